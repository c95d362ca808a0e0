"""Objectives that a search minimises: a loss, or one minus a metric, as functions of logits and labels."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch.nn import functional

from hf_ft_ext.classifier_losses import classifier_losses
from hf_ft_ext.errors import InputError
from hf_ft_ext.label_tokens import check_row_labels
from hf_ft_ext.problem_types import CLASSIFICATION, MULTI_LABEL, REGRESSION

OBJECTIVES = LOSS, ACCURACY, F1, MATTHEWS = ("loss", "accuracy", "f1", "matthews")
Objective = Callable[[torch.Tensor, torch.Tensor], torch.Tensor | float]
_UNSMOOTHED = "label_smoothing_factor={} smooths one class per row, but rows have several labels; leave it out"
_UNSUITABLE = (
    "labels have shape {shape} and type {dtype}; pass class ids as integers, one for each row, or 0 or 1 for each of "
    "{classes} labels; for labels of tokens use search_objective=loss, or a function as objective"
)


def make_objective(
    name: str,
    problem_type: str | None,
    num_labels: int,
    smoothing: float = 0.0,
    label_names: Sequence[str] | None = None,
    positive_label: str | None = None,
) -> Objective:
    """Return an objective to minimise: logits `[..., rows, classes]`, labels `[rows]` -> `[...]`.

    With several labels per row, `labels` are 0 or 1, `[rows, classes]`. A label is predicted if its logit is 0 or
    more. Accuracy is then the fraction of rows with all labels correct, and f1 is micro-averaged over all labels.

    Args:
        name: `loss`: the loss of transformers' classification heads for `problem_type`; `accuracy`, `f1` (of the
            positive class of two), `matthews`: one minus the metric.
        problem_type: of the model's configuration; `None` = inferred from the labels, as transformers does.
        smoothing: label smoothing of the loss.
        label_names: by id; without them class 1 of two is the positive one.
        positive_label: of f1; `None` = inferred from the names.

    Raises:
        InputError: unknown name, a metric that does not fit the labels, or an unknown positive class.
    """
    if name not in OBJECTIVES:
        raise InputError(f"search_objective={name!r} is unknown; choose from: {', '.join(OBJECTIVES)}")
    if smoothing and problem_type == MULTI_LABEL:
        raise InputError(_UNSMOOTHED.format(smoothing))
    if name == LOSS:
        return lambda logits, labels: classification_loss(logits, labels, problem_type, smoothing)
    if problem_type == MULTI_LABEL:
        if positive_label is not None:
            raise InputError(
                f"search_positive_label={positive_label!r} is for two classes, but rows have several labels, and f1 "
                "is of all of them; leave it out"
            )
        return _multi_label_objective(name)
    if problem_type == REGRESSION or num_labels < 2:
        raise InputError(f"search_objective={name} is for classes, but this task is regression; use loss")
    if name == F1 and num_labels != 2:
        raise InputError(f"search_objective=f1 is for two classes, but the model has {num_labels}; use matthews")
    positive = positive_class(label_names, positive_label) if name == F1 else 1
    metrics: dict[str, Callable[[torch.Tensor, torch.Tensor, int], torch.Tensor]] = {
        ACCURACY: _accuracy,
        F1: partial(_f1, positive=positive),
        MATTHEWS: _matthews,
    }

    def one_minus(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        value = 1 - metrics[name](logits.argmax(-1), labels, logits.shape[-1])
        # argmax of a logit that is not finite is meaningless: such a candidate is rejected
        return torch.where(logits.isfinite().flatten(-2).all(-1), value, torch.full_like(value, torch.nan))

    return one_minus


def objective_of_arguments(args: Any, config: Any) -> Objective:
    """The objective that `search_objective` of `args` names, for a classifier with this configuration."""
    names = [str(config.id2label[i]) for i in range(config.num_labels)]
    return make_objective(
        args.search_objective, config.problem_type, config.num_labels, args.label_smoothing_factor, names,
        args.search_positive_label,
    )  # fmt: skip


def check_labels(config: Any, *labels: torch.Tensor) -> None:
    """Refuse labels of rows that do not fit a classifier with this configuration.

    Raises:
        InputError: a label has another shape, is not a class id (with several labels per row: not 0 or 1), or is not
            finite.
    """
    classes, problem = config.num_labels, config.problem_type
    regression = problem == REGRESSION or (problem is None and classes == 1)
    for some in labels:
        several = problem == MULTI_LABEL or some.is_floating_point()
        if not regression and several and (problem not in (None, MULTI_LABEL) or some.shape[1:] != (classes,)):
            raise InputError(_UNSUITABLE.format(shape=tuple(some.shape), dtype=some.dtype, classes=classes))
        if not regression and not several and some.numel() != len(some):  # labels of tokens
            raise InputError(_UNSUITABLE.format(shape=tuple(some.shape), dtype=some.dtype, classes=classes))
        check_row_labels(some, classes, problem, soft=True)


def positive_class(label_names: Sequence[str] | None, positive_label: str | None) -> int:
    """Id of the positive class of f1; raises `InputError` if it is not known."""
    from hf_ft_ext.metrics import positive_id  # imported here: the arguments module needs only names of this one

    return positive_id(label_names, positive_label, "f1")


def from_user_function(function: Callable[[torch.Tensor, torch.Tensor], float]) -> Objective:
    """Extend the user's `function` of logits `[rows, classes]` and labels to logits `[n, rows, classes]`."""

    def objective(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        if logits.ndim == 2:
            return torch.as_tensor(function(logits, labels))
        return torch.tensor([float(function(one, labels)) for one in logits], dtype=torch.float64)

    return objective


def classification_loss(
    logits: torch.Tensor, labels: torch.Tensor, problem_type: str | None, smoothing: float = 0.0
) -> torch.Tensor:
    """Mean loss over the rows: squared error, cross-entropy or binary cross-entropy, by problem type."""
    return row_losses(logits, labels, problem_type, smoothing).mean(-1)


def row_losses(
    logits: torch.Tensor, labels: torch.Tensor, problem_type: str | None, smoothing: float = 0.0
) -> torch.Tensor:
    """Loss of each row, in float32 or wider: logits `[..., rows, classes]` -> `[..., rows]`.

    A search compares losses that differ little, so those of 16-bit logits are not rounded to 16 bits.
    """
    logits = logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
    classes = logits.shape[-1]
    problem_type = problem_type or inferred_problem_type(labels, classes)
    if problem_type == MULTI_LABEL:
        if labels.shape != logits.shape[-2:]:
            raise InputError(_UNSUITABLE.format(shape=tuple(labels.shape), dtype=labels.dtype, classes=classes))
        if smoothing:
            raise InputError(_UNSMOOTHED.format(smoothing))
    losses = classifier_losses(logits, labels, problem_type)
    if smoothing and problem_type == CLASSIFICATION:
        # (1 - s) * cross-entropy + s * mean over the classes of -log p, as transformers' LabelSmoother
        losses = (1 - smoothing) * losses - smoothing * logits.log_softmax(-1).mean(-1)
    return losses


def inferred_problem_type(labels: torch.Tensor, classes: int) -> str:
    """The problem type that transformers infers for a configuration without one."""
    if classes == 1:
        return REGRESSION
    return MULTI_LABEL if labels.is_floating_point() else CLASSIFICATION


def _multi_label_objective(name: str) -> Objective:
    """One minus a metric of several labels per row."""
    if name == MATTHEWS:
        raise InputError(
            "search_objective=matthews is for one label per row, but the model has several; use f1 or loss"
        )

    def one_minus(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        predicted, truth = logits >= 0, labels > 0.5  # logit 0 is probability 0.5
        if name == ACCURACY:
            value = (predicted == truth).all(-1).double().mean(-1)
        else:
            # F1 = 2 TP / (predicted + true)
            true_positives = (predicted & truth).double().sum((-1, -2))
            total = predicted.double().sum((-1, -2)) + truth.double().sum()
            value = torch.where(total > 0, 2 * true_positives / total.clamp(min=1), torch.zeros_like(total))
        return torch.where(logits.isfinite().flatten(-2).all(-1), 1 - value, torch.full_like(value, torch.nan))

    return one_minus


def _counts(predicted: torch.Tensor, labels: torch.Tensor, classes: int) -> torch.Tensor:
    """Confusion counts `[..., predicted, true]`."""
    predicted = functional.one_hot(predicted, classes).double()
    return predicted.transpose(-1, -2) @ functional.one_hot(labels.view(-1), classes).double()


def _accuracy(predicted: torch.Tensor, labels: torch.Tensor, classes: int) -> torch.Tensor:
    return (predicted == labels.view(-1)).double().mean(-1)


def _f1(predicted: torch.Tensor, labels: torch.Tensor, classes: int, positive: int) -> torch.Tensor:
    counts = _counts(predicted, labels, classes)
    # F1 = 2 TP / (predicted positive + truly positive)
    total = counts[..., positive, :].sum(-1) + counts[..., :, positive].sum(-1)
    return torch.where(total > 0, 2 * counts[..., positive, positive] / total.clamp(min=1), torch.zeros_like(total))


def _matthews(predicted: torch.Tensor, labels: torch.Tensor, classes: int) -> torch.Tensor:
    counts = _counts(predicted, labels, classes)
    # Multi-class Matthews correlation: (c n - sum_k p_k t_k) / sqrt((n^2 - sum_k p_k^2) (n^2 - sum_k t_k^2)), with c
    # correct predictions of n, and class k predicted p_k times and true t_k times.
    n, correct = counts.sum((-1, -2)), counts.diagonal(dim1=-2, dim2=-1).sum(-1)
    predicted, true = counts.sum(-1), counts.sum(-2)
    norm = ((n**2 - predicted.square().sum(-1)) * (n**2 - true.square().sum(-1))).sqrt()
    value = (correct * n - (predicted * true).sum(-1)) / norm.clamp(min=1e-12)
    return torch.where(norm > 0, value, torch.zeros_like(value))
