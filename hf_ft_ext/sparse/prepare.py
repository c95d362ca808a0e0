"""Prepare a converted model for training: compute the bases and choose fixed supports."""

import functools
import logging
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from accelerate.utils import broadcast
from torch import nn
from transformers import Trainer

from hf_ft_ext.adapters.sparse_grad.bases import compute_bases as adapter_bases
from hf_ft_ext.errors import InputError
from hf_ft_ext.sparse.arguments import (
    DYNAMIC,
    HOSVD,
    NONE,
    PUBLISHED,
    RANDOM,
    STATIC,
    STRUCTURED,
    TUCKER,
    SparseTrainingArguments,
)
from hf_ft_ext.sparse.basis import GRADIENT, GramSums, by_columns, cheaper_rotation
from hf_ft_ext.sparse.fixed import FixedSupport
from hf_ft_ext.sparse.layer import SparseGradLinear
from hf_ft_ext.sparse.optimizer.moments import rotate_fixed_moments
from hf_ft_ext.sparse.optimizer.support import top_k
from hf_ft_ext.sparse.prepass import for_each_gradient

logger = logging.getLogger(__name__)


def prepare_layers(trainer: Trainer, layers: Mapping[str, SparseGradLinear], args: SparseTrainingArguments) -> None:
    """Compute the bases and choose the fixed supports of `layers` as `args` say, from the trainer's training data.

    Raises:
        InputError: a gradient is not finite, there is no training data, or the layers were converted for another kind
            of support.
    """
    _check_converted(layers, args.sparse_support)
    picks_block = args.sparse_support == STRUCTURED and args.sparse_basis == NONE
    sums = None
    if args.sparse_basis == HOSVD or picks_block:
        sums, tokens = gram_sums(trainer, layers, args.basis_steps)
        _choose_rotation(layers, tokens)
        if args.sparse_basis == HOSVD:
            fill_bases(layers, sums, args.sparse_basis_orientation)
    elif args.sparse_basis == RANDOM:
        _fill_random(layers, args.seed)
    if args.sparse_support == DYNAMIC and args.sparse_basis == RANDOM:
        _choose_rotation(layers, for_each_gradient(trainer, layers, 1, lambda *_: None, "counting tokens"))
    if args.sparse_support == STATIC:
        _choose_entries(trainer, layers, args.basis_steps)
    elif args.sparse_support == STRUCTURED:
        _choose_blocks(layers, sums if picks_block else None, args.sparse_skip_leading)
    if args.sparse_support != DYNAMIC:
        for layer in layers.values():  # each fixed support has copied the columns that it needs
            layer.basis.out_factor = layer.basis.in_factor = None


def refresh_supports(
    trainer: Trainer,
    layers: Mapping[str, SparseGradLinear],
    args: SparseTrainingArguments,
    optimizer: torch.optim.Optimizer,
) -> None:
    """Recompute basis and fixed support of `layers` at the current weights, and rotate the moments.

    Steps with a fixed support compute no dense gradients, so this runs another pre-pass. The weights do not change.
    The changes in the previous supports are recorded for deltas.

    Raises:
        InputError: as for `prepare_layers`.
    """
    prepare_layers(trainer, layers, args)
    betas = {id(p): group["betas"] for group in optimizer.param_groups for p in group["params"]}
    for layer in layers.values():
        support, values, _ = layer.chosen_entries()
        if state := optimizer.state[values]:
            rotate_fixed_moments(state, betas[id(values)], layer.earlier[-1][0], support)


@functools.wraps(adapter_bases)
def compute_bases(model: nn.Module | Trainer, batches: Iterable[Any], *positional: Any, **settings: Any) -> None:
    """Compute the bases of adapters; the deprecated form (trainer, layers, steps) calls `compute_layer_bases`."""
    if not isinstance(model, Trainer):
        adapter_bases(model, batches, *positional, **settings)
        return
    warnings.warn(
        "compute_bases(trainer, layers, steps) is now hf_ft_ext.sparse.prepare.compute_layer_bases; "
        "compute_bases(model, batches) is for SparseGradConfig adapters",
        FutureWarning,
        stacklevel=2,
    )
    compute_layer_bases(model, dict(batches), *positional, **settings)


def compute_layer_bases(
    trainer: Trainer, layers: Mapping[str, SparseGradLinear], steps: int, orientation: str = TUCKER
) -> None:
    """Fill the bases of converted layers from the gradients of `steps` training batches, weights unchanged.

    Args:
        orientation: `"tucker"`, or `"published"`: the input side rotated by the transposed factor.

    Raises:
        InputError: as for `prepare_layers`.
    """
    sums, tokens = gram_sums(trainer, layers, steps)
    _choose_rotation(layers, tokens)
    fill_bases(layers, sums, orientation)


