"""Rules: per-example gradients of a module's parameters from its inputs and output gradients."""

from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from hf_ft_ext.per_example.types import DenseGradient, EmbeddingGradient, Gradient, LinearGradient

# Maps the module, its input `[n, ...]` and the gradient of its output `[n, ...]` to gradients by the parameter's name
# within the module.
Rule = Callable[[nn.Module, torch.Tensor, torch.Tensor], dict[str, Gradient]]


def find_rule(module: nn.Module) -> Rule | None:
    """Return the rule for `module`, or `None` if there is none.

    `ExampleGradients` verifies each rule on real data and discards it if it differs from autograd. So it is safe to
    return a rule for a subclass that computes something else.
    """
    own = {name for name, _ in module.named_parameters(recurse=False)}
    if isinstance(module, Conv1D):
        return _conv1d
    if isinstance(module, nn.Linear):
        return _linear
    if isinstance(module, nn.Embedding):
        return _embedding if module.max_norm is None and not module.scale_grad_by_freq else None
    if expands_for_examples(module):
        return _expanded
    if isinstance(module, nn.LayerNorm) or (
        "Norm" in type(module).__name__ and own <= {"weight", "bias"} and getattr(module, "weight", None) is not None
    ):
        return _norm if module.weight is None or module.weight.ndim == 1 else None
    return None


def expands_for_examples(module: nn.Module) -> bool:
    """Return whether a module can repeat its one parameter per example in the graph (while `per_example` is true).

    This is a protocol: the module's class has `per_example = False` and a single parameter, `weight`. In this package
    the rows of prefixes implement it.
    """
    own = [name for name, _ in module.named_parameters()]
    return getattr(type(module), "per_example", None) is False and own == ["weight"]


def is_sum_of_products(rule: Rule | None) -> bool:
    """Return whether a rule only multiplies and adds its arguments: it does not run the module, which may cast."""
    return rule in (_linear, _conv1d, _embedding)


def rows_and_factors(module: nn.Embedding, args: tuple, kwargs: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """Find the rows that a subclass of `nn.Embedding` reads for these inputs, and the factors that scale them.

    Position embeddings compute ids from a mask or a length (BART, OPT); others scale the rows (Gemma). Two calls with
    substitute tables recover both: `W[i] = i + 1` gives `f_t * (id_t + 1)`, and `W[i] = 1` gives `f_t`.

    Returns:
        ids `[n, tokens]`, factors `[n, tokens, width]`.

    Raises:
        ValueError: the output is not a product of table rows and factors.
    """
    weight = module._parameters["weight"]
    rows, width = weight.shape
    numbers = torch.arange(1, rows + 1, dtype=torch.float64, device=weight.device)[:, None].expand(rows, width)
    outputs = []
    try:
        for table in (numbers, torch.ones_like(numbers[:, :1]).expand(rows, width)):
            module._parameters["weight"] = table
            outputs.append(module.forward(*args, **kwargs).double())
    finally:
        module._parameters["weight"] = weight
    numbered, factors = outputs
    ids = (numbered[..., 0] / factors[..., 0]).round().long() - 1
    if not torch.allclose((ids[..., None] + 1) * factors, numbered, rtol=1e-9):
        raise ValueError(f"{type(module).__name__} does more than read rows and scale them")
    return ids, factors


def _tokens(tensor: torch.Tensor, features: int) -> torch.Tensor:
    """`[n, ..., features]` as `[n, tokens, features]`."""
    return tensor.reshape(len(tensor), -1, features)


def _linear(module: nn.Linear, inputs: torch.Tensor, grads: torch.Tensor) -> dict[str, Gradient]:
    return _affine(module, inputs, grads, transposed=False)


def _conv1d(module: Conv1D, inputs: torch.Tensor, grads: torch.Tensor) -> dict[str, Gradient]:
    return _affine(module, inputs, grads, transposed=True)


def _affine(module: nn.Module, inputs: torch.Tensor, grads: torch.Tensor, transposed: bool) -> dict[str, Gradient]:
    """`dL/dW = sum_t g_t a_t^T`, `dL/db = sum_t g_t`."""
    inputs, grads = _tokens(inputs, inputs.shape[-1]), _tokens(grads, grads.shape[-1])
    found: dict[str, Gradient] = {"weight": LinearGradient(inputs.to(grads.dtype), grads, transposed)}
    if module.bias is not None:
        found["bias"] = DenseGradient(grads.sum(1))
    return found


def _embedding(module: nn.Embedding, inputs: torch.Tensor, grads: torch.Tensor) -> dict[str, Gradient]:
    """`dL/dW[i] = sum over tokens t with id i of dL/dy_t`."""
    ids = inputs.reshape(len(inputs), -1)
    if module.padding_idx is not None:  # torch gives this row no gradient
        ids = torch.where(ids == module.padding_idx, -1, ids)
    return {"weight": EmbeddingGradient(ids, _tokens(grads, grads.shape[-1]), module.num_embeddings)}


def _expanded(module: nn.Module, inputs: torch.Tensor, grads: torch.Tensor) -> dict[str, Gradient]:
    """Each example has its own copy of the parameter, so the output gradient is the gradient."""
    return {"weight": DenseGradient(grads)}


def _norm(module: nn.Module, inputs: torch.Tensor, grads: torch.Tensor) -> dict[str, Gradient]:
    """Any norm that is affine in its weight and bias: `y(w) = y(0) + w * (y(1) - y(0))`.

    So `dL/dw = sum_t g_t * (y_t(1) - y_t(0))` and `dL/db = sum_t g_t`. Variants (root mean square, 1 + weight, an
    upcast inside) need no formula of their own.
    """
    width = grads.shape[-1]
    found: dict[str, Gradient] = {}
    if getattr(module, "bias", None) is not None:
        found["bias"] = DenseGradient(_tokens(grads, width).sum(1))
    if module.weight is not None:
        if isinstance(module, nn.LayerNorm):  # y(1) - y(0) is the normalized input
            slope = functional.layer_norm(inputs, module.normalized_shape, eps=module.eps)
        else:
            at = [_output_at(module, value, inputs) for value in (1.0, 0.0)]
            slope = at[0] - at[1]
        found["weight"] = DenseGradient(_tokens(grads * slope, width).sum(1))
    return found


def _output_at(module: nn.Module, value: float, inputs: torch.Tensor) -> torch.Tensor:
    weight = torch.full_like(module.weight, value, dtype=inputs.dtype)
    return torch.func.functional_call(module, {"weight": weight}, (inputs,))
