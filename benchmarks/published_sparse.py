"""SparseGrad's algorithm as its authors published it, written anew for comparison only.

The layer keeps the rotated weight and multiplies by three matrices in the forward pass; the gradient of the
rotated weight is cut to its k largest entries in every backward pass and handed on as a sparse tensor; SparseAdam
keeps dense moments. (Described in arXiv 2410.07383 and its repository, sayankotor/sparse_grads.)
"""

import torch
from torch import nn
from torch.autograd.function import once_differentiable


class _Function(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, rotated, bias, out_factor, in_factor, k):
        ctx.save_for_backward(x, rotated, out_factor, in_factor)
        ctx.k, ctx.has_bias = k, bias is not None
        return x @ in_factor @ rotated.T @ out_factor.T + (0 if bias is None else bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output):
        x, rotated, out_factor, in_factor = ctx.saved_tensors
        grads = grad_output @ out_factor
        grad_x = grads @ rotated @ in_factor.T
        dense = grads.reshape(-1, rotated.shape[0]).T @ (x @ in_factor).reshape(-1, rotated.shape[1])
        indices = dense.abs().flatten().topk(ctx.k).indices
        rows, columns = indices // dense.shape[1], indices % dense.shape[1]
        sparse = torch.sparse_coo_tensor(
            torch.stack([rows, columns]), dense.flatten()[indices], dense.shape, check_invariants=False
        )
        grad_bias = grad_output.reshape(-1, rotated.shape[0]).sum(0) if ctx.has_bias else None
        return grad_x, sparse, grad_bias, None, None, None


class PublishedLinear(nn.Module):
    """A linear layer in rotated coordinates; `rotated` takes sparse gradients."""

    def __init__(self, linear: nn.Linear, out_factor: torch.Tensor, in_factor: torch.Tensor, k: int):
        super().__init__()
        dtype = linear.weight.dtype
        self.out_factor, self.in_factor, self.k = out_factor.to(dtype), in_factor.to(dtype), k
        self.rotated = nn.Parameter(self.out_factor.T @ linear.weight.detach() @ self.in_factor)
        self.bias = linear.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _Function.apply(x, self.rotated, self.bias, self.out_factor, self.in_factor, self.k)
