"""`metric_function`: make a Trainer's `compute_metrics` from metrics by name and the names of the classes."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np
from transformers import EvalPrediction

from hf_ft_ext.errors import InputError, did_you_mean
from hf_ft_ext.metrics.external import External, evaluate_metric, function_metric, user_metric
from hf_ft_ext.metrics.glue import METRICS, check_metric
from hf_ft_ext.metrics.outputs import Outputs, Thresholds, make_outputs, problem_of
from hf_ft_ext.metrics.positive import evident_positive, positive_id
from hf_ft_ext.metrics.scores import MULTI_LABEL_METRICS, SCORES
from hf_ft_ext.metrics.thresholds import as_thresholds, best_thresholds, parse_threshold
from hf_ft_ext.problem_types import CLASSIFICATION, MULTI_LABEL, REGRESSION

Metric = str | Callable
_SAMPLE = 48  # rows of the random sample for finding a metric's keys

logger = logging.getLogger(__name__)


class MetricFunction:
    """A Trainer's `compute_metrics`; created by `metric_function`.

    Attributes:
        thresholds: for multi-label probabilities; `None` = chosen on the data of each call.
        names: names of the metrics.
    """

    def __init__(
        self,
        metrics: Sequence[Metric],
        label_names: Sequence[str] | None,
        positive_label: str | None,
        problem_type: str | None,
        threshold: str | float,
        label_order: Sequence[str] | None,
    ):
        self.names = [m if isinstance(m, str) else getattr(m, "__name__", type(m).__name__) for m in metrics]
        self.problem_type = problem_type or _implied(self.names)
        self.label_names = None if label_names is None else tuple(map(str, label_names))
        self.thresholds: Thresholds | None = parse_threshold(threshold)
        self.positive: int | None = None
        self._externals: dict[str, External] = {}
        self._keys: list[str] | None = None
        self._sides_checked = False
        if twice := [name for name in self.names if self.names.count(name) > 1]:
            raise InputError(f"metric '{twice[0]}' is named twice; name each metric once")
        for name, metric in zip(self.names, metrics, strict=True):
            self._check(name, metric)
        certain = self.problem_type == CLASSIFICATION
        about_positive = [name for name in self.names if self._needs_positive(name) and certain]
        evident = self._externals and self._evident() and self.problem_type in (CLASSIFICATION, None)
        if about_positive or positive_label is not None or evident:
            name = about_positive[0] if about_positive else "positive_label"
            if self.problem_type in (REGRESSION, MULTI_LABEL):
                raise InputError(f"positive_label={positive_label!r}: {self.problem_type} has no positive class")
            self.positive = positive_id(self.label_names, positive_label, name)
            if positive_label is None and self.label_names is not None:
                logger.info("The positive class is %r, by the names of the labels.", self.label_names[self.positive])
        self._order = self._external_order(label_order)
        if certain:
            self._refuse_sided()

    # --- checks ---------------------------------------------------------------------------------------

    def _check(self, name: str, metric: Metric) -> None:
        known = METRICS | SCORES
        count = None if self.label_names is None else len(self.label_names)
        if not isinstance(metric, str):
            self._externals[name] = function_metric(metric, name)
        elif name in METRICS and self.problem_type != MULTI_LABEL:
            if self.problem_type is not None:
                check_metric(name, self.problem_type, count)
        elif name in known:
            kinds = SCORES[name].problem_types if name in SCORES else (METRICS[name].problem_type,)
            if self.problem_type is not None and self.problem_type not in kinds:
                fitting = [n for n, row in METRICS.items() if row.problem_type == self.problem_type]
                fitting += [n for n, row in SCORES.items() if self.problem_type in row.problem_types]
                raise InputError(f"metric '{name}' is not for {self.problem_type}; use one of: {', '.join(fitting)}")
        elif ":" in name:
            self._externals[name] = user_metric(name)
        else:
            try:
                self._externals[name] = evaluate_metric(name)
            except InputError as error:
                raise InputError(f"{error}{did_you_mean(name, known)}; known: {', '.join(known)}") from error

    def _needs_positive(self, name: str) -> bool:
        if self.problem_type == MULTI_LABEL:
            return False
        return name == "accuracy_f1" or (name in SCORES and SCORES[name].positive and name not in self._externals)

    def _evident(self) -> bool:
        return self.label_names is not None and evident_positive(self.label_names) is not None

    def is_from_elsewhere(self, key: str) -> bool:
        """Whether `key` may be of an external metric, so that it is not known whether high or low values are good."""
        known = {"loss", *SCORES, *(row.primary for row in METRICS.values())}
        return bool(self._externals) and (key in self._externals or key not in known)

    @property
    def reads_positive(self) -> bool:
        """Whether a metric may depend on the choice of the positive class."""
        return bool(self._externals) or any(self._needs_positive(name) for name in self.names)

    def _external_order(self, label_order: Sequence[str] | None) -> list[int] | None:
        """Class ids in the order for external metrics: that of the data, with the positive one of two classes last.

        It does not depend on the order of the classes in the model.
        """
        names = self.label_names
        if names is None:
            return None
        order = list(range(len(names)))
        if label_order is not None and set(map(str, label_order)) == set(names):
            order = [names.index(str(name)) for name in label_order]
        if len(names) == 2 and self.positive is not None:
            order = [1 - self.positive, self.positive]
        return order

    def _refuse_sided(self) -> None:
        """Refuse an external metric that depends on which of two classes is class 1, if the positive one is unknown.

        Checked once, by evaluating it on a sample with both orders.
        """
        if self._sides_checked or not self._externals or self._order is None or len(self._order) != 2:
            return
        self._sides_checked = True
        if self.positive is not None:
            return
        outputs = self._outputs(*_sample(CLASSIFICATION, 2))
        for name, compute in self._externals.items():
            one, other = (_with_retries(compute, name, outputs.in_order(order)) for order in ([0, 1], [1, 0]))
            if any(not np.isclose(one[key], other.get(key, np.nan), equal_nan=True) for key in one):
                positive_id(self.label_names, None, name)  # raises

    # --- the function ----------------------------------------------------------------------------------

    def __call__(self, prediction: EvalPrediction) -> dict[str, float]:
        logits, labels = (
            np.asarray(part[0] if isinstance(part, tuple) else part) if part is not None else None
            for part in (prediction.predictions, prediction.label_ids)
        )
        if labels is None:
            raise InputError("this data has no labels, so it cannot be evaluated; only predict on it")
        if logits is None:
            raise InputError("the model returned no predictions, so there is nothing to score; pass its logits")
        outputs = self._outputs(logits, labels)
        scores: dict[str, float] = {}
        for name in self.names:
            for key, value in self._scores(name, outputs).items():
                if not np.isclose(scores.setdefault(key, value), value, equal_nan=True):
                    raise InputError(
                        f"metrics {', '.join(self.names)}: two of them return the key '{key}' with different values; "
                        "rename it in yours"
                    )
        if self._is_composite() and len(scores) > 1:
            scores["combined_score"] = float(np.mean(list(scores.values())))
        return scores

    def _is_composite(self) -> bool:
        """Whether the only metric is one of GLUE, for which GLUE reports the mean of its keys."""
        return len(self.names) == 1 and self.names[0] in METRICS and not self._externals

    def _outputs(self, logits: np.ndarray, labels: np.ndarray) -> Outputs:
        kind = self.problem_type or problem_of(logits, labels)
        thresholds = as_thresholds(self.thresholds)
        if kind == MULTI_LABEL and self.thresholds is None and logits.shape == labels.shape:
            thresholds = best_thresholds(logits, labels)
        return make_outputs(self.names[0], kind, logits, labels, thresholds, self.positive, self.label_names)

    def _scores(self, name: str, outputs: Outputs) -> dict[str, float]:
        if name in self._externals:
            if outputs.problem_type == CLASSIFICATION and self._order is not None:
                self._refuse_sided()
                outputs = outputs.in_order(self._order)
            return _with_retries(self._externals[name], name, outputs)
        if name in SCORES:
            if outputs.problem_type not in SCORES[name].problem_types:
                raise InputError(f"metric '{name}' is not for {outputs.problem_type}; pass another metric")
            if not outputs.references.size:
                raise InputError("there are no rows to score; pass at least one prediction with its label")
            count = outputs.margins.shape[1]
            about_one = self._needs_positive(name) and outputs.problem_type == CLASSIFICATION
            if about_one and self.label_names is None and count > 2:
                raise InputError(
                    f"metric '{name}' needs a positive class, and there are {count} classes; pass label_names and "
                    "positive_label, or use an average over the classes, such as f1_macro"
                )
            if about_one and outputs.positive is None:
                outputs = replace(outputs, positive=positive_id(self.label_names, None, name))
            return {name: SCORES[name].compute(outputs)}
        if outputs.problem_type != METRICS[name].problem_type:
            raise InputError(f"metric '{name}' is not for {outputs.problem_type}; pass another metric")
        predictions, references = outputs.predictions, outputs.references
        if name == "accuracy_f1" and outputs.positive == 0:
            predictions, references = (_swapped(ids) for ids in (predictions, references))
        return METRICS[name].cls.score(predictions, references)

    def keys(self, num_labels: int | None = None) -> list[str]:
        """The keys that the metrics return; the first one selects the best model.

        Args:
            num_labels: number of classes, if `label_names` was not passed; `None` = 2.

        Raises:
            InputError: an external metric fails on a small sample.
        """
        if self._keys is not None:
            return list(self._keys)
        count = len(self.label_names) if self.label_names is not None else num_labels or 2
        outputs = self._outputs(*_sample(self.problem_type or CLASSIFICATION, count))
        keys: dict[str, None] = {}
        for name in self.names:
            if name in METRICS and name not in self._externals:
                keys |= dict.fromkeys([METRICS[name].primary])
            keys |= dict.fromkeys(self._scores(name, outputs))
        if self._is_composite() and len(keys) > 1:
            keys["combined_score"] = None
        self._keys = list(keys)
        return list(keys)


def metric_function(
    metric: Metric | Sequence[Metric],
    label_names: Sequence[str] | Mapping[int, str] | None = None,
    *,
    positive_label: str | None = None,
    problem_type: str | None = None,
    threshold: str | float = 0.5,
    label_order: Sequence[str] | None = None,
) -> MetricFunction:
    """Return a Trainer's `compute_metrics` for one or several metrics.

    The function takes logits `[rows, classes]` (classification), `[rows, labels]` (multi-label) or `[rows]` /
    `[rows, 1]` (regression), alone or first in a tuple. It returns the keys of all metrics. A single GLUE metric with
    several keys also returns their mean as `combined_score`, as GLUE reports it.

    Args:
        metric: one or several of: a name in `METRICS` or `SCORES`; `module:function` or `file.py:function`; the name
            or path of a metric of `evaluate`; a function, which gets arguments by the names of its parameters
            (`predictions`, `references`, `probabilities`, `logits`, `label_names`, or one `EvalPrediction`).
        label_names: of the classes in the order of the logits, or a configuration's `id2label`. Without names, class
            1 of two is the positive one.
        positive_label: name of the positive class of `f1`, `precision`, `recall`, `accuracy_f1` and
            `average_precision`; `None` = inferred from the names (`yes` of no and yes).
        problem_type: as in a model's configuration; `None` = by the shapes of logits and labels.
        threshold: multi-label: a label is predicted if its probability is at least this; `auto` = for each label the
            threshold with the best F1 on the data of the call, or the value of the attribute `thresholds`.
        label_order: names of the classes in the order for external metrics; `None` = by id. Of two classes, the
            positive one is class 1.

    Raises:
        InputError: an unknown name, a metric that does not fit the problem, a positive class that is needed and not
            known; on use: there are no labels, or logits or labels have another shape.
    """
    metrics = [metric] if isinstance(metric, str) or callable(metric) else list(metric)
    if not metrics:
        raise InputError("no metric was passed; pass one or more")
    if isinstance(label_names, Mapping):
        label_names = [label_names[i] for i in sorted(label_names, key=int)]
    return MetricFunction(metrics, label_names, positive_label, problem_type, threshold, label_order)


def default_metrics(problem_type: str) -> str | tuple[str, ...]:
    """The default metrics for the user's own data."""
    if problem_type == MULTI_LABEL:
        return MULTI_LABEL_METRICS
    return "pearson_spearman" if problem_type == REGRESSION else "accuracy"


