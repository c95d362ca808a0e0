"""`KernelSource`: a trainer's kernels, computed and stored in parts, or read from the authors' files."""

import contextlib
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import broadcast, broadcast_object_list
from transformers import Trainer

from hf_ft_ext.errors import InputError
from hf_ft_ext.features.rows import batches_in_order, data_and_collator, labels_of
from hf_ft_ext.kernel import store
from hf_ft_ext.kernel.engines.projected import Chunks, MemoryChunks, divide_rows, features_product, read_chunk
from hf_ft_ext.kernel.ntk import KernelComputation, outputs_at_start
from hf_ft_ext.kernel.options import Engine, KernelOptions
from hf_ft_ext.kernel.rows import ExampleRows
from hf_ft_ext.kernel.saved.training_data import TrainingFeatures, TrainingRows
from hf_ft_ext.kernel.schedule import BlockSchedule, Edges
from hf_ft_ext.kernel.store import FeatureStore, KernelStore
from hf_ft_ext.per_example.capture import Function
from hf_ft_ext.training.first_process import on_first_process

logger = logging.getLogger(__name__)


class KernelSource:
    """Provides kernels between a trainer's training data and other data, and the model's outputs before training.

    Attributes:
        train: the training data, those that the trainer has now. A trainer whose data are replaced later still
            predicts with the rows that its coefficients belong to.

    Args:
        trainer: its model, data, collator and arguments are used.
        options: options of the kernel.
        function: maps model and batch to the scalars; `None` = the logits.
        keep: whether to store finished blocks on disk.
        scalars: a description of `function` that identifies it, so that its kernels can be stored on disk.
    """

    def __init__(
        self,
        trainer: Trainer,
        options: KernelOptions,
        function: Function | None = None,
        keep: bool = True,
        scalars: str | None = None,
    ):
        self.trainer, self.args, self.options, self.keep = trainer, trainer.args, options, keep
        self.train = trainer.train_dataset
        self._function, self._scalars = function, scalars
        self.computation = KernelComputation(trainer.model, options, function)
        self._training_rows: tuple[Any, ExampleRows] | None = None
        self._other_rows: tuple[Any, ExampleRows] | None = None
        self._training_features: Chunks | None = None  # only for engine `projected`
        self._model_hash: str | None = None

    def rows(self, dataset: Any) -> ExampleRows:
        """The collated rows of `dataset`.

        Rows of the training data are cached. Rows of other data are cached until the next data set, or `forget`.
        """
        if isinstance(dataset, TrainingRows):
            return dataset.rows
        for known in (self._training_rows, self._other_rows):
            if known is not None and known[0] is dataset:
                return known[1]
        data, collate = data_and_collator(self.trainer, dataset)
        pad = getattr(getattr(self.trainer.model, "config", None), "pad_token_id", 0)
        rows = ExampleRows(batches_in_order(data, collate, self.args.rows_per_pass), pad)
        if dataset is self.train:
            self._training_rows = (dataset, rows)
        else:
            self._other_rows = (dataset, rows)
        return rows

    def forget(self) -> None:
        """Free the cached rows that are not training data."""
        self._other_rows = None

    def kernel(self, dataset: Any, split: str) -> np.ndarray:
        """`[kernels, N_train, C, N, C]` between the training data and `dataset`; see `KernelOptions.class_diagonal`.

        Raises:
            InputError: as `empirical_ntk`, `KernelStore` and `read_kernel`; a loaded kernel of another size.
        """
        if self.args.load_kernels is not None:
            kernel = self._loaded(dataset, split)
        else:
            if self.computation.projected is None:
                kernel = self._computed(self.rows(self.train), None if dataset is self.train else self.rows(dataset))
            else:
                kernel = self._product(dataset)
        if self.args.export_kernels is not None and self.args.process_index == 0:
            labels = labels_of(dataset)
            scores = labels.double() if self.trainer.regression else labels  # ratings may be whole numbers
            store.write_kernel(self.args.export_kernels, split, self._task(), kernel, scores)
        return kernel.numpy()

    def _computed(self, rows1: ExampleRows, rows2: ExampleRows | None) -> torch.Tensor:
        """The kernel of exact engines: all processes compute blocks of it, which are stored on disk with `keep`."""
        args, folder, computation = self.args, self._folder, self.computation
        first = args.process_index == 0
        blocks: KernelStore | None = None
        if self.keep:
            about = self._about(rows1, rows2)
            if self.options.class_diagonal:
                if not args.overwrite_kernels and on_first_process(lambda: KernelStore(folder, about).finished()):
                    # An earlier run stored the kernel with all products of classes: use it.
                    options = replace(self.options, class_diagonal=False)
                    computation = KernelComputation(self.trainer.model, options, self._function)
                else:
                    about["class_diagonal"] = True
            blocks = self._on_every_process(
                lambda: KernelStore(folder, about, args.overwrite_kernels and first, first)
            )
        shared = _SharedSchedule(blocks) if args.world_size > 1 else blocks
        return computation.run(rows1, rows2, shared, args.process_index, args.world_size, self._quiet, self._send)

    @property
    def _folder(self) -> Path:
        return Path(self.args.kernel_dir or Path(self.args.output_dir) / "kernels")

    @property
    def _quiet(self) -> bool:
        return self.args.disable_tqdm or not self.args.should_log

    def _send(self, tensor: torch.Tensor, process: int) -> torch.Tensor:
        """Broadcast `tensor` from `process` to every process."""
        return broadcast(tensor.to(self.args.device), from_process=process).cpu()

    def _about(self, rows1: ExampleRows, rows2: ExampleRows | None) -> dict[str, Any]:
        return {
            "model": self._hash_of_model(),
            "first": store.rows_hash(rows1),
            "second": None if rows2 is None else store.rows_hash(rows2),
            "formula": self.options.formula.value,
            "engine": "jacobian" if self.options.engine is Engine.JACOBIAN else "structured",
            "binary_classification": self.options.binary_classification,
            "parameters": sorted(self.computation.parameters),
            **({} if self._scalars is None else {"scalars": self._scalars}),
        }

    def _hash_of_model(self) -> str:
        if self._model_hash is None:
            self._model_hash = store.model_hash(self.trainer.model)
        return self._model_hash

    # --- engine `projected` -----------------------------------------------------------------------------

    def _product(self, dataset: Any) -> torch.Tensor:
        """The kernel from projected gradients, which are stored for each set of rows."""
        right = None if dataset is self.train else self._projected(self.rows(dataset))
        return features_product(self._projected_training(), right, self.options.class_diagonal)[None]

    def _projected_training(self) -> Chunks:
        if self._training_features is None:
            saved = isinstance(self.train, TrainingFeatures)
            self._training_features = (
                MemoryChunks.of(self.train.features) if saved else self._projected(self.rows(self.train))
            )
        return self._training_features

    def training_data(self) -> TrainingRows | TrainingFeatures:
        """The training data in the form that is needed to predict new rows."""
        if self.computation.projected is None:
            return TrainingRows(self.rows(self.train))
        chunks = self._projected_training()
        return TrainingFeatures(torch.cat([read_chunk(chunks, i) for i in range(len(chunks.edges))]))

    def _projected(self, rows: ExampleRows) -> Chunks:
        """The projected gradients of `rows`: read from the folder, or computed, with the work shared by processes."""
        args, about = self.args, self._about_features(rows)
        first = args.process_index == 0
        cut = divide_rows(len(rows), args.world_size)
        chunks: Chunks = MemoryChunks(cut)
        if self.keep:
            kept: FeatureStore = self._on_every_process(
                lambda: FeatureStore(self._folder, about, args.overwrite_kernels and first, first)
            )
            edges = on_first_process(lambda: kept.cut(cut))
            if not first:
                kept.cut(edges)
            chunks = kept
        self.computation.project(rows, chunks, args.process_index, args.world_size, self._quiet)
        if args.world_size > 1:
            self._exchange(chunks)
        return chunks

    def _exchange(self, chunks: Chunks) -> None:
        """Send chunks to the processes that do not have them, because they do not share the folder."""
        args = self.args
        self.trainer.accelerator.wait_for_everyone()
        for i in range(len(chunks.edges)):
            owner = i % args.world_size
            found = chunks.get(i)
            missing = self.trainer.accelerator.reduce(torch.tensor(float(found is None), device=args.device))
            if missing == 0:
                continue
            shape: list = [None if found is None else tuple(found.shape)]
            broadcast_object_list(shape, from_process=owner)
            sent = self._send(torch.zeros(shape[0], dtype=self.computation.dtype) if found is None else found, owner)
            if found is None:
                chunks.put(i, sent)

    def _about_features(self, rows: ExampleRows) -> dict[str, Any]:
        options = self.options
        return {
            "model": self._hash_of_model(),
            "rows": store.rows_hash(rows),
            "engine": Engine.PROJECTED.value,
            "dimension": options.dimension,
            "seed": options.seed,
            "binary_classification": options.binary_classification,
            "parameters": sorted(self.computation.parameters),
            **({} if self._scalars is None else {"scalars": self._scalars}),
        }

    def _on_every_process(self, make: Callable[[], Any]) -> Any:
        """Call `make()` on every process, on the first one first; its `InputError` is raised on all of them."""
        made: list = []
        on_first_process(lambda: made.append(make()))
        return made[0] if made else make()

    # --- the authors' files ---------------------------------------------------------------------------

    def _task(self) -> str:
        return self.args.kernel_task_name or "task"

    def _loaded(self, dataset: Any, split: str) -> torch.Tensor:
        folder = Path(self.args.load_kernels).expanduser()
        task = self.args.kernel_task_name or store.find_task(folder, split)
        kernel, labels = store.read_kernel(folder, split, task)
        n1, n2 = len(self.train), len(dataset)
        c = 1 if self.options.binary_classification else self.trainer.model.config.num_labels
        wanted = (self.options.formula.kernels, n1, c, n2, c)
        if tuple(kernel.shape) != wanted:
            raise InputError(
                f"{folder / store.kernel_file(split, task)} holds a kernel of shape {tuple(kernel.shape)}, but "
                f"kernel_formula={self.options.formula.value} with {n1} training and {n2} other rows and {c} scalars "
                f"needs {wanted}; pass the data and options that it was computed with"
            )
        own = labels_of(dataset)
        if not own.is_floating_point() and not torch.equal(own.long(), labels.long()):
            raise InputError(
                f"{folder / store.kernel_file(split, task)} has other labels than the {split} data; pass the data "
                "that it was computed with, in the same order"
            )
        return kernel

    # --- outputs at the start ---------------------------------------------------------------------------

    def start(self, dataset: Any, split: str) -> np.ndarray:
        """The model's scalars before training `[N, C]`: from the authors' file, or computed in the kernel's dtype."""
        if self.args.load_kernels is not None:
            folder = Path(self.args.load_kernels).expanduser()
            with contextlib.suppress(InputError):
                return store.read_logits(folder, split, self.args.kernel_task_name or store.find_task(folder, split))
        return outputs_at_start(self.computation, self.rows(dataset), self.args.rows_per_pass)


class _SharedSchedule:
    """Wraps a store (`None`: blocks are not stored) so that all processes use the schedule of the first one."""

    def __init__(self, blocks: KernelStore | None):
        self._blocks = blocks

    def schedule(self, make: Callable[[Edges | None], BlockSchedule]) -> BlockSchedule:
        blocks = self._blocks
        if blocks is None:
            return on_first_process(lambda: make(None))
        schedule = on_first_process(lambda: blocks.schedule(make))
        return blocks.schedule(lambda edges: schedule)

    def get(self, i: int, j: int) -> torch.Tensor | None:
        return None if self._blocks is None else self._blocks.get(i, j)

    def put(self, i: int, j: int, block: torch.Tensor) -> None:
        if self._blocks is not None:
            self._blocks.put(i, j, block)
