"""The base class of all methods' trainers: completed arguments, checks before training, search trials."""

import contextlib
import copy
import inspect
from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any, ClassVar, get_args, get_type_hints

import torch
from torch import nn
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments, Trainer, TrainingArguments
from transformers.trainer_pt_utils import LabelSmoother
from transformers.trainer_utils import BestRun, EvalLoopOutput, HPSearchBackend, TrainOutput, default_compute_objective

from hf_ft_ext.arguments import MethodTrainingArguments, own_fields
from hf_ft_ext.errors import InputError, did_you_mean
from hf_ft_ext.label_tokens import label_tokens, predicts_next_tokens, with_a_label
from hf_ft_ext.per_example.state import dtypes_kept, forget_preparation
from hf_ft_ext.training.by_name import load_by_name
from hf_ft_ext.training.checks import check_loss, check_training_arguments, refuse_compiled
from hf_ft_ext.training.loss_scale import ignores_count, is_unscaled, one_answer
from hf_ft_ext.training.saved.saving import checkpoint_to_resume
from hf_ft_ext.training.sft import asks_for_routers, fit_sft, is_sft
from hf_ft_ext.training.weights.placement import check_placement, declare_offloaded
from hf_ft_ext.training.weights.quantized import quantized_base

_PACKAGE = __name__.partition(".")[0]
DATA_LOADING = ("get_train_dataloader", "_get_dataloader")  # hooks that decide what a training batch is
SAMPLING = (*DATA_LOADING, "_get_train_sampler")

# Arguments that configure `Trainer`'s optimizer, unless the optimizer's class and settings are passed.
_OPTIMIZER_ARGUMENTS = ("adam_beta1", "adam_beta2", "adam_epsilon", "learning_rate", "optim", "optim_args")


