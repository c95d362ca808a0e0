"""Read run folders: `run.json`, and `comparison.json` of a comparison."""

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hf_ft_ext.errors import InputError
from hf_ft_ext.training.sharing.privacy import hide_tokens
from hf_ft_ext.training.sharing.text import shell_command

COMPARISON = "comparison.json"
NOT_STARTED = "not started"
_RUN_RECORD = "run.json"
_NUMBER = (int, float)
_REQUIRED: dict[str, tuple[type, ...]] = {
    "method": (str,), "task": (str,), "model": (str,), "seed": (int,), "metrics": (dict,), "command": (list,),
}  # fmt: skip
# Records of other versions may lack these.
_OPTIONAL: dict[str, tuple[type, ...]] = {
    "train_seconds": _NUMBER, "preparation_seconds": _NUMBER, "samples_per_second": _NUMBER,
    "peak_memory_bytes": _NUMBER, "trainable_parameters": _NUMBER, "counted_parameters": _NUMBER,
    "total_parameters": _NUMBER, "artefact_bytes": _NUMBER, "world_size": (int,), "versions": (dict,),
    "arguments": (dict,), "data": (dict,), "model_source": (dict,), "device": (str,), "quality": (str,),
    "labels": (list,), "task_type": (str,), "generations": (list,),
}  # fmt: skip
_KINDS = {
    dict: "an object",
    list: "a list",
    str: "a text",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
}
_ENTRY: dict[str, tuple[type, ...]] = {  # a run of a comparison
    "variant": (str,), "seed": (int,), "folder": (str,), "log": (str,), "state": (str,), "reason": (str,),
    "seconds": _NUMBER, "command": (str,),
}  # fmt: skip
_GENERATION: dict[str, tuple[type, ...]] = {"prompt": (str, list), "prediction": (str,)}


@dataclass(frozen=True)
class Run:
    """A finished run.

    Attributes:
        record: the content of `run.json`, with `None` for missing optional keys.
        variant: its name in a comparison; `None` outside of a comparison.
        seconds: wall-clock seconds of its process, including start-up and evaluation, if a comparison measured it.
    """

    folder: Path
    record: dict[str, Any]
    variant: str | None = None
    seconds: float | None = None

    @property
    def command(self) -> str:
        return shell_command(self.record["command"])

    @property
    def modified(self) -> float:
        """Modification time of its record, seconds since the epoch; 0 if the file does not exist."""
        try:
            return (self.folder / _RUN_RECORD).stat().st_mtime
        except OSError:
            return 0.0


@dataclass(frozen=True)
class Missing:
    """A run without a result, and the reason; `command` is empty if it is not known."""

    name: str
    seed: int | None
    state: str
    reason: str
    command: str = ""
    log: str = ""


@dataclass
class Found:
    """The runs and missing runs under some paths."""

    runs: list[Run] = field(default_factory=list)
    missing: list[Missing] = field(default_factory=list)
    left_out: dict[str, dict[str, str]] = field(default_factory=dict)  # variant -> argument -> reason
    seconds: float = 0.0  # wall-clock seconds of the last calls of the comparisons
    run_seconds: float = 0.0  # and of the runs in these calls


def find_runs(paths: Iterable[str | os.PathLike]) -> Found:
    """Read the runs in `paths`: run folders, folders of run folders, or folders of comparisons.

    A record that cannot be read, or belongs to another program, is added to `missing`; the others are still read.
    Paths of files are ignored, so that `runs/*` may include logs. A folder is read once, even if it is found twice.

    Raises:
        InputError: a path that does not exist, or no run at all.
    """
    found, seen, folders = Found(), set(), []
    for path in map(Path, paths):
        if not path.exists():
            raise InputError(f"{str(path)!r} does not exist; pass run folders, or folders of run folders")
        if path.is_dir() and path.resolve() not in seen:
            seen.add(path.resolve())
            folders.append(path)
    reader = _Reader(found)
    # Comparisons first, as they have the names of their runs.
    for folder in sorted(folders, key=lambda folder: not (folder / COMPARISON).is_file()):
        if (folder / COMPARISON).is_file():
            reader.comparison(folder)
        elif (folder / _RUN_RECORD).is_file():
            reader.run(folder)
        else:
            patterns = (f"*/{COMPARISON}", f"*/{_RUN_RECORD}", f"runs/*/{_RUN_RECORD}")
            for pattern in patterns:
                for record in sorted(folder.glob(pattern)):
                    if record.name == COMPARISON:
                        reader.comparison(record.parent)
                    else:
                        reader.run(record.parent)
    if not found.runs and not found.missing:
        shown = ", ".join(map(str, paths))
        raise InputError(f"no {_RUN_RECORD} in {shown}; pass the folders that run_glue.py wrote, such as runs/*")
    return found


