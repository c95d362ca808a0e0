"""Convert a label column of any stored type into class ids or scores."""

import logging
import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from datasets import ClassLabel, Dataset, Value

from hf_ft_ext.data.tasks import Task
from hf_ft_ext.errors import InputError
from hf_ft_ext.problem_types import CLASSIFICATION, REGRESSION

_NUMBER = re.compile(r"[+-]?[0-9]+([.,][0-9]+)?")
_KEPT_AS_TEXT = re.compile(r"\s|\+|-?0[0-9]|.*\s$")  # numbers in this spelling are read as text: they may be ids
_NO_VALUE = {"na", "n/a", "none", "null", "nan", "?", "-", "unknown"}
UNLABELLED = -1  # marks GLUE's test rows and SNLI's pairs without a gold label

logger = logging.getLogger(__name__)


@dataclass
class RawLabels:
    """One split's label column, one entry per row.

    `values` holds names (`str`) or numbers; `missing` marks None, NaN, infinite and empty entries.
    """

    split: str
    kind: str  # "name", "int" or "float"
    values: np.ndarray
    missing: np.ndarray  # bool [rows]
    names: list[str] | None = None  # a ClassLabel's names

    @property
    def unlabelled(self) -> np.ndarray:
        return ~self.missing & (self.values == UNLABELLED)

    @property
    def empty(self) -> bool:
        """Whether no row has a label at all, as in GLUE's test splits."""
        return bool((self.missing | self.unlabelled).all())


def read_labels(split: str, data: Dataset, column: str) -> RawLabels:
    """Read a label column.

    Raises:
        InputError: the column holds neither text nor numbers.
    """
    return raw_labels(split, column, data[column][:], data.features[column])


def raw_labels(split: str, column: str, labels: Sequence, feature: Any) -> RawLabels:
    """As `read_labels`, for labels in memory, each of the type of `feature` or `None`."""
    dtype = getattr(feature, "dtype", str(feature))
    values = np.empty(len(labels), dtype=object)
    values[:] = labels
    missing = np.array([value is None for value in values], dtype=bool)
    if isinstance(feature, ClassLabel):
        named = [UNLABELLED if v is None or v < 0 else feature.names[v] for v in values]
        values[:] = named
        return RawLabels(split, "name", values, missing, feature.names)
    if not isinstance(feature, Value):
        raise InputError(f"label column '{column}' of split '{split}' holds {feature}; labels must be text or numbers")
    if dtype == "null" or "string" in dtype:
        missing |= np.array([isinstance(value, str) and not value.strip() for value in values], dtype=bool)
        return RawLabels(split, "name", values, missing)
    if dtype == "bool":
        values[:] = [None if value is None else str(value) for value in values]
        return RawLabels(split, "name", values, missing)
    if dtype.startswith(("int", "uint")):
        return RawLabels(split, "int", values, missing)
    if dtype.startswith("float"):
        missing = ~np.isfinite(np.array([np.nan if value is None else value for value in values], dtype=np.float64))
        return RawLabels(split, "float", values, missing)
    raise InputError(f"label column '{column}' of split '{split}' holds {dtype}; labels must be text or numbers")


def check_missing(raw: RawLabels) -> None:
    """Raise `InputError` if a row has no label value."""
    rows = np.flatnonzero(raw.missing)
    if len(rows):
        raise InputError(
            f"{len(rows)} of {len(raw.values)} rows of split '{raw.split}' have no label (empty or NaN; first: row "
            f"{rows[0]}, counted from 0); label or remove them"
        )


def problem_type(raws: Sequence[RawLabels], task: Task | None, wanted: str | None = None) -> str:
    """Return the task's problem type; for own data the `wanted` one, else that of the first split's labels.

    Float labels mean regression, which is logged.
    """
    if task is not None:
        return task.problem_type
    if wanted is not None:
        return wanted
    if not raws or raws[0].kind != "float":
        return CLASSIFICATION
    values = raws[0].values[~raws[0].missing].astype(np.float64)
    if np.all(values % 1 == 0):
        shown = ", ".join(f"{value:.1f}" for value in np.unique(values)[:5])
        logger.warning(
            "the labels are whole numbers written with a decimal point (%s): this is a regression; for classes pass "
            "--problem_type %s",
            shown,
            CLASSIFICATION,
        )
    else:
        logger.info("the labels are numbers with decimals: this is a regression")
    return REGRESSION


