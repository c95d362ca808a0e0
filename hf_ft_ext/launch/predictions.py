"""What predictions are written as: label names, numbers, several labels per row, and their probabilities."""

from typing import Any

import numpy as np
from transformers import Trainer

from hf_ft_ext.metrics import MULTI_LABEL, REGRESSION, MetricFunction, probabilities

SEPARATOR = "|"  # between the labels of a row


def named_predictions(predictions: Any, config: Any, thresholds: float | np.ndarray = 0.5) -> list[str]:
    """Logits as label names (several of a row with `|` between them), or as numbers where the model is a regression.

    Args:
        predictions: logits, alone or first in a tuple.
        config: of the model.
        thresholds: of several labels per row: the probability from which on a label is predicted.
    """
    logits = logits_of(predictions)
    if config.problem_type == REGRESSION:
        return [f"{value:.6g}" for value in logits.reshape(-1)]
    if config.problem_type == MULTI_LABEL:
        names = [str(config.id2label[i]) for i in range(logits.shape[-1])]
        chosen = probabilities(logits, MULTI_LABEL) >= thresholds
        return [SEPARATOR.join(name for name, yes in zip(names, row, strict=True) if yes) for row in chosen]
    return [str(config.id2label[int(i)]) for i in logits.argmax(axis=-1)]


def prediction_table(trainer: Trainer, predictions: Any, with_probabilities: bool) -> tuple[list[str], list[tuple]]:
    """Header and rows of a predictions file: `index`, `prediction` and, if wanted, a probability for each label."""
    config = trainer.model.config
    columns: list[Any] = [named_predictions(predictions, config, thresholds_of(trainer))]
    header = ["index", "prediction"]
    if with_probabilities:
        shares = probabilities(logits_of(predictions), config.problem_type)
        header += [f"probability_{config.id2label[i]}" for i in range(shares.shape[-1])]
        columns += [[f"{share:.6g}" for share in column] for column in shares.T]
    return header, list(zip(range(len(columns[0])), *columns, strict=True))


def thresholds_of(trainer: Trainer) -> float | np.ndarray:
    """The thresholds that the trainer's metrics use."""
    thresholds = getattr(trainer.compute_metrics, "thresholds", None)
    return 0.5 if thresholds is None else thresholds


def scoring_of(trainer: Trainer) -> dict[str, Any]:
    """How the run was scored, for `run.json`: the metric that chooses, the positive class, the thresholds."""
    metrics = trainer.compute_metrics
    if not isinstance(metrics, MetricFunction):
        return {}
    positive = metrics.label_names[metrics.positive] if metrics.label_names and metrics.positive is not None else None
    return {
        "primary_metric": metrics.keys()[0],
        "positive_label": positive if metrics.reads_positive else None,
        "thresholds": _recorded_thresholds(trainer),
    }


def _recorded_thresholds(trainer: Trainer) -> dict[str, float] | None:
    """The threshold of each label by its name; `None` with one label per row."""
    config = trainer.model.config
    if config.problem_type != MULTI_LABEL:
        return None
    values = np.broadcast_to(np.asarray(thresholds_of(trainer), dtype=float), (config.num_labels,))
    return {str(config.id2label[i]): float(value) for i, value in enumerate(values)}


def logits_of(predictions: Any) -> np.ndarray:
    return np.asarray(predictions[0] if isinstance(predictions, tuple) else predictions)
