"""Reading a data set in order: collated batches for the encoder, and labels."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from transformers import Trainer

from hf_ft_ext.errors import InputError

LABELS = "labels"
SAMPLE = 16  # rows used to find out how the head reads its features


def batches_in_order(
    dataset: Any, collate: Callable[[list], dict], batch_size: int, device: torch.device | str | None = None
) -> Iterator[dict[str, torch.Tensor]]:
    """Collated batches of all rows in order, without labels, on `device`."""
    for start in range(0, len(dataset), batch_size):
        rows = [dataset[i] for i in range(start, min(start + batch_size, len(dataset)))]
        yield inputs_of(collate(rows), device)


def read_in_order(
    read: Callable[[dict[str, torch.Tensor]], torch.Tensor],
    dataset: Any,
    collate: Callable[[list], dict],
    batch_size: int,
    device: torch.device | str | None = None,
    window: int = 16,
    start: int = 0,
) -> Iterator[torch.Tensor]:
    """Yield `read(batch)` for all rows from `start` on, in order, several rows at a time: `[n, ...]` each.

    Within a window of `window` batches, rows of similar length share a batch, which reduces padding. Windows do not
    depend on `start`, so a continued run makes the same batches.
    """
    size = window * batch_size
    for first in range(start - start % size, len(dataset), size):
        rows = [dataset[i] for i in range(first, min(first + size, len(dataset)))]
        order = sorted(range(len(rows)), key=lambda i: len(rows[i].get("input_ids", ())))
        batches = [[rows[i] for i in order[at : at + batch_size]] for at in range(0, len(rows), batch_size)]
        found = torch.cat([read(inputs_of(collate(batch), device)) for batch in batches])
        table = torch.empty_like(found)
        table[order] = found
        yield table[max(0, start - first) :]


def inputs_of(batch: dict[str, torch.Tensor], device: torch.device | str | None) -> dict[str, torch.Tensor]:
    """`batch` on `device`, without its labels."""
    return {key: value.to(device) for key, value in batch.items() if key != LABELS}


def labels_of(dataset: Any) -> torch.Tensor:
    """Labels of all rows.

    Raises:
        InputError: a row has none.
    """
    columns = getattr(dataset, "column_names", None)
    name = next((name for name in ("labels", "label") if columns is None or name in columns), None)
    try:
        if columns is not None:
            return torch.as_tensor(dataset.with_format(None)[name][:])
        return torch.as_tensor([dataset[i].get("labels", dataset[i].get("label")) for i in range(len(dataset))])
    except (KeyError, TypeError, RuntimeError, ValueError) as error:
        raise InputError("the training data have no labels to learn from; add a column `labels`") from error


def data_and_collator(trainer: Trainer, dataset: Any) -> tuple[Any, Any]:
    """The data set and the collator from which `trainer` makes its batches."""
    if hasattr(dataset, "column_names"):
        return trainer._remove_unused_columns(dataset, description="training"), trainer.data_collator
    return dataset, trainer._get_collator_with_removed_columns(trainer.data_collator, description="training")
