"""Run folders as the report reads them: `run.json`, and `comparison.json` where a comparison left one."""

import json
import os
import shlex
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hf_ft_ext.errors import InputError

COMPARISON = "comparison.json"
NOT_STARTED = "not started"
_RUN_RECORD = "run.json"
_NEEDED = ("method", "task", "model", "seed", "metrics", "command")


@dataclass(frozen=True)
class Run:
    """A finished run.

    Attributes:
        variant: its name in a comparison; `None` elsewhere.
        seconds: wall-clock seconds of its process, start-up and evaluation included, where a comparison measured it.
    """

    folder: Path
    record: dict[str, Any]
    variant: str | None = None
    seconds: float | None = None

    @property
    def command(self) -> str:
        return shlex.join(str(word) for word in self.record["command"])


@dataclass(frozen=True)
class Missing:
    """A run that is not there, and why; `command` is empty where nobody knows it."""

    name: str
    seed: int | None
    state: str
    reason: str
    command: str = ""
    log: str = ""


@dataclass
class Found:
    """All that was found under some paths."""

    runs: list[Run] = field(default_factory=list)
    missing: list[Missing] = field(default_factory=list)
    left_out: dict[str, dict[str, str]] = field(default_factory=dict)  # variant -> argument -> reason
    seconds: float = 0.0  # of the last calls of the comparisons, and of the runs that these calls made
    run_seconds: float = 0.0


def find_runs(paths: Iterable[str | os.PathLike]) -> Found:
    """Read the runs in `paths`: run folders, folders of run folders, or folders of comparisons.

    A record that cannot be read does not keep the others out; it is among `missing`. A path that is a file is left
    out, so that `runs/*` may hold logs beside run folders.

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
    for folder in folders:
        if (folder / COMPARISON).is_file():
            _read_comparison(folder, found)
        elif (folder / _RUN_RECORD).is_file():
            _read_run(folder, found)
        else:
            patterns = (f"*/{COMPARISON}", f"*/{_RUN_RECORD}", f"runs/*/{_RUN_RECORD}")
            for record in sorted(path for pattern in patterns for path in folder.glob(pattern)):
                read = _read_comparison if record.name == COMPARISON else _read_run
                if record.parent.resolve() not in seen:
                    seen.add(record.parent.resolve())
                    read(record.parent, found)
    if not found.runs and not found.missing:
        shown = ", ".join(map(str, paths))
        raise InputError(f"no {_RUN_RECORD} in {shown}; pass the folders that run_glue.py wrote, such as runs/*")
    return found


def _read_comparison(folder: Path, found: Found) -> None:
    try:
        record = json.loads((folder / COMPARISON).read_text(encoding="utf-8"))
        entries = record["runs"]
        found.seconds += record["seconds"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        found.missing.append(Missing(str(folder), None, "unreadable", f"{COMPARISON} cannot be read ({error})"))
        return
    for entry in entries:
        found.left_out.setdefault(entry["variant"], entry.get("left_out", {}))
        found.run_seconds += entry["seconds"]  # 0 for runs that an earlier call made
        if entry["state"] == "done":
            _read_run(folder / entry["folder"], found, entry["variant"], entry["seconds"] or None)
        else:
            log = str(folder / entry["log"]) if (folder / entry["log"]).is_file() else ""
            found.missing.append(
                Missing(entry["variant"], entry["seed"], entry["state"], entry["reason"], entry["command"], log)
            )


def _read_run(folder: Path, found: Found, variant: str | None = None, seconds: float | None = None) -> None:
    try:
        record = json.loads((folder / _RUN_RECORD).read_text(encoding="utf-8"))
        if lacks := [key for key in _NEEDED if key not in record]:
            raise ValueError(f"it lacks {lacks[0]!r}")
    except (OSError, ValueError, TypeError) as error:
        reason = f"{_RUN_RECORD} cannot be read: {error}"
        found.missing.append(Missing(variant or str(folder), None, "unreadable", reason))
        return
    found.runs.append(Run(folder, record, variant, seconds))
