"""`Outputs`: predictions and labels of a data set in the form that metrics need, for each problem type."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import numpy as np

from hf_ft_ext.errors import InputError
from hf_ft_ext.problem_types import CLASSIFICATION, MULTI_LABEL, REGRESSION

Thresholds: TypeAlias = float | np.ndarray

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Outputs:
    """Predictions and true labels of some rows.

    Attributes:
        problem_type: `CLASSIFICATION`, `REGRESSION` or `MULTI_LABEL`.
        predictions: class ids `[rows]` (-1 if the logits contain a NaN), 0 and 1 `[rows, labels]`, or numbers
            `[rows]`.
        references: the true values in the same form.
        margins: log-odds of each class or label, `[rows, classes]`, NaN for rows with a NaN logit; a regression has
            no classes.
        logits: logits of the model.
        positive: id of the positive class, if known.
        names: names of the classes by id, if known.
    """

    problem_type: str
    predictions: np.ndarray
    references: np.ndarray
    margins: np.ndarray
    logits: np.ndarray
    positive: int | None = None
    names: tuple[str, ...] | None = None

    def in_order(self, order: Sequence[int]) -> "Outputs":
        """Return the outputs with the classes reordered: class `order[0]` gets id 0, `order[1]` id 1, and so on."""
        order = np.asarray(order)
        new_ids = np.append(np.argsort(order), -1)  # the last entry is the new id of -1
        return replace(
            self,
            predictions=new_ids[self.predictions],
            references=new_ids[self.references],
            margins=self.margins[:, order],
            logits=self.logits[:, order],
            positive=None if self.positive is None else int(new_ids[self.positive]),
            names=None if self.names is None else tuple(self.names[i] for i in order),
        )


def class_margins(logits: np.ndarray) -> np.ndarray:
    """Log-odds of each class against all others, `[rows, classes]`; unlike probabilities they do not saturate at 1.

    `z_i - log sum_(j != i) exp(z_j)`. An infinite logit gives infinity; rows without an order of the classes (NaN, or
    two infinite logits) give NaN.
    """
    logits = logits.astype(np.float64)
    found = np.empty_like(logits)
    with np.errstate(invalid="ignore", over="ignore"):
        for i in range(logits.shape[1]):
            others = np.delete(logits, i, axis=1)
            found[:, i] = logits[:, i] - np.logaddexp.reduce(others, axis=1)
    found[np.isnan(logits).any(axis=1)] = np.nan
    return found


def probabilities(logits: np.ndarray, problem_type: str) -> np.ndarray:
    """Probabilities `[rows, classes]` of logits: softmax over classes, or sigmoid of each label; in float64."""
    from scipy.special import expit, softmax

    logits = np.asarray(logits).astype(np.float64)
    return expit(logits) if problem_type == MULTI_LABEL else softmax(logits, axis=-1)


def problem_of(logits: np.ndarray, labels: np.ndarray) -> str:
    """Infer the problem type from the shapes of logits and labels."""
    if labels.ndim == 2 and labels.shape[1] > 1:
        return MULTI_LABEL
    if logits.size == labels.size and (logits.ndim == 1 or logits.shape[-1] == 1):
        return REGRESSION
    return CLASSIFICATION


def make_outputs(
    name: str,
    problem_type: str,
    logits: np.ndarray,
    labels: np.ndarray,
    thresholds: Thresholds = 0.5,
    positive: int | None = None,
    names: tuple[str, ...] | None = None,
) -> Outputs:
    """Create `Outputs` from logits and labels.

    Args:
        name: of the metric, for messages.
        thresholds: multi-label: a label is predicted if its probability is at least this, one for all labels or
            `[labels]`.

    Raises:
        InputError: logits or labels do not have the shape of the problem type.
    """
    if problem_type == REGRESSION:
        if logits.size != labels.size:
            raise InputError(f"metric '{name}' needs one score per row, but got logits of shape {logits.shape}")
        predicted, truth = (part.reshape(-1).astype(np.float64) for part in (logits, labels))
        return Outputs(problem_type, predicted, truth, np.empty((truth.size, 0)), logits)
    if logits.ndim != 2 or logits.shape[1] < 2:
        raise InputError(f"metric '{name}' needs logits [rows, classes], but got shape {logits.shape}")
    if names is not None and len(names) != logits.shape[1]:
        raise InputError(f"metric '{name}' has {len(names)} label names, but got logits of shape {logits.shape}")
    broken = np.isnan(logits).any(axis=1)
    if broken.any():
        logger.warning("%d of %d rows have NaN logits and count as wrong", int(broken.sum()), len(broken))
    if problem_type == MULTI_LABEL:
        if labels.shape != logits.shape:
            raise InputError(
                f"metric '{name}' needs 0 or 1 for each label, {logits.shape}, but got labels of shape {labels.shape}"
            )
        truth = (labels > 0.5).astype(np.int64)
        predicted = (probabilities(logits, problem_type) >= thresholds).astype(np.int64)
        predicted[broken] = 1 - truth[broken]
        return Outputs(problem_type, predicted, truth, logits.astype(np.float64), logits, None, names)
    if labels.size != len(logits):
        raise InputError(f"metric '{name}' needs one class per row, but got labels of shape {labels.shape}")
    predicted = np.where(broken, -1, logits.argmax(axis=1))
    return Outputs(problem_type, predicted, labels.reshape(-1), class_margins(logits), logits, positive, names)
