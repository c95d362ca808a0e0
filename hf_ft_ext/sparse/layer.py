"""A linear layer whose weight SparseGrad trains: the plain forward, the gradient in the Tucker basis."""

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from hf_ft_ext.sparse.basis import ACTIVATIONS, Basis


class SparseLinearFunction(torch.autograd.Function):
    """`y = x W^T + b`, with the weight's gradient `G` or, given the factors, `V^T G U`.

    The published layer keeps `V^T W U` and multiplies by three matrices in the forward pass. Here the weight
    stays as it is: the forward pass is one product, and the basis is met in the backward pass alone.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, out_factor, in_factor):
        ctx.save_for_backward(x, weight, out_factor, in_factor)
        ctx.bias_dtype = None if bias is None else bias.dtype
        return nn.functional.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output):
        x, weight, out_factor, in_factor = ctx.saved_tensors
        grad_x = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = grad_output @ weight.to(grad_output.dtype)
        grads, inputs = grad_output.reshape(-1, weight.shape[0]), x.reshape(-1, weight.shape[1])
        if ctx.needs_input_grad[1]:
            if out_factor is not None:
                grads, inputs = grads.to(out_factor.dtype) @ out_factor, inputs.to(in_factor.dtype) @ in_factor
            grad_weight = (grads.T @ inputs).to(weight.dtype)
        if ctx.needs_input_grad[2]:
            grad_bias = grad_output.reshape(-1, weight.shape[0]).sum(0).to(ctx.bias_dtype)
        return grad_x, grad_weight, grad_bias, None, None


class SparseGradLinear(nn.Linear):
    """`nn.Linear` for SparseGrad; `hf_ft_ext.SparseAdamW` updates `n_params` entries of its weight per step.

    Names and shapes of the parameters are those of `nn.Linear`, so a converted model saves as the plain one.
    A half-precision weight is kept in float32 (small updates would be rounded away) and cast for the product.

    While `basis.rotates == "activations"`, `weight.grad` holds `V^T G U` and not `G`: train the layer with
    `SparseAdamW` only.

    Attributes:
        basis: the factors, shared by all layers of one kind; not ready before the gradient pre-pass.
        n_params: entries of the rotated weight that one step updates.
        kind: name of the layer with layer numbers folded; layers of one kind share the basis.
        plain_dtype: dtype of the weight before the conversion.
    """

    basis: Basis
    n_params: int
    kind: str
    plain_dtype: torch.dtype

    @classmethod
    def from_linear(cls, linear: nn.Linear, basis: Basis, n_params: int, kind: str) -> "SparseGradLinear":
        """A layer that takes over the parameters of `linear` (no copy, unless they are half precision)."""
        layer = cls(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
        layer.weight, layer.bias, layer.plain_dtype = linear.weight, linear.bias, linear.weight.dtype
        if layer.weight.dtype in (torch.float16, torch.bfloat16):
            layer.weight = nn.Parameter(layer.weight.detach().float(), requires_grad=linear.weight.requires_grad)
        layer.basis, layer.n_params, layer.kind = basis, n_params, kind
        return layer.train(linear.training)

    def to_linear(self) -> nn.Linear:
        """The plain layer with the trained weight, in the dtype it had before the conversion."""
        linear = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        linear.weight, linear.bias = self.weight, self.bias
        if self.weight.dtype != self.plain_dtype:
            weight = self.weight.detach().to(self.plain_dtype)
            linear.weight = nn.Parameter(weight, requires_grad=self.weight.requires_grad)
        return linear.train(self.training)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Shape (..., in) -> (..., out), in the dtype of `x` (or of autocast)."""
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        rotate = self.basis.ready and self.basis.rotates == ACTIVATIONS
        factors = (self.basis.out_factor, self.basis.in_factor) if rotate else (None, None)
        return SparseLinearFunction.apply(x, self.weight, self.bias, *factors)

    def value_gradient(self, indices: torch.Tensor | None = None) -> torch.Tensor:
        """`V^T G U` from the accumulated `weight.grad`: shape (out, in), or (k,) at the flat `indices`."""
        gradient = self.weight.grad
        rotated = gradient if self.basis.rotates == ACTIVATIONS else self.basis.rotate(gradient)
        return rotated if indices is None else rotated.flatten()[indices.long()]

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, n_params={self.n_params}"
