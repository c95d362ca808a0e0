"""Arguments of `--method linearhead`."""

from dataclasses import dataclass, field
from typing import ClassVar

from hf_ft_ext.arguments import Gradients
from hf_ft_ext.errors import InputError
from hf_ft_ext.training.at_once_arguments import AtOnceTrainingArguments


@dataclass
class LinearHeadTrainingArguments(AtOnceTrainingArguments):
    """`transformers.TrainingArguments` plus the settings of linear probing.

    What steers a training loop is refused: there is none. The encoder takes `per_device_eval_batch_size` rows at
    once, or `per_device_train_batch_size` if that is set and smaller.

    Raises:
        InputError: a value out of range.
    """

    instead_of_steps: ClassVar[str] = "method linearhead has none: the head is fitted at once"

    linearhead_c: float | None = field(
        default=None,
        metadata={
            "help": "Inverse regularisation strength, above 0, for features scaled to variance 1; none = chosen by "
            "cross-validation (numbers: by leaving each row out)."
        },
    )
    linearhead_folds: int = field(default=5, metadata={"help": "Parts of the cross-validation, 2 or more."})
    linearhead_max_iter: int = field(
        default=1000, metadata={"help": "Most iterations of the logistic regression's solver."}
    )
    feature_cache_gb: float = field(
        default=4.0,
        metadata={
            "help": "What the head reads is kept on disk if it takes no more than this many GB; 0 = in memory only."
        },
    )
    feature_cache_dir: str | None = field(
        default=None, metadata={"help": "Where features are kept; none = beside the Hub's cache."}
    )

    def validate(self) -> None:
        super().validate()
        if self.linearhead_c is not None and not 0 < self.linearhead_c < float("inf"):
            raise InputError(f"linearhead_c={self.linearhead_c} is no strength; pass a number above 0, such as 1")
        if self.linearhead_folds < 2:
            raise InputError(f"linearhead_folds={self.linearhead_folds} leaves no row out; pass 2 or more")
        if self.linearhead_max_iter < 1:
            raise InputError(
                f"linearhead_max_iter={self.linearhead_max_iter} lets the solver do nothing; pass 100, say"
            )
        if not self.feature_cache_gb >= 0:
            raise InputError(f"feature_cache_gb={self.feature_cache_gb} is below 0; pass 0 or more")

    @property
    def gradients(self) -> Gradients:
        return Gradients.NONE
