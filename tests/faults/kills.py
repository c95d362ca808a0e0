"""Moments at which a run is killed: after a time, between two changes of files, in the middle of a write, at work."""

import os
import resource
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from random import Random

import safetensors.torch
import torch

KINDS = ("time", "file", "write", "work")
_COUNTS = ".counts"


class Events:
    """Counts what a run does in its folder, and does something at one of the counts.

    `file`: a file or folder is opened for writing, renamed or deleted, or safetensors are written (before and after).
    `work`: a module is called: steps, pre-passes, searches, evaluation.
    """

    def __init__(self, kind: str = "", at: int = 0, act: Callable[[], None] | None = None):
        self.kind, self.at, self.act = kind, at, act
        self.counts = {"file": 0, "work": 0}

    def install(self) -> None:
        """In this process, for good."""
        folder = os.getcwd()

        def audit(event: str, arguments: tuple) -> None:
            if event == "open":
                path, mode, flags = arguments
                writes = flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) if mode is None else set(mode) & set("wax+")
            elif event in ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree"):
                path, writes = arguments[0], True
            else:
                return
            if writes and isinstance(path, str | os.PathLike) and os.path.abspath(path).startswith(folder):
                self._count("file")

        sys.addaudithook(audit)
        torch.nn.modules.module.register_module_forward_pre_hook(lambda *_: self._count("work"))
        written = safetensors.torch.serialize_file

        def write(*arguments, **settings):
            self._count("file")
            written(*arguments, **settings)
            self._count("file")

        safetensors.torch.serialize_file = write

    def _count(self, kind: str) -> None:
        self.counts[kind] += 1
        if kind == self.kind and self.counts[kind] == self.at:
            self.act()

    def write_down(self, folder: Path) -> None:
        (folder / _COUNTS).write_text(f"{self.counts['file']} {self.counts['work']}")


def kill() -> None:
    """End this process as the out-of-memory killer would."""
    os.kill(os.getpid(), signal.SIGKILL)


def die_in_write(most: int) -> Callable[[], None]:
    """From now on, writing a file beyond `most` bytes ends the process in the middle of that write."""

    def act() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))

    return act


def counted(main: Callable[[list[str]], int]) -> Callable[[list[str]], int]:
    """`main`, its events counted into a file of the folder it runs in."""

    def run(argv: list[str]) -> int:
        events = Events()
        events.install()
        try:
            return main(argv)
        finally:
            events.write_down(Path.cwd())

    return run


def read_counts(folder: Path) -> dict[str, int]:
    """What `counted` wrote."""
    return dict(zip(("file", "work"), map(int, (folder / _COUNTS).read_text().split()), strict=True))


def draw(kind: str, random: Random, counts: dict[str, int], seconds: float, largest: int) -> tuple[dict, str]:
    """A moment of `kind`: the keywords for `launch`, and its description.

    Args:
        counts: of the unbroken run.
        seconds: that it took.
        largest: bytes of the largest file that it wrote.
    """
    if kind == "time":
        after = random.uniform(0.05, 1.0) * seconds
        return {"kill_after": after}, f"after {after:.2f} s"
    if kind == "write":
        at, most = random.randint(1, counts["file"]), random.randint(1, largest)
        return {"fault": Events("file", at, die_in_write(most)).install}, f"beyond {most} bytes from change {at}"
    at = random.randint(1, counts[kind])
    return {"fault": Events(kind, at, kill).install}, f"at {kind} {at} of {counts[kind]}"
