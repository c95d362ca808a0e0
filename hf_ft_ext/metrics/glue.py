"""The GLUE metrics as `evaluate.Metric` classes that download nothing.

An undefined score is 0.0, the value of a model that has learnt nothing, so that one bad evaluation never becomes the
best checkpoint:

- `matthews_correlation` is 0.0 if predictions or references contain one class only.
- `f1` is 0.0 if neither contains the positive class.
- `pearson` and `spearmanr` are 0.0 for constant predictions or references, for fewer than two rows, and if a
  prediction is NaN or infinite.
- A classification row with a NaN in its logits counts as wrong (its predicted class is -1).

Further metrics for the user's own data: `hf_ft_ext.metrics.scores`.
"""

import logging
import warnings
from dataclasses import dataclass

import datasets
import evaluate
import numpy as np
import numpy.typing as npt

from hf_ft_ext.errors import InputError
from hf_ft_ext.problem_types import CLASSIFICATION, REGRESSION

logger = logging.getLogger(__name__)


class _InMemoryMetric(evaluate.Metric):
    """A metric that keeps its rows in memory: without a cache folder, processes cannot interfere."""

    _dtype = "int64"
    _summary = ""

    def __init__(self, config_name: str | None = None, **kwargs):
        kwargs.setdefault("keep_in_memory", kwargs.get("num_process", 1) == 1)
        super().__init__(config_name, **kwargs)

    def _build_data_dir(self):
        # evaluate creates the folder even if it never writes to it, which fails with a read-only home folder.
        return "" if self.keep_in_memory else super()._build_data_dir()

    def _info(self):
        columns = dict.fromkeys(("predictions", "references"), datasets.Value(self._dtype))
        return evaluate.MetricInfo(
            description=self._summary,
            citation="",
            inputs_description="\nArgs:\n    predictions: one value per row.\n    references: the true values.\n",
            features=datasets.Features(columns),
        )

    def _compute(self, predictions, references):
        return self.score(predictions, references)

    @classmethod
    def score(cls, predictions: npt.ArrayLike, references: npt.ArrayLike) -> dict[str, float]:
        """Return what `compute` returns, without its copies of the rows: an Arrow table, then lists.

        Raises:
            InputError: there are no rows, or a class id is not a whole number.
        """
        predictions, references = cls._column(predictions), cls._column(references)
        if references.size == 0:
            raise InputError("there are no rows to score; pass at least one prediction with its label")
        return {key: float(value) for key, value in cls._scores(predictions, references).items()}

    @classmethod
    def _column(cls, values: npt.ArrayLike) -> np.ndarray:
        given = np.asarray(values)
        column = given.astype(cls._dtype)
        if column.dtype.kind == "i" and given.dtype.kind == "f" and (column != given).any():
            raise InputError(f"class ids must be whole numbers, got {given[column != given][0]:g}; correct the labels")
        return column

    @staticmethod
    def _scores(predictions: np.ndarray, references: np.ndarray) -> dict[str, float]:
        raise NotImplementedError


class Accuracy(_InMemoryMetric):
    """Fraction of correctly predicted rows: key `accuracy`, 0 to 1. Predictions are class ids."""

    _summary = "Fraction of rows whose predicted class is the true one."

    @staticmethod
    def _scores(predictions, references):
        return {"accuracy": np.mean(predictions == references)}


class AccuracyF1(_InMemoryMetric):
    """Accuracy and F1 of class 1, as GLUE scores MRPC and QQP: keys `accuracy`, `f1`, 0 to 1.

    Predictions and references are class ids. `metric_function` finds the positive class by its name instead.

    Raises:
        InputError: the references contain a class other than 0 and 1.
    """

    _summary = "Accuracy, and the harmonic mean of precision and recall of class 1."

    @staticmethod
    def _scores(predictions, references):
        from sklearn.metrics import f1_score

        others = sorted(set(references.tolist()) - {0, 1})
        if others:
            raise InputError(
                f"metric 'accuracy_f1' is for two classes, but the labels contain {others}; use 'accuracy'"
            )
        # Class 1 against the rest, so that a row without a prediction (-1) counts as a false negative at most.
        f1 = f1_score(references == 1, predictions == 1, zero_division=0.0)
        return {"accuracy": np.mean(predictions == references), "f1": f1}


