"""Kernels and logits in the file format of Malladi et al. 2023 (LM-Kernel-FT), by split and task."""

from pathlib import Path

import numpy as np
import torch

from hf_ft_ext.errors import InputError, first_line
from hf_ft_ext.files import atomic_write


def read_pair(path: str | Path, names: tuple[str, str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Read a pair of tensors from a `.pt` file: `(kernel, labels)` or `(logits, labels)`.

    It is read with `weights_only=True`, so that nothing in the file is executed.

    Args:
        names: names of the two tensors, for messages.

    Raises:
        InputError: the file is missing or truncated, or it holds something else.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"there is no file {path}; load_kernels needs one per split and task")
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many types, pickle's and zip's among them
        reason = first_line(error)
        raise InputError(f"{path} cannot be read as tensors ({reason}); download or compute it again") from error
    if not (isinstance(found, list | tuple) and len(found) == 2 and all(isinstance(t, torch.Tensor) for t in found)):
        raise InputError(f"{path} does not hold the two tensors ({', '.join(names)})")
    return found[0], found[1]


def read_kernel(folder: str | Path, split: str, task: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Read the kernel `[kernels, N1, C, N2, C]` in float64, and labels `[N2]` as class ids or scores
    (several labels per row: `[N2, labels]`).

    Raises:
        InputError: as `read_pair`, or a kernel of another shape.
    """
    path = Path(folder) / kernel_file(split, task)
    kernel, labels = read_pair(path, ("kernel", "labels"))
    if kernel.ndim == 4:
        kernel = kernel[None]
    if labels.ndim and labels.numel() == len(labels):
        labels = labels.reshape(-1)
    if kernel.ndim != 5 or kernel.shape[0] not in (1, 2) or kernel.shape[2] != kernel.shape[4]:
        raise InputError(
            f"{path}: a kernel must have shape [N1, C, N2, C] or [2, N1, C, N2, C], got {tuple(kernel.shape)}"
        )
    if not labels.ndim or kernel.shape[3] != len(labels):
        raise InputError(
            f"{path}: {kernel.shape[3]} examples but labels of shape {tuple(labels.shape)}; the file is damaged"
        )
    if kernel.shape[2] == 1 and labels.is_floating_point() and set(labels.unique().tolist()) <= {-1.0, 1.0}:
        labels = (labels + 1) // 2
    return kernel.double(), labels.double() if _are_scores(labels) else labels.long()


def write_kernel(folder: str | Path, split: str, task: str, kernel: torch.Tensor, labels: torch.Tensor) -> Path:
    """Write kernel and labels in the authors' format, for their analysis code, and return the path.

    Args:
        kernel: `[kernels, N1, C, N2, C]`.
        labels: `[N2]`, class ids; with one scalar they are written as -1 and 1, as in the authors' files. Scores are
            floating-point numbers.
    """
    path = Path(folder) / kernel_file(split, task)
    if kernel.shape[2] == 1 and not labels.is_floating_point():
        labels = (2 * labels - 1).float()
    with atomic_write(path) as temporary:
        torch.save((kernel if len(kernel) == 2 else kernel[0], labels), temporary)
    return path


def kernel_file(split: str, task: str) -> str:
    """The authors' file name of a kernel."""
    return f"{split}_kernels_{task}.pt"


def logits_file(split: str, task: str) -> str:
    """The authors' file name of logits."""
    return f"{split}_logits_{task}.pt"


def read_logits(folder: str | Path, split: str, task: str) -> np.ndarray:
    """Read the logits before training `[N, C]` from the authors' file."""
    logits, _ = read_pair(Path(folder) / logits_file(split, task), ("logits", "labels"))
    return (logits[:, None] if logits.ndim == 1 else logits).double().numpy()


def find_task(folder: Path, split: str) -> str:
    """Find the task whose kernels `folder` holds for `split`, from the file names.

    Raises:
        InputError: there are no kernels, or kernels of several tasks.
    """
    prefix = f"{split}_kernels_"
    tasks = sorted(path.stem.removeprefix(prefix) for path in folder.glob(f"{prefix}*.pt"))
    if len(tasks) != 1:
        there = f"holds kernels of several tasks ({', '.join(tasks)})" if tasks else f"holds no {prefix}<task>.pt"
        raise InputError(f"load_kernels: {folder} {there}; pass the files of one task, or kernel_task_name")
    return tasks[0]


def _are_scores(labels: torch.Tensor) -> bool:
    return labels.is_floating_point() and not torch.equal(labels, labels.round())
