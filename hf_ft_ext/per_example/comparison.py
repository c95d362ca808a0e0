"""Gradients by rules against autograd's, parameter by parameter, without all gradients at once in memory."""

import contextlib
from collections.abc import Callable, Collection, Iterator, Mapping
from math import inf

import torch
from torch import nn

from hf_ft_ext.per_example.types import EmbeddingGradient, Gradient, LinearGradient, dense, largest


def differing(
    parameters: Mapping[str, nn.Parameter],
    scalar: torch.Tensor,
    found: dict[str, list[Gradient]],
    tolerance: float,
    failed: Collection[str],
    sizes: dict[str, float],
) -> set[str]:
    """Names of the parameters whose gradients by rules, for the first example, are not the gradient of `scalar`.

    Args:
        parameters: those to look at, which require gradients.
        scalar: of the first example, with its graph; it is used up.
        found: by name; a parameter that is absent is said to have gradient 0.
        tolerance: of the largest entry of a parameter's gradient, and its square of the largest of all.
        failed: names to pass over.
        sizes: gets the largest entry of each parameter's gradient by autograd.
    """
    errors: dict[str, float] = {}
    sizes |= dict.fromkeys(parameters, 0.0)

    def compare(name: str, expected: torch.Tensor) -> None:
        expected = expected.coalesce() if expected.is_sparse else expected
        sizes[name] = largest(expected.values() if expected.is_sparse else expected)
        if name not in failed and name in found:
            try:
                errors[name] = _error(found[name], expected)
            except (IndexError, RuntimeError, TypeError):  # a rule made for other inputs: ids that are no ids, say
                errors[name] = inf

    with _each_gradient(parameters, compare):
        scalar.backward()
    top = max(sizes.values(), default=0.0)
    for name in parameters:
        if name not in errors and name not in failed:  # a hook saw it and autograd did not, or the reverse
            by_rule = largest(dense(found[name])) if name in found else 0.0
            errors[name] = abs(by_rule - sizes[name])
    # |found - expected| <= tol |expected| + tol^2 max |all|, by largest entries
    return {n for n, error in errors.items() if not error <= tolerance * (sizes[n] + tolerance * top)}


def _error(gradients: list[Gradient], expected: torch.Tensor) -> float:
    """Largest difference between one example's gradient by rules and autograd's, which may be sparse by rows."""
    tables = [gradient for gradient in gradients if isinstance(gradient, EmbeddingGradient)]
    if len(tables) == len(gradients):  # a table is nearly all zero
        ids = torch.cat([gradient.ids[0] for gradient in tables])
        read, places = ids.clamp_min(0).unique(return_inverse=True)
        grads = torch.cat([gradient.output_gradients[0] for gradient in tables]) * (ids >= 0)[:, None]
        # rows that were read: sums over their tokens; elsewhere the gradient must be 0
        found = grads.new_zeros(len(read), expected.shape[1]).index_add_(0, places, grads)
        there = expected.index_select(0, read)
        entries = expected
        if expected.is_sparse:
            there, entries = there.to_dense(), expected.values()
        elsewhere = torch.linalg.vector_norm(entries, 1) - torch.linalg.vector_norm(there, 1)
        return max(largest(found - there), float(elsewhere.abs()))
    expected = expected.to_dense()
    expected = expected.to(torch.promote_types(expected.dtype, torch.float32))
    linear = [g for g in gradients if isinstance(g, LinearGradient) and g.shape == expected.shape]
    if len(linear) == len(gradients):
        for gradient in linear:
            gradient.subtract_from(expected)  # dropped anyway
        return largest(expected)
    found = dense(gradients)[0]
    if found.shape != expected.shape:
        return inf
    return largest(found.sub_(expected))


@contextlib.contextmanager
def sparse_tables(model: nn.Module) -> Iterator[None]:
    """Embeddings give gradients of the rows that they read: a table may be most of a model."""
    tables = [m for m in model.modules() if isinstance(m, nn.Embedding) and not (m.sparse or m.scale_grad_by_freq)]
    for table in tables:
        table.sparse = True
    try:
        yield
    finally:
        for table in tables:
            table.sparse = False


@contextlib.contextmanager
def _each_gradient(
    parameters: Mapping[str, nn.Parameter], look: Callable[[str, torch.Tensor], None]
) -> Iterator[None]:
    """In a backward pass, hand each gradient to `look` and drop it: they never exist all at once."""
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
