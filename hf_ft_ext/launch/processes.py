"""What the processes of one run write: errors and warnings once, with their process; bars by the first one only.

Every process of a run writes to the same terminal. What all of them have to report (a misspelt option) must not appear
once per process, and what only one of them has to report (a loss of NaN in its rows) must not be lost. Processes that
fail cannot use collectives any more, so they agree by small files in the temporary folder of their machine.
"""

import contextlib
import hashlib
import json
import logging
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

_TOGETHER = 1.0  # seconds that a process waits for others with the same message
_STARTS = 2.0  # seconds within which all processes of a run start; a process's own start is known to one second
_STALE = 7 * 86400.0  # seconds after which the files of other runs are deleted
_POLL = 0.01  # seconds between looks at the files of the others
_PREFIX = "hf_ft_ext-messages"
_FAILED = "failed"
_WRITTEN = "written"
# What gloo, NCCL and the stores report in a process whose peer has ended.
_LOST = ("Connection closed by peer", "Connection reset by peer", "Socket closed", "Broken pipe", "recvValue failed",
         "sendBytes failed", "remote process has terminated", "Connection was likely closed")  # fmt: skip


def _number(names: tuple[str, ...], default: int) -> int:
    """The first of the environment variables `names` that holds a number."""
    for name in names:
        with contextlib.suppress(KeyError, ValueError):
            return int(os.environ[name])
    return default


@dataclass(frozen=True)
class Process:
    """Which of the run's processes this is.

    Attributes:
        rank, world: its number and how many there are, on all machines.
        neighbours: how many of them run on this machine.
    """

    rank: int
    world: int
    neighbours: int

    @classmethod
    def this(cls) -> "Process":
        """Read the environment as accelerate does: torchrun's variables, or those of an MPI."""
        world = _number(("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE"), 1)
        rank = _number(("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK"), 0)
        names = ("LOCAL_WORLD_SIZE", "MPI_LOCALNRANKS", "OMPI_COMM_WORLD_LOCAL_SIZE", "MV2_COMM_WORLD_LOCAL_SIZE")
        return cls(rank, world, _number(names, world))

    @property
    def first(self) -> bool:
        return self.rank == 0

    @property
    def alone(self) -> bool:
        return self.world == 1


def report(kind: str, message: str, same: str | None = None, failed: bool = True) -> None:
    """Write `kind: message` to standard error, once for all processes of this machine that have the same message.

    With several processes this waits up to a second for the others; the line names the processes if not all of them
    have the message. Signals of a launcher that ends the processes meanwhile are ignored.

    Args:
        same: what two equal messages have in common, if not the whole text.
        failed: whether the message is an error (see `another_failed`).
    """
    process = Process.this()
    if process.alone:
        sys.stderr.write(f"{kind}: {message}\n")
        return
    with _undisturbed():
        try:
            if failed:
                (_folder() / _FAILED).touch()
            with_it = _agree(process, f"{kind}: {same or message}")
        except OSError:  # no temporary folder: twice is better than not at all
            with_it = [process.rank]
        if with_it is None:
            return
        all_of_them = len(with_it) == process.neighbours > 1  # one per machine knows of no others
        where = "" if all_of_them else f" ({_names(with_it)} of {process.world})"
        sys.stderr.write(f"{kind}{where}: {message}\n")  # one write, so that no other process's text gets into it
        sys.stderr.flush()
        if failed:
            _give_to_torchrun(message)


