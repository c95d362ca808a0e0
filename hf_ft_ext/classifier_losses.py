"""The loss of transformers' classifiers of rows, for each row."""

import torch
from torch.nn import functional

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
