"""A run of the launcher in a process of its own: started, bounded in time, found again when it was done before."""

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

PROGRAM = ("hf-ft-ext", "train")  # how a run that is started here calls itself in its record
COMMAND = (sys.executable, "-m", "hf_ft_ext", "train")
_PACKAGES = str(Path(hf_ft_ext.__file__).resolve().parents[1])  # a checkout need not be installed
DONE, FAILED, STOPPED = "done", "failed", "stopped"
_GRACE = 10  # seconds from SIGTERM to SIGKILL


@dataclass(frozen=True)
class Outcome:
    """What became of a run.

    Attributes:
        state: `done`, `failed` or `stopped` (by the time limit).
        record: the content of `run.json`; `None` unless done.
        reason: why it failed, in one line; empty if it did not.
        seconds: wall-clock seconds of the process; 0 if the run was found.
    """

    state: str
    record: dict[str, Any] | None = None
    reason: str = ""
    seconds: float = 0.0


def find_run(folder: Path, words: list[str]) -> dict[str, Any] | None:
    """The record of the run in `folder` if it was finished with exactly the launcher's arguments `words`."""
    try:
        record = json.loads((folder / RUN_RECORD).read_text(encoding="utf-8"))
        done, wanted = arguments_of(record["command"]), words
        return record if _without_tokens(done) == _without_tokens(wanted) else None
    except (OSError, ValueError, KeyError, TypeError):  # none, or damaged: it is run again
        return None


def arguments_of(command: list[str]) -> list[str]:
    """The launcher's arguments in a recorded command, which starts with `run_glue.py` or `hf-ft-ext train`."""
    return command[len(PROGRAM) :] if tuple(command[: len(PROGRAM)]) == PROGRAM else command[1:]


def _without_tokens(words: list[str]) -> list[str]:
    """The words but for access tokens, which change no result."""
    return without_secrets(split_secrets(words)[0])


def run_or_find(folder: Path, words: list[str], seconds: float | None = None) -> Outcome:
    """Run the launcher with `words` in a process of its own, unless `folder` holds that very run.

    Output and errors go to `<folder>.log`. The run sees one accelerator (see `one_device`). If this process is
    interrupted, the run is ended with it. An access token goes by the environment: every user of a machine sees the
    words of a process.

    Args:
        folder: the run's `output_dir`, which `words` name.
        seconds: end the run after so many; `None` = no limit.
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
            start_new_session=True,  # so that its data workers end with it
        )
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            return Outcome(STOPPED, reason=f"stopped after {seconds:.0f} s", seconds=time.monotonic() - start)
        finally:
            _end(process)
    spent = time.monotonic() - start
    if process.returncode == 0 and (found := find_run(folder, words)) is not None:
        return Outcome(DONE, found, seconds=spent)
    return Outcome(FAILED, reason=_reason(process.returncode, log), seconds=spent)


def log_of(folder: Path) -> Path:
    """Where the output of the run in `folder` goes."""
    return folder.with_name(f"{folder.name}.log")


def _end(process: subprocess.Popen) -> None:
    for number in (signal.SIGTERM, signal.SIGKILL):
        if process.poll() is None:
            os.killpg(process.pid, number)
            try:
                process.wait(_GRACE)
            except subprocess.TimeoutExpired:
                continue


def _reason(status: int, log: Path) -> str:
    """The launcher's own message, or the last line of the log."""
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    said = next((line for line in reversed(lines) if line.startswith("error: ")), lines[-1] if lines else "")
    if status < 0:
        name = signal.Signals(-status).name
        hint = " (out of memory?)" if -status == signal.SIGKILL else ""
        return f"ended by {name}{hint}" + (f"; last line: {said}" if said else "")
    return said.removeprefix("error: ") or f"ended with status {status} and left no {RUN_RECORD}"
