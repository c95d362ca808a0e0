"""The run folder: its name, what it may already hold, and how an old run leaves it."""

import itertools
import logging
import os
import re
import shutil
from pathlib import Path

from hf_ft_ext.errors import InputError
from hf_ft_ext.prompts.model import PROMPT_FILE
from hf_ft_ext.training.checkpoints import checkpoint_folders, fault_of, last_sound_checkpoint
from hf_ft_ext.training.record import RUN_RECORD

logger = logging.getLogger(__name__)

# Weights and the configuration that says whether they are a model or an adapter: one kind must not stay
# beside the other, or the folder would load as neither.
_WEIGHTS = ("model*.safetensors*", "pytorch_model*.bin*", "adapter_model.*")
_OWN = (
    RUN_RECORD,
    "predictions*.tsv",
    "hp_search.json",
    "config.json",
    "adapter_config.json",
    PROMPT_FILE,
    "adapter_plan.*",
    "*_delta.safetensors",
    *_WEIGHTS,
)


def holds_run(folder: str | os.PathLike) -> bool:
    """Whether `folder` holds a run: its record, a checkpoint, or weights of a model or adapter."""
    folder = Path(folder)
    patterns = (RUN_RECORD, "checkpoint-*", "run-*/checkpoint-*", *_WEIGHTS)
    return any(next(folder.glob(pattern), None) is not None for pattern in patterns)


def free_folder(base: str, *, resume: bool = False) -> str:
    """The first of `base`, `base-2`, `base-3`, ... that holds no run; with `resume` the last that holds one."""
    names = (base if i == 1 else f"{base}-{i}" for i in itertools.count(1))
    last = base
    while holds_run(name := next(names)):
        last = name
    return last if resume else name


def folder_name(text: str) -> str:
    """`text` as a part of a folder's name: the last part of a path, awkward characters replaced."""
    return re.sub(r"[^\w.-]+", "_", Path(text.rstrip("/")).name) or "data"


def checkpoint_to_resume(resume: str, output_dir: str) -> str:
    """The checkpoint folder that `--resume_from_checkpoint` means.

    Args:
        resume: `true` for the last checkpoint in `output_dir` that is complete and undamaged, or a path.

    Raises:
        InputError: there is no such checkpoint, or the one that was named is incomplete or damaged.
    """
    if resume.lower() == "true":
        if not checkpoint_folders(output_dir):
            raise InputError(
                f"--resume_from_checkpoint true: {output_dir!r} holds no checkpoint; pass the run's --output_dir, "
                "or start without it"
            )
        faults: list[str] = []
        last = last_sound_checkpoint(output_dir, faults)
        if last is None:
            raise InputError(
                f"--resume_from_checkpoint true: {output_dir!r} holds no complete checkpoint ({'; '.join(faults)}); "
                "start again with --overwrite_output_dir"
            )
        for fault in faults:
            logger.warning("Not resumed from %s", fault)
        return str(last)
    folder = Path(resume).expanduser()
    if not (folder / "trainer_state.json").is_file():
        raise InputError(
            f"--resume_from_checkpoint {resume!r} is no checkpoint (no trainer_state.json in it); pass a "
            "checkpoint-<step> folder, or true for the last one in output_dir"
        )
    if (fault := fault_of(folder)) is not None:
        raise InputError(
            f"--resume_from_checkpoint {resume!r} cannot be used: {fault}; pass another checkpoint, or true for the "
            "last sound one in output_dir"
        )
    return str(folder)


def refuse_foreign_run(output_dir: str) -> None:
    """Raise an `InputError` if `output_dir` is no folder or holds another run."""
    if os.path.exists(output_dir) and not os.path.isdir(output_dir):
        raise InputError(f"output_dir {output_dir!r} is a file; pass a folder")
    if holds_run(output_dir):
        raise InputError(
            f"output_dir {output_dir!r} already holds a run; pass --resume_from_checkpoint true to continue it, "
            "--overwrite_output_dir to replace it, or another --output_dir"
        )


def refuse_lost_model(output_dir: str, model: str | None) -> None:
    """Raise an `InputError` if the model to start from lies in the folder that would be overwritten."""
    target = Path(output_dir).expanduser().resolve()
    if model is None or not os.path.isdir(model):
        return
    source = Path(model).resolve()
    if source == target or target in source.parents:
        raise InputError(
            f"--overwrite_output_dir would delete {model!r}, the model to start from; pass another --output_dir"
        )


def clear_old_run(output_dir: str | os.PathLike) -> None:
    """Delete the run that `output_dir` holds: checkpoints, record, predictions, weights. Other files stay."""
    folder = Path(output_dir)
    for path in folder.glob("checkpoint-*"):
        if path.is_dir() and re.fullmatch(r"checkpoint-\d+", path.name):
            shutil.rmtree(path)
    for pattern in (*_OWN, "*_delta.safetensors"):
        for path in folder.glob(pattern):
            path.unlink()
