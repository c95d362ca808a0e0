"""Several labels per row: convert lists of labels, or columns of 0 and 1, to one vector of 0 and 1 per row."""

import ast
import logging
import re
from collections.abc import Sequence
from typing import Any

import datasets
import numpy as np
from datasets import ClassLabel, Dataset, Value

from hf_ft_ext.data.labels import in_order
from hf_ft_ext.data.tasks import Task
from hf_ft_ext.errors import InputError
from hf_ft_ext.metrics import evident_positive
from hf_ft_ext.problem_types import MULTI_LABEL

Roles = Sequence[tuple[str, str, Dataset]]  # (role, split name, rows)

UNLABELLED, MISSING = -1.0, np.nan
_WORDS = {"1": 1, "true": 1, "yes": 1, "1.0": 1, "0": 0, "false": 0, "no": 0, "0.0": 0, "-1": -1, "-1.0": -1}
_LISTS = (datasets.LargeList, type(datasets.Sequence(Value("int64"))))  # the second: `List`, or `Sequence` before

SEPARATOR = "|"  # between the labels of a row in predictions.tsv

_ITEM = re.compile(r"""'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*"|[^\s,()\[\]{}'"]+""")
_ARRAY = re.compile(rf"\[\s*(?:{_ITEM.pattern})(?:\s+(?:{_ITEM.pattern}))*\s*\]")  # as numpy prints one

logger = logging.getLogger(__name__)


def is_multi_label(roles: Roles, columns: Sequence[str]) -> bool:
    """Whether rows have several labels: several label columns, or one that holds lists."""
    if len(columns) > 1:
        return True
    for _, _, data in roles:
        if columns and columns[0] in data.column_names:
            return isinstance(data.features[columns[0]], _LISTS) or _lists_in_text(data, columns[0]) is not None
    return False


def read_multi_labels(
    roles: Roles, columns: Sequence[str], task: Task | None, wanted: str | None = None
) -> tuple[list[str], list[np.ndarray | None]]:
    """Return the label names and, for each split, 0 and 1 as float32 `[rows, labels]`.

    Rows whose values are all -1 have no label and are `UNLABELLED` in all entries. A test split with unlabelled rows
    gives `None`: it can be used for prediction, not for evaluation.

    - A list holds the names or ids of a row's labels. The label names are the ClassLabel's, else all labels of the
      training split, sorted.
    - Lists of equal length that hold only 0 and 1 are vectors; their labels are named by position.
    - With several columns, the column names are the labels; values are 0 and 1, true and false, or yes and no.

    Args:
        roles: the splits, the training split first if there is one.
        columns: one column of lists, or several of 0 and 1.
        task: a known task; none of them has several labels per row, so this is an error.
        wanted: the problem type that the user passed, if any.

    Raises:
        InputError: any other form of labels, or fewer than two labels to train on. Rows to evaluate may have one.
    """
    if task is not None:
        raise InputError(
            f"task '{task.name}' has one label per row, but {', '.join(columns)} gives several; leave --task_name out"
        )
    if wanted not in (None, MULTI_LABEL):
        raise InputError(
            f"--problem_type {wanted}: {', '.join(columns)} gives several labels per row; leave it out, or name one "
            "column of single labels with --label_column"
        )
    if len(columns) > 1:
        names, arrays = list(columns), [_from_columns(role, name, data, columns) for role, name, data in roles]
    else:
        names, arrays = _from_lists(roles, columns[0])
    trains = any(role == "train" for role, _, _ in roles)
    if not names:
        raise InputError(f"no row has a label in '{columns[0]}'; check --label_column and the data")
    if len(names) < 2 and trains:
        raise InputError(
            f"multi-label classification needs two labels or more, but there is {len(names)} ({', '.join(names)}); "
            "for one label pass a column of its own with --label_column"
        )
    found = [
        _checked_values(role, name, values, columns) for (role, name, _), values in zip(roles, arrays, strict=True)
    ]
    _warn_of_constant_labels(roles, names, found)
    return names, found


def feature(count: int) -> Any:
    """Return the type of a column of `count` labels."""
    return datasets.Sequence(Value("float32"), length=count)


# --- columns of 0 and 1 ---------------------------------------------------------------------------------------


