"""Reading batches from a user's training data loader before training, without changing what training sees."""

import contextlib
import itertools
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from transformers import Trainer

from hf_ft_ext.errors import InputError
from hf_ft_ext.training.generators import generators_kept
from hf_ft_ext.training.method_trainer import SAMPLING, overridden


def draws_own_batches(trainer: Trainer) -> bool:
    """Whether training batches may differ from plain batches of `trainer.train_dataset`: no data set, or own hooks."""
    return trainer.train_dataset is None or overridden(trainer, *SAMPLING)


def loader_batches(trainer: Trainer, count: int, skip: int = 0) -> list[dict[str, Any]]:
    """The first `count` batches of this process's training data loader, after skipping `skip` batches.

    A loader with fewer batches is read again. Training later gets its batches in the same order as without this call.

    Raises:
        InputError: there is no training data, or the loader yields no batch.
    """
    batches: list[dict[str, Any]] = []
    with _undisturbed_loader(trainer) as loader:
        while len(batches) < skip + count:
            before = len(batches)
            batches += [dict(batch) for batch in itertools.islice(loader, skip + count - before)]
            if len(batches) == before:
                raise InputError("get_train_dataloader yields no batch, but the pre-pass needs some; check its data")
    return batches[skip:]


def loader_rows(trainer: Trainer, rows: int, batch_size: int) -> list[dict[str, Any]]:
    """The first `rows` rows of this process's training data loader (all, if it has fewer), in smaller batches.

    Raises:
        InputError: as for `loader_batches`.
    """
    parts: list[dict[str, Any]] = []
    with _undisturbed_loader(trainer) as loader:
        for batch in loader:
            taken = min(_rows_in(batch), rows)
            for start in range(0, taken, batch_size):
                part = slice(start, min(start + batch_size, taken))
                parts.append({key: value[part] if _has_rows(value) else value for key, value in batch.items()})
            rows -= taken
            if rows == 0:
                break
    if not parts:
        raise InputError("get_train_dataloader yields no batch, but the pre-pass needs some; check its data")
    return parts


def _has_rows(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.dim() > 0


def _rows_in(batch: dict[str, Any]) -> int:
    return next(len(value) for value in batch.values() if _has_rows(value))


@contextlib.contextmanager
def _undisturbed_loader(trainer: Trainer) -> Iterator[Iterable]:
    if trainer.train_dataset is None and not overridden(trainer, "get_train_dataloader"):
        raise InputError("the gradient pre-pass needs a train_dataset; pass one to the trainer")
    with generators_kept() as keep:
        loader = trainer.get_train_dataloader()
        keep(loader)
        try:
            yield loader
        finally:
            if hasattr(loader, "end"):
                loader.end()  # accelerate marks its loader as in use until the last batch
