"""What a module's inputs and output gradients say about the gradients of its parameters, example by example."""

from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from hf_ft_ext.per_example.forms import Dense, Form, Outer, Rows

# From the module, its input `[n, ...]` and the gradient of its output `[n, ...]` to forms by the parameter's own name.
Rule = Callable[[nn.Module, torch.Tensor, torch.Tensor], dict[str, Form]]


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
    if isinstance(module, nn.LayerNorm) or (
        "Norm" in type(module).__name__ and own <= {"weight", "bias"} and getattr(module, "weight", None) is not None
    ):
        return _norm if module.weight is None or module.weight.ndim == 1 else None
    return None


def _tokens(tensor: torch.Tensor, features: int) -> torch.Tensor:
    """`[n, ..., features]` as `[n, tokens, features]`."""
    return tensor.reshape(len(tensor), -1, features)


def _linear(module: nn.Linear, inputs: torch.Tensor, grads: torch.Tensor) -> dict[str, Form]:
    return _affine(module, inputs, grads, transposed=False)


def _conv1d(module: Conv1D, inputs: torch.Tensor, grads: torch.Tensor) -> dict[str, Form]:
    return _affine(module, inputs, grads, transposed=True)


def _affine(module: nn.Module, inputs: torch.Tensor, grads: torch.Tensor, transposed: bool) -> dict[str, Form]:
    inputs, grads = _tokens(inputs, inputs.shape[-1]), _tokens(grads, grads.shape[-1])
    forms: dict[str, Form] = {"weight": Outer(inputs, grads, transposed)}
    if module.bias is not None:
        forms["bias"] = Dense(grads.sum(1))
    return forms


def _embedding(module: nn.Embedding, inputs: torch.Tensor, grads: torch.Tensor) -> dict[str, Form]:
    """`dL/dW[i]` is the sum of `dL/dy_t` over the tokens t with id i."""
    ids = inputs.reshape(len(inputs), -1)
    if module.padding_idx is not None:  # torch gives this row no gradient
        ids = torch.where(ids == module.padding_idx, -1, ids)
    return {"weight": Rows(ids, _tokens(grads, grads.shape[-1]), module.num_embeddings)}


def looked_up(module: nn.Embedding, args: tuple, kwargs: dict) -> tuple[torch.Tensor, torch.Tensor]:
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


def _norm(module: nn.Module, inputs: torch.Tensor, grads: torch.Tensor) -> dict[str, Form]:
    """Any norm that is affine in its weight and bias: the slope in the weight is its output at 1 less that at 0.

    So variants (root mean square, 1 + weight, an upcast inside) need no formula of their own.
    """
    width = grads.shape[-1]
    forms: dict[str, Form] = {}
    if getattr(module, "bias", None) is not None:
        forms["bias"] = Dense(_tokens(grads, width).sum(1))
    if module.weight is not None:
        if isinstance(module, nn.LayerNorm):
            slope = functional.layer_norm(inputs, module.normalized_shape, eps=module.eps)
        else:
            at = [_output_at(module, value, inputs) for value in (1.0, 0.0)]
            slope = at[0] - at[1]
        forms["weight"] = Dense(_tokens(grads * slope, width).sum(1))
    return forms


def _output_at(module: nn.Module, value: float, inputs: torch.Tensor) -> torch.Tensor:
    return torch.func.functional_call(module, {"weight": torch.full_like(module.weight, value)}, (inputs,))