class MethodTrainer(Trainer):
    """Base class of the trainers: completes and checks the arguments, and prepares each model for the method.

    It can be combined with other subclasses of `Trainer`: in `class X(SparseTrainer, SFTTrainer)` all arguments are
    passed on to the next class.

    Attributes:
        arguments_class: the dataclass of the method's arguments.
        no_optimizer: why the trainer cannot take a ready-made optimizer; `None` if it can.
        no_optimizer_class: whether it cannot take `optimizer_cls_and_kwargs` either.
        several_devices: whether it can train a model that `device_map` spreads over several accelerators.
        offloaded_models: whether it can train a model of which `device_map` keeps parts in memory or on disk.

    Raises:
        InputError: arguments or objects that the method cannot honour.
    """

    arguments_class: ClassVar[type[MethodTrainingArguments]]
    no_optimizer: ClassVar[str | None] = None
    no_optimizer_class: ClassVar[bool] = False
    several_devices: ClassVar[bool] = False
    offloaded_models: ClassVar[bool] = False
    _loss_scale_known = False

    def __init__(
        self, model: nn.Module | str | None = None, args: TrainingArguments | None = None, *positional, **kwargs
    ):
        args = self._complete(args)
        self.args = args
        passed = self._named_arguments(model, args, positional, kwargs)
        optimizer, scheduler = passed.get("optimizers") or (None, None)
        self._check_optimizers(optimizer, scheduler, passed.get("optimizer_cls_and_kwargs"))
        if optimizer is not None and passed.get("model_init") is not None:
            raise InputError(
                "optimizers: model_init makes a new model for each training, whose parameters an optimizer made "
                "before does not hold; pass optimizer_cls_and_kwargs"
            )
        self.check_passed(passed)
        self.check_arguments()
        if isinstance(model, str):
            model = load_by_name(model, args)
            if getattr(args, "model_init_kwargs", None) is not None:
                self.args = args = copy.copy(args)
                args.model_init_kwargs = None  # already applied; trl warns if they are set beside a loaded model
        if model is not None:
            refuse_compiled(model)
            check_loss(args, model)
            declare_offloaded(model)
            model = self.prepare_model(model)
        routers = asks_for_routers(model)
        with quantized_base(model):
            super().__init__(model, args, *positional, **kwargs)
        if predicts_next_tokens(self.model):
            # transformers goes by `model.loss_type`, which GPT-2, CTRL and others (`...LMHeadModel`) do not have, and
            # would divide their loss by a count that includes the first token of each row.
            self._loss_shifts_labels = True
        if is_sft(self):
            fit_sft(self, routers)
        self._check_optimizers(self.optimizer, self.lr_scheduler, self.optimizer_cls_and_kwargs)
        self.apply_arguments()

    # --- hooks of the methods -----------------------------------------------------------------------

    def check_arguments(self) -> None:
        """Refuse values of `self.args` that this trainer cannot honour. Called again for each trial of a search.

        Raises:
            InputError: there is such a value.
        """
        self.args.validate()
        check_training_arguments(self.args)

    def check_passed(self, passed: Mapping[str, Any]) -> None:
        """Refuse other arguments of the constructor that the method cannot honour.

        Args:
            passed: the arguments beside model and training arguments, by name.

        Raises:
            InputError: there is such an argument.
        """
        if passed.get("peft_config") is not None:  # trl's: it would freeze what the method trains
            raise InputError(
                f"peft_config wraps the model once more, after {type(self).__name__} has made it ready; leave it out, "
                "or take FullTrainer without peft and fix_layers"
            )

    def prepare_model(self, model: nn.Module) -> nn.Module:
        """Prepare a model for the method by `self.args`: the model passed, and each one that `model_init` returns."""
        return model

    def apply_arguments(self) -> None:
        """Apply `self.args` to the trainer: at construction, and again for each trial of a search."""
        smoothing = self.args.label_smoothing_factor
        self.label_smoother = LabelSmoother(epsilon=smoothing) if smoothing else None
        self.neftune_noise_alpha = self.args.neftune_noise_alpha

    # --- the loss -------------------------------------------------------------------------------------

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, Any]:
        """As in `Trainer`, but 0 for a batch without a label token, whose mean loss would be NaN.

        A model whose loss ignores `num_items_in_batch` takes the mean over a micro-batch, which `Trainer` then divides
        by the number of micro-batches.
        """
        self._check_loss_scale(model, inputs, num_items_in_batch)
        if not self.model_accepts_loss_kwargs and self.compute_loss_func is None:
            num_items_in_batch = None  # counted before the check, for all micro-batches of its step
        if label_tokens(inputs, predicts_next_tokens(self.accelerator.unwrap_model(model))) != 0:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        found = super().compute_loss(model, with_a_label(inputs), return_outputs)
        return (0 * found[0], found[1]) if return_outputs else 0 * found

    def _check_loss_scale(self, model: nn.Module, inputs: Mapping[str, Any], count: torch.Tensor | int | None) -> None:
        """Find out with the first batch whether the model divides its loss by the label count of the whole step."""
        args = self.args
        replaced = self.compute_loss_func is not None or self.label_smoother is not None
        if self._loss_scale_known or replaced or count is None or not self.model_accepts_loss_kwargs:
            return
        if "labels" not in inputs or (args.gradient_accumulation_steps == 1 and args.world_size == 1):
            return
        ignored = ignores_count(self.accelerator.unwrap_model(model, keep_torch_compile=False), inputs, count)
        ignored = one_answer(self.accelerator, ignored)
        self._loss_scale_known = ignored is not None
        if ignored:
            self.model_accepts_loss_kwargs = False

    def training_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        num_items_in_batch: torch.Tensor | int | None = None,
        *positional,
        **kwargs,
    ) -> torch.Tensor:
        """As in `Trainer`; the first step finds out how a user's `compute_loss` is scaled."""
        self._check_own_loss_scale(inputs, num_items_in_batch)
        return super().training_step(model, inputs, num_items_in_batch, *positional, **kwargs)

    def _check_own_loss_scale(self, inputs: Mapping[str, Any], count: torch.Tensor | int | None) -> None:
        """Find out whether a user's `compute_loss` divides by the label count of the whole step.

        Otherwise it is a mean over a micro-batch, and `Trainer` has to divide it by their number.
        """
        args = self.args
        if self.loss_is_scaled_for_ga is not None or count is None or not overridden(self, "compute_loss"):
            return
        if is_sft(self) or (args.gradient_accumulation_steps == 1 and args.world_size == 1):
            return
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        batch = self._prepare_inputs(inputs)

        def loss(n: torch.Tensor | int) -> torch.Tensor:
            return self.compute_loss(model, dict(batch), num_items_in_batch=n)

        unscaled = one_answer(self.accelerator, is_unscaled(loss, model, count))
        if unscaled is not None:
            self.loss_is_scaled_for_ga = not unscaled

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> torch.Tensor | int | None:
        """As in `Trainer`, and also for a user's `compute_loss` if the model's own loss ignores the count.

        With several processes, such a loss gets no count: it would have to multiply by their number.
        """
        accepts = self.model_accepts_loss_kwargs
        own = overridden(self, "compute_loss") and self.args.world_size == 1
        self.model_accepts_loss_kwargs = accepts or own
        try:
            return super()._get_num_items_in_batch(batch_samples, device)
        finally:
            self.model_accepts_loss_kwargs = accepts

    def evaluation_loop(self, *positional, **kwargs) -> EvalLoopOutput:
        # trl averages over all forward passes in evaluation mode since its last log, also those of a pre-pass.
        getattr(self, "_metrics", {}).get("eval", {}).clear()
        # transformers converts the model in place for these, and would save it and train on in 16 bits.
        converts = (self.args.bf16_full_eval or self.args.fp16_full_eval) and not self.is_in_train
        with dtypes_kept(self.model) if converts else contextlib.nullcontext():
            return super().evaluation_loop(*positional, **kwargs)

    # --- models and trials ----------------------------------------------------------------------------

    def call_model_init(self, trial: Any = None) -> nn.Module:
        model = super().call_model_init(trial)
        refuse_compiled(model)
        check_loss(self.args, model)
        declare_offloaded(model)
        model = self.prepare_model(model)
        self._let_inputs_require_gradients(model)
        return model

    def _let_inputs_require_gradients(self, model: Any) -> None:
        """Let gradients reach layers that are checkpointed with `use_reentrant` and follow frozen ones.

        Such a layer passes gradients on only if its inputs require them. transformers sees to it for texts only.
        """
        reentrant = (self.args.activation_checkpointing_kwargs or {}).get("use_reentrant")
        other_inputs = getattr(model, "main_input_name", "input_ids") != "input_ids"
        if self.args.activation_checkpointing and reentrant and other_inputs:
            model.enable_input_require_grads()

    def train(
        self, resume_from_checkpoint: str | bool | None = None, trial: Any = None, *positional, **kwargs
    ) -> TrainOutput:
        checkpoint_to_resume(resume_from_checkpoint, self.args.output_dir)
        check_placement(self.model, self.several_devices, offloaded_too=self.offloaded_models)
        self.apply_trial(trial)
        self._let_inputs_require_gradients(self.model)
        if self.args.world_size > 1 and self.model_wrapped is self.model:
            forget_preparation(self.model)  # by an evaluation: accelerate would not share the gradients
        return super().train(resume_from_checkpoint, trial, *positional, **kwargs)

    def hyperparameter_search(
        self, hp_space: Callable | None = None, compute_objective: Callable | None = None, *positional, **kwargs
    ) -> BestRun | list[BestRun]:
        return super().hyperparameter_search(hp_space, compute_objective or _sum_of_metrics, *positional, **kwargs)

    def apply_trial(self, trial: Any) -> None:
        """Set the values of a search trial in `self.args` before the model is created from them.

        `Trainer` sets them only after it has created the trial's model, which would then use the previous trial's
        values.

        Raises:
            InputError: a value or a combination that cannot work, or a name that is not an argument.
        """
        if trial is None or self.hp_search_backend is None:
            return
        if self.hp_search_backend == HPSearchBackend.OPTUNA:
            self._check_searched(self.hp_space(trial))  # optuna returns the same values on each call for a trial
        self._hp_search_setup(trial)
        self.check_arguments()
        self.apply_arguments()

    def _check_searched(self, values: Mapping[str, Any]) -> None:
        for name in values:
            if not hasattr(self.args, name):
                raise InputError(
                    f"hp_space searches over {name!r}, and {type(self.args).__name__} has no such argument"
                    f"{did_you_mean(name, vars(self.args))}"
                )
            if name in _OPTIMIZER_ARGUMENTS and self.optimizer_cls_and_kwargs is not None:
                raise InputError(
                    f"a search over {name} would compare equal trials: optimizer_cls_and_kwargs brings its own "
                    "settings; leave it out, and choose the optimizer by optim"
                )

    # --- what was passed ------------------------------------------------------------------------------

    def _complete(self, args: TrainingArguments | None) -> MethodTrainingArguments:
        wanted = _arguments_of_other_trainers(type(self))
        if wanted is None or isinstance(args, wanted):
            return self.arguments_class.complete(args)
        # Another Trainer in the bases needs arguments of its own class: build these from the values given.
        own = self.arguments_class.complete(args)
        theirs = wanted(**{name: value for name, value in vars(own).items() if name in _init_names(wanted)})
        for name in vars(own).keys() - vars(theirs).keys():
            setattr(theirs, name, getattr(own, name))
        completed = type(own).complete(theirs)
        for f in own_fields(self.arguments_class):  # also where the value is the other library's default
            setattr(completed, f.name, getattr(own, f.name))
        return completed

    def _named_arguments(self, model: Any, args: Any, positional: tuple, kwargs: dict) -> dict[str, Any]:
        """All arguments passed, by the parameter names of the next class in the method resolution order."""
        signature = inspect.signature(super().__init__)
        bound = signature.bind_partial(model, args, *positional).arguments if positional else {}
        return {**bound, **kwargs}

    def _check_optimizers(self, optimizer: Any, scheduler: Any, factory: Any) -> None:
        name = type(self).__name__
        if self.no_optimizer is not None:
            if optimizer is not None or scheduler is not None:
                raise InputError(f"{name} {self.no_optimizer}; leave `optimizers` out")
            if factory is not None and self.no_optimizer_class:
                raise InputError(f"{name} {self.no_optimizer}; leave `optimizer_cls_and_kwargs` out")
        elif scheduler is not None and getattr(scheduler, "optimizer", optimizer) is not optimizer:
            raise InputError(
                "optimizers: the scheduler steers another optimizer than the one that trains; pass both, or use "
                "lr_scheduler_type"
            )


