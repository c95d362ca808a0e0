"""Reading a data set in order: collated batches for the encoder, and labels."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from transformers import DataCollatorWithPadding, DefaultDataCollator, Trainer, default_data_collator
from transformers.trainer_utils import RemoveColumnsCollator

from hf_ft_ext.errors import InputError, first_line
from hf_ft_ext.prompts.collator import ContextCollator

LABELS = "labels"
SAMPLE = 16  # rows used to find out how the head reads its features
_SEARCHED = 1000  # rows searched for one of another length, in data without columns
_PADDING = (DataCollatorWithPadding, DefaultDataCollator, ContextCollator)


def has_plain_columns(dataset: Any) -> bool:
    """Whether the rows are those of the columns: a data set of `datasets` without a transform (`set_transform`)."""
    return hasattr(dataset, "column_names") and getattr(dataset, "format", {}).get("type") != "custom"


def without_removal(collate: Any) -> Any:
    """The collator inside the one that removes unused columns of a data set without columns."""
    return collate.data_collator if isinstance(collate, RemoveColumnsCollator) else collate


def only_pads(collate: Any) -> bool:
    """Whether a collator is known to return each row unchanged: transformers' padding collators and ours."""
    collate = without_removal(collate)
    return type(collate) in _PADDING or collate is default_data_collator


def sample_rows(dataset: Any) -> list[Any]:
    """The first rows; if they all have one length, the last of them is replaced by a row of another length, if any.

    Only padding shows whether a head reads, for example, the last token or the last position.
    """
    rows = [dataset[i] for i in range(min(SAMPLE, len(dataset)))]
    lengths = {_length(row) for row in rows}
    if len(lengths) == 1 and len(dataset) > len(rows) > 1:
        other = _row_of_another_length(dataset, lengths.pop())
        if other is not None:
            rows[-1] = dataset[other]
    return rows


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
    return {key: value for key, value in on_device(batch, device).items() if key != LABELS}


def on_device(batch: dict[str, torch.Tensor], device: torch.device | str | None) -> dict[str, torch.Tensor]:
    """`batch` with its tensors on `device`."""
    return {key: value.to(device) if isinstance(value, torch.Tensor) else value for key, value in batch.items()}


def has_labels(dataset: Any) -> bool:
    """Whether the rows have a column of labels."""
    first = dict.fromkeys(dataset.column_names, True) if has_plain_columns(dataset) else dataset[0]
    return any(first.get(name) is not None for name in ("labels", "label"))


def labels_of(dataset: Any) -> torch.Tensor:
    """Labels of all rows.

    Raises:
        InputError: there are none, or not a number, or as many numbers as in other rows, in each row.
    """
    if not has_labels(dataset):
        raise InputError("the rows have no labels; add a column `labels`")
    try:
        if has_plain_columns(dataset):
            name = next((name for name in ("labels", "label") if name in dataset.column_names), None)
            return torch.as_tensor(dataset.with_format(None)[name][:])
        return stacked_labels([dataset[i].get("labels", dataset[i].get("label")) for i in range(len(dataset))])
    except (KeyError, TypeError, RuntimeError, ValueError) as error:
        raise InputError(
            f"the labels of the rows are not numbers, or not as many in each row ({first_line(error)}); correct them, "
            "or remove rows without a label"
        ) from error


def stacked_labels(labels: list[Any]) -> torch.Tensor:
    """Labels of rows as one tensor; those of a row are a number, or as many numbers as in other rows."""
    return torch.stack([torch.as_tensor(label) for label in labels])


def data_and_collator(trainer: Trainer, dataset: Any) -> tuple[Any, Any]:
    """The data set and the collator from which `trainer` makes its batches."""
    if hasattr(dataset, "column_names"):
        return trainer._remove_unused_columns(dataset, description="training"), trainer.data_collator
    return dataset, trainer._get_collator_with_removed_columns(trainer.data_collator, description="training")


def _length(row: Any) -> int:
    return len(row["input_ids"]) if isinstance(row, dict) and "input_ids" in row else 0


def _row_of_another_length(dataset: Any, length: int) -> int | None:
    if not has_plain_columns(dataset) or "input_ids" not in dataset.column_names:
        rows = range(min(_SEARCHED, len(dataset)))
        return next((i for i in rows if _length(dataset[i]) != length), None)
    first = 0
    for table in dataset.select_columns("input_ids").with_format("arrow").iter(batch_size=10_000):
        lengths = table.column(0).combine_chunks().value_lengths().to_numpy(zero_copy_only=False)
        if (lengths != length).any():
            return first + int((lengths != length).argmax())
        first += len(lengths)
    return None