def check_spelling(raw: RawLabels, task: Task | None = None, wanted: str | None = None) -> None:
    """Check for label names that look like numbers, or that differ only in spaces or case.

    Args:
        raw: labels without missing ones.
        task: a known task, whose own names may be written in any case.
        wanted: the problem type that the user passed; a classification accepts any name.

    Raises:
        InputError: numbers with a decimal comma, or decimal numbers among words or in spellings that are read as text.
    """
    if raw.kind != "name" or raw.names is not None:
        return
    names = {value for value in raw.values[~raw.missing].tolist() if isinstance(value, str)}
    numbers = {name for name in names if _NUMBER.fullmatch(name.strip())}
    commas = sorted(name for name in numbers if "," in name)
    fractions = sorted(name for name in numbers if "." in name)
    if commas and numbers == names and wanted != CLASSIFICATION:
        raise InputError(
            f"split '{raw.split}' has labels with a decimal comma, such as '{commas[0]}'; write a point for numbers "
            f"(0.5), or pass --problem_type {CLASSIFICATION} if these are names of classes"
        )
    amounts = numbers == names or (len(fractions) > 1 and len(names - numbers) < len(fractions))
    if fractions and amounts and wanted != CLASSIFICATION:
        row = next(i for i, value in enumerate(raw.values) if value in names - numbers) if names - numbers else None
        cause = f", but row {row} (counted from 0) has '{raw.values[row]}'" if row is not None else ""
        odd = [name for name in sorted(numbers) if _KEPT_AS_TEXT.match(name)]
        if row is None and odd:
            cause = f", but '{odd[0]}' is read as text; write it without '+', spaces and leading zeros"
        raise InputError(
            f"split '{raw.split}' has numbers such as '{fractions[0]}' for labels{cause}; correct the data, or pass "
            f"--problem_type {CLASSIFICATION} if these are names of classes"
        )
    if numbers and len(names - numbers) == 1 and min(names - numbers).lower() in _NO_VALUE:
        logger.warning(
            "split '%s': label '%s' among numbers is taken as a class; remove these rows if it marks missing labels",
            raw.split,
            min(names - numbers),
        )
    plain: dict[str, str] = {}
    for name in sorted({_canonical(name, task) for name in names}):
        other = plain.setdefault(_plain(name), name)
        if other == name:
            continue
        if other.strip().lower() == name.strip().lower():
            logger.warning("labels %r and %r differ only in spaces or case: they are two classes", other, name)
        else:
            logger.warning("labels %a and %a look alike: they are two classes", other, name)


def scores(raw: RawLabels) -> np.ndarray:
    """Return the labels of a regression as float32 `[rows]`.

    Raises:
        InputError: the labels are names.
    """
    if raw.kind == "name":
        example = next(iter(raw.values), None)
        raise InputError(
            f"split '{raw.split}' has labels such as '{example}', but this is a regression, which needs "
            "numbers; check --label_column and --task_name"
        )
    return raw.values.astype(np.float32)


