"""Shortcuts for classifiers that read one position: the other positions of the last layer have zero gradient."""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from hf_ft_ext.products import linear

# --- the last layer's feed-forward part on the first position only ----------------------------------
# transformers runs this part through `apply_chunking_to_forward`, so it treats each position independently.


def last_feed_forward(model: nn.Module) -> nn.Module | None:
    """Return the last module of `model` with an unchunked `feed_forward_chunk`, or `None` if there is none."""
    found: nn.Module | None = None
    for module in model.modules():
        part = getattr(type(module), "feed_forward_chunk", None)
        if part is not None and len(inspect.signature(part).parameters) == 2:  # self, and one input
            found = module
    if found is None or bool(getattr(found, "chunk_size_feed_forward", 0)) or getattr(found, "seq_len_dim", 1) != 1:
        return None
    return found


@contextmanager
def first_position_only(layer: nn.Module | None) -> Iterator[None]:
    """Inside, `layer` returns NaN for all positions but the first, so reading another position shows in the result."""
    if layer is None:
        yield
        return
    full = layer.feed_forward_chunk

    def first(hidden: torch.Tensor) -> torch.Tensor:
        read = full(hidden[:, :1].contiguous())  # torch rounds differently for non-contiguous slices
        return torch.cat(
            [read, read.new_full((*hidden.shape[:1], hidden.shape[1] - 1, *read.shape[2:]), torch.nan)], 1
        )

    layer.feed_forward_chunk = first
    try:
        yield
    finally:
        del layer.feed_forward_chunk


# --- frozen linear layers that skip positions whose gradient is zero ----------------------------------

_STRIDE = 64  # the first check looks at every 64th column
_FEW = 0.5  # up to this share of non-zero positions, selecting them is cheaper


class _Linear(torch.autograd.Function):
    """`y = x W^T + b` of a frozen layer, with `dL/dx = dL/dy W` for the positions where `dL/dy` is not zero."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(weight)
        return linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        (weight,) = ctx.saved_tensors
        flat = gradient.reshape(-1, gradient.shape[-1])
        if flat[:, ::_STRIDE].any(1).sum() <= _FEW * len(flat):
            rows = flat.any(1).nonzero().squeeze(1)
            if len(rows) <= _FEW * len(flat):
                result = flat.new_zeros(len(flat), weight.shape[1])
                result[rows] = flat[rows] @ weight  # not `linear`: oneDNN would compile for each number of rows
                return result.view(*gradient.shape[:-1], -1), None, None
        # Flattened: torch would multiply a batch of matrices in another memory order one by one.
        return linear(flat, weight.t()).view(*gradient.shape[:-1], -1), None, None


@contextmanager
def skipping_zero_rows(model: nn.Module) -> Iterator[None]:
    """Inside, frozen plain linear layers of `model` skip positions whose output gradient is zero.

    This applies on the CPU only: elsewhere checking the gradient costs more than the product.
    """
    changed = []
    for module in model.modules():
        plain = type(module) is nn.Linear and "forward" not in vars(module) and module.weight.is_floating_point()
        if not plain or module.weight.device.type != "cpu" or torch.is_autocast_enabled("cpu"):
            continue
        if not any(p.requires_grad for p in module.parameters()):
            module.forward = _forward(module)
            changed.append(module)
    try:
        yield
    finally:
        for module in changed:
            del module.forward


def _forward(module: nn.Linear):
    def forward(input: torch.Tensor) -> torch.Tensor:
        trains = any(p.requires_grad for p in module.parameters())  # may have changed since the forward was replaced
        if trains or not (torch.is_grad_enabled() and input.requires_grad):
            return nn.functional.linear(input, module.weight, module.bias)
        return _Linear.apply(input, module.weight, module.bias)

    return forward
