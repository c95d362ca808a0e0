"""Terminal output of a run with several processes: each message once, progress bars by the first process only.

All processes of a run write to the same terminal. A message that all of them have (a misspelt option) must not appear
once per process, and a message of a single process (a loss of NaN in its rows) must not be lost. Failing processes
cannot use collectives, so they coordinate through small files in the temporary folder of their machine.
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

_JOINT_REPORT_SECONDS = 1.0  # seconds that a process waits for others to report the same message
_START_SPREAD_SECONDS = 2.0  # all processes of a run start within this time; start times are whole seconds
_STALE = 7 * 86400.0  # seconds after which the files of other runs are deleted
_POLL = 0.01  # seconds between checks of the other processes' files
_PREFIX = "hf_ft_ext-messages"
_FAILED = "failed"
_WRITTEN = "written"
# Error texts of gloo, NCCL and the stores in a process whose peer has ended.
_LOST_PEER_ERRORS = (
    "Connection closed by peer", "Connection reset by peer", "Socket closed", "Broken pipe", "recvValue failed",
    "sendBytes failed", "remote process has terminated", "Connection was likely closed",
)  # fmt: skip


@dataclass(frozen=True)
class Process:
    """The position of this process in the run.

    Attributes:
        rank, world: its rank, and the number of processes on all machines.
        neighbours: number of processes on this machine.
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
    def is_single(self) -> bool:
        return self.world == 1


def report(kind: str, message: str, same: str | None = None, failed: bool = True) -> None:
    """Write `kind: message` to standard error, once for all processes of this machine with the same message.

    With several processes this waits up to a second for the others. The line names the processes if not all of them
    have the message. Signals from a launcher that ends the processes meanwhile are ignored.

    Args:
        same: the text by which messages are compared; `None` = the message itself.
        failed: whether the message is an error (see `another_failed`).
    """
    process = Process.this()
    if process.is_single:
        sys.stderr.write(f"{kind}: {message}\n")
        return
    with _ignoring_signals():
        try:
            if failed:
                (_folder() / _FAILED).touch()
            with_it = _agree(process, f"{kind}: {same or message}")
        except OSError:  # no temporary folder: a repeated message is better than none
            with_it = [process.rank]
        if with_it is None:
            return
        all_of_them = len(with_it) == process.neighbours > 1  # a single process on a machine does not see the others
        where = "" if all_of_them else f" ({_names(with_it)} of {process.world})"
        sys.stderr.write(f"{kind}{where}: {message}\n")  # one write, so that no other output interleaves
        sys.stderr.flush()
        if failed:
            _give_to_torchrun(message)


def report_crash(error: BaseException) -> None:
    """Write the traceback of an unexpected error, once for all processes of a run with several.

    The traceback of a process that only lost the connection to a failed one is of no use. It reports one line, or
    nothing if another process has reported its own error.
    """
    text = str(error)
    lost = (
        next((words for words in _LOST_PEER_ERRORS if words in text), None)
        if isinstance(error, RuntimeError)
        else None
    )
    if lost is not None:
        if not another_failed():
            report(
                "error",
                f"lost the connection to another process ({lost}), which ended without an error message of its own; "
                "the system may have killed it for lack of memory",
            )
        return
    trace = traceback.extract_tb(error.__traceback__)
    location = f"{trace[-1].filename}:{trace[-1].lineno}" if trace else ""
    report("unexpected error", f"\n{''.join(traceback.format_exception(error))}".rstrip(), f"{type(error)} {location}")


def another_failed() -> bool:
    """Whether a process of this run on this machine has reported an error."""
    try:
        return not Process.this().is_single and (_folder() / _FAILED).exists()
    except OSError:
        return False


class SharedLog(logging.Handler):
    """Log handler: the first process logs at once; the others log at the end what the first one did not.

    Most warnings concern all processes, such as those about the data. `flush_held` writes the remaining ones.
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
        except Exception:  # as logging's own handlers do
            self.handleError(record)
            return
        if record.levelno >= logging.WARNING and not self.process.is_single:
            with contextlib.suppress(OSError):
                (_folder() / _hash(f"log {text}")).touch()

    def flush_held(self) -> None:
        """Write the held messages, once for all processes, each with the process that logged it."""
        held, self._held = self._held, {}
        for text in held:
            with contextlib.suppress(OSError):
                try:
                    (_folder() / _hash(f"log {text}")).touch(exist_ok=False)
                except FileExistsError:
                    continue
            sys.stderr.write(f"process {self.process.rank} of {self.process.world}: {text}\n")


def silence_bars() -> None:
    """Turn off the progress bars of all libraries in this process (loading weights, converting data, downloads)."""
    import datasets
    import evaluate
    import transformers

    transformers.utils.logging.disable_progress_bar()  # huggingface_hub's too
    datasets.disable_progress_bars()
    evaluate.logging.disable_progress_bar()


def start_log(process: Process) -> SharedLog:
    """Send the log of hf_ft_ext to standard error; warnings of libraries appear on the first process only."""
    handler = SharedLog(process)
    logging.basicConfig(handlers=[handler])
    logging.getLogger("hf_ft_ext").setLevel(logging.INFO if process.first else logging.WARNING)
    if not process.first:
        # Libraries read these variables on import, which happens later.
        for name in ("TRANSFORMERS_VERBOSITY", "DATASETS_VERBOSITY", "EVALUATE_VERBOSITY", "HF_HUB_VERBOSITY"):
            os.environ.setdefault(name, "error")
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    if not sys.warnoptions:  # the user's own -W and PYTHONWARNINGS win
        if not process.first:
            warnings.simplefilter("ignore")
        # peft 0.21 reads an attribute that transformers has renamed; users cannot change that
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
    return handler


def _number(names: tuple[str, ...], default: int) -> int:
    """The first of the environment variables `names` that holds a number."""
    for name in names:
        with contextlib.suppress(KeyError, ValueError):
            return int(os.environ[name])
    return default


def _give_to_torchrun(message: str) -> None:
    """Pass the message to torchrun, whose final summary then shows it instead of a link to its documentation."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path:
        with contextlib.suppress(OSError):
            Path(path).write_text(
                json.dumps({"message": message.strip(), "timestamp": int(time.time())}), encoding="utf-8"
            )


def _names(ranks: list[int]) -> str:
    return f"process{'es' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"


def _agree(process: Process, text: str) -> list[int] | None:
    """Wait for other processes with the same text; return their ranks if this process must write it, else `None`."""
    folder = _folder() / _hash(text)
    folder.mkdir(mode=0o700, exist_ok=True)
    (folder / str(process.rank)).touch()
    end = time.monotonic() + _JOINT_REPORT_SECONDS
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
    """The folder of this run's messages; its name is a hash of values that the processes on this machine share."""
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
    _delete_older([folder], psutil.Process().create_time() - _START_SPREAD_SECONDS)
    folder.mkdir(mode=0o700, exist_ok=True)
    return folder


def _delete_older(folders: Iterable[Path], limit: float) -> None:
    """Delete the folders that were last changed before `limit`, in seconds since the epoch."""
    for path in folders:
        with contextlib.suppress(OSError):
            if path.stat().st_mtime < limit:
                shutil.rmtree(path, ignore_errors=True)


@contextlib.contextmanager
def _ignoring_signals() -> Iterator[None]:
    """A context that ignores the signals by which a launcher ends all processes when one has failed."""
    if threading.current_thread() is not threading.main_thread():  # others may not set handlers
        yield
        return
    before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
