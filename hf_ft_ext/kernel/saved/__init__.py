"""A solved kernel in a folder: `record` (what is written), `training_side`, `model`, and what comes from it again.

`loading` makes trainers and `predictor` plain objects that predict.
"""

from hf_ft_ext.kernel.saved.model import load_model, load_tokenizer, without_report
from hf_ft_ext.kernel.saved.record import (
    COEFFICIENTS,
    FILES,
    NOT_TRAINED,
    SOLUTION,
    TRAINING,
    SavedKernel,
    holds_kernel,
    weights_hash,
)

__all__ = [
    "COEFFICIENTS",
    "FILES",
    "NOT_TRAINED",
    "SOLUTION",
    "TRAINING",
    "SavedKernel",
    "holds_kernel",
    "load_model",
    "load_tokenizer",
    "weights_hash",
    "without_report",
]
