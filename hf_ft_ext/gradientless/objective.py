"""What a search minimises: a loss or a metric, of logits."""

from collections.abc import Callable

import torch
from torch.nn import functional

from hf_ft_ext.errors import InputError

OBJECTIVES = LOSS, ACCURACY, F1, MATTHEWS = ("loss", "accuracy", "f1", "matthews")
Objective = Callable[[torch.Tensor, torch.Tensor], torch.Tensor | float]


def make_objective(name: str, problem_type: str | None, num_labels: int, smoothing: float = 0.0) -> Objective:
    """A function of logits `[..., rows, classes]` and labels `[rows]` that is low where the model is good: `[...]`.

    Args:
        name: `loss`: the one that transformers' classification heads take for `problem_type`; `accuracy`, `f1`
            (class 1 of two), `matthews`: one minus the metric, which needs no derivative.
        problem_type: of the model's configuration; `None` is read off the labels, as transformers does.
        smoothing: label smoothing of the loss.

    Raises:
        InputError: unknown name, or a metric that does not fit the labels.
    """
    if name not in OBJECTIVES:
        raise InputError(f"search_objective={name!r} is unknown; choose from: {', '.join(OBJECTIVES)}")
    if name == LOSS:
        return lambda logits, labels: classification_loss(logits, labels, problem_type, smoothing)
    if problem_type == "regression" or num_labels < 2:
        raise InputError(f"search_objective={name} is for classes, but this task is regression; use loss")
    if name == F1 and num_labels != 2:
        raise InputError(f"search_objective=f1 is for two classes, but the model has {num_labels}; use matthews")
    metric = {ACCURACY: _accuracy, F1: _f1, MATTHEWS: _matthews}[name]

    def one_minus(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        value = 1 - metric(logits.argmax(-1), labels, logits.shape[-1])
        # a row without finite logits has no class
        return torch.where(logits.isfinite().flatten(-2).all(-1), value, torch.full_like(value, torch.nan))

    return one_minus


def of_the_user(function: Callable[[torch.Tensor, torch.Tensor], float]) -> Objective:
    """`function` of logits `[rows, classes]` and labels, for any number of candidates' logits at once."""

    def objective(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        if logits.ndim == 2:
            return torch.as_tensor(function(logits, labels))
        return torch.tensor([float(function(one, labels)) for one in logits], dtype=torch.float64)

    return objective


def classification_loss(
    logits: torch.Tensor, labels: torch.Tensor, problem_type: str | None, smoothing: float = 0.0
) -> torch.Tensor:
    """Mean loss over the rows: squared error, cross-entropy or binary cross-entropy, by the problem."""
    logits = logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
    if problem_type == "regression" or (problem_type is None and logits.shape[-1] == 1):
        labels = labels.to(logits.dtype).reshape(logits.shape[-2], -1)
        return (logits - labels).square().mean((-1, -2))
    if problem_type == "multi_label_classification" or (problem_type is None and labels.is_floating_point()):
        labels = labels.to(logits.dtype).expand_as(logits)
        return functional.binary_cross_entropy_with_logits(logits, labels, reduction="none").mean((-1, -2))
    likely = logits.log_softmax(-1)
    index = labels.view(-1, 1).expand(*likely.shape[:-1], 1)
    losses = -likely.gather(-1, index)[..., 0]
    if smoothing:
        losses = (1 - smoothing) * losses - smoothing * likely.mean(-1)
    return losses.mean(-1)


def _counts(predicted: torch.Tensor, labels: torch.Tensor, classes: int) -> torch.Tensor:
    """Confusion counts `[..., predicted, true]`."""
    predicted = functional.one_hot(predicted, classes).double()
    return predicted.transpose(-1, -2) @ functional.one_hot(labels.view(-1), classes).double()


def _accuracy(predicted: torch.Tensor, labels: torch.Tensor, classes: int) -> torch.Tensor:
    return (predicted == labels.view(-1)).double().mean(-1)


def _f1(predicted: torch.Tensor, labels: torch.Tensor, classes: int) -> torch.Tensor:
    counts = _counts(predicted, labels, classes)
    both = counts[..., 1, :].sum(-1) + counts[..., :, 1].sum(-1)
    return torch.where(both > 0, 2 * counts[..., 1, 1] / both.clamp(min=1), torch.zeros_like(both))


def _matthews(predicted: torch.Tensor, labels: torch.Tensor, classes: int) -> torch.Tensor:
    counts = _counts(predicted, labels, classes)
    n, right = counts.sum((-1, -2)), counts.diagonal(dim1=-2, dim2=-1).sum(-1)
    said, true = counts.sum(-1), counts.sum(-2)
    spread = ((n**2 - said.square().sum(-1)) * (n**2 - true.square().sum(-1))).sqrt()
    value = (right * n - (said * true).sum(-1)) / spread.clamp(min=1e-12)
    return torch.where(spread > 0, value, torch.zeros_like(value))
