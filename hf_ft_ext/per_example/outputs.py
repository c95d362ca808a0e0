"""Loss and logits of what a model returns: an output of transformers, a dict, or a tuple of loss and logits."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from hf_ft_ext.errors import InputError


def loss_of(output: Any) -> torch.Tensor | None:
    """The loss; `None` if there is none. In a tuple it is the first entry, if that is a scalar."""
    if isinstance(output, tuple | list):
        first = output[0] if output else None
        return first if isinstance(first, torch.Tensor) and not first.ndim else None
    return output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)


def logits_of(output: Any) -> torch.Tensor:
    """The logits. In a tuple they are the first entry that is not a scalar.

    Raises:
        InputError: there are none.
    """
    if isinstance(output, torch.Tensor):
        return output
    if isinstance(output, tuple | list):
        found = next((part for part in output if isinstance(part, torch.Tensor) and part.ndim), None)
    else:
        found = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    if found is None:
        raise InputError(
            f"the model returns a {type(output).__name__} without logits; return an output of transformers, a dict "
            "with 'logits', or a tuple of loss and logits"
        )
    return found


def logits(model: nn.Module, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Return the logits of `model(**batch)`, called without labels: `[n, classes]`."""
    return logits_of(model(**{key: value for key, value in batch.items() if key != "labels"}))