class Matthews(_InMemoryMetric):
    """Matthews correlation, as GLUE scores CoLA: key `matthews_correlation`, -1 to 1; any number of classes."""

    _summary = "Correlation of predicted and true classes."

    @staticmethod
    def _scores(predictions, references):
        from sklearn.metrics import matthews_corrcoef

        if np.ptp(predictions) == 0 or np.ptp(references) == 0:
            return {"matthews_correlation": 0.0}
        return {"matthews_correlation": matthews_corrcoef(references, predictions)}


class PearsonSpearman(_InMemoryMetric):
    """Linear and rank correlation, as GLUE scores STS-B: keys `pearson`, `spearmanr`, -1 to 1.

    Raises:
        InputError: a reference is NaN or infinite.
    """

    _dtype = "float64"
    _summary = "Pearson and Spearman correlation of predicted and true scores."

    @staticmethod
    def _scores(predictions, references):
        from scipy.stats import pearsonr, spearmanr

        bad = int(np.sum(~np.isfinite(references)))
        if bad:
            raise InputError(f"{bad} of {references.size} true scores are NaN or infinite; remove these rows")
        bad = int(np.sum(~np.isfinite(predictions)))
        if bad:
            logger.warning("%d of %d predictions are NaN or infinite: correlations are set to 0", bad, references.size)
        if bad or np.ptp(predictions) == 0 or np.ptp(references) == 0:
            return {"pearson": 0.0, "spearmanr": 0.0}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about nearly constant input
            pearson = pearsonr(predictions, references).statistic
            spearman = spearmanr(predictions, references).statistic
        return {"pearson": np.nan_to_num(pearson), "spearmanr": np.nan_to_num(spearman)}


@dataclass(frozen=True)
class MetricSpec:
    """One row of `METRICS`."""

    cls: type[_InMemoryMetric]
    problem_type: str  # CLASSIFICATION or REGRESSION
    primary: str  # the key that selects the best model; higher is better for all


METRICS = {
    "accuracy": MetricSpec(Accuracy, CLASSIFICATION, "accuracy"),
    "accuracy_f1": MetricSpec(AccuracyF1, CLASSIFICATION, "accuracy"),
    "matthews": MetricSpec(Matthews, CLASSIFICATION, "matthews_correlation"),
    "pearson_spearman": MetricSpec(PearsonSpearman, REGRESSION, "pearson"),
}


def load_metric(name: str) -> evaluate.Metric:
    """Return a new metric by its name in `METRICS`; raises `InputError` for an unknown name."""
    return _spec(name).cls()


def primary_key(name: str) -> str:
    """Return the key of the metric that selects the best model, such as `matthews_correlation`."""
    return _spec(name).primary


def check_metric(name: str, problem_type: str, num_labels: int | None = None) -> None:
    """Check that a metric can score a problem.

    Args:
        name: a name in `METRICS`.
        problem_type: `single_label_classification` or `regression`.
        num_labels: number of classes, where known.

    Raises:
        InputError: the name is unknown, or the metric is for the other problem type or for two classes only.
    """
    spec = _spec(name)
    if spec.problem_type != problem_type:
        fitting = [other for other, row in METRICS.items() if row.problem_type == problem_type]
        is_, for_ = (kind.replace("single_label_", "") for kind in (problem_type, spec.problem_type))
        raise InputError(
            f"metric '{name}' is for {for_}, but this is {is_} (float labels mean regression, others "
            f"classification); use {' or '.join(fitting)}, or change the type of the labels"
        )
    if name == "accuracy_f1" and num_labels is not None and num_labels != 2:
        raise InputError(f"metric 'accuracy_f1' is for two classes, but the data has {num_labels}; use 'accuracy'")


def _spec(name: str) -> MetricSpec:
    if name not in METRICS:
        raise InputError(f"unknown metric '{name}'; known: {', '.join(METRICS)}")
    return METRICS[name]
