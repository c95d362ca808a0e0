"""The run folder: its name, its lock, checks of earlier content, deletion of an old run, and disk errors."""

import contextlib
import errno
import inspect
import itertools
import json
import logging
import os
import re
import shlex
import shutil
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout
from safetensors import SafetensorError

from hf_ft_ext.arguments import MethodTrainingArguments, RunArguments
from hf_ft_ext.errors import InputError
from hf_ft_ext.files import write_json
from hf_ft_ext.methods import METHODS, hooks_of
from hf_ft_ext.prompts.configuration import PROMPT_FILE
from hf_ft_ext.training.runs.record import RUN_RECORD, TRAINER_STATE
from hf_ft_ext.training.saved.checkpoints import (
    checkpoint_folders,
    checkpoint_problem,
    last_complete_checkpoint,
)

logger = logging.getLogger(__name__)

LOCK_FILE = ".run.lock"  # it stays in the folder and does no harm there
# Beside it, because a second process may truncate the locked file. transformers' pushes leave out names with `_`.
LOCK_HOLDER_FILE = "_run.owner.json"

# Weights of models and of adapters. Files of both kinds in one folder would make it unloadable, so all are deleted.
_WEIGHTS = ("model*.safetensors*", "pytorch_model*.bin*", "adapter_model.*")
_RUN_FILES = (
    RUN_RECORD,
    "predictions*.tsv",
    "predictions*.jsonl",
    "hp_search.json",
    "config.json",
    "generation_config.json",
    "adapter_config.json",
    PROMPT_FILE,
    TRAINER_STATE,
    *_WEIGHTS,
)
_CHECKPOINT_FILES = ("checkpoint_*.json", "optimizer*", "rng_state*.pth", "scheduler.pt")


def holds_run(folder: str | os.PathLike) -> bool:
    """Whether `folder` holds a run: its record, a checkpoint, or weights of a model or adapter."""
    folder = Path(folder)
    patterns = (RUN_RECORD, "checkpoint-*", "run-*/checkpoint-*", *_WEIGHTS)
    return any(next(folder.glob(pattern), None) is not None for pattern in patterns)


def free_folder(base: str, *, resume: bool = False) -> str:
    """The first of `base`, `base-2`, `base-3`, ... without a run; with `resume`, the last one with a run."""
    names = (base if i == 1 else f"{base}-{i}" for i in itertools.count(1))
    last = base
    while holds_run(name := next(names)):
        last = name
    return last if resume else name


def folder_name(text: str) -> str:
    """`text` as part of a folder name: the last part of the path, with unusual characters replaced."""
    return re.sub(r"[^\w.-]+", "_", Path(text.rstrip("/")).name) or "data"


def checkpoint_to_resume(resume: str, output_dir: str) -> str:
    """The checkpoint folder that `--resume_from_checkpoint` means.

    Args:
        resume: `true` (the last complete and undamaged checkpoint in `output_dir`), or a path.

    Raises:
        InputError: there is no such checkpoint, or the given one is incomplete or damaged.
    """
    if resume.lower() == "true":
        if not checkpoint_folders(output_dir):
            raise InputError(
                f"--resume_from_checkpoint true: {output_dir!r} holds no checkpoint; pass the run's --output_dir, "
                "or start without it"
            )
        problems: list[str] = []
        last = last_complete_checkpoint(output_dir, problems)
        if last is None:
            raise InputError(
                f"--resume_from_checkpoint true: {output_dir!r} holds no complete checkpoint ({'; '.join(problems)}); "
                "start again with --overwrite_output_dir"
            )
        for problem in problems:
            logger.warning("Not resumed from %s", problem)
        return str(last)
    folder = Path(resume).expanduser()
    if not (folder / TRAINER_STATE).is_file():
        raise InputError(
            f"--resume_from_checkpoint {resume!r} is no checkpoint (no {TRAINER_STATE} in it); pass a "
            "checkpoint-<step> folder, or true for the last one in output_dir"
        )
    if _is_run_folder(folder):
        raise InputError(
            f"--resume_from_checkpoint {resume!r} is the folder of a run, not a checkpoint; pass one of its "
            f"checkpoint-<step> folders, or --output_dir {shlex.quote(resume)} --resume_from_checkpoint true"
        )
    if (damage := checkpoint_problem(folder)) is not None:
        raise InputError(
            f"--resume_from_checkpoint {resume!r} cannot be used: {damage}; pass another checkpoint, or true for the "
            "last complete one in output_dir"
        )
    return str(folder)


