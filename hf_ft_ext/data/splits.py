"""Choose the splits of a data set for training, validation and test."""

import glob
import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from datasets import Dataset, IterableDataset, concatenate_datasets

from hf_ft_ext.arguments import DataArguments
from hf_ft_ext.data.tasks import Task
from hf_ft_ext.errors import InputError, first_line

_PREFIXES = {"train": ("train",), "validation": ("validation", "valid", "val", "dev"), "test": ("test",)}

logger = logging.getLogger(__name__)


def find_roles(
    source: dict[str, Dataset | IterableDataset], task: Task | None, data_args: DataArguments
) -> list[tuple[str, str, Dataset | IterableDataset]]:
    """Return (role, split name, rows), training first, then validation, then test.

    Each role takes the splits named in `data_args`, else those of the task, else those whose names begin with the
    role's name. Several training splits named in `train_split` are concatenated to one, named `train`.

    Raises:
        InputError: a split is missing, there are several training splits and no choice, or there is no split.
    """
    of_task = {"train": ("train",)} | (
        {"validation": task.validation_splits, "test": task.test_splits} if task else {"validation": (), "test": ()}
    )
    roles: list[tuple[str, str, Dataset | IterableDataset]] = []
    used: dict[str, str] = {}
    for role in _PREFIXES:
        wanted = getattr(data_args, f"{role}_split")
        if wanted:
            found = _named(source, f"{role}_split", wanted)
        else:
            found = [name for name in of_task[role] if name in source and name not in used]
            like_it = [name for name in source if name.split("_")[0] in _PREFIXES[role] and name not in used]
            found = found or like_it
        if role == "train" and len(found) > 1 and not wanted:
            raise InputError(
                f"the data has several training splits: {', '.join(found)}; pass those to train on, one or more, to "
                "--train_split"
            )
        for name in found:
            if name in used:
                raise InputError(f"split '{name}' is named by --{used[name]}_split and --{role}_split; choose one")
        used |= dict.fromkeys(found, role)
        if role == "train" and found:
            roles.append((role, "train", _together(source, found)))
        else:
            roles += [(role, name, source[name]) for name in found]
    if not roles:
        raise InputError(
            f"the data has none of the splits train, validation and test, only {', '.join(source) or 'empty ones'}; "
            "name them with --train_split, --validation_split and --test_split"
        )
    return roles


def files_of_task(files: Mapping[str, Sequence[str]] | None, task: Task | None) -> dict[str, list[str]] | None:
    """Return the files of a local folder by the task's own splits; `None` if `files` need no change.

    `datasets` puts files whose names begin alike into one split: those of MNLI's matched and mismatched part.

    Args:
        files: the paths of each split, as `datasets` found them.

    Returns:
        Patterns for `datasets`, each of one file.
    """
    found: dict[str, list[str]] = {}
    for split, paths in (files or {}).items():
        for path in paths:
            found.setdefault(_split_of_task(path, task) or str(split), []).append(glob.escape(str(path)))
    return found if task is not None and found.keys() - (files or {}).keys() else None


def _split_of_task(path: str, task: Task | None) -> str | None:
    """The split of a task with several for one role, such as `validation_matched`, that a file or its folder names."""
    for split in (*task.validation_splits, *task.test_splits) if task else ():
        role, _, part = split.partition("_")
        pattern = rf"({'|'.join(_PREFIXES[role])})[._-]{part}([._-].*)?" if part else None
        if pattern and any(re.fullmatch(pattern, name) for name in Path(path).parts[-2:]):
            return split
    return None


def _named(source: dict, option: str, wanted: Sequence[str]) -> list[str]:
    for name in wanted:
        if name not in source:
            raise InputError(f"--{option} {name}: the data has no such split; its splits are {', '.join(source)}")
    return list(dict.fromkeys(wanted))


def _together(source: dict[str, Dataset | IterableDataset], names: Sequence[str]) -> Dataset | IterableDataset:
    if len(names) == 1:
        return source[names[0]]
    try:
        joined = concatenate_datasets([source[name] for name in names])
    except ValueError as error:
        raise InputError(
            f"--train_split {' '.join(names)}: their columns differ ({first_line(error)}); pass one of them"
        ) from error
    logger.info("training on %s together", ", ".join(names))
    return joined
