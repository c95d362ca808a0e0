"""Disks that are full, read-only or gone: found out before training where possible, explained where not."""

import contextlib
import errno
import os
import tempfile
from collections.abc import Iterator

from safetensors import SafetensorError

from hf_ft_ext.errors import InputError
from hf_ft_ext.training.checkpoints import last_sound_checkpoint

_STORAGE = {
    getattr(errno, name)
    for name in ("ENOSPC", "EDQUOT", "EFBIG", "EROFS", "EACCES", "EPERM", "EIO", "ENOTDIR", "EISDIR", "ESTALE")
    if hasattr(errno, name)
}
_IN_TEXT = ("No space left", "File too large", "Read-only file system", "Disk quota", "Input/output error",
            "Permission denied")  # fmt: skip
_TORCH = ("PytorchStreamWriter", "inline_container", "iostream error")  # torch.save does not say what the disk said


def check_writable(folder: str) -> None:
    """Make `folder` and a file in it, which is deleted again.

    Raises:
        InputError: that is not possible.
    """
    try:
        os.makedirs(folder, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise not_writable(folder, error) from error


def not_writable(folder: str, error: OSError) -> InputError:
    """The error for an output folder that is none."""
    return InputError(
        f"output_dir {folder!r} cannot be written to ({error.strerror or error}); pass another --output_dir"
    )


@contextlib.contextmanager
def explained(folder: str) -> Iterator[None]:
    """Turn a refusal of the disk, by whichever library it was met, into an `InputError` that says what is left."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        if (reason := _reason(error)) is None:
            raise
        checkpoint = last_sound_checkpoint(folder)
        left = (
            f"{checkpoint} is complete: make room and go on with --resume_from_checkpoint true"
            if checkpoint is not None
            else "there is no complete checkpoint: make room, or pass another --output_dir, and start again"
        )
        raise InputError(f"the run in {folder!r} cannot be saved ({reason}); {left}") from error


def _reason(error: BaseException) -> str | None:
    """What the disk said, or `None` if the error is about something else."""
    seen = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.errno in _STORAGE:
            return f"{seen.strerror}: {seen.filename}" if seen.filename else str(seen.strerror)
        text = str(seen)
        # tokenizers raise a bare Exception, safetensors their own
        plain = isinstance(seen, OSError | SafetensorError) or type(seen) in (Exception, RuntimeError)
        if plain and any(words in text for words in _IN_TEXT):
            return next(words for words in _IN_TEXT if words in text)
        if isinstance(seen, RuntimeError) and any(words in text for words in _TORCH):
            return "a file could not be written to its end"
        seen = seen.__cause__ or seen.__context__
    return None
