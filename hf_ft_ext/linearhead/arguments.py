"""Arguments of `--method linearhead`."""

from dataclasses import dataclass, field
from typing import Any, ClassVar

from hf_ft_ext.arguments import Gradients, MethodTrainingArguments
from hf_ft_ext.errors import InputError

# What steers a training loop, which this method has not.
_OF_A_LOOP = (
    "adam_beta1", "adam_beta2", "adam_epsilon", "auto_find_batch_size", "early_stopping_patience", "eval_strategy",
    "gradient_accumulation_steps", "gradient_checkpointing", "hp_search", "label_smoothing_factor", "learning_rate",
    "load_best_model_at_end", "lr_scheduler_kwargs", "lr_scheduler_type", "max_grad_norm", "max_steps",
    "num_train_epochs", "optim", "optim_args",
    "per_device_train_batch_size", "resume_from_checkpoint", "train_sampling_strategy", "warmup_steps", "weight_decay",
)  # fmt: skip


@dataclass
class LinearHeadTrainingArguments(MethodTrainingArguments):
    """`transformers.TrainingArguments` plus the settings of linear probing.

    Nothing that steers a training loop has an effect: there is none. `per_device_eval_batch_size` is the number of
    rows that the encoder takes at once.

    Raises:
        InputError: a value out of range.
    """

    needs_all_rows: ClassVar[bool] = True

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

    def __post_init__(self):
        super().__post_init__()
        self.max_steps = 1  # what a plan and a progress bar count
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

    def check_given(self, given: dict[str, Any]) -> None:
        for name in _OF_A_LOOP:
            if name in given:
                raise InputError(
                    f"{name}={given[name]} steers a training loop, and method linearhead has none: the head is fitted "
                    "at once; leave it out"
                )
        super().check_given(given)
