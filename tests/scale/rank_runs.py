"""Every method in its variants; run on two processes, it leaves what `test_processes.py` compares with one."""

import contextlib
import json
import time
from collections import Counter
from pathlib import Path

import torch
from collectives import counting
from quick import SOLVER_METHODS
from safetensors.torch import save_file
from tiny import tiny_dataset, tiny_model, tiny_tokenizer
from transformers import TrainerCallback

from hf_ft_ext.methods import METHODS

ROWS, STEPS = 64, 2
# SGD, or AdamW with a large epsilon: a small one turns gradients that are rounding noise into steps of full size.
SGD = {"optim": "sgd", "learning_rate": 0.1}
ADAM = {"adam_epsilon": 1e-2, "learning_rate": 1e-2}
SPARSE = {"sparse_basis_steps": 2, "sparse_train_rest": "head", **ADAM}
PREFIX = {"prefix": {"projection_size": 8}}
SPSA = {"search_method": "spsa", "search_target": "all", "search_directions": 3, "learning_rate": 0.01}

# name -> method, its arguments
VARIANTS = {
    "full": ("full", SGD),
    "full-fixed-layers": ("full", {"fix_layers": 1, **SGD}),
    "lora": ("lora", SGD),
    "sparse-dynamic": ("sparse", {"sparse_support": "dynamic", "sparse_density": 1.0, **SPARSE}),
    "sparse-static": ("sparse", {"sparse_support": "static", "sparse_density": 0.1, **SPARSE}),
    # all rows: two batches' gradients are of lower rank than the columns are many
    "sparse-structured": (
        "sparse",
        {"sparse_support": "structured", "sparse_density": 0.1, **SPARSE, "sparse_basis_steps": ROWS // 8},
    ),
    "fisher-select": ("fisher", {"fisher_examples": 8, "fisher_candidate_settings": PREFIX, **SGD}),
    "fisher-mask": ("fisher", {"fisher_mode": "mask", "fisher_examples": 8, "fisher_keep_ratio": 0.05, **SGD}),
    "search-data": ("gradientless", {"learning_rate": 0.1}),
    "search-candidates": ("gradientless", {"learning_rate": 0.1, "candidate_parallel": "candidates"}),
    "spsa-data": ("gradientless", SPSA),
    "spsa-candidates": ("gradientless", {"candidate_parallel": "candidates", **SPSA}),
    "linearhead": ("linearhead", {"feature_cache_gb": 0.0}),
    "kernel": ("kernel", {"kernel_regularization": "1e-2"}),
}
# Evaluated first, which makes accelerate take the model for prepared, and which one process does not do.
EVALUATED = (
    "full-fixed-layers",
    "lora",
    "sparse-static",
    "sparse-structured",
    "fisher-mask",
    "search-data",
    "linearhead",
)


class Carried(TrainerCallback):
    """Counts what crosses before and in the first step, and in the second one by itself."""

    def __init__(self):
        self.first, self.second = Counter(), Counter()
        self._open = contextlib.ExitStack()
        self._open.enter_context(counting(self.first))

    def on_step_end(self, args, state, control, **kwargs):
        self._open.close()
        if state.global_step == 1:
            self._open.enter_context(counting(self.second))

    def on_train_end(self, args, state, control, **kwargs):
        self._open.close()

    def counts(self) -> dict[str, dict[str, int]]:
        """Bytes by kind of collective: in a step, and once for the run."""
        return {"step": dict(self.second), "once": dict(self.first - self.second)}


def make(folder: Path, name: str, world: int):
    """The variant's trainer: `STEPS` steps of eight rows over all processes. Searches compare in double precision."""
    method, options = VARIANTS[name]
    if method not in SOLVER_METHODS:
        options = {"max_steps": STEPS, "per_device_train_batch_size": 8 // world, **options}
    model = tiny_model(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    args = METHODS[method].arguments_class()(
        str(folder / f"{name}-{world}"), use_cpu=True, save_strategy="no", report_to="none", disable_tqdm=True,
        dataloader_pin_memory=False, **options,
    )  # fmt: skip
    assert args.world_size == world
    return METHODS[method].trainer_class()(
        model.double() if method == "gradientless" else model, args, train_dataset=tiny_dataset(ROWS),
        eval_dataset=tiny_dataset(12, seed=1), processing_class=tiny_tokenizer(),
    )  # fmt: skip


def result(trainer) -> dict[str, torch.Tensor]:
    """What the run ended with: the weights, or the kernel's predictions."""
    if hasattr(trainer, "solved"):
        return {"predictions": torch.from_numpy(trainer.predict(trainer.eval_dataset).predictions)}
    return {name: value.detach().clone().contiguous() for name, value in trainer.model.state_dict().items()}


def run_all(argv: list[str]) -> None:
    """Train every variant, as one of two processes, into the folder `argv[0]`."""
    folder, carried = Path(argv[0]), {}
    for name in VARIANTS:
        trainer = make(folder, name, 2)
        if name in EVALUATED:
            trainer.evaluate()
        counts = Carried()
        trainer.add_callback(counts)
        trainer.train()
        carried[name] = counts.counts()
        ended = result(trainer)
        if trainer.is_world_process_zero():
            save_file(ended, folder / f"{name}.safetensors")
            (folder / "carried.json").write_text(json.dumps(carried))
    # gloo's threads abort or hang a process that ends while they still hold a collective's tensors
    trainer.accelerator.wait_for_everyone()
    time.sleep(0.5)
    trainer.accelerator.end_training()