def _give_to_torchrun(message: str) -> None:
    """Let the summary that torchrun writes last, some forty lines, hold the message in place of a link."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path:
        with contextlib.suppress(OSError):
            Path(path).write_text(
                json.dumps({"message": message.strip(), "timestamp": int(time.time())}), encoding="utf-8"
            )


def report_crash(error: BaseException) -> None:
    """Write the traceback of an unexpected error, once for all processes; for runs of several processes.

    A process that only lost the connection to one that failed has no traceback of interest, and gets one line or,
    where the other process wrote its own error, none.
    """
    text = str(error)
    lost = next((words for words in _LOST if words in text), None) if isinstance(error, RuntimeError) else None
    if lost is not None:
        if not another_failed():
            report(
                "error",
                f"lost the connection to another process ({lost}), which ended without an error message of its own; "
                "the system may have killed it for lack of memory",
            )
        return
    trace = traceback.extract_tb(error.__traceback__)
    place = f"{trace[-1].filename}:{trace[-1].lineno}" if trace else ""
    report("unexpected error", f"\n{''.join(traceback.format_exception(error))}".rstrip(), f"{type(error)} {place}")


def another_failed() -> bool:
    """Whether some process of this run, on this machine, has reported an error."""
    try:
        return not Process.this().alone and (_folder() / _FAILED).exists()
    except OSError:
        return False


def _names(ranks: list[int]) -> str:
    return f"process{'es' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"


def _agree(process: Process, text: str) -> list[int] | None:
    """Wait for the neighbours with the same text; the ranks that have it if this process is to write it."""
    folder = _folder() / _hash(text)
    folder.mkdir(mode=0o700, exist_ok=True)
    (folder / str(process.rank)).touch()
    end = time.monotonic() + _TOGETHER
    while len(ranks := _ranks(folder)) < process.neighbours and time.monotonic() < end:
        if (folder / _WRITTEN).exists():
            return None
        time.sleep(_POLL)
    try:
        (folder / _WRITTEN).touch(exist_ok=False)
    except FileExistsError:
        return None
    return ranks


def _ranks(folder: Path) -> list[int]:
    return sorted(int(path.name) for path in folder.iterdir() if path.name != _WRITTEN)


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _folder() -> Path:
    """The folder of this run's messages: its name holds what the processes on this machine have in common."""
    import psutil

    parent = os.getppid()  # the launcher
    born = 0.0
    with contextlib.suppress(psutil.Error):
        born = psutil.Process(parent).create_time()
    names = ("MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT")
    run = _hash(" ".join(map(str, (parent, born, *(os.environ.get(name) for name in names)))))
    user = os.getuid() if hasattr(os, "getuid") else "user"
    folder = Path(tempfile.gettempdir()) / f"{_PREFIX}-{user}-{run}"
    _delete_older(folder.parent.glob(f"{_PREFIX}-{user}-*"), time.time() - _STALE)
    # A shell may start two runs, one after the other, with the same variables.
    _delete_older([folder], psutil.Process().create_time() - _STARTS)
    folder.mkdir(mode=0o700, exist_ok=True)
    return folder


def _delete_older(folders: Iterable[Path], limit: float) -> None:
    """Delete the folders to which nothing was added since `limit`, in seconds since the epoch."""
    for path in folders:
        with contextlib.suppress(OSError):
            if path.stat().st_mtime < limit:
                shutil.rmtree(path, ignore_errors=True)


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """Ignore the signals by which a launcher ends all processes as soon as one has failed."""
    if threading.current_thread() is not threading.main_thread():  # others may not set handlers
        yield
        return
    before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


class SharedLog(logging.Handler):
    """The log of a process: as it comes on the first one; on others, what the first one did not write, at the end.

    Most warnings are about what all processes share, such as the data. `flush_held` writes the rest.
    """

    def __init__(self, process: Process):
        super().__init__()
        self.process = process
        self.setFormatter(logging.Formatter("%(message)s"))
        self._held: dict[str, None] = {}

    def emit(self, record: logging.LogRecord) -> None:
        try:
            text = self.format(record)
            if not self.process.first:
                self._held[text] = None
                return
            sys.stderr.write(f"{text}\n")
        except Exception:  # as every handler of logging does
            self.handleError(record)
            return
        if record.levelno >= logging.WARNING and not self.process.alone:
            with contextlib.suppress(OSError):
                (_folder() / _hash(f"log {text}")).touch()

    def flush_held(self) -> None:
        """Write what was held back, once for all processes, with the process that it came from."""
        held, self._held = self._held, {}
        for text in held:
            with contextlib.suppress(OSError):
                try:
                    (_folder() / _hash(f"log {text}")).touch(exist_ok=False)
                except FileExistsError:
                    continue
            sys.stderr.write(f"process {self.process.rank} of {self.process.world}: {text}\n")


def silence_bars() -> None:
    """Turn off the progress bars of all libraries, in this process: loading weights, converting data, downloads."""
    import datasets
    import evaluate
    import transformers

    transformers.utils.logging.disable_progress_bar()  # huggingface_hub's too
    datasets.disable_progress_bars()
    evaluate.logging.disable_progress_bar()


def start_log(process: Process) -> SharedLog:
    """Send the log of hf_ft_ext to standard error; libraries' warnings appear on the first process only."""
    handler = SharedLog(process)
    logging.basicConfig(handlers=[handler])
    logging.getLogger("hf_ft_ext").setLevel(logging.INFO if process.first else logging.WARNING)
    if not process.first:
        # Libraries read these when they are imported, which is later than here.
        for name in ("TRANSFORMERS_VERBOSITY", "DATASETS_VERBOSITY", "EVALUATE_VERBOSITY", "HF_HUB_VERBOSITY"):
            os.environ.setdefault(name, "error")
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
        if not sys.warnoptions:  # the user's own -W and PYTHONWARNINGS win
            warnings.simplefilter("ignore")
    return handler
