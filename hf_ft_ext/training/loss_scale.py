"""The scale of losses over micro-batches and processes: mean losses, and the labels that they are means over."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

_MEAN_LOSS = "ForSequenceClassification"
_IGNORED = -100  # the label of tokens that are ignored, as in transformers


def declare_mean_loss(model: nn.Module) -> None:
    """Tell `Trainer` that a sequence-classification head averages its loss over the micro-batch it gets.

    transformers 5 assumes that any forward with `**kwargs` divides by the label count of the whole step.
    Classification heads ignore that count. Without this switch their loss and gradients grow with the number of
    micro-batches and of processes (transformers issue #47688). `accepts_loss_kwargs` is transformers' own switch.
    """
    if type(model).__name__.endswith(_MEAN_LOSS):
        model.accepts_loss_kwargs = False


def predicts_next_tokens(model: nn.Module) -> bool:
    """Whether the loss is that of a causal language model, which does not predict the first label of a row."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    return type(inner).__name__.endswith(("ForCausalLM", "LMHeadModel"))


def label_count(batch: Mapping[str, Any], shifted: bool) -> int:
    """Number of labels that a batch's mean loss is a mean over: label tokens, or rows if a row has one label.

    It is the weight of the loss in the mean over several batches: `sum_b (n_b / n) loss_b`.

    Args:
        shifted: whether each token is predicted from those before it (see `predicts_next_tokens`), so that the first
            label of a row is not used.
    """
    labels = batch.get("shift_labels")
    shifted = shifted and labels is None
    labels = batch.get("labels") if labels is None else labels
    if not isinstance(labels, torch.Tensor) or labels.ndim < 2 or labels.is_floating_point():
        return len(next(iter(batch.values())))
    return int((labels[..., 1:] if shifted else labels).ne(_IGNORED).sum())
