"""Where a trainer's kernels come from: computed block by block and kept, or read from the authors' files."""

import contextlib
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import broadcast_object_list
from transformers import Trainer, TrainingArguments

from hf_ft_ext.errors import InputError
from hf_ft_ext.feature_rows import batches_in_order, for_collator, labels_of
from hf_ft_ext.kernel import store
from hf_ft_ext.kernel.ntk import KernelComputation, KernelOptions
from hf_ft_ext.kernel.rows import ExampleRows
from hf_ft_ext.kernel.schedule import Plan
from hf_ft_ext.kernel.store import KernelStore
from hf_ft_ext.per_example.state import evaluating

logger = logging.getLogger(__name__)


class KernelSource:
    """Kernels between a trainer's training data and other data, the model's outputs, and labels.

    Args:
        trainer: its model, data, collator and arguments are used.
        options: of the kernel.
    """

    def __init__(self, trainer: Trainer, options: KernelOptions):
        self.trainer, self.args, self.options = trainer, trainer.args, options
        self.computation = KernelComputation(trainer.model, options)
        self._rows: dict[int, tuple[Any, ExampleRows]] = {}
        self._model_hash: str | None = None

    def rows(self, dataset: Any) -> ExampleRows:
        """The collated rows of `dataset`."""
        if id(dataset) not in self._rows:
            data, collate = for_collator(self.trainer, dataset)
            pad = getattr(self.trainer.model.config, "pad_token_id", 0)
            batches = batches_in_order(data, collate, self.args.per_device_eval_batch_size)
            self._rows[id(dataset)] = (dataset, ExampleRows(batches, pad))  # held, so that the id stays its own
        return self._rows[id(dataset)][1]

    def kernel(self, dataset: Any, split: str) -> np.ndarray:
        """`[kernels, N_train, C, N, C]` between the training data and `dataset`; see `KernelOptions.class_diagonal`.

        Raises:
            InputError: as `empirical_ntk`, `KernelStore` and `read_kernel`; a loaded kernel of other sizes.
        """
        train = self.trainer.train_dataset
        if self.args.load_kernels is not None:
            kernel = self._loaded(dataset, split)
        else:
            rows1 = self.rows(train)
            rows2 = None if dataset is train else self.rows(dataset)
            kernel = self._computed(rows1, rows2)
        if self.args.export_kernels is not None and self.args.process_index == 0:
            store.write_kernel(self.args.export_kernels, split, self._task(), kernel, labels_of(dataset))
        return kernel.numpy()

    def _computed(self, rows1: ExampleRows, rows2: ExampleRows | None) -> torch.Tensor:
        args = self.args
        folder = Path(args.kernel_dir or Path(args.output_dir) / "kernels")
        first = args.process_index == 0
        about, computation = self._about(rows1, rows2), self.computation
        if self.options.class_diagonal:
            if not args.overwrite_kernels and _at_first(args, lambda: KernelStore(folder, about).finished()):
                # the whole kernel is there, of a solver that needs it
                computation = KernelComputation(self.trainer.model, replace(self.options, class_diagonal=False))
            else:
                about["class_diagonal"] = True
        blocks = self._everywhere(lambda: KernelStore(folder, about, args.overwrite_kernels and first, first))
        shared = _SharedPlan(blocks, args) if args.world_size > 1 else blocks
        found = computation.run(
            rows1, rows2, shared, args.process_index, args.world_size, args.disable_tqdm or not args.should_log
        )
        if args.world_size > 1:
            found = self.trainer.accelerator.reduce(found.to(args.device), reduction="sum").cpu()
        return found

    def _about(self, rows1: ExampleRows, rows2: ExampleRows | None) -> dict[str, Any]:
        if self._model_hash is None:
            self._model_hash = store.model_hash(self.trainer.model)
        options = self.options
        return {
            "model": self._model_hash,
            "first": store.rows_hash(rows1),
            "second": None if rows2 is None else store.rows_hash(rows2),
            "formula": options.formula.value,
            "engine": "jacobian" if options.engine.value == "jacobian" else "structured",
            "binary_classification": options.binary_classification,
            "parameters": sorted(self.computation.parameters),
        }

    def _everywhere(self, make: Callable[[], Any]) -> Any:
        """`make()` on every process, the first one before the others; a refusal by the first is everybody's."""
        made: list = []
        _at_first(self.args, lambda: made.append(make()))
        return made[0] if made else make()

    # --- the authors' files ---------------------------------------------------------------------------

    def _task(self) -> str:
        return self.args.kernel_task_name or "task"

    def _loaded(self, dataset: Any, split: str) -> torch.Tensor:
        folder = Path(self.args.load_kernels).expanduser()
        task = self.args.kernel_task_name or find_task(folder, split)
        kernel, labels = store.read_kernel(folder, split, task)
        n1, n2 = len(self.trainer.train_dataset), len(dataset)
        c = 1 if self.options.binary_classification else self.trainer.model.config.num_labels
        wanted = (self.options.formula.kernels, n1, c, n2, c)
        if tuple(kernel.shape) != wanted:
            raise InputError(
                f"{folder / store.kernel_file(split, task)} holds a kernel of shape {tuple(kernel.shape)}, but "
                f"kernel_formula={self.options.formula.value} with {n1} training and {n2} other rows and {c} scalars "
                f"needs {wanted}; pass the data and options that it was made with"
            )
        own = labels_of(dataset)
        if not own.is_floating_point() and not torch.equal(own.long(), labels.long()):
            raise InputError(
                f"{folder / store.kernel_file(split, task)} has other labels than the {split} data; pass the data "
                "that it was made with, in the same order"
            )
        return kernel

    # --- outputs at the start ---------------------------------------------------------------------------

    def start(self, dataset: Any, split: str) -> np.ndarray:
        """The model's scalars `[N, C]`, in the type that kernels are computed in or from the authors' file."""
        if self.args.load_kernels is not None:
            folder = Path(self.args.load_kernels).expanduser()
            with contextlib.suppress(InputError):
                return store.read_logits(folder, split, self.args.kernel_task_name or find_task(folder, split))
        rows, found = self.rows(dataset), []
        model, device = self.trainer.model, self.args.device
        with torch.no_grad(), evaluating(model):
            for k in range(0, len(rows), self.args.per_device_eval_batch_size):
                indices = range(k, min(k + self.args.per_device_eval_batch_size, len(rows)))
                scalars = self.computation.function(model, rows.batch(indices, device))
                found.append((scalars[:, None] if scalars.ndim == 1 else scalars).double().cpu())
        return torch.cat(found).numpy()


