"""The published kernel algorithm and full Jacobians, written anew for comparison only.

Published (described in LM-Kernel-FT's code): the training data is the outer loop, the other data the inner one, in
batches. sgd: for each training example, logit and inner batch, one Jacobian-vector product through the whole network,
the tangent being the training example's gradient. asymmetric_signgd: the same with the sign of the gradient, and once
more with the roles exchanged. signgd: for each outer batch, the Jacobians of every inner batch anew, and products of
signs in float64. `FullJacobians` holds the Jacobians of the training data and of one chunk of the other data.
"""

import torch
from torch import nn
from torch.func import functional_call, jvp, vjp, vmap


class Differentiable:
    """A two-class model's `f_1 - f_0` as a function of its parameters."""

    def __init__(self, model: nn.Module):
        self.model = model.eval()
        model.set_attn_implementation("eager")  # forward derivatives and vmap know no other
        self.parameters = {name: p.detach() for name, p in model.named_parameters()}

    def __call__(self, parameters: dict, batch: dict) -> torch.Tensor:
        logits = functional_call(self.model, parameters, (), dict(batch)).logits
        return logits[:, 1] - logits[:, 0]

    def jacobian(self, batch: dict) -> dict[str, torch.Tensor]:
        """`[n, *shape]` by name."""

        def one(example: dict) -> dict:
            example = {key: value[None] for key, value in example.items()}
            scalar, pull = vjp(lambda p: self(p, example)[0], self.parameters)
            return pull(torch.ones_like(scalar))[0]

        return vmap(one)(batch)


def prepared(batch: dict) -> dict:
    """`batch` with the additive mask `[n, 1, tokens, tokens]`: code that makes it from two axes branches on data."""
    mask = batch["attention_mask"]
    tokens = mask.shape[1]
    added = torch.where(mask[:, None, None, :].bool(), 0.0, torch.finfo(torch.float32).min)
    return {**batch, "attention_mask": added.expand(-1, 1, tokens, tokens)}


def rows(batch: dict, first: int, last: int) -> dict:
    return {key: value[first:last] for key, value in batch.items()}


def published(model: nn.Module, left: dict, right: dict, formula: str, outer: int = 1, inner: int = 4) -> torch.Tensor:
    """`[n, m]`, or `[2, n, m]` with its flip."""
    function = Differentiable(model)
    left, right = prepared(left), prepared(right)
    n, m = len(left["input_ids"]), len(right["input_ids"])
    if formula == "asymmetric_signgd":
        one = _products(function, left, right, outer, inner, sign=True)
        return torch.stack([one, _products(function, right, left, outer, inner, sign=True).T])
    if formula == "sgd":
        return _products(function, left, right, outer, inner, sign=False)
    found = torch.zeros(n, m, dtype=torch.float64)
    with torch.no_grad():
        for i in range(0, n, outer):
            a = {k: v.sign().flatten(1).double() for k, v in function.jacobian(rows(left, i, i + outer)).items()}
            for j in range(0, m, inner):
                for name, value in function.jacobian(rows(right, j, j + inner)).items():
                    found[i : i + outer, j : j + inner] += a[name] @ value.sign().flatten(1).double().T
    return found


def _products(function: Differentiable, left: dict, right: dict, outer: int, inner: int, sign: bool) -> torch.Tensor:
    n, m = len(left["input_ids"]), len(right["input_ids"])
    found = torch.zeros(n, m, dtype=torch.float64)
    with torch.no_grad():
        for i in range(0, n, outer):
            gradients = function.jacobian(rows(left, i, i + outer))
            if sign:
                gradients = {name: value.sign() for name, value in gradients.items()}
            for k in range(len(next(iter(gradients.values())))):
                tangent = ({name: value[k] for name, value in gradients.items()},)
                for j in range(0, m, inner):
                    batch = rows(right, j, j + inner)
                    _, slopes = jvp(lambda p, batch=batch: function(p, batch), (function.parameters,), tangent)
                    found[i + k, j : j + inner] = slopes.double()
    return found


def full_jacobians(model: nn.Module, left: dict, right: dict, formula: str, chunk: int = 8) -> torch.Tensor:
    """`[n, m]`, or `[2, n, m]`: all Jacobians of the training data, then chunk by chunk of the other data."""
    function = Differentiable(model)
    left, right = prepared(left), prepared(right)
    with torch.no_grad():
        n, m = len(left["input_ids"]), len(right["input_ids"])
        a = None
        for i in range(0, n, chunk):
            part = function.jacobian(rows(left, i, i + chunk))
            if a is None:
                a = {name: value.new_empty(n, value[0].numel()) for name, value in part.items()}
            for name, value in part.items():
                a[name][i : i + chunk] = value.flatten(1)
        found = torch.zeros(2, n, m, dtype=torch.float64)
        for j in range(0, m, chunk):
            for name, value in function.jacobian(rows(right, j, j + chunk)).items():
                x, y = a[name], value.flatten(1)
                columns = slice(j, j + chunk)
                if formula == "sgd":
                    found[0, :, columns] += x @ y.T
                elif formula == "signgd":
                    found[0, :, columns] += x.sign() @ y.sign().T
                else:
                    found[0, :, columns] += x.sign() @ y.T
                    found[1, :, columns] += x @ y.sign().T
    return found if formula == "asymmetric_signgd" else found[0]
