"""Result files: what a benchmark measured, and under which conditions.

`benchmarks/results/<name>.json` holds `rows`, each a mapping with at least `what` and `value`, and `runs`, the
conditions (command, commit, versions, machine, date) that each row names by its number. All entries of a row that are
not in `MEASURED` identify it. Saving a row again replaces it and other rows stay, so that a long study can write after
every step and a partial file is valid. `tables.py` makes the tables of the pages from these files.
"""

import contextlib
import datetime
import fcntl
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

# Trials of a benchmark write elsewhere.
FOLDER = Path(os.environ.get("HF_FT_EXT_RESULTS") or Path(__file__).resolve().parent / "results")
MEASURED = ("value", "low", "high", "deviation", "values", "seeds", "noisy", "run")
STEADY = 0.1  # quartiles within this share of the median


def summary(values: Sequence[float]) -> dict[str, Any]:
    """Median and quartiles of repeated measurements: `value`, `low`, `high`, and the `values` themselves."""
    if not values:
        raise ValueError("a result needs at least one measured value")
    low, high = (min(values), max(values)) if len(values) < 4 else _quartiles(values)
    return {"value": statistics.median(values), "low": low, "high": high, "values": list(values)}


def over_seeds(scores: dict[int, float]) -> dict[str, Any]:
    """Mean and standard deviation (of a sample) of one score by seed; no deviation for a single seed."""
    values = list(scores.values())
    deviation = statistics.stdev(values) if len(values) > 1 else None
    return {"value": statistics.mean(values), "deviation": deviation, "values": values, "seeds": list(scores)}


def conditions(command: Sequence[str] | None = None) -> dict[str, Any]:
    """What a number depends on beside the code: the command, commit, versions, machine and day."""
    import torch

    from hf_ft_ext.training.runs.record import library_versions

    script = f"benchmarks/{Path(sys.argv[0]).name}"
    words = ["python", script, *sys.argv[1:]] if command is None else list(command)
    return {
        "command": as_recorded(words),
        "commit": _commit(),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "versions": library_versions(),
        "machine": {
            "processor": _processor(),
            "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
            "threads": torch.get_num_threads(),
            "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        },
    }


def as_recorded(words: Sequence[str]) -> str:
    """A command as result files have it: without absolute paths, which differ from machine to machine."""
    return shlex.join(_without_folders(words))


def command_text(run: dict[str, Any]) -> str:
    """The command of a run, to be called in the folder of the checkout; old files have it without the folder."""
    return run["command"] if run["command"].startswith("python ") else f"python benchmarks/{run['command']}"


def machine_text(machine: dict[str, Any]) -> str:
    """A machine of `conditions` in a few words: `AMD EPYC, 1 thread`."""
    count = machine["threads"]  # some old files do not say
    threads = f", {count} thread{'s' * (count != 1)}" if count else ""
    return machine["accelerator"] or f"{machine['processor']}{threads}"


def read(name: str, folder: Path = FOLDER) -> list[dict[str, Any]]:
    """The rows of a result file, each with its conditions under `run`; an empty list if the file does not exist."""
    path = folder / f"{name}.json"
    if not path.exists():
        return []
    content = json.loads(path.read_text(encoding="utf-8"))
    return [{**row, "run": content["runs"][row["run"]]} for row in content["rows"]]


def save(
    name: str,
    rows: Iterable[dict[str, Any]],
    command: Sequence[str] | None = None,
    folder: Path = FOLDER,
    found: bool = False,
) -> Path:
    """Add rows to a result file, in place of those that were measured before, and return its path.

    Args:
        found: whether rows with the same values as before may be those of before, found again by a resumed study;
            they keep their conditions.
    """
    from hf_ft_ext.files import write_json

    run = conditions(command)
    with _locked(folder):
        kept = {_key(row): row for row in read(name, folder)}
        for row in rows:
            before = kept.get(_key(row), {})
            same = found and before and all(before.get(key) == row.get(key) for key in MEASURED if key != "run")
            kept[_key(row)] = before if same else {**row, "run": run}
        runs: list[dict[str, Any]] = []
        written = []
        for row in kept.values():
            if row["run"] not in runs:
                runs.append(row["run"])
            written.append({**row, "run": runs.index(row["run"])})
        path = folder / f"{name}.json"
        write_json(path, {"runs": runs, "rows": written})
    return path


def is_noisy(row: dict[str, Any]) -> bool:
    """Whether a quartile of a row is further than 10 % from the median."""
    if row.get("low") is None or row.get("high") is None:
        return False
    return max(row["high"] - row["value"], row["value"] - row["low"]) > STEADY * abs(row["value"])


def mark_noisy(name: str, commands: Collection[str], folder: Path = FOLDER) -> list[dict[str, Any]]:
    """Say in a result file which rows of these commands (as recorded) are noisy, `noisy: true`, and return these."""
    from hf_ft_ext.files import write_json

    path = folder / f"{name}.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    found = []
    for row in content["rows"]:
        if content["runs"][row["run"]]["command"] not in commands:
            continue
        row.pop("noisy", None)
        if is_noisy(row):
            row["noisy"] = True
            found.append(row)
    write_json(path, content)
    return found


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """A context in which no other process of this machine saves: each reads and writes whole files."""
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        fcntl.flock(handle, fcntl.LOCK_UN)  # closing does not unlock if a fork has a copy of the handle
        os.close(handle)


def _key(row: dict[str, Any]) -> str:
    return json.dumps({key: value for key, value in row.items() if key not in MEASURED}, sort_keys=True)


def _quartiles(values: Sequence[float]) -> tuple[float, float]:
    first, _, third = statistics.quantiles(values, n=4, method="inclusive")
    return first, third


def _without_folders(words: Sequence[str]) -> list[str]:
    """The command with absolute paths shortened to their last part."""
    return [Path(word).name if Path(word).is_absolute() else word for word in words]


def _commit() -> str | None:
    """The commit of the checkout, `+` behind it if files differ from it; `None` outside of git."""
    here = Path(__file__).resolve().parent

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=here, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ":!benchmarks/results", ":!docs")
        return git("rev-parse", "--short=12", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
