"""Arguments of `--method linearhead`."""

from dataclasses import dataclass, field
from typing import ClassVar

from hf_ft_ext.arguments import FeatureCacheArguments, Gradients
from hf_ft_ext.arguments.completion import chosen
from hf_ft_ext.errors import InputError
from hf_ft_ext.training.solver_arguments import SolverTrainingArguments


@dataclass
class LinearHeadTrainingArguments(FeatureCacheArguments, SolverTrainingArguments):
    """`transformers.TrainingArguments` plus the settings of linear probing.

    Arguments of a training loop are refused, because there is none. A forward pass of the encoder takes
    `per_device_eval_batch_size` rows, or `per_device_train_batch_size` if that is set and smaller.

    Raises:
        InputError: a value out of range.
    """

    instead_of_steps: ClassVar[str] = "method linearhead has none: the head is fitted at once"

    linearhead_c: float | None = field(
        default=None,
        metadata={
            "help": "Inverse regularization strength, above 0, for features scaled to variance 1; none = chosen by "
            "cross-validation (in regression, by leave-one-out)."
        },
    )
    linearhead_folds: int = field(default=5, metadata={"help": "Folds of the cross-validation, 2 or more."})
    linearhead_max_iter: int = field(
        default=1000, metadata={"help": "Largest number of iterations of the logistic regression's solver."}
    )

    def validate(self) -> None:
        super().validate()
        if self.linearhead_c is not None and not 0 < self.linearhead_c < float("inf"):
            raise InputError(
                f"linearhead_c must be above 0 and finite, got {self.linearhead_c}; pass a value such as 1"
            )
        if self.linearhead_folds < 2:
            raise InputError(f"linearhead_folds must be 2 or more, got {self.linearhead_folds}")
        if self.linearhead_c is not None and chosen(self, "linearhead_folds"):
            raise InputError(
                f"linearhead_folds={self.linearhead_folds} is for the cross-validation that chooses linearhead_c, and "
                f"linearhead_c={self.linearhead_c} is given; leave one of them out"
            )
        if self.linearhead_max_iter < 1:
            raise InputError(
                f"linearhead_max_iter must be 1 or more, got {self.linearhead_max_iter}; pass a value such as 1000"
            )

    @property
    def gradients(self) -> Gradients:
        return Gradients.NONE
