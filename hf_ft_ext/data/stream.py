"""Training data as a stream: rows are read and checked, and their labels converted, during training."""

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
from datasets import ClassLabel, Dataset, Features, IterableDataset, Value

from hf_ft_ext.data import labels as lb
from hf_ft_ext.data.sources import READ_ERRORS, reason
from hf_ft_ext.data.task_data import LABEL
from hf_ft_ext.data.tasks import Task
from hf_ft_ext.errors import InputError

_BATCH = 256  # rows converted at a time

logger = logging.getLogger(__name__)


def in_memory(split: str, data: Dataset | IterableDataset, rows: int | None = None) -> Dataset:
    """Return all rows of a split, or its first `rows`, in memory; a `Dataset` is returned unchanged.

    Raises:
        InputError: the rows cannot be read.
    """
    if isinstance(data, Dataset):
        return data
    try:
        found = list(data if rows is None else data.take(rows))
        return Dataset.from_list(found, features=data.features)
    except READ_ERRORS as error:
        raise InputError(
            f"cannot read split '{split}' as a stream ({reason(error)}); check the data, or leave --streaming out"
        ) from error


def usable_rows(
    stream: IterableDataset,
    text_columns: Sequence[str],
    label_column: str,
    stored: Any,
    feature: ClassLabel | Value,
    task: Task | None,
) -> IterableDataset:
    """Return the rows of `stream` in the form of a `TaskData`, without unusable rows.

    Rows without a text or without a known label are skipped and counted in the log.

    Args:
        stream: the stored data.
        text_columns: one or two columns of text.
        label_column: the column of labels.
        stored: type of the stored labels, taken from the first rows.
        feature: type of the resulting labels: a `ClassLabel` of all known labels, or float32.
        task: a known task, or `None`.
    """
    columns = [*text_columns, label_column]
    return stream.select_columns(columns).map(
        _Usable(tuple(text_columns), label_column, stored, feature, task),
        batched=True,
        batch_size=_BATCH,
        remove_columns=columns,
        features=Features({**dict.fromkeys(text_columns, Value("string")), LABEL: feature}),
    )


class _Usable:
    """Converts a batch to texts and label ids or scores; drops and counts unusable rows."""

    def __init__(self, text_columns: tuple[str, ...], label_column: str, stored: Any, feature: Any, task: Task | None):
        self.text_columns, self.label_column = text_columns, label_column
        self.stored, self.feature, self.task = stored, feature, task
        self.skipped = self.logged = 0

    def __call__(self, batch: dict[str, list]) -> dict[str, list]:
        labels, usable = self._labels(batch[self.label_column])
        for column in self.text_columns:
            usable &= np.array([isinstance(text, str) for text in batch[column]], dtype=bool)
        self._count(int((~usable).sum()))
        kept = np.flatnonzero(usable).tolist()
        return {column: [batch[column][i] for i in kept] for column in self.text_columns} | {
            LABEL: labels[kept].tolist()
        }

    def _labels(self, values: list) -> tuple[np.ndarray, np.ndarray]:
        """Return ids or scores, and a mask of the usable ones."""
        raw = lb.raw_labels("train", self.label_column, [self._suited(value) for value in values], self.stored)
        if isinstance(self.feature, ClassLabel):
            ids = lb.known_ids(raw, self.feature.names, self.task)
            return ids, ids != lb.UNLABELLED
        scores = np.where(raw.missing, np.nan, raw.values).astype(np.float32)
        return scores, np.isfinite(scores)

    def _suited(self, value: Any) -> Any:
        """Return a label in the type of the first rows, or `None`; readers may change the type between chunks."""
        dtype = "int" if isinstance(self.stored, ClassLabel) else str(self.stored.dtype)
        if isinstance(value, bool) or not dtype.startswith(("int", "uint", "float")):
            return value if isinstance(value, bool if dtype == "bool" else str) else None
        if not isinstance(value, int | float):
            return None
        if dtype.startswith("float"):
            return value
        return int(value) if value % 1 == 0 else None

    def _count(self, skipped: int) -> None:
        self.skipped += skipped
        if self.skipped >= max(1, 2 * self.logged):  # log when the count has doubled, not for every batch
            self.logged = self.skipped
            logger.warning(
                "stream: %d rows so far lack a text or a label among %s; they are skipped",
                self.skipped,
                ", ".join(self.feature.names[:10]) if isinstance(self.feature, ClassLabel) else "the numbers",
            )
