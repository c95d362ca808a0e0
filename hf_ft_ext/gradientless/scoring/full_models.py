"""The objective of one step by forward passes of the whole model."""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from hf_ft_ext.classifier_losses import returns_classifier_loss
from hf_ft_ext.errors import InputError
from hf_ft_ext.gradientless.scoring.objectives import Objective, check_labels, inferred_problem_type
from hf_ft_ext.label_tokens import IGNORED, label_count, other_labels
from hf_ft_ext.per_example.outputs import logits_of
from hf_ft_ext.per_example.state import evaluating

Batch = Mapping[str, torch.Tensor]
_LABELS = ("labels", "shift_labels")
# ends of the names of models with one vector of logits for each row
CLASSIFIERS = tuple(f"For{rows}Classification" for rows in ("Sequence", "Image", "Audio", "Video"))


@dataclass
class FullObjective:
    """The objective of a step's micro-batches.

    Attributes:
        value: returns the objective at the current weights as a scalar tensor.
        repeated: `repeated(n)` -> values `[n]`, float, of the batch repeated `n` times along the first dimension of
            all inputs (the whole batch, then the whole batch again), in one forward pass per micro-batch; `None` if
            that is not supported.
        row_passes: for each micro-batch a function that returns the loss of each row, `[rows]`, and the micro-batch's
            weight in the mean; `None` if the loss is known for whole batches only.
    """

    value: Callable[[], torch.Tensor]
    repeated: Callable[[int], torch.Tensor] | None = None
    row_passes: Sequence[tuple[Callable[[], torch.Tensor], float]] | None = None

    def rows_differ(self) -> bool | None:
        """Whether `value` is not the mean of the losses that `row_passes` return: a model may add terms to its loss.

        `None` if it cannot be told, as no row has a label.
        """
        if self.row_passes is None or not sum(weight for _, weight in self.row_passes):
            return None
        with torch.no_grad():
            means = [(losses().mean(), weight) for losses, weight in self.row_passes]
            value = self.value()
        mean = sum(float(mean) * weight for mean, weight in means) / sum(weight for _, weight in means)
        rtol = 1e-4 if value.dtype.itemsize > 2 else 3e-2
        return math.isfinite(float(value)) and not math.isclose(mean, float(value), rel_tol=rtol, abs_tol=1e-6)


def rows_of(batch: Batch) -> int:
    """Number of rows of a collated batch."""
    return len(next(iter(batch.values())))


def labels_of(batches: Sequence[Batch]) -> list[torch.Tensor]:
    """The labels of each batch, for objectives of logits and labels.

    Raises:
        InputError: a batch has no `labels`.
    """
    if missing := next((batch for batch in batches if "labels" not in batch), None):
        raise InputError(
            f"the objective compares logits with labels, and the batch has only: {', '.join(missing)}; use "
            "search_objective=loss, or add a column labels"
        )
    return [batch["labels"] for batch in batches]


def objective_of_logits(
    model: nn.Module, objective: Objective, batches: Sequence[Batch], of_rows: Objective | None = None
) -> FullObjective:
    """`objective` of the logits of all micro-batches together.

    If rows are sequences, they are padded to the longest one: labels with -100, logits with 0.

    Args:
        of_rows: the objective of each row, `[rows]`; `None` if it is not a mean over rows.
    """
    labels = _joined(labels_of(batches), 0)
    inputs = [_inputs(batch) for batch in batches]

    def value() -> torch.Tensor:
        return torch.as_tensor(objective(_joined([logits_of(model(**batch)) for batch in inputs], 0), labels))

    def repeated(n: int) -> torch.Tensor:
        parts = [logits_of(model(**repeat(batch, n))) for batch in inputs]
        logits = _joined([part.view(n, -1, *part.shape[1:]) for part in parts], 1)
        return torch.stack([torch.as_tensor(objective(one, labels)) for one in logits])

    if of_rows is None:
        return FullObjective(value, repeated)

    def losses(batch: Batch, own_labels: torch.Tensor) -> torch.Tensor:
        return of_rows(logits_of(model(**batch)), own_labels)

    passes = [
        (functools.partial(losses, own, batch["labels"]), float(rows_of(batch)))
        for own, batch in zip(inputs, batches, strict=True)
    ]
    return FullObjective(value, repeated, passes)


def has_usual_loss(model: nn.Module, batch: Batch) -> bool:
    """Whether a classifier of rows returns the loss of transformers' classifiers for this batch, or none.

    Raises:
        InputError: the labels do not fit the classifier.
    """
    config = (model.get_base_model() if hasattr(model, "get_base_model") else model).config
    labels = batch["labels"]
    check_labels(config, labels)
    problem_type = config.problem_type or inferred_problem_type(labels, config.num_labels)
    batches = [batch, {**batch, "labels": other_labels(labels, config.num_labels)}]
    with evaluating(model):
        return returns_classifier_loss(model, batches, problem_type)


