"""What a module's activations and output gradients say about the gradients of its parameters, example by example."""

from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from hf_ft_ext.per_example.types import DenseGradient, EmbeddingGradient, Gradient, LinearGradient

# From the module, its input `[n, ...]` and the gradient of its output `[n, ...]` to gradients by the parameter's own
# name.
Rule = Callable[[nn.Module, torch.Tensor, torch.Tensor], dict[str, Gradient]]


def find_rule(module: nn.Module) -> Rule | None:
    """The rule for `module`, or `None` where there is none.

    A rule is an offer: `ExampleGradients` tries each on real data and takes none that gives another gradient than
    autograd, so a subclass that computes something else does no harm.
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
    """Whether a module gives each example a copy of its one parameter in the graph if its `per_example` is true.

    This is a protocol: the module's class has `per_example = False`, and one parameter, `weight`. Ours of it are the
    rows of prefixes.
    """
    own = [name for name, _ in module.named_parameters()]
    return getattr(type(module), "per_example", None) is False and own == ["weight"]


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
    """`dL/dW[i]` is the sum of `dL/dy_t` over the tokens t with id i."""
    ids = inputs.reshape(len(inputs), -1)
    if module.padding_idx is not None:  # torch gives this row no gradient
        ids = torch.where(ids == module.padding_idx, -1, ids)
    return {"weight": EmbeddingGradient(ids, _tokens(grads, grads.shape[-1]), module.num_embeddings)}


def rows_and_factors(module: nn.Embedding, args: tuple, kwargs: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """The rows that a subclass of `nn.Embedding` reads for these inputs, and the factors that it multiplies them with.

    Position embeddings make ids of a mask or of a length (BART, OPT), others scale the rows (Gemma). Both are read off
    two calls, with a table that holds the number of each row, and with a table of ones.

    Returns:
        ids `[n, tokens]`, factors `[n, tokens, width]`.

    Raises:
        ValueError: the output is no product of rows of the table with factors.
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
        raise ValueError(f"{type(module).__name__} does more than reading rows and multiplying them")
    return ids, factors


def _expanded(module: nn.Module, inputs: torch.Tensor, grads: torch.Tensor) -> dict[str, Gradient]:
    """Each example had a copy of the parameter: the gradient of what came out is its gradient."""
    return {"weight": DenseGradient(grads)}


def _norm(module: nn.Module, inputs: torch.Tensor, grads: torch.Tensor) -> dict[str, Gradient]:
    """Any norm that is affine in its weight and bias: the slope in the weight is its output at 1 less that at 0.

    So variants (root mean square, 1 + weight, an upcast inside) need no formula of their own.
    """
    width = grads.shape[-1]
    found: dict[str, Gradient] = {}
    if getattr(module, "bias", None) is not None:
        found["bias"] = DenseGradient(_tokens(grads, width).sum(1))
    if module.weight is not None:
        if isinstance(module, nn.LayerNorm):
            slope = functional.layer_norm(inputs, module.normalized_shape, eps=module.eps)
        else:
            at = [_output_at(module, value, inputs) for value in (1.0, 0.0)]
            slope = at[0] - at[1]
        found["weight"] = DenseGradient(_tokens(grads * slope, width).sum(1))
    return found


def _output_at(module: nn.Module, value: float, inputs: torch.Tensor) -> torch.Tensor:
    weight = torch.full_like(module.weight, value, dtype=inputs.dtype)
    return torch.func.functional_call(module, {"weight": weight}, (inputs,))
