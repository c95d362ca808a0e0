"""Measure the sparsity of gradients: the energy in their largest entries, raw and in a basis, by layer.

SparseGrad assumes that 1 % of the entries of `V^T G U` hold most of `||G||^2`, so that little is lost if only these
train. The energy is measured in three coordinate systems (during training by `watch`): the raw gradient, the basis of
the gradients before training, and a basis computed at the current step (as a refresh would).
"""

from collections.abc import Mapping

import torch
from transformers import Trainer

from hf_ft_ext.sparse.basis import Basis
from hf_ft_ext.sparse.layer import SparseGradLinear
from hf_ft_ext.sparse.prepass import for_each_gradient

RAW, START, FRESH = "raw", "basis of the start", "basis of the step"
FRACTIONS = tuple(10 ** (power / 4) for power in range(-16, 1))  # of the entries: 0.0001 to 1


def captured_energy(matrix: torch.Tensor, fractions: tuple[float, ...] = FRACTIONS) -> torch.Tensor:
    """Return the share of the sum of squares in the largest entries, for each fraction of entries (at least one).

    Args:
        matrix: a gradient, shape (out, in), or any other tensor that is not empty.
        fractions: each in (0, 1].

    Returns:
        Shares in [0, 1], shape (len(fractions),), float32; 0 if all entries are zero.
    """
    # sum of the k largest squares / sum of all squares
    squares = matrix.flatten().double().square().sort(descending=True).values.cumsum(0)
    kept = [max(round(fraction * matrix.numel()), 1) - 1 for fraction in fractions]
    return (squares[kept] / squares[-1].clamp(min=torch.finfo(squares.dtype).tiny)).float()


def measure_sparsity(
    trainer: Trainer, layers: Mapping[str, SparseGradLinear], bases: Mapping[str, Mapping[str, Basis]], batches: int
) -> dict[str, dict[str, list[float]]]:
    """Return the energy captured at each of `FRACTIONS`, the mean over the gradients of `batches` training batches.

    The bases are computed from other batches, because a basis fits its own gradients better than later ones. Gradients
    that are zero (an expert that was routed none of a batch's tokens) are left out of the mean.

    Args:
        bases: by the name of the coordinate system, then by kind of layer.

    Returns:
        Values by coordinate system (`"raw"` besides those of `bases`), then by layer.
    """
    totals = {
        system: {name: torch.zeros(len(FRACTIONS), device=trainer.args.device) for name in layers}
        for system in (RAW, *bases)
    }
    counts = {name: torch.zeros((), device=trainer.args.device) for name in layers}

    def add(name: str, gradient: torch.Tensor) -> None:
        if not gradient.any():
            return
        counts[name] += 1
        totals[RAW][name] += captured_energy(gradient)
        for system, by_kind in bases.items():
            totals[system][name] += captured_energy(by_kind[layers[name].kind].rotate(gradient))

    for_each_gradient(trainer, layers, batches, add, "energy of gradients", draw=1)
    reduce = trainer.accelerator.reduce
    counts = {name: reduce(count).clamp(min=1) for name, count in counts.items()}
    return {
        system: {name: (reduce(total) / counts[name]).tolist() for name, total in by_layer.items()}
        for system, by_layer in totals.items()
    }
