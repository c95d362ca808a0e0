"""Frozen linear layers that skip, in the backward pass, positions whose gradient is zero.

A classifier reads one position, so behind the last layer's attention the gradient of all others is exactly zero.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.autograd.function import once_differentiable

_STRIDE = 64  # columns that a first look skips
_FEW = 0.5  # share of positions up to which picking them pays


class _Linear(torch.autograd.Function):
    """`x W^T + b` of a frozen layer; the same gradient of `x` as autograd's."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(weight)
        return nn.functional.linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        (weight,) = ctx.saved_tensors
        flat = gradient.reshape(-1, gradient.shape[-1])
        if flat[:, ::_STRIDE].any(1).sum() <= _FEW * len(flat):
            rows = flat.any(1).nonzero().squeeze(1)
            if len(rows) <= _FEW * len(flat):
                result = flat.new_zeros(len(flat), weight.shape[1])
                result[rows] = flat[rows] @ weight
                return result.view(*gradient.shape[:-1], -1), None, None
        return gradient @ weight, None, None


@contextmanager
def skipping_zero_rows(model: nn.Module) -> Iterator[None]:
    """Inside, plain linear layers of `model` whose parameters need no gradient skip positions without gradient."""
    changed = []
    for module in model.modules():
        plain = type(module) is nn.Linear and "forward" not in vars(module) and module.weight.is_floating_point()
        if plain and not torch.is_autocast_enabled() and not any(p.requires_grad for p in module.parameters()):
            module.forward = _forward(module)
            changed.append(module)
    try:
        yield
    finally:
        for module in changed:
            del module.forward


def _forward(module: nn.Linear):
    def forward(input: torch.Tensor) -> torch.Tensor:
        trains = any(p.requires_grad for p in module.parameters())  # it may since it was changed
        if trains or not (torch.is_grad_enabled() and input.requires_grad):
            return nn.functional.linear(input, module.weight, module.bias)
        return _Linear.apply(input, module.weight, module.bias)

    return forward
