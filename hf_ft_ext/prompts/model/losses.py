"""The losses of prompt models, from the logits of the label words."""

import torch
from torch.nn import functional

from hf_ft_ext.prompts.readout import wide


def class_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Cross-entropy over the label words. `logits`: `[rows, words]`; `labels`: `[rows]`, class ids."""
    return functional.cross_entropy(wide(logits), labels.reshape(-1))


def scale_loss(logits: torch.Tensor, labels: torch.Tensor, bounds: tuple[float, float]) -> torch.Tensor:
    """Mean over rows of `KL(target || softmax(logits))`; the target of word 1 is the label's position on the scale.

    Args:
        logits: `[rows, 2]`, logits of the words of the lower and the upper end.
        labels: `[rows]`, numbers.
        bounds: the ends of the scale, in the labels' units.
    """
    low, high = bounds
    logits = wide(logits)
    position = ((labels.to(logits.dtype).reshape(-1) - low) / (high - low)).clamp(0, 1)
    target = torch.stack([1 - position, position], -1)
    return functional.kl_div(logits.log_softmax(-1), target, reduction="batchmean")