def overridden(trainer: Trainer, *names: str) -> bool:
    """Whether code outside `Trainer` and this package overrides one of these methods of `trainer`."""
    for name in names:
        if name in vars(trainer):
            return True
        for kind in type(trainer).__mro__:
            if kind is Trainer:
                break
            if name in vars(kind) and kind.__module__.partition(".")[0] != _PACKAGE:
                return True
    return False


def has_own_loss(trainer: Trainer) -> bool:
    """Whether the user replaced the loss, so that only `compute_loss` can compute it."""
    return overridden(trainer, "compute_loss") or trainer.compute_loss_func is not None


def loss_of_batch(trainer: Trainer, model: nn.Module, batch: Mapping[str, Any]) -> torch.Tensor:
    """The loss of one batch by itself, for code outside of training steps; no other process takes part.

    A user's loss gets the count of the batch's own labels, as `Trainer` passes a count to it in each step.
    """
    if not has_own_loss(trainer):
        return trainer.compute_loss(model, dict(batch))
    args = trainer.args
    across, args.average_tokens_across_devices = args.average_tokens_across_devices, False
    try:
        count = trainer._get_num_items_in_batch([batch], args.device)
        return trainer.compute_loss(model, dict(batch), num_items_in_batch=count)
    finally:
        args.average_tokens_across_devices = across


def _sum_of_metrics(metrics: dict[str, float]) -> float:
    """transformers' default objective, without the preparation time that it would count as a metric."""
    return default_compute_objective({k: v for k, v in metrics.items() if not k.endswith("_model_preparation_time")})


def _arguments_of_other_trainers(kind: type) -> type[TrainingArguments] | None:
    """The arguments class that another Trainer among the bases of `kind` requires, or `None`."""
    for base in kind.__mro__:
        if base is Trainer or base.__module__.partition(".")[0] == _PACKAGE or "__init__" not in vars(base):
            continue
        if base is Seq2SeqTrainer:
            return Seq2SeqTrainingArguments  # its signature annotates the base class only
        try:
            hint = get_type_hints(vars(base)["__init__"]).get("args")
        except (NameError, TypeError):  # an annotation that cannot be read at run time
            continue
        for candidate in (hint, *get_args(hint)):
            own = isinstance(candidate, type) and issubclass(candidate, TrainingArguments)
            if own and candidate is not TrainingArguments and not issubclass(candidate, MethodTrainingArguments):
                return candidate
    return None


def _init_names(kind: type[TrainingArguments]) -> set[str]:
    return {f.name for f in fields(kind) if f.init}
