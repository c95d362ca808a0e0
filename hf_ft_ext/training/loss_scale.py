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


def predicts_next_tokens(model: nn.Module) -> bool:
    """Whether the loss is that of a causal language model, which does not predict the first label of a row."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    return type(inner).__name__.endswith(("ForCausalLM", "LMHeadModel"))
