"""The products of a structured SparseGrad layer: `y = W x + V_r D U_c^T x` and its gradients.

Rows are tokens: `x` (tokens, in), `g = dL/dy` (tokens, out), `V` (out, r), `U` (in, c), `D` (r, c). For the backward
pass only the narrow `x U` is kept, not `x`:

    dL/dD = (g V)^T (x U),    dL/dx = g W + (g V) D U^T

The change of the weight can be applied in two ways, and each pass takes the one with fewer multiplications:

- by product: `x W^T + ((x U) D^T) V^T`; the additional cost grows with the number of tokens.
- by weight: `W + V D U^T` is computed, used in one product and dropped; the additional cost does not depend on the
  number of tokens.

Both depend on `W` and `D` alone, so nothing has to be undone when an adapter is switched off or saved.

Tokens whose output gradient is zero add nothing to either gradient. Where there are many, as padding and in the last
layer of a model that reads out one token, the backward pass leaves them out.
"""

from collections.abc import Callable

import torch
from torch.autograd.function import once_differentiable

from hf_ft_ext.products import linear, onednn_is_faster


def change_of_weight(values: torch.Tensor, out_columns: torch.Tensor, in_columns: torch.Tensor) -> torch.Tensor:
    """`V D U^T`, shape (out, in)."""
    left, right = _thin_factors(values, out_columns, in_columns)
    return left @ right.T


def by_weight_is_cheaper(tokens: int, values: torch.Tensor, n_out: int, n_in: int, backward: bool) -> bool:
    """Whether forming `W + V D U^T` costs fewer multiplications than the products for so many tokens."""
    r, c = values.shape
    # Forward: x U is computed in any case, for the gradient of D; then ((x U) D^T) V^T, or (x U) (V D)^T.
    # Backward: g V is computed in any case; then the same with U and V exchanged.
    if backward:
        per_token, once = (r * n_in, r * c * n_in) if r < c else (r * c + c * n_in, 0)
    else:
        per_token, once = (c * r + r * n_out, 0) if r <= c else (c * n_out, n_out * r * c)
    form = n_out * n_in * min(r, c) + r * c * (n_in if r <= c else n_out)
    # The weight is also read, written and read again once: about as slow as `_COPY` multiplications per entry.
    return form + _COPY * n_out * n_in < tokens * per_token + once


_COPY = 32


class ChangedLinear(torch.autograd.Function):
    """`y = x (W + V D U^T)^T + b` of a frozen floating-point `W` (out, in) and `b`; gradients for `x` and `D`."""

    @staticmethod
    def forward(ctx, x, weight, bias, values, out_columns, in_columns):
        n_out, n_in = weight.shape
        flat, dtype = x.reshape(-1, n_in), x.dtype
        d, v, u = (part.to(dtype) for part in (values, out_columns, in_columns))
        by_weight = by_weight_is_cheaper(len(flat), values, n_out, n_in, backward=False)
        trains = ctx.needs_input_grad[3]
        narrow = project(flat, u) if trains or not by_weight else None  # x U
        bias = None if bias is None else bias.to(dtype)
        used = _changed(weight, d, v, u) if by_weight else weight.to(dtype)
        y = _new_output(x, used, bias)  # x (W + V D U^T)^T + b, or x W^T + b
        if not by_weight:
            _add_change(y.view(-1, n_out), narrow, d, v)  # + (x U) D^T V^T
        ctx.save_for_backward(narrow if trains else None, weight, values, out_columns, in_columns)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output):
        narrow, weight, values, out_columns, in_columns = ctx.saved_tensors
        n_out, n_in = weight.shape
        grads, dtype = grad_output.reshape(-1, n_out), grad_output.dtype
        d, v, u = (part.to(dtype) for part in (values, out_columns, in_columns))
        grad_x = grad_values = None
        tokens, kept = len(grads), tokens_with_gradient(grads)
        if kept is not None:
            grads, narrow = grads[kept], None if narrow is None else narrow[kept]
        narrow_grads = project(grads, v)  # g V
        if ctx.needs_input_grad[3]:
            grad_values = (narrow_grads.T @ narrow.to(dtype)).to(values.dtype)  # (g V)^T (x U)
        if ctx.needs_input_grad[0]:
            if by_weight_is_cheaper(len(grads), values, n_out, n_in, backward=True):
                grad_x = linear(grads, _changed(weight, d, v, u).T)  # g (W + V D U^T)
            else:
                grad_x = linear(grads, weight.to(dtype).T)  # g W
                _add_change(grad_x, narrow_grads, d.T, u)  # + (g V) D U^T
            grad_x = _scatter_rows(grad_x, kept, tokens).view(*grad_output.shape[:-1], n_in)
        return grad_x, None, None, grad_values, None, None