def checked_record(value: Any) -> dict[str, Any]:
    """Check the content of a `run.json`, and set missing optional keys to `None`.

    Raises:
        ValueError: it is not a record of this package: a key is missing, or its value has another type.
    """
    _check_kinds(value, _REQUIRED, _OPTIONAL)
    for generation in value.get("generations") or ():
        _check_kinds(generation, _GENERATION, {}, "one of its generations")
    return {**dict.fromkeys(_OPTIONAL), **value}


def _check_kinds(
    value: Any, required: dict[str, tuple[type, ...]], optional: dict[str, tuple[type, ...]], part: str = ""
) -> None:
    """Raise `ValueError` unless `value` is an object whose values have these types; optional ones may be missing."""
    if not isinstance(value, dict):
        raise ValueError(f"{part or 'it'} contains {_kind(value)}, not an object")
    for key, kinds in {**required, **optional}.items():
        if key in required and key not in value:
            raise ValueError(f"{part or 'it'} has no {key!r}; is it of another program?")
        given = value.get(key)
        right = isinstance(given, kinds) and not isinstance(given, bool)
        if not right and not (key in optional and given is None):
            name = f"the {key!r} of {part}" if part else f"its {key!r}"
            raise ValueError(f"{name} is {_kind(given)}, not {_KINDS[kinds[0]]}")


class _Reader:
    """Adds the runs of folders to `found`, each folder once."""

    def __init__(self, found: Found):
        self.found = found
        self._seen: set[Path] = set()

    def _is_new(self, folder: Path) -> bool:
        new = folder.resolve() not in self._seen
        self._seen.add(folder.resolve())
        return new

    def comparison(self, folder: Path) -> None:
        if not self._is_new(folder / COMPARISON):
            return
        try:
            record = json.loads((folder / COMPARISON).read_text(encoding="utf-8"))
            entries, seconds = record["runs"], float(record["seconds"])
            for entry in entries:
                _check_kinds(entry, _ENTRY, {"left_out": (dict,)}, "one of its runs")
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            reason = f"{COMPARISON} cannot be read ({error})"
            self.found.missing.append(Missing(str(folder), None, "unreadable", reason))
            return
        self.found.seconds += seconds
        for entry in entries:
            self._entry(folder, entry)

    def _entry(self, folder: Path, entry: dict[str, Any]) -> None:
        self.found.left_out.setdefault(entry["variant"], entry.get("left_out") or {})
        self.found.run_seconds += entry["seconds"]  # 0 for runs of an earlier call
        if entry["state"] == "done":
            self.run(folder / entry["folder"], entry["variant"], entry["seconds"] or None)
            return
        self._is_new(folder / entry["folder"])  # marks it as read: a result of an earlier call there does not count
        log = str(folder / entry["log"]) if (folder / entry["log"]).is_file() else ""
        command = hide_tokens(entry["command"])
        command = f"python {command}" if command.startswith("run_glue.py") else command
        self.found.missing.append(
            Missing(entry["variant"], entry["seed"], entry["state"], entry["reason"], command, log)
        )

    def run(self, folder: Path, variant: str | None = None, seconds: float | None = None) -> None:
        if not self._is_new(folder):
            return
        try:
            record = checked_record(json.loads((folder / _RUN_RECORD).read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError, RecursionError) as error:
            reason = f"{_RUN_RECORD} cannot be read: {error}"
            self.found.missing.append(Missing(variant or str(folder), None, "unreadable", reason))
            return
        self.found.runs.append(Run(folder, record, variant, seconds))


def _kind(value: Any) -> str:
    return "nothing" if value is None else _KINDS[type(value)]
