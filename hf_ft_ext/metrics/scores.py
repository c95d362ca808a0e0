"""Scores by the names of scikit-learn's scorers: F1, precision, recall, areas under curves, averages over classes.

An undefined score is 0.0, and rows with NaN logits count as wrong, as for the GLUE metrics. As in scikit-learn,
averages are over the classes that occur in the true labels or the predictions. Higher is better.
"""

import logging
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from hf_ft_ext.metrics.outputs import Outputs
from hf_ft_ext.problem_types import CLASSIFICATION, MULTI_LABEL

_BOTH = (CLASSIFICATION, MULTI_LABEL)

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Score:
    """One row of `SCORES`.

    Attributes:
        compute: returns the score of outputs.
        problem_types: problem types for which it is defined.
        positive: whether it needs a positive class.
    """

    compute: Callable[[Outputs], float]
    problem_types: tuple[str, ...]
    positive: bool = False


def _positive_score(kind: str) -> Callable[[Outputs], float]:
    def compute(outputs: Outputs) -> float:
        truth, predicted = outputs.references == outputs.positive, outputs.predictions == outputs.positive
        return _sklearn(f"{kind}_score", truth, predicted, average="binary", zero_division=0.0)

    return compute


def _averaged(kind: str, average: str) -> Callable[[Outputs], float]:
    def compute(outputs: Outputs) -> float:
        settings = {"average": average, "zero_division": 0.0}
        if outputs.problem_type == CLASSIFICATION:
            occurring = np.union1d(outputs.references, outputs.predictions)
            settings["labels"] = occurring[occurring >= 0]  # -1 is a row without a prediction, not a class
        return _sklearn(f"{kind}_score", outputs.references, outputs.predictions, **settings)

    return compute


def _balanced_accuracy(outputs: Outputs) -> float:
    right = outputs.predictions == outputs.references
    return float(np.mean([right[outputs.references == i].mean() for i in np.unique(outputs.references)]))


def _subset_accuracy(outputs: Outputs) -> float:
    return float(np.mean((outputs.predictions == outputs.references).all(axis=1)))


def _roc_auc(outputs: Outputs) -> float:
    """Area under the ROC curve; for more than two classes or several labels, the mean of each against the rest."""
    return _area(outputs, "roc_auc_score")


def _average_precision(outputs: Outputs) -> float:
    if outputs.problem_type == MULTI_LABEL:
        return _area(outputs, "average_precision_score")
    truth = outputs.references == outputs.positive
    return _ranking_score("average_precision_score", truth, outputs.margins[:, outputs.positive])


def _area(outputs: Outputs, function: str) -> float:
    count = outputs.margins.shape[1]
    if outputs.problem_type == MULTI_LABEL:
        truths = list(outputs.references.T == 1)
    else:
        truths = [outputs.references == i for i in range(count)]
    columns = [1] if outputs.problem_type == CLASSIFICATION and count == 2 else range(count)
    defined = [i for i in columns if truths[i].any() and not truths[i].all()]
    if not defined:
        logger.warning("%s is not defined if all rows are of one class: it is set to 0.", function)
    return float(np.mean([_ranking_score(function, truths[i], outputs.margins[:, i]) for i in defined] or [0.0]))


def _ranking_score(function: str, truth: np.ndarray, margins: np.ndarray) -> float:
    """A score of the order of rows by margin; a row without a margin (NaN) is put at the wrong end."""
    if not truth.any() or truth.all():
        return 0.0
    margins = np.where(np.isnan(margins), np.where(truth, -np.inf, np.inf), margins)
    return _sklearn(function, truth, np.unique(margins, return_inverse=True)[1])  # ranks, as infinity is refused


def _sklearn(function: str, *arrays: np.ndarray, **settings) -> float:
    import sklearn.metrics

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about undefined scores
        return float(np.nan_to_num(getattr(sklearn.metrics, function)(*arrays, **settings)))


SCORES: dict[str, Score] = {
    **{kind: Score(_positive_score(kind), (CLASSIFICATION,), True) for kind in ("f1", "precision", "recall")},
    **{
        f"{kind}_{average}": Score(_averaged(kind, average), _BOTH)
        for kind in ("f1", "precision", "recall")
        for average in ("macro", "micro", "weighted")
    },
    "balanced_accuracy": Score(_balanced_accuracy, (CLASSIFICATION,)),
    "roc_auc": Score(_roc_auc, _BOTH),
    "average_precision": Score(_average_precision, _BOTH, True),
    "f1_samples": Score(_averaged("f1", "samples"), (MULTI_LABEL,)),
    "subset_accuracy": Score(_subset_accuracy, (MULTI_LABEL,)),
}
MULTI_LABEL_METRICS = ("f1_micro", "f1_macro", "subset_accuracy")  # defaults; the first selects the best model
