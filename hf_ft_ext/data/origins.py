"""The origin of a split's rows: the split of the data set, the number of its rows, and how they were chosen."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from datasets import ClassLabel, Dataset, IterableDataset

from hf_ft_ext.arguments import DataArguments
from hf_ft_ext.data.tasks import Task

ALL, FIRST, DRAWN, STREAM = "all", "first", "drawn", "stream"
_ROWS_AT_ONCE = 10_000
Origins = dict[tuple[str, str], "SplitOrigin"]  # by role (train, validation, test) and name of the split


@dataclass(frozen=True)
class SplitOrigin:
    """The origin of the rows of a split.

    Attributes:
        split: the split's name in the data set; `train`, `validation` or `test` for own files.
        rows: number of rows in use; `None` for a stream.
        source_rows: number of rows in that split, without unlabelled rows; `None` for a stream.
        drawn: description of the random draw; empty if rows were not drawn.
        content: hash of texts and label names, in row order; `None` for a stream.
    """

    split: str
    rows: int | None
    source_rows: int | None
    drawn: str = ""
    content: str | None = None

    @property
    def selection(self) -> str:
        """`all` rows of the split, the `first` of them, rows `drawn` from it, or a `stream` of unknown length."""
        if self.drawn:
            return DRAWN
        if self.rows is None:
            return STREAM
        return ALL if self.rows == self.source_rows else FIRST

    def record(self) -> dict[str, Any]:
        """Return the origin in the form of `run.json`."""
        return {
            "split": self.split,
            "rows": self.rows,
            "source_rows": self.source_rows,
            "selection": self.selection,
            "drawn": self.drawn or None,
            "content": self.content,
        }


def whole_splits(data: Any) -> Origins:
    """Return the origins of the splits of a `TaskData` before any rows are drawn or cut."""
    origins = {}
    for role, splits in (("train", {"train": data.train}), ("validation", data.validation), ("test", data.test)):
        for name, rows in splits.items():
            if rows is not None:
                origins[role, name] = SplitOrigin(name, count := _count(rows), count)
    return origins


def final_origins(data: Any, drawn: str = "", training_splits: Sequence[str] = ()) -> Origins:
    """Return the origins of the splits of a `TaskData` in their final form, with row counts and content hashes.

    Args:
        data: `data.origins` may lack splits taken from another role, such as the test split used for validation.
        drawn: how training and validation rows were chosen if some were left out; empty = the first ones.
        training_splits: names of the source splits of the training rows, if not one split named `train`.
    """
    origins = {}
    for (role, name), now in whole_splits(data).items():
        before = data.origins.get((role, name)) or data.origins.get(("test", name)) or now
        rows = data.train if role == "train" else getattr(data, role)[name]
        origin = replace(before, rows=now.rows, content=content_hash(rows))
        if drawn and role != "test" and not origin.drawn and origin.selection == FIRST:
            origin = replace(origin, drawn=drawn)
        if training_splits and role == "train":
            origin = replace(origin, split=" + ".join(training_splits))
        origins[role, name] = origin
    return origins


def content_hash(rows: Dataset | IterableDataset) -> str | None:
    """Return the first 16 hexadecimal digits of a SHA-256 over all cells, in order; `None` for a stream."""
    if not isinstance(rows, Dataset):
        return None
    digest = hashlib.sha256()
    for start in range(0, len(rows), _ROWS_AT_ONCE):
        batch = rows[start : start + _ROWS_AT_ONCE]
        for column in sorted(batch):
            feature = rows.features[column]
            values = batch[column]
            if isinstance(feature, ClassLabel):
                values = [feature.names[value] if value >= 0 else value for value in values]
            digest.update("\0".join([column, *map(repr, values)]).encode(errors="surrogatepass"))
    return digest.hexdigest()[:16]


def data_source(data_args: DataArguments, task: Task) -> dict[str, Any]:
    """Return the data set of a run in the form of `run.json`.

    Keys: `hub_id` with `config` and `revision`, or `folder`, or `files` (absolute paths by option). For the demo all
    values are `None`.
    """
    options = ("train_file", "validation_file", "test_file")
    files = {option: getattr(data_args, option) for option in options if getattr(data_args, option)}
    name = data_args.dataset_name or (None if files else task.hub_id)
    path = None if name is None else Path(name).expanduser()
    folder = path if path is not None and path.is_dir() else None
    return {
        "hub_id": name if folder is None else None,
        "config": data_args.dataset_config_name or (None if data_args.dataset_name or files else task.hub_config),
        "revision": getattr(data_args, "dataset_revision", None),
        "folder": None if folder is None else str(folder.resolve()),
        "files": {option: str(Path(path).expanduser().resolve()) for option, path in files.items()} or None,
    }


def own_data_name(data_args: DataArguments) -> str:
    """Return the name of own data: that of its first file without the suffix, or of its data set; empty for none."""
    file = data_args.train_file or data_args.validation_file or data_args.test_file
    return Path(file).stem if file else Path(data_args.dataset_name or "").name


def _count(rows: Dataset | IterableDataset) -> int | None:
    return len(rows) if isinstance(rows, Dataset) else None
