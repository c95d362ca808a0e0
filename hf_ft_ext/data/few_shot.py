"""k-shot splits: a few rows of each class for training, others for evaluation, and a test split."""

import hashlib
import logging
from collections.abc import Iterable
from dataclasses import replace

import numpy as np
from datasets import Dataset, IterableDataset

from hf_ft_ext.data.origins import Origins, SplitOrigin
from hf_ft_ext.data.task_data import LABEL, TaskData
from hf_ft_ext.data.tasks import GLUE_ID
from hf_ft_ext.errors import InputError
from hf_ft_ext.problem_types import MULTI_LABEL, REGRESSION

DEFAULT_SEED = 13  # the first of the source's five: 13, 21, 42, 87, 100
TEST_ROWS = 1000  # of k-shot-1k-test
_EVALUATION_ROWS = {"k-shot": 1, "k-shot-10x": 10, "k-shot-1k-test": 1}  # times k
_TEST_SEED = 0  # the cut of the test data is the same for every data seed

logger = logging.getLogger(__name__)


def few_shot_data(
    data: TaskData,
    k: int,
    seed: int | None = None,
    split: str = "k-shot",
    allow_small_classes: bool = False,
    keep_test: bool = False,
    max_test_rows: int | None = None,
) -> TaskData:
    """Return few-shot splits: `train` and `validation["dev"]`, drawn from the training split, and a test split.

    Train takes the first `k` rows of each class in the order of `draw_order(seed)`, dev the next `k` (or `10 k`). The
    rows of both stay in that order. A regression has two classes: the lower and the upper half of its scale. The test
    split is that of the source: for GLUE the validation splits, else the labelled test splits, else the validation
    splits.

    Args:
        data: all splits, not cut.
        k: rows of each class, 1 or more.
        seed: seed of the draw; `None` = 13. The draw depends on no other seed and no library's random generator.
        split: `k-shot`, `k-shot-10x` or `k-shot-1k-test`.
        allow_small_classes: let a class with too few rows contribute all that it has, training first.
        keep_test: keep the test splits of `data`, labelled or not.
        max_test_rows: `k-shot-1k-test` draws at most this many test rows; `None` = 1,000.

    Raises:
        InputError: no labelled training split, or a stream; `k` below 1, or a class with too few rows (the message
            names it).

    Source: LM-BFF (Gao et al., ACL 2021, arXiv 2012.15723), tools/generate_k_shot_data.py, which draws with numpy.
    """
    if k < 1:
        raise InputError(f"num_k={k} is out of range; pass 1 or more, or leave it out for all rows")
    if split not in _EVALUATION_ROWS:
        raise InputError(f"few_shot_split={split!r} is unknown; choose from: {', '.join(_EVALUATION_ROWS)}")
    if data.problem_type == MULTI_LABEL:
        raise InputError(
            f"num_k={k} draws rows of each class, but rows with several labels belong to several classes; pass a file "
            "with the rows to train on, or max_train_samples"
        )
    train = data.train
    if train is None:
        raise InputError(
            f"num_k={k}: few-shot rows are drawn from a training split, and {data.task.name!r} has none here; pass "
            "one, such as --train_file with the file of another split"
        )
    if isinstance(train, IterableDataset):
        raise InputError(
            f"num_k={k} draws from all training rows, which a stream does not hold; load the data without streaming"
        )
    if LABEL not in train.column_names:
        raise InputError(
            f"num_k={k} draws rows of each class, but the training rows of {data.task.name!r} have no column "
            f"{LABEL!r}; pass labelled data"
        )
    seed = DEFAULT_SEED if seed is None else seed
    if data.problem_type == REGRESSION:  # use the scale of all rows, not of the drawn ones
        data = replace(data, task=replace(data.task, bounds=label_bounds(data)))
    labels = np.asarray(train[LABEL][:])
    order = draw_order(range(len(labels)), seed)
    parts_of_train, parts_of_dev = [], []
    wanted = k * _EVALUATION_ROWS[split]
    for name, member in _classes(data, labels).items():
        rows = order[member[order]]
        if len(rows) < k + wanted:
            _report_small_class(name, len(rows), k, wanted, allow_small_classes)
        parts_of_train.append(rows[:k])
        parts_of_dev.append(rows[k : k + wanted])
    in_train, in_dev = (_in_order(order, parts) for parts in (parts_of_train, parts_of_dev))
    if not len(in_dev):
        logger.warning("num_k=%d uses every row for training: none is left to evaluate on", k)
    test = dict(data.test) if keep_test and data.test else _test_splits(data)
    numbers = {("test", name): _numbers(data, name, rows) for name, rows in test.items()}
    if split == "k-shot-1k-test":
        most = min(TEST_ROWS, max_test_rows or TEST_ROWS)
        for name, rows in test.items():
            drawn = _drawn_test(len(rows), most)
            test[name], numbers["test", name] = rows.select(drawn), numbers["test", name][drawn]
    return replace(
        data,
        train=train.select(in_train),
        validation={"dev": train.select(in_dev)} if len(in_dev) else {},
        test=test,
        row_numbers=numbers,
        origins=_origins(data, len(labels), k, wanted, seed, test),
    )