def refuse_foreign_run(output_dir: str) -> None:
    """Raise an `InputError` if `output_dir` is not a folder or holds another run."""
    if os.path.exists(output_dir) and not os.path.isdir(output_dir):
        raise InputError(f"output_dir {output_dir!r} is a file; pass a folder")
    if holds_run(output_dir):
        raise InputError(
            f"output_dir {output_dir!r} already holds a run; pass --resume_from_checkpoint true to continue it, "
            "--overwrite_output_dir to replace it, or another --output_dir"
        )


def refuse_run_of_another_checkpoint(output_dir: str, checkpoint: str) -> None:
    """Raise an `InputError` if `output_dir` holds a run that the `checkpoint` to resume from is not part of."""
    if Path(output_dir).resolve() not in Path(checkpoint).resolve().parents and holds_run(output_dir):
        raise InputError(
            f"output_dir {output_dir!r} already holds a run, and --resume_from_checkpoint {checkpoint!r} belongs to "
            "another one; pass another --output_dir, or --resume_from_checkpoint true to continue the run it holds"
        )


def refuse_lost_model(output_dir: str, model: str | None) -> None:
    """Raise an `InputError` if the model to start from lies in the folder that would be overwritten."""
    target = Path(output_dir).expanduser().resolve()
    if model is None or not os.path.isdir(os.path.expanduser(model)):
        return
    source = Path(model).expanduser().resolve()
    if source == target or target in source.parents:
        raise InputError(
            f"--overwrite_output_dir would delete {model!r}, the model to start from; pass another --output_dir"
        )


def clear_old_run(output_dir: str | os.PathLike, method: str) -> None:
    """Delete the run that `output_dir` holds: checkpoints, record, predictions, weights, its method's own files.

    Other files are kept.

    Args:
        method: method of the new run. That of the old run is read from its record; without a record it may be any.
    """
    folder = Path(output_dir)
    methods = {method, *_methods_of(folder)}
    own = {pattern for name in methods for pattern in getattr(hooks_of(name), "own_files", ())}
    for path in folder.glob("checkpoint-*"):
        if path.is_dir() and re.fullmatch(r"checkpoint-\d+", path.name):
            shutil.rmtree(path)
    for pattern in (*_RUN_FILES, *own):
        for path in folder.glob(pattern):
            if path.is_file() or path.is_symlink():
                path.unlink()


def prepare_folder(run_args: RunArguments, args: MethodTrainingArguments, until: contextlib.ExitStack) -> None:
    """Create and lock `output_dir`, and delete the old run in it if the user asked for that; other processes wait.

    Args:
        until: the exit stack that releases the lock.

    Raises:
        InputError: the folder cannot be written to, another run uses it, or another run has filled it meanwhile.
    """
    with args.main_process_first(desc="making room"):
        if args.process_index == 0:
            check_writable(args.output_dir)
            until.enter_context(lock_folder(args.output_dir))
            if run_args.overwrite_output_dir:
                clear_old_run(args.output_dir, run_args.method)
            elif args.resume_from_checkpoint is None:
                refuse_foreign_run(args.output_dir)  # again: another run may have filled it since the first check


