"""`finished`: a command run to its end; where it comes to none, what each of its processes was doing."""

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import psutil
import pytest


def finished(
    words: Sequence[str], timeout: float, env: Mapping[str, str] | None = None, cwd: str | Path | None = None
) -> subprocess.CompletedProcess:
    """`subprocess.run` with the output as text; after `timeout` seconds the test fails with all Python stacks."""
    environment = {**(os.environ if env is None else env), "PYTHONFAULTHANDLER": "1"}  # prints them on SIGABRT
    pipe = subprocess.PIPE
    with subprocess.Popen(words, stdout=pipe, stderr=pipe, text=True, env=environment, cwd=cwd) as process:
        try:
            out, err = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            ended = process.poll()
            all_of_them = [] if ended is not None else family(process.pid)
            send(signal.SIGSTOP, *all_of_them)  # workers have sessions of their own, so there is no group to send to
            for one in all_of_them:  # one after the other: their stacks go to one pipe
                send(signal.SIGABRT, one)
                send(signal.SIGCONT, one)
                wait(one, 5)
            send(signal.SIGKILL, *all_of_them)
            try:
                out, err = process.communicate(timeout=5)
            except subprocess.TimeoutExpired as error:
                out, err = ((part or b"").decode() for part in (error.stdout, error.stderr))
            how = "did not end" if ended is None else f"ended with {ended}, but somebody holds its output"
            pytest.fail(f"{' '.join(map(str, words))} {how} within {timeout} s\n{out[-3000:]}\n{err[-12000:]}")
    return subprocess.CompletedProcess(words, process.returncode, out, err)


def send(number: int, *processes: psutil.Process) -> None:
    for one in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            one.send_signal(number)


def wait(process: psutil.Process, timeout: float) -> None:
    """Until the process has ended, whether or not its parent, stopped, has taken notice."""
    end = time.monotonic() + timeout
    with contextlib.suppress(psutil.NoSuchProcess):
        while process.status() != psutil.STATUS_ZOMBIE and time.monotonic() < end:
            time.sleep(0.01)


def family(pid: int) -> list[psutil.Process]:
    """The process and all that it started, the youngest first."""
    first = psutil.Process(pid)
    return [*first.children(recursive=True)[::-1], first]
