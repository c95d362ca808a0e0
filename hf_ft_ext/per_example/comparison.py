"""Compares gradients by rules with autograd's, one parameter at a time to save memory."""

import contextlib
from collections.abc import Callable, Collection, Iterator, Mapping
from math import inf

import torch
from torch import nn

from hf_ft_ext.per_example.types import EmbeddingGradient, Gradient, LinearGradient, dense, max_abs


def differing_parameters(
    parameters: Mapping[str, nn.Parameter],
    scalar: torch.Tensor,
    found: dict[str, list[Gradient]],
    tolerance: float,
    failed: Collection[str],
    sizes: dict[str, float],
) -> set[str]:
    """Return the names of parameters whose gradient by rules differs from autograd's, for the first example.

    Args:
        parameters: those to compare; they require gradients.
        scalar: the first example's scalar with its graph, which the call frees.
        found: gradients by rules, by name; an absent parameter has gradient 0 by the rules.
        tolerance: relative to the largest entry of the parameter's gradient; its square is relative to the largest
            entry of all gradients.
        failed: names to skip.
        sizes: receives the largest entry of each parameter's gradient by autograd.
    """
    errors: dict[str, float] = {}
    sizes |= dict.fromkeys(parameters, 0.0)

    def compare(name: str, expected: torch.Tensor) -> None:
        expected = expected.coalesce() if expected.is_sparse else expected
        sizes[name] = max_abs(expected.values() if expected.is_sparse else expected)
        if name not in failed and name in found:
            try:
                errors[name] = _error(found[name], expected)
            except (IndexError, RuntimeError, TypeError):  # the rule expects other inputs, such as token ids
                errors[name] = inf

    with _each_gradient(parameters, compare):
        scalar.backward()
    top = max(sizes.values(), default=0.0)
    for name in parameters:
        if name not in errors and name not in failed:  # only the hooks or only autograd found a gradient
            by_rule = max_abs(dense(found[name])) if name in found else 0.0
            errors[name] = abs(by_rule - sizes[name])
    # |found - expected| <= tol |expected| + tol^2 max |all|, by largest entries
    return {n for n, error in errors.items() if not error <= tolerance * (sizes[n] + tolerance * top)}


@contextlib.contextmanager
def sparse_tables(model: nn.Module) -> Iterator[None]:
    """Make embeddings give row-sparse gradients, because a dense one may be as large as most of the model."""
    tables = [m for m in model.modules() if isinstance(m, nn.Embedding) and not (m.sparse or m.scale_grad_by_freq)]
    for table in tables:
        table.sparse = True
    try:
        yield
    finally:
        for table in tables:
            table.sparse = False


def _error(gradients: list[Gradient], expected: torch.Tensor) -> float:
    """Return the largest difference between one example's gradient by rules and autograd's (dense or row-sparse)."""
    tables = [gradient for gradient in gradients if isinstance(gradient, EmbeddingGradient)]
    if len(tables) == len(gradients):  # compare the rows that were read: the others are zero
        ids = torch.cat([gradient.ids[0] for gradient in tables])
        read, positions = ids.clamp_min(0).unique(return_inverse=True)
        grads = torch.cat([gradient.output_gradients[0] for gradient in tables]) * (ids >= 0)[:, None]
        # Rows that were read: sum over their tokens. Elsewhere the gradient must be 0.
        found = grads.new_zeros(len(read), expected.shape[1]).index_add_(0, positions, grads)
        there = expected.index_select(0, read)
        entries = expected
        if expected.is_sparse:
            there, entries = there.to_dense(), expected.values()
        elsewhere = torch.linalg.vector_norm(entries, 1) - torch.linalg.vector_norm(there, 1)
        return max(max_abs(found - there), float(elsewhere.abs()))
    expected = expected.to_dense()
    expected = expected.to(torch.promote_types(expected.dtype, torch.float32))
    linear = [g for g in gradients if isinstance(g, LinearGradient) and g.shape == expected.shape]
    if len(linear) == len(gradients):
        for gradient in linear:
            gradient.subtract_from(expected)  # in place: the caller does not use `expected` again
        return max_abs(expected)
    found = dense(gradients)[0]
    if found.shape != expected.shape:
        return inf
    return max_abs(found.sub_(expected))


@contextlib.contextmanager
def _each_gradient(
    parameters: Mapping[str, nn.Parameter], look: Callable[[str, torch.Tensor], None]
) -> Iterator[None]:
    """Pass each gradient of a backward pass to `look` and free it, so that they never exist all at once."""
    before = {name: parameter.grad for name, parameter in parameters.items()}

    def hook(name: str) -> Callable[[nn.Parameter], None]:
        def received(parameter: nn.Parameter) -> None:
            gradient, parameter.grad = parameter.grad, None
            look(name, gradient)

        return received

    handles = []
    try:
        for name, parameter in parameters.items():
            parameter.grad = None
            handles.append(parameter.register_post_accumulate_grad_hook(hook(name)))
        yield
    finally:
        for handle in handles:
            handle.remove()
        for name, parameter in parameters.items():
            parameter.grad = before[name]
