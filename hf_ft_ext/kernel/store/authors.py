"""The files of the kernel paper's authors: kernels and logits by split and task, read and written."""

from pathlib import Path

import numpy as np
import torch

from hf_ft_ext.errors import InputError, first_line
from hf_ft_ext.files import replacing


def read_foreign(path: str | Path, names: tuple[str, str]) -> tuple[torch.Tensor, torch.Tensor]:
    """A pair of tensors from a `.pt` file of the paper's authors: `(kernel, labels)` or `(logits, labels)`.

    Read with `weights_only=True`: nothing in the file is executed.

    Args:
        names: what the two are, for messages.

    Raises:
        InputError: there is no such file, it is truncated, or it holds something else.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"there is no file {path}; load_kernels needs one per split and task")
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds, among them pickle's and zip's
        reason = first_line(error)
        raise InputError(f"{path} cannot be read as tensors ({reason}); download or compute it again") from error
    if not (isinstance(found, list | tuple) and len(found) == 2 and all(isinstance(t, torch.Tensor) for t in found)):
        raise InputError(f"{path} does not hold the two tensors ({', '.join(names)})")
    return found[0], found[1]


def read_kernel(folder: str | Path, split: str, task: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Kernel `[kernels, N1, C, N2, C]` in float64 and labels `[N2]` as class ids, from the authors' file.

    Raises:
        InputError: as `read_foreign`, or a kernel of another shape.
    """
    path = Path(folder) / kernel_file(split, task)
    kernel, labels = read_foreign(path, ("kernel", "labels"))
    if kernel.ndim == 4:
        kernel = kernel[None]
    labels = labels.reshape(-1)
    if kernel.ndim != 5 or kernel.shape[0] not in (1, 2) or kernel.shape[2] != kernel.shape[4]:
        raise InputError(f"{path}: a kernel has shape [N1, C, N2, C] or [2, N1, C, N2, C], not {tuple(kernel.shape)}")
    if kernel.shape[3] != len(labels):
        raise InputError(f"{path}: {kernel.shape[3]} examples but {len(labels)} labels; the file is damaged")
    if kernel.shape[2] == 1 and labels.is_floating_point() and set(labels.unique().tolist()) <= {-1.0, 1.0}:
        labels = (labels + 1) // 2
    return kernel.double(), labels.double() if _scores(labels) else labels.long()


def _scores(labels: torch.Tensor) -> bool:
    return labels.is_floating_point() and not torch.equal(labels, labels.round())


def write_kernel(folder: str | Path, split: str, task: str, kernel: torch.Tensor, labels: torch.Tensor) -> Path:
    """Write kernel and labels in the authors' form, for their analysis code; returns the file.

    Args:
        kernel: `[kernels, N1, C, N2, C]`.
        labels: `[N2]`, class ids; with one scalar they become -1 and 1, as the authors' are.
    """
    path = Path(folder) / kernel_file(split, task)
    if kernel.shape[2] == 1 and not labels.is_floating_point():
        labels = (2 * labels - 1).float()
    with replacing(path) as temporary:
        torch.save((kernel if len(kernel) == 2 else kernel[0], labels), temporary)
    return path


def kernel_file(split: str, task: str) -> str:
    """The authors' name of a kernel file."""
    return f"{split}_kernels_{task}.pt"


def logits_file(split: str, task: str) -> str:
    """The authors' name of a file of logits."""
    return f"{split}_logits_{task}.pt"


def read_logits(folder: str | Path, split: str, task: str) -> np.ndarray:
    """Logits at the start `[N, C]` from the authors' file."""
    logits, _ = read_foreign(Path(folder) / logits_file(split, task), ("logits", "labels"))
    return (logits[:, None] if logits.ndim == 1 else logits).double().numpy()


def find_task(folder: Path, split: str) -> str:
    """The task whose kernels `folder` holds for `split`, by the files' names.

    Raises:
        InputError: none, or several.
    """
    prefix = f"{split}_kernels_"
    tasks = sorted(path.stem.removeprefix(prefix) for path in folder.glob(f"{prefix}*.pt"))
    if len(tasks) != 1:
        there = f"holds kernels of several tasks ({', '.join(tasks)})" if tasks else f"holds no {prefix}<task>.pt"
        raise InputError(f"load_kernels: {folder} {there}; pass the files of one task, or kernel_task_name")
    return tasks[0]