def check_writable(folder: str) -> None:
    """Check that `folder` can be created and written to, with a temporary file.

    Raises:
        InputError: it cannot.
    """
    try:
        os.makedirs(folder, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise not_writable(folder, error) from error


def not_writable(folder: str, error: OSError) -> InputError:
    """The error for an output folder that cannot be written to."""
    return InputError(
        f"output_dir {folder!r} cannot be written to ({error.strerror or error}); pass another --output_dir"
    )


@contextlib.contextmanager
def disk_errors_as_input_errors(folder: str) -> Iterator[None]:
    """Turn a disk error, raised by any library, into an `InputError` that names the last complete checkpoint."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        if (reason := _reason(error)) is None:
            raise
        checkpoint = last_complete_checkpoint(folder)
        left = (
            f"{checkpoint} is complete: make room and continue with --resume_from_checkpoint true"
            if checkpoint is not None
            else "there is no complete checkpoint: make room, or pass another --output_dir, and start again"
        )
        raise InputError(f"the run in {folder!r} cannot be saved ({reason}); {left}") from error


@contextlib.contextmanager
def lock_folder(folder: str | os.PathLike) -> Iterator[None]:
    """A context that holds the lock of a run folder; for the first process of a run.

    The lock belongs to the process (`flock`). The system releases it however the process ends, so the lock file of a
    killed run does not block later runs. On network file systems without locks between machines (NFS mounted with
    `nolock` or `local_lock`), only runs on the same machine exclude each other. If the file system has no locks at
    all, the run continues without one and logs a warning.

    Raises:
        InputError: another run holds it.
    """
    path, owner = Path(folder) / LOCK_FILE, Path(folder) / LOCK_HOLDER_FILE
    # filelock's soft lock is the mere presence of a file, which would outlive a killed process.
    options = {"fallback_to_soft": False} if "fallback_to_soft" in inspect.signature(FileLock).parameters else {}
    lock = FileLock(path, timeout=0, **options)
    try:
        lock.acquire()
    except Timeout:
        raise InputError(
            f"output_dir {os.fspath(folder)!r} is in use by another run{_lock_holder(owner)}; wait until it has "
            "ended, or pass another --output_dir"
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


def _is_run_folder(folder: Path) -> bool:
    """Whether `folder` is a run folder rather than a checkpoint; a finished run saves a trainer state there too."""
    if (folder / RUN_RECORD).is_file() or checkpoint_folders(folder):
        return True
    if re.fullmatch(r"checkpoint-\d+", folder.resolve().name) or checkpoint_problem(folder) is not None:
        return False
    return not any(next(folder.glob(pattern), None) for pattern in _CHECKPOINT_FILES)


def _methods_of(folder: Path) -> list[str]:
    """The method of the run in `folder`; all methods if the run has no record."""
    try:
        return [str(json.loads((folder / RUN_RECORD).read_text(encoding="utf-8"))["method"])]
    except (OSError, ValueError, KeyError, TypeError):
        return list(METHODS) if any(folder.glob("*")) else []


_STORAGE_ERRORS = {
    getattr(errno, name)
    for name in ("ENOSPC", "EDQUOT", "EFBIG", "EROFS", "EACCES", "EPERM", "EIO", "ENOTDIR", "EISDIR", "ESTALE")
    if hasattr(errno, name)
}
_STORAGE_MESSAGES = ("No space left", "File too large", "Read-only file system", "Disk quota", "Input/output error",
            "Permission denied")  # fmt: skip
# torch.save does not report the system's error
_TORCH_MESSAGES = ("PytorchStreamWriter", "inline_container", "iostream error")


def _reason(error: BaseException) -> str | None:
    """The reason of a disk error, or `None` for other errors."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.errno in _STORAGE_ERRORS:
            return f"{seen.strerror}: {seen.filename}" if seen.filename else str(seen.strerror)
        text = str(seen)
        # tokenizers raise a bare Exception, safetensors their own
        plain = isinstance(seen, OSError | SafetensorError) or type(seen) in (Exception, RuntimeError)
        if plain and any(words in text for words in _STORAGE_MESSAGES):
            return next(words for words in _STORAGE_MESSAGES if words in text)
        if isinstance(seen, RuntimeError) and any(words in text for words in _TORCH_MESSAGES):
            return "a file could not be written to its end"
        seen = seen.__cause__ or seen.__context__
    return None


def _lock_holder(owner: Path) -> str:
    """The process that holds the lock, for the message; empty if unknown."""
    try:
        found = json.loads(owner.read_text(encoding="utf-8"))
        return f" (process {found['pid']} on {found['host']})"
    except (OSError, ValueError, KeyError, TypeError):
        return ""
