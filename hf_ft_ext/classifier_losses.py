"""The loss of transformers' classifiers of rows: its value for each row, and whether a model returns this loss."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from hf_ft_ext.label_tokens import spread_logits
from hf_ft_ext.per_example.outputs import logits_of, loss_of
from hf_ft_ext.problem_types import MULTI_LABEL, REGRESSION


def classifier_losses(logits: torch.Tensor, labels: torch.Tensor, problem_type: str) -> torch.Tensor:
    """Loss of each row, in the type of the logits: `[..., rows, classes]` -> `[..., rows]`.

    Args:
        labels: class ids `[rows]`, numbers, or 0 and 1 for each label `[rows, classes]`.
    """
    if problem_type == REGRESSION:  # mean over outputs of (f - y)^2
        return (logits - labels.to(logits.dtype).reshape(logits.shape[-2], -1)).square().mean(-1)
    if problem_type == MULTI_LABEL:  # mean over labels k of -(y_k log p_k + (1 - y_k) log(1 - p_k))
        targets = labels.to(logits.dtype).expand_as(logits)
        return functional.binary_cross_entropy_with_logits(logits, targets, reduction="none").mean(-1)
    classes = labels.reshape(-1).expand(logits.shape[:-1])
    losses = functional.cross_entropy(logits.flatten(0, -2), classes.flatten(), reduction="none")  # -log p_y
    return losses.view(logits.shape[:-1])


def returns_classifier_loss(model: nn.Module, batches: Iterable[Mapping[str, Any]], problem_type: str) -> bool:
    """Whether a classifier's loss of each of these batches is the mean of `classifier_losses`, or it returns no loss.

    A subclass may weigh the classes in its forward, and a model may have its `loss_function` replaced. Class weights
    have no effect on equal logits, so the logits are changed. They have none on rows of one class either: pass batches
    with other labels too.
    """
    config = (model.get_base_model() if hasattr(model, "get_base_model") else model).config
    before = config.problem_type
    try:
        with torch.no_grad(), spread_logits(model, config.num_labels):
            return all(_has_this_loss(model(**batch), batch["labels"], problem_type) for batch in batches)
    finally:
        config.problem_type = before  # transformers stores what it infers from the labels


def _has_this_loss(output: Any, labels: torch.Tensor, problem_type: str) -> bool:
    loss = loss_of(output)
    if loss is None:
        return True
    logits = logits_of(output)
    rtol = 1e-4 if logits.dtype.itemsize > 2 else 3e-2
    losses = classifier_losses(logits.to(torch.promote_types(logits.dtype, torch.float32)), labels, problem_type)
    return torch.allclose(losses.mean().double(), loss.double().reshape(()), rtol=rtol, atol=1e-6, equal_nan=True)