def _from_columns(role: str, split: str, data: Dataset, columns: Sequence[str]) -> np.ndarray | None:
    absent = [column for column in columns if column not in data.column_names]
    if role == "test" and len(absent) == len(columns):
        return None
    if absent:
        raise InputError(
            f"split '{split}' has no label column '{absent[0]}', only {', '.join(data.column_names)}; all splits need "
            "the same label columns (test data may be without labels)"
        )
    if twice := [column for column in columns if list(columns).count(column) > 1]:
        raise InputError(f"--label_column names '{twice[0]}' twice; name each label column once")
    return np.stack([_from_column(split, data, column) for column in columns], axis=1)


def _from_column(split: str, data: Dataset, column: str) -> np.ndarray:
    kind = data.features[column]
    positive = None
    if isinstance(kind, ClassLabel):
        name = evident_positive(kind.names)
        if name is None:
            raise InputError(
                f"label column '{column}' of split '{split}' has the classes {', '.join(kind.names)}; with several "
                "label columns each must hold 0 and 1"
            )
        positive = kind.names.index(name)
    values = np.empty(len(data))
    for row, value in enumerate(data[column][:]):
        if positive is not None and value is not None and value >= 0:
            value = int(value == positive)
        number = _number(value)
        if number is None:
            raise InputError(
                f"label column '{column}' of split '{split}' holds {value!r} in row {row} (counted from 0); with "
                "several label columns each must hold 0 and 1"
            )
        values[row] = number
    return values


def _number(value: Any) -> float | None:
    """Convert a value to 0 or 1, `UNLABELLED` or `MISSING`; `None` for anything else."""
    if value is None or (isinstance(value, float) and np.isnan(value)):
        return MISSING
    if isinstance(value, str) and not value.strip():
        return MISSING
    if isinstance(value, str):
        return _WORDS.get(value.strip().lower())
    return float(value) if isinstance(value, bool | int | float) and value in (0, 1, -1) else None


# --- lists ----------------------------------------------------------------------------------------------------


def _from_lists(roles: Roles, column: str) -> tuple[list[str], list[np.ndarray | None]]:
    lists = [_lists_of(role, name, data, column) for role, name, data in roles]
    if _are_vectors([rows for rows in lists if rows is not None]):
        count = next(len(row) for rows in lists if rows is not None for row in rows if row is not None)
        logger.info("labels: the lists in '%s' are read as 0 or 1 for each of %d labels", column, count)
        gap = [MISSING] * count
        return [str(i) for i in range(count)], [
            None if rows is None else np.array([gap if row is None else [float(v) for v in row] for row in rows])
            for rows in lists
        ]
    kind = next((data.features[column] for _, _, data in roles if column in data.column_names), None)
    inner = getattr(kind, "feature", None)
    class_names = inner.names if isinstance(inner, ClassLabel) else None
    tokens = [
        None if rows is None else [None if row is None else _tokens(name, column, i, row, class_names)
                                   for i, row in enumerate(rows)]
        for (_, name, _), rows in zip(roles, lists, strict=True)
    ]  # fmt: skip
    known = tokens[:1] if roles[0][0] == "train" else tokens
    names = class_names or in_order(label for rows in known for row in rows or () for label in row or ())
    return list(names), [
        None if rows is None else _vectors(roles[i][1], rows, names, roles[0][1]) for i, rows in enumerate(tokens)
    ]


def _lists_of(role: str, split: str, data: Dataset, column: str) -> list[list | None] | None:
    if role == "test" and column not in data.column_names:
        return None
    if isinstance(data.features[column], _LISTS):
        return data[column][:]
    found = _lists_in_text(data, column)
    if found is None:
        if str(getattr(data.features[column], "dtype", "")) == "null":
            return [None] * len(data)
        raise InputError(
            f"label column '{column}' of split '{split}' holds {data.features[column]}, but lists in other splits; "
            "all splits need the same kind of labels"
        )
    return found


def _lists_in_text(data: Dataset, column: str) -> list[list | None] | None:
    """Parse lists, tuples, sets and numpy arrays in text form, as pandas writes them; `None` if a row is none."""
    if "string" not in str(getattr(data.features[column], "dtype", "")):
        return None
    found: list[list | None] = []
    for value in data[column][:]:
        if value is None or not value.strip():
            found.append(None)
            continue
        row = _list_in_text(value.strip())
        if row is None:
            return None
        found.append(row)
    return found if any(row is not None for row in found) else None