def gram_sums(
    trainer: Trainer, layers: Mapping[str, SparseGradLinear], steps: int
) -> tuple[dict[str, GramSums], dict[str, float]]:
    """Return by kind of layer: Gram sums over all layers, batches and processes, and the tokens of a step."""
    sums: dict[str, GramSums] = {}
    of_kind = Counter(layer.kind for layer in layers.values())
    for layer in layers.values():
        if layer.kind not in sums:
            weight, gradients = layer.weight, steps * of_kind[layer.kind]
            sums[layer.kind] = GramSums(layer.out_features, layer.in_features, weight.dtype, weight.device, gradients)
    tokens = for_each_gradient(
        trainer, layers, steps, lambda name, gradient: sums[layers[name].kind].add(gradient), "gradient basis"
    )
    for kind, gram in sums.items():
        gram.out, gram.inp = trainer.accelerator.reduce(gram.out), trainer.accelerator.reduce(gram.inp)
        logger.info("gradients of %s: about %.0f tokens per step", kind, tokens[kind])
    return sums, tokens


def fill_bases(layers: Mapping[str, SparseGradLinear], sums: Mapping[str, GramSums], orientation: str) -> None:
    """Give each kind's basis the factors of its Gram sums."""
    for kind, layer in {layer.kind: layer for layer in layers.values()}.items():
        out_factor, in_factor = sums[kind].factors()
        if orientation == PUBLISHED:
            in_factor, layer.basis.in_transposed = by_columns(in_factor.T), True
        # All processes decompose the same sums; the broadcast makes the bases bitwise equal.
        layer.basis.out_factor, layer.basis.in_factor = broadcast(out_factor.T).T, broadcast(in_factor.T).T


def _check_converted(layers: Mapping[str, SparseGradLinear], wanted: str) -> None:
    for name, layer in layers.items():
        support = DYNAMIC if layer.values is None else STATIC if layer.block is None else STRUCTURED
        if support != wanted:
            raise InputError(
                f"{name} was converted with support={support!r}, but sparse_support is {wanted!r}; convert the model "
                "with the same one"
            )


def _fill_random(layers: Mapping[str, SparseGradLinear], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for layer in {layer.kind: layer for layer in layers.values()}.values():
        factors = []
        for side in (layer.out_features, layer.in_features):
            gaussian = torch.randn(side, side, generator=generator, dtype=torch.float64)
            # Q of a Gaussian matrix: a random orthonormal factor
            factor = torch.linalg.qr(gaussian).Q.to(layer.weight.device, layer.weight.dtype)
            factors.append(broadcast(by_columns(factor).T).T)
        layer.basis.out_factor, layer.basis.in_factor = factors


def _choose_rotation(layers: Mapping[str, SparseGradLinear], tokens: Mapping[str, float]) -> None:
    shared = {layer.kind for layer in layers.values() if layer.shared}
    for layer in layers.values():
        cheaper = cheaper_rotation(layer.out_features, layer.in_features, tokens[layer.kind])
        layer.basis.rotates = GRADIENT if layer.kind in shared else cheaper


def _choose_entries(trainer: Trainer, layers: Mapping[str, SparseGradLinear], steps: int) -> None:
    """Choose a static support for each layer: the entries of `V^T G U` with the largest mean square."""
    energy = {name: torch.zeros_like(layer.weight) for name, layer in layers.items()}

    def add(name: str, gradient: torch.Tensor) -> None:
        energy[name] += layers[name].basis.rotate(gradient).square()  # sum of (V^T G U)^2, entry by entry

    for_each_gradient(trainer, layers, steps, add, "choosing entries")
    for name, layer in layers.items():
        total = trainer.accelerator.reduce(energy.pop(name))
        indices = broadcast(top_k(total, layer.n_params).long())
        layer.set_support(FixedSupport.of_entries(layer.basis, indices, layer.in_features))


def _choose_blocks(layers: Mapping[str, SparseGradLinear], sums: Mapping[str, GramSums] | None, skip: float) -> None:
    """Choose a structured support: rows and columns of largest energy, shared by all layers of one kind.

    With a basis these are the leading rows and columns, after the fraction `skip` of all. Without one they have the
    largest diagonal entries of the Gram sums (the squared norms of the rows and columns of the gradients).
    """
    chosen: dict[str, FixedSupport] = {}
    for layer in layers.values():
        if layer.kind not in chosen:
            assert layer.block is not None  # `_check_converted`
            if sums is None:
                sides = []
                for n, side in zip(layer.block, layer.weight.shape, strict=True):
                    first = min(round(skip * side), side - n)
                    sides.append(torch.arange(first, first + n, device=layer.weight.device))
            else:
                gram = sums[layer.kind]
                diagonals = (gram.out.diag(), gram.inp.diag())
                sides = [broadcast(top_k(d, n).long()) for d, n in zip(diagonals, layer.block, strict=True)]
            chosen[layer.kind] = FixedSupport.of_block(layer.basis, *sides)
        layer.set_support(chosen[layer.kind])
