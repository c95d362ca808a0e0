"""Run the launcher in a separate process, with a time limit; a run that was finished before is not repeated."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hf_ft_ext
from hf_ft_ext.training.runs.record import RUN_RECORD
from hf_ft_ext.training.sharing.privacy import split_secrets, without_secrets
from hf_ft_ext.training.weights.devices import one_device

PROGRAM = ("hf-ft-ext", "train")  # the command in the records of runs started here
COMMAND = (sys.executable, "-m", "hf_ft_ext", "train")
_PACKAGES = str(Path(hf_ft_ext.__file__).resolve().parents[1])  # on PYTHONPATH, as a checkout may not be installed
DONE, FAILED, STOPPED = "done", "failed", "stopped"
_GRACE = 10  # seconds from SIGTERM to SIGKILL


@dataclass(frozen=True)
class Outcome:
    """The result of a run.

    Attributes:
        state: `done`, `failed` or `stopped` (by the time limit).
        record: the content of `run.json`; `None` unless done.
        reason: why it failed or was stopped, in one line; else empty.
        seconds: wall-clock seconds of the process; 0 for a run that was finished before.
    """

    state: str
    record: dict[str, Any] | None = None
    reason: str = ""
    seconds: float = 0.0


def find_run(folder: Path, words: list[str]) -> dict[str, Any] | None:
    """The record of the run in `folder`, if it was finished with the arguments `words`, in any order; else `None`.

    Also `None` if a file that it read was changed since.
    """
    record = _record(folder, words)
    if record is None:
        return None
    try:
        finished = (folder / RUN_RECORD).stat().st_mtime
        files = map(Path, ((record.get("data") or {}).get("files") or {}).values())
        return None if any(file.is_file() and file.stat().st_mtime > finished for file in files) else record
    except (OSError, TypeError, AttributeError):  # a damaged record
        return None


def _record(folder: Path, words: list[str]) -> dict[str, Any] | None:
    try:
        record = json.loads((folder / RUN_RECORD).read_text(encoding="utf-8"))
        return record if _settings(arguments_of(record["command"])) == _settings(words) else None
    except (OSError, ValueError, KeyError, TypeError):  # no record, or a damaged one: run again
        return None


def arguments_of(command: list[str]) -> list[str]:
    """The launcher's arguments in a recorded command, which starts with `run_glue.py` or `hf-ft-ext train`."""
    return command[len(PROGRAM) :] if tuple(command[: len(PROGRAM)]) == PROGRAM else command[1:]


def run_or_find(folder: Path, words: list[str], seconds: float | None = None) -> Outcome:
    """Run the launcher with the arguments `words` in a separate process, unless `folder` contains that finished run.

    Output and errors are written to `<folder>.log`. The run uses one accelerator (see `one_device`). If this process
    is interrupted, the run is terminated too. An access token is passed by the environment, as the arguments of a
    process are visible to all users of a machine.

    Args:
        folder: the run's `output_dir`, also in `words`.
        seconds: time limit; `None` = no limit.
    """
    if (found := find_run(folder, words)) is not None:
        return Outcome(DONE, found)
    log = log_of(folder)
    log.parent.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    environment = {"TOKENIZERS_PARALLELISM": "false", **os.environ, **one_device()}
    public, secrets = split_secrets(words)
    if token := secrets.get("token"):
        environment["HF_TOKEN"] = token
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (_PACKAGES, os.environ.get("PYTHONPATH"))))
    with open(log, "w", encoding="utf-8") as output:
        process = subprocess.Popen(
            [*COMMAND, *public],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,  # so that its data workers can be terminated with it
        )
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            return Outcome(STOPPED, reason=f"stopped after {seconds:.0f} s", seconds=time.monotonic() - start)
        finally:
            _end(process)
    spent = time.monotonic() - start
    if process.returncode == 0 and (found := _record(folder, words)) is not None:
        return Outcome(DONE, found, seconds=spent)
    return Outcome(FAILED, reason=_reason(process.returncode, log), seconds=spent)


def log_of(folder: Path) -> Path:
    """The log file of the run in `folder`."""
    return folder.with_name(f"{folder.name}.log")


def _settings(words: list[str]) -> dict[str, list[str]]:
    """The values of each option, the last ones where it is repeated; without access tokens: these affect no result."""
    found: dict[str, list[str]] = {}
    option = ""  # what stands before the first option: a recipe
    for word in without_secrets(split_secrets(words)[0]):
        if word.startswith("--"):
            option, given, value = word.partition("=")
            found[option] = [value] if given else []
        else:
            found.setdefault(option, []).append(word)
    return found


def _end(process: subprocess.Popen) -> None:
    for number in (signal.SIGTERM, signal.SIGKILL):
        if process.poll() is None:
            os.killpg(process.pid, number)
            try:
                process.wait(_GRACE)
            except subprocess.TimeoutExpired:
                continue


def _reason(status: int, log: Path) -> str:
    """The launcher's error message, or the last line of the log."""
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    message = next((line for line in reversed(lines) if line.startswith("error: ")), lines[-1] if lines else "")
    if status < 0:
        name = signal.Signals(-status).name
        hint = " (out of memory?)" if -status == signal.SIGKILL else ""
        return f"ended by {name}{hint}" + (f"; last line: {message}" if message else "")
    return message.removeprefix("error: ") or f"ended with status {status} and wrote no {RUN_RECORD}"
