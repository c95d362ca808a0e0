"""Thresholds of multi-label predictions: one for all labels, or for each label the one with the best F1."""

import numpy as np

from hf_ft_ext.errors import InputError
from hf_ft_ext.metrics.outputs import Thresholds, probabilities
from hf_ft_ext.problem_types import MULTI_LABEL

AUTO = "auto"


def parse_threshold(value: str | float) -> float | None:
    """Parse a threshold: a number between 0 and 1, or `auto` -> `None` (chosen on data).

    Raises:
        InputError: another value.
    """
    if value == AUTO:
        return None
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = -1.0
    if not 0 < number < 1:
        raise InputError(f"multi_label_threshold must be between 0 and 1, or {AUTO}, got {value!r}")
    return number


def best_thresholds(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """For each label, the threshold of its probability with the best F1: `[labels]`.

    Candidates are the midpoints between consecutive probabilities in sorted order. Of equally good ones, the nearest
    to 0.5 is taken; a label that no row has gets 0.5. Rows with NaN logits are left out.

    Args:
        logits: `[rows, labels]`.
        labels: 0 and 1, `[rows, labels]`.
    """
    usable = ~np.isnan(np.asarray(logits, dtype=np.float64)).any(axis=1)
    shares, truth = probabilities(logits[usable], MULTI_LABEL), labels[usable] > 0.5
    return np.array([_best(shares[:, i], truth[:, i]) for i in range(labels.shape[1])])


def as_thresholds(chosen: Thresholds | None) -> Thresholds:
    """`chosen`, or 0.5 if it is `None`."""
    return 0.5 if chosen is None else chosen


def _best(shares: np.ndarray, truth: np.ndarray) -> float:
    if not truth.any():
        return 0.5
    order = np.argsort(-shares, kind="stable")
    shares, hits = shares[order], np.cumsum(truth[order])
    last = np.flatnonzero(np.append(shares[:-1] != shares[1:], True))  # last row of each run of equal probabilities
    f1 = 2 * hits[last] / (last + 1 + truth.sum())  # 2 TP / (predicted + true), with rows 0 to `last` predicted
    cuts = (shares[last] + np.append(shares, 0.0)[last + 1]) / 2
    cuts = np.clip(cuts, np.finfo(float).tiny, 1.0)
    best = np.flatnonzero(f1 >= f1.max() - 1e-12)
    return float(cuts[best[np.argmin(np.abs(cuts[best] - 0.5))]])