def _implied(names: Sequence[str]) -> str | None:
    """The problem type, if all metrics with a known type share a single one; else `None`."""
    kinds = [{METRICS[n].problem_type} if n in METRICS else set(SCORES[n].problem_types) for n in names
             if n in METRICS or n in SCORES]  # fmt: skip
    common = set.intersection(*kinds) if kinds else set()
    return next(iter(common)) if len(common) == 1 else None


def _swapped(ids: np.ndarray) -> np.ndarray:
    """Exchange the ids of two classes; others (-1) stay."""
    return np.where((ids == 0) | (ids == 1), 1 - ids, ids)


def _sample(problem_type: str, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Random logits and labels in which every class occurs."""
    generator = np.random.default_rng(0)
    rows = max(_SAMPLE, 4 * count)
    if problem_type == REGRESSION:
        labels = generator.normal(size=rows)
        return labels + generator.normal(size=rows), labels
    logits = generator.normal(size=(rows, count))
    if problem_type == MULTI_LABEL:
        return logits, (generator.random((rows, count)) < 0.4).astype(np.float32)
    # Lower ids are more frequent, so that the result of a metric that treats two classes differently changes.
    labels = generator.choice(count, rows, p=np.arange(count, 0, -1) / (count * (count + 1) / 2))
    labels[:count] = np.arange(count)
    return logits, labels


def _with_retries(compute: Callable[[Outputs], dict[str, float]], name: str, outputs: Outputs) -> dict[str, float]:
    try:
        return compute(outputs)
    except InputError:
        raise
    except Exception as error:  # an external metric may raise anything
        lines = str(error).strip().splitlines() or [""]
        raise InputError(
            f"metric '{name}' fails on {len(outputs.references)} rows ({type(error).__name__}: "
            f"{lines[0]}); correct it, or pass another metric"
        ) from error
