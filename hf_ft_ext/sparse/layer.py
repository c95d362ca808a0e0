"""A linear layer whose weight SparseGrad trains: plain forward pass, gradient in the Tucker basis."""

import math

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from transformers.pytorch_utils import Conv1D

from hf_ft_ext.adapters.sparse_grad.config import block_shape
from hf_ft_ext.files import tensor_hash
from hf_ft_ext.sparse.basis import ACTIVATIONS, Basis
from hf_ft_ext.sparse.fixed import FixedSupport


class SparseLinearFunction(torch.autograd.Function):
    """`y = x W^T + b`; the weight's gradient is `G` or, if the factors are given, `V^T G U`.

    Shapes: `x` (..., in), `W` (out, in), `y` (..., out), `V` (out, out), `U` (in, in).

    The published layer stores `V^T W U` and multiplies by three matrices in the forward pass. This one stores `W`:
    the forward pass is one product, and only the backward pass uses the basis.
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
            grad_x = grad_output @ weight.to(grad_output.dtype)  # g W
        grads, inputs = grad_output.reshape(-1, weight.shape[0]), x.reshape(-1, weight.shape[1])
        if ctx.needs_input_grad[1]:
            if out_factor is not None:
                # V^T G U = (g V)^T (x U), with G = g^T x
                grads, inputs = grads.to(out_factor.dtype) @ out_factor, inputs.to(in_factor.dtype) @ in_factor
            grad_weight = (grads.T @ inputs).to(weight.dtype)  # g^T x, or (g V)^T (x U)
        if ctx.needs_input_grad[2]:
            grad_bias = grad_output.reshape(-1, weight.shape[0]).sum(0).to(ctx.bias_dtype)  # sum_t g_t
        return grad_x, grad_weight, grad_bias, None, None


class FixedEntriesFunction(torch.autograd.Function):
    """`y = x W^T + b`, with the gradient of `k` fixed entries of `V^T W U` instead of one of size (out, in).

    With short batches and small blocks (route `"activations"`), only `x U_c` is saved for the backward pass.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, values, support, layer):
        flat = x.detach().reshape(-1, weight.shape[1])
        ctx.route = support.cheaper_route(*weight.shape, len(flat))
        ctx.save_for_backward(support.project_input(flat) if ctx.route == ACTIVATIONS else flat, weight)
        ctx.support, ctx.layer, ctx.values_dtype = support, layer, values.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        return nn.functional.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output):
        inputs, weight = ctx.saved_tensors
        support, grads = ctx.support, grad_output.reshape(-1, weight.shape[0])
        grad_x = grad_bias = grad_values = None
        if ctx.needs_input_grad[0]:
            grad_x = grad_output @ weight.to(grad_output.dtype)  # g W
        if ctx.needs_input_grad[2]:
            grad_bias = grads.sum(0).to(ctx.bias_dtype)  # sum_t g_t
        if ctx.needs_input_grad[3]:
            if ctx.route == ACTIVATIONS:
                block = support.project_output(grads).T @ inputs  # (g V_r)^T (x U_c)
            else:
                block = support.block_of(grads.T @ inputs)  # V_r^T (g^T x) U_c
            grad_values = support.pick(block).to(ctx.values_dtype)
            if ctx.layer is not None:
                ctx.layer.may_have_changed = True  # an optimizer step will follow
        return grad_x, None, grad_bias, grad_values, None, None


