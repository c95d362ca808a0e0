"""How sparse gradients are: the energy in their largest entries, raw and in a basis, layer by layer, while training.

The question behind SparseGrad: if 1 % of the entries of `V^T G U` hold most of `||G||^2`, training them alone loses
little. `SparsityWatch` measures it before training and after every so many steps, in three coordinate systems: the raw
gradient, the basis of the gradients before training, and a basis computed at the very step (as a refresh would).
"""

import os
from collections.abc import Mapping
from pathlib import Path

import torch
from transformers import Trainer, TrainerCallback

from hf_ft_ext.sparse.basis import Basis
from hf_ft_ext.sparse.convert import sparse_layers
from hf_ft_ext.sparse.layer import SparseGradLinear
from hf_ft_ext.sparse.prepare import gram_sums
from hf_ft_ext.sparse.prepass import visit_gradients
from hf_ft_ext.training.files import write_json

RAW, START, FRESH = "raw", "basis of the start", "basis of the step"
FRACTIONS = tuple(10 ** (power / 4) for power in range(-16, 1))  # of the entries: 0.0001 to 1
SPARSITY_FILE = "sparsity.json"


def captured_energy(matrix: torch.Tensor, fractions: tuple[float, ...] = FRACTIONS) -> torch.Tensor:
    """Share of the sum of squares in the largest entries, for each fraction of the entries kept (one at least)."""
    squares = matrix.flatten().double().square().sort(descending=True).values.cumsum(0)
    kept = [max(round(fraction * matrix.numel()), 1) - 1 for fraction in fractions]
    return (squares[kept] / squares[-1]).float()


def measure_sparsity(
    trainer: Trainer, layers: Mapping[str, SparseGradLinear], bases: Mapping[str, Mapping[str, Basis]], batches: int
) -> dict[str, dict[str, list[float]]]:
    """Energy captured at each of `FRACTIONS`, the mean over the gradients of `batches` training batches.

    They are other batches than those of the bases: a basis fits its own gradients better than the next ones.

    Args:
        bases: by the name of the coordinate system, then by kind of layer.

    Returns:
        Values by coordinate system (`"raw"` besides those of `bases`), then by layer.
    """
    totals = {
        system: {name: torch.zeros(len(FRACTIONS), device=trainer.args.device) for name in layers}
        for system in (RAW, *bases)
    }

    def add(name: str, gradient: torch.Tensor) -> None:
        totals[RAW][name] += captured_energy(gradient)
        for system, by_kind in bases.items():
            totals[system][name] += captured_energy(by_kind[layers[name].kind].rotate(gradient))

    visit_gradients(trainer, layers, batches, add, "energy of gradients", draw=1)
    return {
        system: {name: (trainer.accelerator.reduce(total) / batches).tolist() for name, total in by_layer.items()}
        for system, by_layer in totals.items()
    }


class SparsityWatch(TrainerCallback):
    """Measures the sparsity of the MLP gradients before training and every `every` steps, and draws it at the end.

    Writes `sparsity.json` (all values) and the pictures of `pictures.draw_sparsity` into the output folder. The
    measurement costs gradients of `2 x batches` batches each time and changes nothing: weights, moments, data order
    and random generators stay as they are.

    Args:
        trainer: a trainer whose model has converted layers.
        every: steps between two measurements, 1 or more.
        batches: gradients that each basis and each mean is taken from.
    """

    def __init__(self, trainer: Trainer, every: int, batches: int):
        self.trainer, self.every, self.batches = trainer, every, batches
        self.start: dict[str, Basis] = {}
        self.steps: dict[int, dict] = {}

    def _measure(self, step: int) -> None:
        layers = sparse_layers(self.trainer.model)
        sums, _ = gram_sums(self.trainer, layers, self.batches)
        fresh = {kind: Basis(*gram.factors()) for kind, gram in sums.items()}
        self.start = self.start or fresh
        bases = {START: self.start, FRESH: fresh}
        self.steps[step] = measure_sparsity(self.trainer, layers, bases, self.batches)

    def on_train_begin(self, args, state, control, **kwargs):
        self.start, self.steps = {}, {}
        self._measure(state.global_step)

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % self.every == 0 or state.global_step == state.max_steps:
            self._measure(state.global_step)

    def on_train_end(self, args, state, control, **kwargs):
        from hf_ft_ext.sparse.pictures import draw_sparsity

        if not state.is_world_process_zero:
            return
        folder = Path(args.output_dir)
        os.makedirs(folder, exist_ok=True)
        write_json(folder / SPARSITY_FILE, {"fractions": FRACTIONS, "steps": self.steps})
        draw_sparsity(self.steps, folder)