class _SharedPlan:
    """A store whose cut the first process decides."""

    def __init__(self, blocks: KernelStore, args: TrainingArguments):
        self._blocks, self._args = blocks, args
        self.get, self.put = blocks.get, blocks.put

    def plan(self, make: Callable[[], Plan]) -> Plan:
        cut = _at_first(self._args, lambda: self._blocks.plan(make))
        return self._blocks.plan(lambda: cut)


def _at_first(args: TrainingArguments, find: Callable[[], Any]) -> Any:
    """What `find()` gives on the first process; a refusal is everybody's."""
    if args.world_size == 1:
        return find()
    outcome: list = [None]
    if args.process_index == 0:
        try:
            outcome[0] = find()
        except InputError as error:
            outcome[0] = error
    broadcast_object_list(outcome)
    if isinstance(outcome[0], InputError):
        raise outcome[0]
    return outcome[0]


def find_task(folder: Path, split: str) -> str:
    """The task whose kernels `folder` holds for `split`, by the files' names.

    Raises:
        InputError: none, or several.
    """
    prefix = f"{split}_kernels_"
    tasks = sorted(path.stem.removeprefix(prefix) for path in folder.glob(f"{prefix}*.pt"))
    if len(tasks) != 1:
        there = f"holds kernels of several tasks ({', '.join(tasks)})" if tasks else f"holds no {prefix}<task>.pt"
        raise InputError(f"load_kernels: {folder} {there}; pass the files of one task, or kernel_task_name")
    return tasks[0]
