"""Processes of tests: functions in forks of this process, alone or as the two processes of one run, and commands.

A fork has paid for the imports already, which are most of what a new process costs. `finished` is for what has to
start from nothing, such as a test of what is imported.
"""

import contextlib
import faulthandler
import functools
import importlib
import logging
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState, GradientState, PartialState
from tqdm.std import TqdmDefaultWriteLock

import run_glue
from hf_ft_ext.methods import METHODS

Main = Callable[[list[str]], int | None]
Fault = Callable[[], None]


@dataclass(frozen=True)
class Ended:
    """How a fork ended.

    Attributes:
        status: its exit status; `None` if a signal ended it.
        killed_by: that signal, or `None`.
        hung: it had to be killed at the end of the time allowed.
        seconds: of wall-clock time.
        out, err: what it wrote; `err` holds all Python stacks if it hung.
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


class Fork:
    """A fork of this process that runs `main(argv)` in `folder`.

    Args:
        fault: called in the fork before the run, to install what will go wrong.
        log: what tells the names of its logs from those of others.
    """

    def __init__(self, main: Main, argv: list[str], folder: Path, fault: Fault | None = None, log: str = ""):
        # outside of the folder, which may be full
        self.logs = [folder.with_name(f"{folder.name}{log}{name}.log") for name in (".out", ".err")]
        for path in self.logs:
            path.touch()  # a signal may end the child before it opens them
        _import_what_runs_need()
        sys.stdout.flush()
        sys.stderr.flush()
        self.start, self.status, self.hung, self.seconds = time.monotonic(), None, False, 0.0
        self.pid = os.fork()
        if self.pid == 0:
            _child(main, argv, folder, self.logs, fault)

    def has_ended(self) -> bool:
        if self.status is None:
            self.seconds = time.monotonic() - self.start
            found, status = os.waitpid(self.pid, os.WNOHANG)
            self.status = status if found else None
        return self.status is not None

    def end(self) -> None:
        """Kill it and what it started; its log gets all Python stacks."""
        self.hung = True
        os.kill(self.pid, signal.SIGABRT)
        time.sleep(0.5)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)

    def ended(self) -> Ended:
        out, err = (path.read_text(errors="replace") for path in self.logs)
        by = os.WTERMSIG(self.status) if os.WIFSIGNALED(self.status) else None
        return Ended(None if by else os.WEXITSTATUS(self.status), by, self.hung, self.seconds, out, err)


@functools.cache
def _import_what_runs_need() -> None:
    """Once in this process, instead of a second in each fork."""
    for name in ("parsing", "building", "language", "results"):
        importlib.import_module(f"hf_ft_ext.launch.{name}")
    for method in METHODS.values():
        method.trainer_class()


def wait_for(forks: Sequence[Fork], seconds: float) -> None:
    """Until all have ended; those that have not after `seconds` are killed."""
    running = list(forks)
    while running:
        for fork in running:
            if not fork.has_ended() and fork.seconds > seconds and not fork.hung:
                fork.end()
        running = [fork for fork in running if fork.status is None]
        time.sleep(0.004)


def launch(
    argv: list[str],
    folder: Path,
    fault: Fault | None = None,
    kill_after: float | None = None,
    send: int = signal.SIGKILL,
    seconds: float = 90,
    main: Main = run_glue.main,
) -> Ended:
    """Run `main(argv)` in `folder`, in a fork of this process.

    Args:
        fault: called in the fork before the run, to install what will go wrong.
        kill_after: send the signal `send` after so many seconds.
        seconds: after which the run counts as hung.
    """
    fork = Fork(main, argv, folder, fault)
    if kill_after is not None:
        while not fork.has_ended() and fork.seconds < kill_after:
            time.sleep(0.004)
        if fork.status is None:
            os.kill(fork.pid, send)
    wait_for([fork], seconds)
    return fork.ended()


def launch_two(
    argv: list[str], folder: Path, faults=(None, None), seconds: float = 90, main: Main = run_glue.main
) -> list[Ended]:
    """Run `main(argv)` in `folder` as the two processes of one run: what `torchrun --nproc_per_node 2` starts."""
    port = free_port()
    forks = [Fork(main, argv, folder, as_rank(rank, 2, port, faults[rank]), f".{rank}") for rank in (0, 1)]
    wait_for(forks, seconds)
    return [fork.ended() for fork in forks]


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def rank_environment(rank: int, world: int, port: int) -> dict[str, str]:
    """What torchrun sets for one of `world` processes."""
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "MASTER_PORT": port}
    words = {"MASTER_ADDR": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo"}
    return {key: str(value) for key, value in numbers.items()} | words


def as_rank(rank: int, world: int, port: int, fault: Fault | None = None) -> Callable[[], None]:
    """What makes a fork one of `world` processes, and installs `fault` in it."""

    def install() -> None:
        os.environ.update(rank_environment(rank, world, port))
        AcceleratorState._reset_state(True)  # this process may have been a single one before
        PartialState._reset_state()
        GradientState._reset_state()
        if fault is not None:
            fault()

    return install


def two_ranks(program: Main | Path, *argv: str, folder: Path | None = None, seconds: float = 200) -> list[Ended]:
    """Run a function, or a script, as two processes; the test fails unless both end with 0.

    Args:
        folder: they run in it; by default in the present one.
    """
    main = program if callable(program) else _script(program)
    with tempfile.TemporaryDirectory() as logs:
        place = Path.cwd() if folder is None else folder

        def run(words: list[str]) -> int | None:
            os.chdir(place)
            return main(words)

        (Path(logs) / "run").mkdir()
        both = launch_two(list(argv), Path(logs) / "run", seconds=seconds, main=run)
    for rank, ended in enumerate(both):
        if ended.status != 0:
            pytest.fail(f"process {rank}: status {ended.status}, signal {ended.killed_by}\n{ended.err[-4000:]}")
    return both


def _script(path: Path) -> Main:
    def main(argv: list[str]) -> None:
        sys.argv = [str(path), *argv]
        sys.path.insert(0, str(path.parent))
        runpy.run_path(str(path), run_name="__main__")

    return main


def _child(main: Main, argv: list[str], folder: Path, logs: list[Path], fault) -> None:
    status = 1
    try:
        os.setsid()
        for number, path in enumerate(logs, 1):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644), number)
        sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1, closefd=False) for number in (1, 2))
        faulthandler.enable(sys.stderr)
        logging.getLogger().handlers.clear()  # those of pytest
        os.chdir(folder)
        # Its semaphore is shared by all forks, and one of them may have been killed while holding it.
        TqdmDefaultWriteLock.acquire = TqdmDefaultWriteLock.release = lambda *_, **__: None
        if fault is not None:
            fault()
        status = main(argv) or 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def finished(
    words: Sequence[str], timeout: float, env: Mapping[str, str] | None = None, cwd: str | Path | None = None
) -> subprocess.CompletedProcess:
    """A command that has ended, its output as text; the test fails if it has not after `timeout` seconds."""
    pipe = subprocess.PIPE
    with subprocess.Popen(words, stdout=pipe, stderr=pipe, text=True, env=env, cwd=cwd) as process:
        try:
            out, err = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            process.terminate()  # torchrun ends its workers then
            out, err = process.communicate(timeout=60)
            pytest.fail(f"{' '.join(map(str, words))} did not end within {timeout} s\n{out[-3000:]}\n{err[-12000:]}")
    return subprocess.CompletedProcess(words, process.returncode, out, err)