def _list_in_text(text: str) -> list | None:
    """Parse one list; numpy writes no commas, and to Python `['a' 'b']` is the one text `ab`."""
    try:
        if _ARRAY.fullmatch(text):
            return [ast.literal_eval(item) for item in _ITEM.findall(text)]
        row = ast.literal_eval(text) if text.startswith(("[", "(", "{", "set()")) else None
    except (SyntaxError, ValueError, TypeError, MemoryError, RecursionError):
        return None
    return list(row) if isinstance(row, list | tuple | set) else None


def _are_vectors(splits: list[list[list | None]]) -> bool:
    """Whether all lists have the same length of two or more and hold only 0 and 1 (unlikely for lists of ids)."""
    rows = [row for rows in splits for row in rows if row is not None]
    if not rows or len({len(row) for row in rows}) != 1 or len(rows[0]) < 2:
        return False
    return all(not isinstance(value, str) and value in (0, 1) for row in rows for value in row)


def _tokens(split: str, column: str, row: int, labels: list, names: list[str] | None) -> list[str]:
    found = []
    for label in labels:
        if isinstance(label, float) and label.is_integer():
            label = int(label)
        if isinstance(label, bool) or not isinstance(label, str | int) or not str(label).strip():
            raise InputError(
                f"label column '{column}' of split '{split}' holds {label!r} in the list of row {row} (counted from "
                "0); lists must hold names or whole numbers"
            )
        if names is not None and isinstance(label, int):
            if not 0 <= label < len(names):
                raise InputError(f"label {label} in row {row} of split '{split}' is not an id of {len(names)} labels")
            label = names[label]
        found.append(str(label))
    return found


def _vectors(split: str, rows: list[list[str] | None], names: Sequence[str], source: str) -> np.ndarray:
    ids = {name: i for i, name in enumerate(names)}
    values = np.zeros((len(rows), len(names)))
    for i, row in enumerate(rows):
        if row is None:
            values[i] = MISSING
            continue
        if unseen := [label for label in row if label not in ids]:
            raise InputError(
                f"split '{split}' has the label '{unseen[0]}' in row {i} (counted from 0), which is not among those "
                f"of '{source}' ({', '.join(names[:10])}{', ...' if len(names) > 10 else ''}); correct it, or add "
                "such rows there"
            )
        values[i, [ids[label] for label in row]] = 1
    return values


# --- both -----------------------------------------------------------------------------------------------------


def _checked_values(role: str, split: str, values: np.ndarray | None, columns: Sequence[str]) -> np.ndarray | None:
    """Return the values as float32, after checking that every row has all of its labels or none."""
    if values is None:
        return None
    missing, unlabelled = np.isnan(values), (values == UNLABELLED).all(axis=1)
    without = missing.all(axis=1) | unlabelled
    if role == "test" and without.any():
        state = "no row has" if without.all() else f"{int(without.sum())} of {len(values)} rows do not have"
        logger.info("split '%s': %s labels; it can be used for prediction, not for evaluation", split, state)
        return None
    gaps = np.argwhere(missing | ((values == UNLABELLED) & ~unlabelled[:, None]))
    if len(gaps):
        row, label = gaps[0]
        column = columns[label] if len(columns) > 1 else columns[0]
        raise InputError(
            f"{len(set(gaps[:, 0].tolist()))} of {len(values)} rows of split '{split}' have no label in '{column}' "
            f"(empty or -1; first: row {row}, counted from 0); label or remove them"
        )
    return values.astype(np.float32)


def _warn_of_constant_labels(roles: Roles, names: Sequence[str], found: Sequence[np.ndarray | None]) -> None:
    if roles[0][0] != "train" or found[0] is None:
        return
    never = [name for i, name in enumerate(names) if not (found[0][:, i] == 1).any()]
    if never:
        shown = ", ".join(never[:5]) + (", ..." if len(never) > 5 else "")
        logger.warning("no training row has the label %s: it cannot be learnt", shown)