def class_ids(raws: Sequence[RawLabels], task: Task | None, trains: bool = True) -> tuple[list[str], list[np.ndarray]]:
    """Return the label names and, for each split, ids as int64 `[rows]`, `UNLABELLED` for rows without a label.

    The names are the task's if the labels match them, else those of the ClassLabel, else the sorted labels of the
    training split (of all splits if there is no training split).

    Args:
        raws: splits without missing labels, the training split first if there is one.
        task: a known task, or `None`.
        trains: whether there is training data, which needs two classes. Rows to evaluate may have one of a model's.

    Raises:
        InputError: fewer than two classes to train on, a split with labels that the training split lacks, or decimal
            numbers.
    """
    tokens = [_tokens(raw, task) for raw in raws]
    source = raws[0]
    if source.names is not None:
        names = [_canonical(name, task) for name in source.names]
    elif source.split == "train":
        names = in_order(tokens[0])
    else:
        names = in_order(token for split in tokens for token in split)
    if task is not None and task.label_names and set(names) <= set(task.label_names):
        names = list(task.label_names)
    if len(names) < 2 and trains:
        raise InputError(
            f"split '{source.split}' has only one class ({', '.join(names)}), but "
            "a classification needs two or more; check --label_column and the data"
        )
    if "-1" in names:
        logger.warning("label -1 is taken as a class; remove these rows if it marks missing labels")

    ids = {name: i for i, name in enumerate(names)}
    arrays = []
    for raw, split in zip(raws, tokens, strict=True):
        unseen = in_order(set(split) - set(ids))
        if unseen:
            shown = ", ".join(f"'{name}'" for name in unseen[:5]) + (", ..." if len(unseen) > 5 else "")
            raise InputError(
                f"split '{raw.split}' has labels that are not among those of '{source.split}': {shown} (known: "
                f"{', '.join(names[:10])}{', ...' if len(names) > 10 else ''}); correct them, or add such rows there"
            )
        arrays.append(np.array([ids.get(token, UNLABELLED) for token in split], dtype=np.int64))
    return names, arrays


def known_ids(raw: RawLabels, names: Sequence[str], task: Task | None) -> np.ndarray:
    """Return the ids of labels in `names` as `class_ids` does, int64 `[rows]`; `UNLABELLED` for all other entries."""
    ids = np.full(len(raw.values), UNLABELLED, dtype=np.int64)
    usable = ~raw.missing
    if raw.kind == "float":
        usable[usable] = raw.values[usable].astype(np.float64) % 1 == 0
    known = {name: i for i, name in enumerate(names)}
    tokens = _tokens(replace(raw, values=raw.values[usable], missing=raw.missing[usable]), task)
    ids[usable] = [known.get(token, UNLABELLED) for token in tokens]
    return ids


def _plain(name: str) -> str:
    """Return a name without differences that are hard to see: case, spaces, and ways of encoding a character."""
    shown = (letter for letter in unicodedata.normalize("NFKC", name) if unicodedata.category(letter) != "Cf")
    return " ".join("".join(shown).split()).casefold()


def _tokens(raw: RawLabels, task: Task | None) -> list[str]:
    """Return every label as a name; `UNLABELLED` rows as the empty string, which is not a valid label."""
    values = raw.values.tolist()
    if raw.kind == "float":
        fractions = [value for value in values if value != int(value)]
        if fractions:
            raise InputError(
                f"split '{raw.split}' has the label {fractions[0]}, but this is a classification, which needs "
                "names or whole numbers; check --label_column, or use float labels without a task for a regression"
            )
        values = [int(value) for value in values]
    if raw.kind == "name":
        return ["" if value == UNLABELLED else _canonical(value, task) for value in values]
    # Without a task or names, -1 may be a class (labels -1 and 1, or -1, 0 and 1).
    known = task.label_names if task is not None and task.label_names else ()
    if task is not None:
        values = ["" if value == UNLABELLED else value for value in values]
    if known and all(value == "" or 0 <= value < len(known) for value in values):
        return [value if value == "" else known[value] for value in values]
    return [str(value) for value in values]


def _canonical(name: str, task: Task | None) -> str:
    """Return the task's own spelling of a label name, or the name unchanged."""
    if task is None or task.label_names is None:
        return name
    spellings = {known.lower(): known for known in task.label_names}
    spellings.update((alias.lower(), known) for alias, known in task.label_aliases.items())
    return spellings.get(name.strip().lower(), name)


def in_order(names: Iterable[str]) -> list[str]:
    """Sort different names; whole numbers by value, those of equal value (`7` and `07`) by their spelling.

    A set has another order in every process, so no two names may compare equal.
    """
    names = set(names) - {""}
    try:
        return sorted(names, key=lambda name: (int(name), name))
    except ValueError:
        return sorted(names)
