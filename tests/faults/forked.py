"""Launcher runs in forked processes: the imports are paid once, and a fault may kill or stop the run."""

import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tqdm.std import TqdmDefaultWriteLock

import run_glue


@dataclass(frozen=True)
class Ended:
    """How a process ended.

    Attributes:
        status: its exit status; `None` if a signal ended it.
        killed_by: that signal, or `None`.
        hung: it had to be killed at the end of the time allowed.
        seconds: of wall-clock time.
        out, err: what it wrote.
    """

    status: int | None
    killed_by: int | None
    hung: bool
    seconds: float
    out: str
    err: str

    @property
    def clean(self) -> bool:
        """Whether nothing of a library's insides was shown."""
        return "Traceback" not in self.err


def launch(
    argv: list[str],
    folder: Path,
    fault: Callable[[], None] | None = None,
    kill_after: float | None = None,
    send: int = signal.SIGKILL,
    seconds: float = 90,
    main: Callable[[list[str]], int] = run_glue.main,
    log: str = "",
) -> Ended:
    """Run `main(argv)` in `folder`, in a fork of this process.

    Args:
        fault: called in the fork before the run, to install what will go wrong.
        kill_after: send the signal `send` after so many seconds.
        seconds: after which the run counts as hung.
        log: what tells the names of its logs from those of others.
    """
    logs = [
        folder.with_name(f"{folder.name}{log}{name}.log") for name in (".out", ".err")
    ]  # outside of what may be full
    for path in logs:
        path.touch()  # a signal may end the child before it opens them
    sys.stdout.flush()
    sys.stderr.flush()
    start = time.monotonic()
    child = os.fork()
    if child == 0:
        _child(argv, folder, logs, fault, main)
    sent = hung = False
    while True:
        found, status = os.waitpid(child, os.WNOHANG)
        spent = time.monotonic() - start
        if found:
            break
        if kill_after is not None and spent >= kill_after and not sent:
            os.kill(child, send)
            sent = True
        if spent > seconds and not hung:
            hung = True
            os.killpg(child, signal.SIGKILL)
        time.sleep(0.004)
    out, err = (path.read_text(errors="replace") for path in logs)
    by = os.WTERMSIG(status) if os.WIFSIGNALED(status) else None
    return Ended(None if by else os.WEXITSTATUS(status), by, hung, spent, out, err)


def _child(argv: list[str], folder: Path, logs: list[Path], fault, main) -> None:
    status = 1
    try:
        os.setsid()
        for number, path in enumerate(logs, 1):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644), number)
        sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1, closefd=False) for number in (1, 2))
        os.chdir(folder)
        # Its semaphore is shared by all forks, and one of them may have been killed while holding it.
        TqdmDefaultWriteLock.acquire = TqdmDefaultWriteLock.release = lambda *_, **__: None
        if fault is not None:
            fault()
        status = main(argv)
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
