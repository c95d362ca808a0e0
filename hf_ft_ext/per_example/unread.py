"""The last layer's feed-forward part for the first position alone, where a classifier reads no other.

transformers runs this part through `apply_chunking_to_forward`, so it takes each position by itself.
"""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


def last_feed_forward(model: nn.Module) -> nn.Module | None:
    """The last module of `model` with such a part that is run in one piece; `None` if there is none."""
    found = None
    for module in model.modules():
        part = getattr(type(module), "feed_forward_chunk", None)
        if part is not None and len(inspect.signature(part).parameters) == 2:  # self, and one input
            found = module
    if found is None or getattr(found, "chunk_size_feed_forward", 0) or getattr(found, "seq_len_dim", 1) != 1:
        return None
    return found


@contextmanager
def first_position_only(layer: nn.Module | None) -> Iterator[None]:
    """Inside, `layer` gives NaN for all positions but the first: who reads one of them cannot fail to notice."""
    if layer is None:
        yield
        return
    whole = layer.feed_forward_chunk

    def first(hidden: torch.Tensor) -> torch.Tensor:
        read = whole(hidden[:, :1].contiguous())  # torch takes other ways, with other rounding, for slices
        return torch.cat(
            [read, read.new_full((*hidden.shape[:1], hidden.shape[1] - 1, *read.shape[2:]), torch.nan)], 1
        )

    layer.feed_forward_chunk = first
    try:
        yield
    finally:
        del layer.feed_forward_chunk
