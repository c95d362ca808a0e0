"""`SolverTrainer`: the base class of trainers that solve the task in one call, without training steps."""

import time
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import torch
from torch import nn
from transformers import EarlyStoppingCallback
from transformers.trainer_utils import TrainOutput, set_seed, speed_metrics

from hf_ft_ext.errors import InputError
from hf_ft_ext.features.rows import LABELS, SAMPLE, data_and_collator, stacked_labels
from hf_ft_ext.moved import former_classes
from hf_ft_ext.training.checks import refuse_label_names
from hf_ft_ext.training.generators import generators_kept
from hf_ft_ext.training.method_trainer import DATA_LOADING, MethodTrainer, overridden
from hf_ft_ext.training.saved.saving import CompleteSaves
from hf_ft_ext.training.weights.devices import refuse_data_parallel
from hf_ft_ext.training.weights.placement import check_placement
from hf_ft_ext.training.weights.precision import refuse_fp16_on_cpu
from hf_ft_ext.training.weights.quantized import move
from hf_ft_ext.training.weights.sharding import refuse_sharding

# Hooks of a training loop. A subclass that overrides one expects a call that never comes, so an override is refused.
_HOOKS = (
    *DATA_LOADING, "_get_train_sampler", "compute_loss", "create_optimizer", "create_optimizer_and_scheduler",
    "create_scheduler", "training_step",
)  # fmt: skip


class SolverTrainer(CompleteSaves, MethodTrainer):
    """`transformers.Trainer` whose `train()` calls `solve` once instead of taking steps.

    Callbacks see one step. There is no optimizer and there are no checkpoints.

    Args:
        model, args and all others: as for `Trainer`.

    Attributes:
        solution: what `train()` computes, with its article ("a linear head"), for error messages.
        start_over: what to do instead of resuming, for error messages.

    Raises:
        InputError: an optimizer, a loss function or early stopping was passed, a hook of the training loop is
            overridden, the parameters are sharded, or one process uses several GPUs. `train` also raises it for a
            checkpoint to resume from, for missing training data and for a stream.
    """

    solution: ClassVar[str]
    start_over: ClassVar[str] = "start a new run"
    no_optimizer = "solves the task at once and takes no steps"
    no_optimizer_class = True

    def check_arguments(self) -> None:
        refuse_sharding(self.args, self.solution)
        super().check_arguments()
        refuse_label_names(self.args)
        for name in _HOOKS:
            if overridden(self, name):
                raise InputError(
                    f"{type(self).__name__} overrides {name}, which belongs to a training loop, and {self.solution} "
                    "is found without one; leave it out, or use a trainer that takes steps"
                )

    def apply_arguments(self) -> None:
        super().apply_arguments()
        refuse_fp16_on_cpu(self.accelerator)
        refuse_data_parallel(self.args)

    def check_passed(self, passed: Mapping[str, Any]) -> None:
        super().check_passed(passed)
        if passed.get("compute_loss_func") is not None:
            raise InputError(f"{self.solution} is found without your compute_loss_func; leave it out")
        self._refuse_early_stopping(passed.get("callbacks") or ())

    def _refuse_early_stopping(self, callbacks: Iterable[Any]) -> None:
        if any(c is EarlyStoppingCallback or isinstance(c, EarlyStoppingCallback) for c in callbacks):
            raise InputError(
                f"EarlyStoppingCallback compares evaluations in training, and {self.solution} is found at once; leave "
                "it out"
            )

    def _check_searched(self, values: Mapping[str, Any]) -> None:
        super()._check_searched(values)
        self.args.refuse_names(values)

    def solve(self) -> dict[str, float]:
        """Solve the task on `train_dataset`; return the metrics, including `train_loss`."""
        raise NotImplementedError

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
        **kwargs,
    ) -> TrainOutput:
        """Solve the task; return what `Trainer.train` returns.

        Raises:
            InputError: see the class.
        """
        if resume_from_checkpoint not in (None, False):
            raise InputError(
                f"resume_from_checkpoint={resume_from_checkpoint!r}: {self.solution} is found at once and leaves no "
                f"checkpoint; {self.start_over}"
            )
        if self.train_dataset is None or not hasattr(self.train_dataset, "__len__"):
            raise InputError(f"{self.solution} needs a training data set of known length; pass train_dataset")
        self._refuse_early_stopping(self.callback_handler.callbacks)
        check_placement(self.model, self.several_devices)
        self._check_rows()
        self.is_in_train = True
        self.apply_trial(trial)
        if self.model_init is not None:
            set_seed(self.args.seed)
            self.model = self.model_wrapped = self.call_model_init(trial)
        move(self.model, self.args.device)
        self.state.max_steps = self.args.max_steps
        self.control = self.callback_handler.on_train_begin(self.args, self.state, self.control)
        start = time.time()
        self.control = self.callback_handler.on_step_begin(self.args, self.state, self.control)
        metrics = self.solve()
        self.state.global_step, self.state.epoch = 1, 1.0
        self.callback_handler.train_dataloader = self.get_train_dataloader()
        self.control = self.callback_handler.on_step_end(self.args, self.state, self.control)
        metrics = {**speed_metrics("train", start, num_samples=len(self.train_dataset)), **metrics, "epoch": 1.0}
        self.is_in_train = False
        self.log(metrics)
        self.control = self.callback_handler.on_train_end(self.args, self.state, self.control)
        return TrainOutput(1, metrics["train_loss"], metrics)

    def _check_rows(self) -> None:
        """Check that data set and collator are deterministic, and that the collator keeps the labels of the data set.

        `solve` reads each row's inputs once, through the collator, and the labels from the data set itself.

        Raises:
            InputError: two readings give different inputs, or the collator changes the labels.
        """
        dataset, collate = data_and_collator(self, self.train_dataset)
        places = range(min(SAMPLE, len(dataset)))
        with generators_kept():
            rows, again = ([dataset[i] for i in places] for _ in range(2))
            first, same_rows, read_again = collate(rows), collate(rows), collate(again)
        name = getattr(self.data_collator, "__name__", type(self.data_collator).__name__)
        for source, second in ((f"data_collator {name}", same_rows), ("train_dataset", read_again)):
            for key, value in first.items():
                if not _same(value, second[key]):
                    raise InputError(
                        f"{source} gives different {key} for the same rows each time, and {self.solution} reads every "
                        "row once; pass one that does not draw at random"
                    )
        if LABELS in first and (LABELS in rows[0] or "label" in rows[0]):
            try:
                own = stacked_labels([row.get(LABELS, row.get("label")) for row in rows])
            except (RuntimeError, TypeError, ValueError) as error:  # rows of several lengths, or no numbers
                raise InputError(
                    f"the labels of rows have different shapes, as those of tokens do, and {self.solution} is fitted "
                    "to one label per row, or 0 or 1 for each of the labels; use a trainer that takes steps"
                ) from error
            if not _same(own.double().flatten(), torch.as_tensor(first[LABELS]).double().flatten()):
                raise InputError(
                    f"data_collator {name} changes the labels of the data set, and {self.solution} is fitted to "
                    "the unchanged ones; put the changed labels into the data set"
                )

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        raise InputError(f"{self.solution} has no optimizer: call train(), which solves the task")


__getattr__ = former_classes(__name__, AtOnceTrainer=SolverTrainer)


def _same(value: Any, other: Any) -> bool:
    """Whether two arrays are equal; a NaN (refused later, by its name) equals a NaN."""
    value, other = torch.as_tensor(value), torch.as_tensor(other)
    if value.shape != other.shape:
        return False
    return bool(((value == other) | ((value != value) & (other != other))).all())
