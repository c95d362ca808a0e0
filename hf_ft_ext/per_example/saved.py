"""The memory of what autograd saves in a forward pass."""

import contextlib
from collections.abc import Iterator

import torch
from torch import nn


@contextlib.contextmanager
def saved_bytes(model: nn.Module) -> Iterator[dict[int, int]]:
    """Within this context, record the bytes of tensors that autograd saves for the backward pass, except weights.

    The sizes are those of the tensors' memory, by its address, so that views of one memory count once.
    """
    saved: dict[int, int] = {}
    weights: set[int] = set()

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if not weights:  # not earlier: weights may be converted inside the context
            weights.update(p.untyped_storage().data_ptr() for p in model.parameters())
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield saved
