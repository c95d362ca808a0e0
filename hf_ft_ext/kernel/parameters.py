"""Which parameters a kernel is taken over."""

import re

from torch import nn

from hf_ft_ext.errors import InputError
from hf_ft_ext.features import encoder_path


def kernel_parameters(
    model: nn.Module,
    pattern: str | None = None,
    exclude_embeddings: bool = False,
    exclude_head: bool = False,
    only_biases: bool = False,
) -> dict[str, nn.Parameter]:
    """The chosen parameters by name: those that require gradients, so of a PEFT model the adapter's.

    Args:
        pattern: regular expression that has to be found in a parameter's name.
        exclude_embeddings: leave out all embedding tables (and with a table the decoder that is tied to it), and what
            is named after them, as the published code does: the norm of BERT's embeddings, for example.
        exclude_head: leave out what lies outside the base model.
        only_biases: only parameters whose last name is `bias`.

    Raises:
        InputError: no regular expression, or nothing is left.
    """
    chosen = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not chosen:
        raise InputError("the model has no trainable parameter to take a kernel over; unfreeze some")
    if pattern is not None:
        try:
            chosen = {name: p for name, p in chosen.items() if re.search(pattern, name)}
        except re.error as error:
            raise InputError(f"kernel_parameters={pattern!r} is no regular expression: {error}") from None
    if exclude_embeddings:
        tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
        chosen = {name: p for name, p in chosen.items() if id(p) not in tables and "embed" not in name}
    if exclude_head:
        inner = model.get_base_model() if hasattr(model, "get_base_model") else model
        path = encoder_path(inner)
        if path is None:
            raise InputError(f"exclude_head: {type(inner).__name__} does not say which part is its base model")
        body = {id(p) for p in inner.get_submodule(path).parameters()}
        chosen = {name: p for name, p in chosen.items() if id(p) in body}
    if only_biases:
        chosen = {name: p for name, p in chosen.items() if name.rpartition(".")[2] == "bias"}
    if not chosen:
        settings = {
            "kernel_parameters": pattern,
            "exclude_embeddings": exclude_embeddings,
            "exclude_head": exclude_head,
            "only_biases": only_biases,
        }
        given = ", ".join(f"{key}={value!r}" for key, value in settings.items() if value)
        raise InputError(f"{given}: no trainable parameter is left; some are {', '.join(_some(model))}")
    return chosen


def _some(model: nn.Module) -> list[str]:
    return [name for name, p in model.named_parameters() if p.requires_grad][-3:]