def tokens_with_gradient(grads: torch.Tensor, wait: bool = False) -> torch.Tensor | None:
    """Indices of the rows of `grads`, shape (tokens, features), that are not zero; `None` where they are most.

    Args:
        wait: ask on accelerators too, which have to finish all earlier work to answer.
    """
    known = type(grads) is torch.Tensor and (wait or grads.device.type == "cpu")
    if not known or not grads.numel() or torch.compiler.is_compiling():
        return None
    # Some columns first: where they show a gradient in most rows, that is all that is read.
    some = grads[:, :: max(grads.shape[1] // _PROBED, 1)]
    most = _MOST * len(grads)
    if int((some != 0).any(1).sum()) > most:
        return None
    # Six times faster than `(grads != 0).any(1)`, and a NaN counts too.
    kept = ((grads.amax(1) != 0) | (grads.amin(1) != 0)).nonzero().squeeze(1)
    return kept if len(kept) <= most else None


_PROBED = 16  # columns
_MOST = 0.75


def project(rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """`rows columns`, as the transpose of a product: with few columns, CPUs are up to 1.4 times faster that way."""
    return (columns.T @ rows.T).T


class AddedChange(torch.autograd.Function):
    """`y + x U D^T V^T` for the output `y` of any layer (quantized, or with adapters); gradients for `y`, `x`, `D`."""

    @staticmethod
    def forward(ctx, y, x, values, out_columns, in_columns):
        flat = x.reshape(-1, x.shape[-1]).to(y.dtype)
        d, v, u = (part.to(y.dtype) for part in (values, out_columns, in_columns))
        narrow = project(flat, u)
        ctx.save_for_backward(narrow, values, out_columns, in_columns)
        ctx.x_dtype = x.dtype
        result = y.clone(memory_format=torch.contiguous_format)
        _add_change(result.view(-1, y.shape[-1]), narrow, d, v)  # y + (x U) D^T V^T
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output):
        narrow, values, out_columns, in_columns = ctx.saved_tensors
        grads, dtype = grad_output.reshape(-1, grad_output.shape[-1]), grad_output.dtype
        d, v, u = (part.to(dtype) for part in (values, out_columns, in_columns))
        narrow_grads = project(grads, v)
        grad_x = grad_values = None
        if ctx.needs_input_grad[2]:
            grad_values = (narrow_grads.T @ narrow.to(dtype)).to(values.dtype)  # (g V)^T (x U)
        if ctx.needs_input_grad[1]:  # (g V) D U^T
            by_rows = d.shape[0] <= d.shape[1]
            grad_x = narrow_grads @ (u @ d.T).T if by_rows else (narrow_grads @ d) @ u.T
            grad_x = grad_x.view(*grad_output.shape[:-1], u.shape[0]).to(ctx.x_dtype)
        return grad_output, grad_x, grad_values, None, None


Observer = Callable[[torch.Tensor, torch.Tensor], None]


class ObservedLinear(torch.autograd.Function):
    """`y = x W^T + b` of a frozen floating-point `W` (out, in) and `b`; the backward pass is `observe`d.

    Args:
        probe: a parameter that trains, so that there is a backward pass at all; it gets no gradient.
        observe: gets inputs (tokens, in) and output gradients (tokens, out), tokens without a gradient left out
            where they are many.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, probe, observe: Observer):
        ctx.save_for_backward(x, weight)
        ctx.observe = observe
        return _new_output(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output):
        x, weight = ctx.saved_tensors
        rows, grads, kept = _observe(ctx.observe, x, grad_output)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = _scatter_rows(linear(grads, weight.to(grads.dtype).T), kept, rows).view(x.shape)
        return grad_x, None, None, None, None


class Observed(torch.autograd.Function):
    """`y` as it is, the output of any layer; the backward pass is observed, as in `ObservedLinear`."""

    @staticmethod
    def forward(ctx, y, x, probe, observe: Observer):
        ctx.save_for_backward(x)
        ctx.observe = observe
        return y.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output):
        (x,) = ctx.saved_tensors
        _observe(ctx.observe, x, grad_output)
        return grad_output, None, None, None


def _thin_factors(values: torch.Tensor, out_columns: torch.Tensor, in_columns: torch.Tensor) -> tuple:
    """`(L, R)` with `L R^T = V D U^T` and min(r, c) columns each."""
    if values.shape[0] <= values.shape[1]:
        return out_columns, in_columns @ values.T
    return out_columns @ values, in_columns


def _scatter_rows(kept_rows: torch.Tensor, kept: torch.Tensor | None, tokens: int) -> torch.Tensor:
    """The rows at the indices `kept`, with zeros elsewhere, shape (tokens, features)."""
    if kept is None:
        return kept_rows
    return kept_rows.new_zeros(tokens, kept_rows.shape[1]).index_copy_(0, kept, kept_rows)


def _new_output(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """`x W^T + b`, not as a view: some models (Falcon) change it in place, which autograd forbids for views."""
    if onednn_is_faster(x, weight):
        return linear(x, weight, bias)
    y = x.new_empty(*x.shape[:-1], len(weight))
    flat, rows = x.reshape(-1, x.shape[-1]), y.view(-1, len(weight))
    torch.mm(flat, weight.T, out=rows) if bias is None else torch.addmm(bias, flat, weight.T, out=rows)
    return y


def _changed(weight: torch.Tensor, d: torch.Tensor, v: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    """`W + V D U^T` as a new tensor."""
    left, right = _thin_factors(d, v, u)
    return torch.addmm(weight.to(d.dtype), left, right.T)


def _add_change(y: torch.Tensor, narrow: torch.Tensor, d: torch.Tensor, v: torch.Tensor) -> None:
    """`y += narrow D^T V^T` in place, for `narrow` (tokens, c), `D` (r, c) and `V` (out, r)."""
    if d.shape[0] <= d.shape[1]:
        y.addmm_(narrow @ d.T, v.T)
    else:
        y.addmm_(narrow, (v @ d).T)


def _observe(observe: Observer, x: torch.Tensor, grad_output: torch.Tensor) -> tuple:
    """Number of tokens, the output gradients that `observe` was given, and their indices if some were left out."""
    flat, grads = x.reshape(-1, x.shape[-1]), grad_output.reshape(-1, grad_output.shape[-1])
    tokens, kept = len(grads), tokens_with_gradient(grads, wait=True)
    if kept is not None:
        flat, grads = flat[kept], grads[kept]
    observe(flat, grads)
    return tokens, grads, kept