def draw_order(rows: Iterable[int], seed: int) -> np.ndarray:
    """Return row numbers in the order of the draw: sorted by the SHA-256 of the text `"<seed> <row>"`.

    The order is the same on every machine and for all versions of Python and of the libraries.
    """
    return np.array(sorted(rows, key=lambda row: hashlib.sha256(f"{seed} {row}".encode()).digest()), dtype=np.int64)


def label_bounds(data: TaskData) -> tuple[float, float]:
    """Return the ends of a regression's scale: the task's own, else the smallest and largest training label.

    Raises:
        InputError: the task has no scale and there are no labels, or all labels are equal.
    """
    if data.task.bounds is not None:
        return data.task.bounds
    source = data.train if data.train is not None else next(iter(data.validation.values()), None)
    if isinstance(source, IterableDataset):
        raise InputError(
            f"the scale of {data.task.name!r} is unknown: it is that of all training labels, which a stream does not "
            "hold; leave --streaming out"
        )
    column = next((name for name in (LABEL, "labels") if source is not None and name in source.column_names), None)
    if source is None or column is None:
        raise InputError(f"the scale of {data.task.name!r} is unknown without training labels; pass a training split")
    labels = np.asarray(source[column][:], dtype=np.float64)
    low, high = float(labels.min()), float(labels.max())
    if low == high:
        raise InputError(
            f"all labels of {data.task.name!r} are {low:g}, so the scale has no length; check --label_column"
        )
    return low, high


def validation_is_test(data: TaskData) -> bool:
    """Whether few-shot splits use the validation data as the test split."""
    return bool(data.validation) and (data.task.hub_id == GLUE_ID or not _labelled_test(data))


def _origins(data: TaskData, rows: int, k: int, wanted: int, seed: int, test: dict[str, Dataset]) -> Origins:
    """Return the origins of the k-shot splits: train and dev from the training split, the test from its own split."""
    kind = "of each half of the scale" if data.problem_type == REGRESSION else "of each class"
    origins: Origins = {
        (role, name): SplitOrigin("train", count, rows, f"{count} rows {kind}, data_seed {seed}")
        for role, name, count in (("train", "train", k), ("validation", "dev", wanted))
    }
    for name, chosen in test.items():
        source = data.test[name] if name in data.test else data.validation[name]
        drawn = f"{len(chosen):,} rows, the same for every seed" if len(chosen) < len(source) else ""
        origins["test", name] = SplitOrigin(name, len(chosen), len(source), drawn)
    return origins


def _classes(data: TaskData, labels: np.ndarray) -> dict[str, np.ndarray]:
    """Return which rows belong to each class: a mask `[rows]` by class name."""
    if data.problem_type == REGRESSION:
        low, high = label_bounds(data)
        middle = (low + high) / 2
        return {f"below {middle:g}": labels < middle, f"{middle:g} and above": labels >= middle}
    if data.label_names is None:
        raise InputError(f"the classes of {data.task.name!r} have no names; pass data with label_names")
    return {name: labels == i for i, name in enumerate(data.label_names)}


def _report_small_class(name: str, size: int, k: int, wanted: int, allowed: bool) -> None:
    if allowed and size:
        logger.warning("class '%s' has only %d rows: training takes %d, evaluation the rest", name, size, min(k, size))
        return
    if size < k:
        cause = f"num_k={k} is more than the {size} rows of class '{name}'"
    else:
        need = f"{k + wanted} rows of each class ({wanted} to evaluate)"
        cause = f"num_k={k} needs {need}, but class '{name}' has {size}"
    most = size * k // (k + wanted)
    advice = f"pass --num_k {most} or less, or --allow_small_classes" if most else "add rows to it"
    raise InputError(f"{cause}; {advice}")


def _in_order(order: np.ndarray, parts: list[np.ndarray]) -> np.ndarray:
    chosen = np.zeros(len(order), dtype=bool)
    chosen[np.concatenate(parts)] = True
    return order[chosen[order]]


def _test_splits(data: TaskData) -> dict[str, Dataset]:
    if validation_is_test(data):
        return dict(data.validation)
    return _labelled_test(data) or dict(data.test)


def _drawn_test(rows: int, most: int) -> np.ndarray:
    """Return the places of at most `most` of so many rows, the same for every seed, in order."""
    return np.sort(draw_order(range(rows), _TEST_SEED)[:most])


def _numbers(data: TaskData, name: str, rows: Dataset) -> np.ndarray:
    """Return the number of each row of the split `name`, of test or validation, in its source."""
    known = data.row_numbers.get(("test" if name in data.test else "validation", name))
    return np.arange(len(rows)) if known is None else known


def _labelled_test(data: TaskData) -> dict[str, Dataset]:
    return {name: rows for name, rows in data.test.items() if LABEL in rows.column_names}
