"""A callback that measures the sparsity of gradients during training (`measure`) and plots it (`pictures`)."""

import os
from pathlib import Path

from transformers import Trainer, TrainerCallback

from hf_ft_ext.files import write_json
from hf_ft_ext.sparse.basis import Basis
from hf_ft_ext.sparse.convert import sparse_layers
from hf_ft_ext.sparse.prepare import gram_sums
from hf_ft_ext.sparse.sparsity.measure import FRACTIONS, FRESH, START, measure_sparsity

SPARSITY_FILE = "sparsity.json"


class SparsityWatch(TrainerCallback):
    """Measures the sparsity of the MLP gradients before training and every `every` steps, and plots it at the end.

    Writes `sparsity.json` (all values) and the plots of `pictures.draw_sparsity` into the output folder. A measurement
    takes the gradients of `2 x batches` batches. It does not change weights, moments, data order or random generators.

    Args:
        trainer: a trainer whose model has converted layers.
        every: steps between two measurements, 1 or more.
        batches: number of gradients for each basis and for each mean.
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
        from hf_ft_ext.sparse.sparsity.pictures import draw_sparsity  # matplotlib is optional

        if not state.is_world_process_zero:
            return
        folder = Path(args.output_dir)
        os.makedirs(folder, exist_ok=True)
        write_json(folder / SPARSITY_FILE, {"fractions": FRACTIONS, "steps": self.steps})
        draw_sparsity(self.steps, folder)