class SparseGradLinear(nn.Linear):
    """`nn.Linear` for SparseGrad; `hf_ft_ext.SparseAdamW` updates `n_params` entries of its weight per step.

    Parameters have the names and shapes of `nn.Linear`, so a converted model saves as the plain one. A half-precision
    weight is kept in float32, because small updates would be rounded away, and cast for the product.

    Dynamic support: `weight` trains, and the optimizer chooses the entries at each step. While
    `basis.rotates == "activations"`, `weight.grad` holds `V^T G U` and not `G`: train the layer with `SparseAdamW`
    only. Fixed support: `weight` is frozen, and the parameter is `values`, the chosen entries of `V^T W U`. Their
    changes are added to `weight` by `SparseAdamW`, and those by other code in the next forward pass (not if compiled).

    Attributes:
        values: the trained entries, shape (k,), float32 or wider, or `None` with dynamic support. Not part of
            `state_dict()`: the optimizer's state holds them.
        initial: the values before training, shape (k,).
        base_hash: SHA-256 of the weight before training.
        may_have_changed: whether the values may differ from those in `weight` without a new version of the tensor.
        earlier: changes in supports before the current one (refreshes of the basis, another training): supports and
            the changes of their values.
        block: number of rows and columns of a structured support.
        support: the entries that `values` holds; `None` with dynamic support and before the pre-pass.
        basis: the factors, shared by all layers of one kind; not ready before the gradient pre-pass.
        n_params: entries of the rotated weight that one step updates.
        threshold: with dynamic support, the least gradient magnitude of an updated entry, instead of `n_params`.
        kind: name and shape of the layer without layer numbers; layers of one kind share the basis.
        plain_dtype: dtype of the weight before the conversion.
        transposed: whether the layer was a `Conv1D`.
        shared: whether other modules have the same weight, so that only its whole gradient can be rotated.

    Source: Chekalina et al., EMNLP 2024, arXiv 2410.07383, whose layer stores the rotated weight instead.
    """

    basis: Basis
    n_params: int
    kind: str
    plain_dtype: torch.dtype
    transposed: bool
    values: nn.Parameter | None
    support: FixedSupport | None = None
    initial: torch.Tensor | None = None
    base_hash: str | None = None
    may_have_changed: bool = False
    _folded: torch.Tensor | None = None  # the values that `weight` contains
    _version: int = -1
    block: tuple[int, int] | None = None
    shared: bool = False
    earlier: list[tuple[FixedSupport, torch.Tensor]]
    threshold: float | None = None

    @classmethod
    def from_linear(cls, linear: nn.Linear | Conv1D, basis: Basis, n_params: int, kind: str) -> "SparseGradLinear":
        """Return a layer with the parameters of `linear` (not copied for an `nn.Linear` in float32 or wider).

        GPT-2's `Conv1D` stores its weight as (in, out). Here it is (out, in) like all others; `state_dict()`
        transposes it back.
        """
        transposed = isinstance(linear, Conv1D)
        n_out, n_in = linear.weight.T.shape if transposed else linear.weight.shape
        layer = cls(n_in, n_out, linear.bias is not None, device="meta")
        layer.weight, layer.bias, layer.plain_dtype = linear.weight, linear.bias, linear.weight.dtype
        layer.transposed = transposed
        if transposed:
            weight = linear.weight.detach().T.contiguous()
            layer.weight = nn.Parameter(weight, requires_grad=linear.weight.requires_grad)
        if layer.weight.dtype in (torch.float16, torch.bfloat16):
            layer.weight = nn.Parameter(layer.weight.detach().float(), requires_grad=linear.weight.requires_grad)
        layer.basis, layer.n_params, layer.kind, layer.earlier = basis, n_params, kind, []
        layer.register_parameter("values", None)
        return layer.train(linear.training)

    def expect_fixed_support(self, block: bool) -> None:
        """Freeze the weight and allocate `n_params` values, rounded up to a block; their entries are chosen later."""
        if block:
            self.block = block_shape(self.n_params, self.out_features, self.in_features)
            self.n_params = math.prod(self.block)
        self.weight.requires_grad_(False)
        self.values = nn.Parameter(torch.zeros(self.n_params, dtype=self.weight.dtype, device=self.weight.device))

    @torch.no_grad()
    def set_support(
        self,
        support: FixedSupport,
        values: torch.Tensor | None = None,
        initial: torch.Tensor | None = None,
        base_hash: str | None = None,
    ) -> None:
        """Train the entries of `support` from now on.

        Args:
            values: their current values; read from the weight if not given.
            initial: their values before training, if training has begun; else the current values.
            base_hash: hash of the weight before training, if training has begun; a known hash is not replaced.

        Raises:
            ValueError: the support has another size than `n_params`, or the layer was converted for dynamic support.
        """
        if self.values is None:
            raise ValueError("the layer was converted for dynamic support; call expect_fixed_support first")
        if support.size != self.n_params:
            raise ValueError(f"a support of {support.size} entries for a layer that trains {self.n_params}")
        if values is None and self.support is not None:  # training has begun in another support
            self.fold()
            self.earlier.append(self.changes()[-1])
        self.support = support
        self.values.copy_(support.pick(support.block_of(self.weight)) if values is None else values)
        self.initial = self.values.detach().clone() if initial is None else initial
        self.base_hash = base_hash or self.base_hash or tensor_hash(self.weight.to(self.plain_dtype))
        self._mark_folded()

    def chosen_entries(self) -> tuple[FixedSupport, nn.Parameter, torch.Tensor]:
        """Return the fixed support, its values, and their values before training.

        Raises:
            ValueError: no fixed support has been chosen.
        """
        if self.support is None or self.values is None or self.initial is None:
            raise ValueError("the layer has no fixed support; run `prepare_layers` or load a state first")
        return self.support, self.values, self.initial

    def changes(self) -> list[tuple[FixedSupport, torch.Tensor]]:
        """Return all changes of the weight: supports and the changes of their values, shape (k,) each."""
        support, values, initial = self.chosen_entries()
        return [*self.earlier, (support, values.detach() - initial)]

    @torch.no_grad()
    def fold(self, compare: bool = True) -> bool:
        """Add the changes of the values since the last call, `W += V_r dS U_c^T`; return whether there were any.

        Args:
            compare: find out whether there are changes, which waits for the device; otherwise they are expected.
        """
        if self.support is None or self.values is None or self._folded is None or self.values.is_meta:
            return False  # no support yet, or a placeholder of one
        changed = not (compare and torch.equal(self.values, self._folded))
        if changed:
            self.support.add_to(self.weight, self.values - self._folded)
        self._mark_folded()
        return changed

    def _mark_folded(self) -> None:
        values = self.chosen_entries()[1]
        self._folded = values.detach().clone()
        self._version, self.may_have_changed = values._version, False

    def _fold_changes_of_others(self) -> None:
        """Fold before a forward pass, if the values may have changed.

        Averaged weights are exchanged for an evaluation through `parameter.data`, which leaves no new version, so
        without gradients the values are always compared.
        """
        if torch.is_grad_enabled():
            if self.may_have_changed or (self.values is not None and self._version != self.values._version):
                self.fold()
        elif self.fold():
            self.may_have_changed = True  # the exchange is undone the same way

    def to_linear(self) -> nn.Linear | Conv1D:
        """Return the plain layer with the trained weight, in the type and dtype that it had before the conversion."""
        self.fold()
        with torch.device("meta"):
            if self.transposed:
                linear = Conv1D(self.out_features, self.in_features)
            else:
                linear = nn.Linear(self.in_features, self.out_features, self.bias is not None)
        linear.weight, linear.bias = self.weight, self.bias
        if self.values is not None:
            linear.weight.requires_grad_(self.values.requires_grad)
        if self.transposed or self.weight.dtype != self.plain_dtype:
            weight = self.weight.detach().to(self.plain_dtype)
            weight = weight.T.contiguous() if self.transposed else weight
            linear.weight = nn.Parameter(weight, requires_grad=self.weight.requires_grad)
        return linear.train(self.training)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return `x W^T + b`, shape (..., in) -> (..., out), in the dtype of `x` (or of autocast)."""
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        if self.support is not None:
            compiled = torch.compiler.is_compiling()  # which cannot follow versions: `SparseAdamW` alone folds then
            if not compiled:
                self._fold_changes_of_others()
            observed = None if compiled else self
            return FixedEntriesFunction.apply(x, self.weight, self.bias, self.values, self.support, observed)
        rotate = self.basis.out_factor is not None and self.basis.rotates == ACTIVATIONS
        factors = (self.basis.out_factor, self.basis.in_factor) if rotate else (None, None)
        return SparseLinearFunction.apply(x, self.weight, self.bias, *factors)

    def value_gradient(self, indices: torch.Tensor | None = None) -> torch.Tensor:
        """Return `V^T G U` from the accumulated `weight.grad`: shape (out, in), or (k,) at the flat `indices`."""
        gradient = self.weight.grad
        rotated = gradient if self.basis.rotates == ACTIVATIONS else self.basis.rotate(gradient)
        return rotated if indices is None else rotated.flatten()[indices.long()]

    def _apply(self, fn, recurse=True):
        # Supports and factors are shared by layers, so they are not buffers. Moving them a second time has no effect.
        super()._apply(fn, recurse)
        for part in (self.basis, self.support, *(support for support, _ in self.earlier)):
            if part is not None:
                part.apply(fn)
        self.earlier = [(support, fn(change)) for support, change in self.earlier]
        if self.initial is not None:
            self.initial, self._folded = fn(self.initial), fn(self._folded)
        return self

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        self.fold()
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination.pop(f"{prefix}values", None)
        if self.transposed:
            destination[f"{prefix}weight"] = destination[f"{prefix}weight"].T.contiguous()

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing_keys, *rest):
        if self.transposed and f"{prefix}weight" in state_dict:
            state_dict = {**state_dict, f"{prefix}weight": state_dict[f"{prefix}weight"].T}
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing_keys, *rest)
        if f"{prefix}values" in missing_keys:
            missing_keys.remove(f"{prefix}values")
        if self.support is not None and self.values is not None and f"{prefix}weight" in state_dict:
            with torch.no_grad():  # the values are entries of the loaded weight
                self.values.copy_(self.support.pick(self.support.block_of(self.weight)))
            self._mark_folded()

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, n_params={self.n_params}"