def model_loss(
    compute: Callable[[Batch], torch.Tensor],
    batches: Sequence[Batch],
    shifted: bool,
    losses_of: Callable[[Mapping[str, Any], torch.Tensor, int], torch.Tensor] | None = None,
    of_rows: Callable[[Mapping[str, Any], torch.Tensor], torch.Tensor] | None = None,
) -> FullObjective:
    """Mean of the micro-batches' losses, weighted by label tokens (by rows if each row has one label).

    Args:
        compute: returns the mean loss of a batch.
        shifted: see `label_count`.
        losses_of: `losses_of(inputs, labels, n)` -> losses `[n]` of repeated inputs; `None` if not supported.
        of_rows: `of_rows(inputs, labels)` -> the loss of each row `[rows]`, with the batch's loss as mean; `None` if
            not supported.
    """
    counts = [label_count(batch, shifted) for batch in batches]
    counted = [(batch, count) for batch, count in zip(batches, counts, strict=True) if count]

    def mean(loss_of: Callable[[Batch], torch.Tensor]) -> torch.Tensor:
        if not counted:  # no label token in this step: loss 0, and weight 0 among the processes
            return torch.zeros(())
        # sum_b (n_b / n) loss_b
        return sum(loss_of(batch) * count for batch, count in counted) / sum(counts)

    def repeated(at_once: Callable[..., torch.Tensor], n: int) -> torch.Tensor:
        def losses(batch: Batch) -> torch.Tensor:
            return at_once(repeat(_inputs(batch), n), batch["labels"], n)

        return mean(losses)

    passes = None  # micro-batches without label tokens keep their place, with weight 0
    if of_rows is not None and all("labels" in batch and "shift_labels" not in batch for batch in batches):
        losses = [functools.partial(of_rows, _inputs(batch), batch["labels"]) for batch in batches]
        passes = list(zip(losses, map(float, counts), strict=True))
    return FullObjective(
        lambda: mean(compute), None if losses_of is None else functools.partial(repeated, losses_of), passes
    )


def language_losses(model: nn.Module, inputs: Mapping[str, Any], labels: torch.Tensor, n: int) -> torch.Tensor:
    """Losses `[n]` of a causal language model on a batch repeated `n` times."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    logits = model(**inputs).logits.view(n, *labels.shape, -1)
    return torch.stack([inner.loss_function(one, labels, vocab_size=one.shape[-1]) for one in logits])


def language_row_losses(model: nn.Module, inputs: Mapping[str, Any], labels: torch.Tensor) -> torch.Tensor:
    """The sum of a causal language model's token losses of each row, scaled so that their mean is the batch's loss.

    `[rows]`; 0 for a row without label tokens.
    """
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    logits = model(**inputs).logits
    labels = _behind_virtual_tokens(labels, logits)
    counts = [label_count({"labels": row[None]}, True) for row in labels]
    losses = logits.new_zeros(len(labels), dtype=torch.float64)
    for i, count in enumerate(counts):
        if count:
            one = inner.loss_function(logits[i : i + 1], labels[i : i + 1], vocab_size=logits.shape[-1])
            losses[i] = one.double() * count * len(labels) / sum(counts)
    return losses


def _behind_virtual_tokens(labels: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """Labels of as many tokens as the logits: those of virtual tokens before a row (prompt tuning) are ignored."""
    return functional.pad(labels, (logits.shape[1] - labels.shape[1], 0), value=IGNORED)


def repeat(batch: Batch, n: int) -> dict[str, Any]:
    """Repeat the batch `n` times along its rows; values that are not per row stay as they are."""
    rows, result = rows_of(batch), {}
    for key, value in batch.items():
        by_rows = isinstance(value, torch.Tensor) and value.ndim and len(value) == rows
        result[key] = value.repeat(n, *[1] * (value.ndim - 1)) if by_rows else value
    return result


def _inputs(batch: Batch) -> dict[str, Any]:
    return {key: value for key, value in batch.items() if key not in _LABELS}


def _joined(parts: list[torch.Tensor], dim: int) -> torch.Tensor:
    """Concatenate along `dim`; parts of unequal length in the next dimension are padded at the end."""
    if len(parts) == 1:
        return parts[0]
    if parts[0].ndim > dim + 1 and len({part.shape[dim + 1] for part in parts}) > 1:
        longest, trailing = max(part.shape[dim + 1] for part in parts), parts[0].ndim - dim - 2
        value = 0 if parts[0].is_floating_point() else IGNORED
        parts = [functional.pad(p, [0, 0] * trailing + [0, longest - p.shape[dim + 1]], value=value) for p in parts]
    return torch.cat(parts, dim)
