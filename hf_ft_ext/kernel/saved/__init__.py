"""A solved kernel in a folder: `record` reads and writes the files, `training_data` and `model` their parts.

`loading` makes a trainer from a folder, and `predictor` a plain object that predicts.
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
