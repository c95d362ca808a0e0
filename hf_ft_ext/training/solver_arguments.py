"""`SolverTrainingArguments`: for tasks solved in one call. Arguments of a training loop are refused."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

from hf_ft_ext.arguments import MethodTrainingArguments
from hf_ft_ext.arguments.completion import chosen
from hf_ft_ext.errors import InputError
from hf_ft_ext.moved import former_classes

# Arguments that configure a training loop, its evaluations or its checkpoints.
_LOOP_ARGUMENTS = (
    "activation_checkpointing", "adam_beta1", "adam_beta2", "adam_epsilon", "auto_find_batch_size",
    "dataloader_drop_last", "early_stopping_patience", "eval_delay", "eval_on_start", "eval_steps", "eval_strategy",
    "gradient_accumulation_steps", "gradient_checkpointing", "hp_search", "ignore_data_skip", "label_smoothing_factor",
    "learning_rate", "load_best_model_at_end", "lr_scheduler_kwargs", "lr_scheduler_type", "max_grad_norm",
    "max_steps", "metric_for_best_model", "neftune_noise_alpha", "num_train_epochs", "optim", "optim_args",
    "optim_target_modules", "resume_from_checkpoint", "save_only_model", "save_steps",
    "save_strategy", "save_total_limit", "train_sampling_strategy", "warmup_steps", "weight_decay",
)  # fmt: skip
_ONE_STEP = 1  # the step count that the training plan and the progress bar show
# Values that are allowed because they match what the method does anyway.
_ALLOWED_VALUES = {
    "early_stopping_patience": (0,),
    "eval_strategy": ("no",),
    "hp_search": (0,),
    "max_steps": (_ONE_STEP,),
    "save_strategy": ("no",),
}


@dataclass
class SolverTrainingArguments(MethodTrainingArguments):
    """Base class of the arguments of methods without a training loop.

    Attributes:
        instead_of_steps: what the method does instead of a training loop, for error messages.
        also_without_effect: further arguments that the method cannot honour.

    Raises:
        InputError: an argument of a training loop was set.
    """

    needs_all_rows: ClassVar[bool] = True
    instead_of_steps: ClassVar[str] = "this method has none"
    also_without_effect: ClassVar[tuple[str, ...]] = ()

    @property
    def rows_per_pass(self) -> int:
        """Maximum rows of a forward pass: the evaluation batch size, or the training batch size if set and smaller.

        It changes memory and speed, not the result.
        """
        if chosen(self, "per_device_train_batch_size"):
            return min(self.per_device_train_batch_size, self.per_device_eval_batch_size)
        return self.per_device_eval_batch_size

    def validate(self) -> None:
        names = (*_LOOP_ARGUMENTS, *self.also_without_effect)
        self._refuse({name: getattr(self, name) for name in names if chosen(self, name)})
        self.max_steps = _ONE_STEP

    def check_given(self, given: dict[str, Any]) -> None:
        self._refuse(given)
        super().check_given(given)

    def refuse_names(self, names: Iterable[str]) -> None:
        """Refuse a hyperparameter search over arguments without effect.

        Raises:
            InputError: `names` holds such an argument.
        """
        for name in names:
            if name in _LOOP_ARGUMENTS or name in self.also_without_effect:
                raise InputError(
                    f"a search over {name} would compare equal trials: it steers a training loop, and "
                    f"{self.instead_of_steps}; search over the method's own arguments, by hp_space"
                )

    def _refuse(self, values: dict[str, Any]) -> None:
        for name in (*_LOOP_ARGUMENTS, *self.also_without_effect):
            if name not in values:
                continue
            value = getattr(values[name], "value", values[name])
            if value is None or value is False or value in _ALLOWED_VALUES.get(name, ()):
                continue
            raise InputError(f"{name}={value} steers a training loop, and {self.instead_of_steps}; leave it out")


__getattr__ = former_classes(__name__, AtOnceTrainingArguments=SolverTrainingArguments)
