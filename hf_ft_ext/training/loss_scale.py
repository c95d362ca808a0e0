"""Keeping the loss scale of classification heads independent of gradient accumulation and process count."""

from torch import nn

_MEAN_LOSS = "ForSequenceClassification"


def declare_mean_loss(model: nn.Module) -> None:
    """Tell `Trainer` that a sequence-classification head averages its loss over the micro-batch it gets.

    transformers 5 assumes that any forward with `**kwargs` divides by the label count of the whole step.
    Classification heads ignore that count. Without this switch their loss and gradients grow with the number of
    micro-batches and of processes (transformers issue #47688). `accepts_loss_kwargs` is transformers' own switch.
    """
    if type(model).__name__.endswith(_MEAN_LOSS):
        model.accepts_loss_kwargs = False
