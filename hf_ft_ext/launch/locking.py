"""One run at a time in a folder: a lock that ends with the process that holds it."""

import contextlib
import inspect
import json
import logging
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from hf_ft_ext.errors import InputError
from hf_ft_ext.training.files import write_json

logger = logging.getLogger(__name__)

LOCK_FILE = ".run.lock"  # an old filelock leaves it there, which does no harm
OWNER_FILE = ".run.owner.json"  # beside it, because a second process may truncate the locked file


@contextlib.contextmanager
def only_run(folder: str | os.PathLike) -> Iterator[None]:
    """Hold the lock of a run folder; for the first process of a run.

    The lock belongs to the process (`flock`): the system releases it however the process ends, and a file that a
    killed run has left blocks nobody. On network file systems without locks between machines (NFS mounted with
    `nolock` or `local_lock`), only runs on the same machine are kept apart. Where the file system has no locks at all,
    the run goes on without one, with a warning.

    Raises:
        InputError: another run holds it.
    """
    path, owner = Path(folder) / LOCK_FILE, Path(folder) / OWNER_FILE
    # A lock by a file's mere presence would outlive a killed process.
    options = {"fallback_to_soft": False} if "fallback_to_soft" in inspect.signature(FileLock).parameters else {}
    lock = FileLock(path, timeout=0, **options)
    try:
        lock.acquire()
    except Timeout:
        raise InputError(
            f"output_dir {os.fspath(folder)!r} is in use by another run{_holder(owner)}; wait until it has ended, or "
            "pass another --output_dir"
        ) from None
    except (OSError, NotImplementedError) as error:
        logger.warning("%s cannot be locked (%s): do not start a second run in this folder.", folder, error)
        yield
        return
    try:
        write_json(owner, {"pid": os.getpid(), "host": socket.gethostname()})
        yield
    finally:
        with contextlib.suppress(OSError):
            owner.unlink(missing_ok=True)
        lock.release()


def _holder(owner: Path) -> str:
    """Who holds the lock, as far as it is known."""
    try:
        found = json.loads(owner.read_text(encoding="utf-8"))
        return f" (process {found['pid']} on {found['host']})"
    except (OSError, ValueError, KeyError, TypeError):
        return ""
