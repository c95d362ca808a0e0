"""Matrix products with frozen weights, by the faster of torch's CPU libraries."""

import torch
from torch import nn

_LARGE = 2**24  # multiplications above which oneDNN's overhead per call is small
# Features above which the gain is worth the memory. oneDNN keeps about half a megabyte for each distinct number of
# rows. That is a third of the memory of training an encoder with 384 features, and little for one with 768.
_WIDE = 512
_PLAIN = (torch.Tensor, nn.Parameter)


def onednn_is_faster(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether `linear` calls oneDNN for `x`, shape (..., in), and `weight`, shape (out, in).

    For single precision on the CPU torch uses MKL. It is about 10 % slower than oneDNN on AVX-512 processors of other
    vendors than Intel, and as fast on Intel's. The operator is the one that `torch.compile` calls.
    """
    return (
        x.dtype is torch.float32
        and weight.dtype is torch.float32
        and x.device.type == "cpu"
        and type(x) in _PLAIN
        and type(weight) in _PLAIN
        and min(weight.shape) >= _WIDE
        and x.numel() * weight.shape[0] >= _LARGE
        and torch.backends.mkldnn.is_available()
        and torch.backends.mkldnn.enabled
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`x W^T + b`, shape (..., out), as `torch.nn.functional.linear`, without a gradient."""
    if onednn_is_faster(x, weight):
        y = torch.ops.mkldnn._linear_pointwise(x.reshape(-1, x.shape[-1]), weight, bias, "none", [], "")
    else:
        y = nn.functional.linear(x, weight, bias)
        if torch.compiler.is_compiling() or not y._is_view():
            return y
    # Not a view: models may change it in place, which autograd forbids for a view that a function returns.
    return torch.ops.aten._unsafe_view(y, [*x.shape[:-1], len(weight)])
