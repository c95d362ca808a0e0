"""GLUE metrics, scikit-learn scores and the user's own metrics; `metric_function` returns a `compute_metrics`."""

from hf_ft_ext.metrics.function import MetricFunction, default_metrics, metric_function
from hf_ft_ext.metrics.glue import (
    METRICS,
    Accuracy,
    AccuracyF1,
    Matthews,
    MetricSpec,
    PearsonSpearman,
    check_metric,
    load_metric,
    primary_key,
)
from hf_ft_ext.metrics.outputs import probabilities
from hf_ft_ext.metrics.positive import evident_positive, positive_id
from hf_ft_ext.metrics.scores import MULTI_LABEL_METRICS, SCORES
from hf_ft_ext.metrics.thresholds import AUTO, best_thresholds, parse_threshold
from hf_ft_ext.problem_types import CLASSIFICATION, MULTI_LABEL, REGRESSION

__all__ = [
    "AUTO",
    "CLASSIFICATION",
    "METRICS",
    "MULTI_LABEL",
    "MULTI_LABEL_METRICS",
    "REGRESSION",
    "SCORES",
    "Accuracy",
    "AccuracyF1",
    "Matthews",
    "MetricFunction",
    "MetricSpec",
    "PearsonSpearman",
    "best_thresholds",
    "check_metric",
    "default_metrics",
    "evident_positive",
    "load_metric",
    "metric_function",
    "parse_threshold",
    "positive_id",
    "primary_key",
    "probabilities",
]
