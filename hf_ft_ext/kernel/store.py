"""Kernels on disk: blocks in safetensors and a description in JSON, in a folder named after what they are of."""

import contextlib
import hashlib
import json
import logging
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from hf_ft_ext.errors import InputError, first_line
from hf_ft_ext.kernel.rows import ExampleRows
from hf_ft_ext.kernel.schedule import Plan
from hf_ft_ext.training.files import replacing, tensor_hash, write_json

logger = logging.getLogger(__name__)

DESCRIPTION = "kernel.json"
# `architectures` is what the weights were saved from: saving a model changes it, and the class is hashed by itself.
_NOT_ABOUT_GRADIENTS = ("_name_or_path", "architectures", "transformers_version", "id2label", "label2id")


def model_hash(model: nn.Module) -> str:
    """SHA-256 over configuration, weights, buffers, and which parameters are trainable."""
    digest = hashlib.sha256(type(model).__name__.encode())
    config = getattr(model, "config", None)
    if hasattr(config, "to_dict"):
        about = {key: value for key, value in config.to_dict().items() if key not in _NOT_ABOUT_GRADIENTS}
        digest.update(json.dumps(about, sort_keys=True, default=str).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor_hash(tensor)}\n".encode())
    for name, parameter in sorted(model.named_parameters()):
        digest.update(f"{name} {parameter.requires_grad}\n".encode())
    return digest.hexdigest()


def rows_hash(rows: ExampleRows) -> str:
    """SHA-256 over the inputs of all rows, padding at the right left out."""
    digest = hashlib.sha256()
    for i in range(len(rows)):
        for key, value in sorted(rows.batch([i]).items()):
            digest.update(f"{key} {tensor_hash(value)}\n".encode())
    return digest.hexdigest()


class KernelStore:
    """The blocks of one kernel, finished ones on disk.

    An interrupted computation finds them again, in the same cut whatever memory or processes there are now, and loses
    at most the block it was in. The folder's name is a hash of `about`, so another model, other data, another formula
    or template never meet the same folder.

    Args:
        folder: where kernels are kept.
        about: what the kernel is of, as JSON values.
        overwrite: delete what is there.
        write: whether this process may delete and write the description (the first one of a machine).

    Raises:
        InputError: the folder's description is of something else or no description.
    """

    def __init__(self, folder: str | Path, about: dict[str, Any], overwrite: bool = False, write: bool = True):
        key = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:32]
        self.folder, self.about, self._write = Path(folder).expanduser() / key, about, write
        self._cut: Plan | None = None
        if overwrite and write and self.folder.exists():
            shutil.rmtree(self.folder)
        found = self._description()
        if found is not None and found.get("about") != about:
            raise InputError(
                f"the kernel in {self.folder} is of something else ({_difference(found.get('about', {}), about)}); "
                "pass overwrite_kernels, or another kernel_dir"
            )

    def plan(self, make: Callable[[], Plan]) -> Plan:
        """The cut that the folder holds, or a new one."""
        found = self._description()
        if found is not None:
            plan = found["plan"]
            if found.get("check") != _check(found["about"], plan):
                raise InputError(
                    f"{self.folder / DESCRIPTION} is damaged: its check does not fit what it says; delete the folder"
                )
            cut = {side: [tuple(bounds) for bounds in plan[side]] for side in ("first", "second")}
            self._cut = Plan(**cut, batch_size=plan["batch_size"], scratch_bytes=plan["scratch_bytes"])
        else:
            self._cut = make()
            if self._write:
                with self._writing():
                    write_json(self.folder / DESCRIPTION, self._said())
        return self._cut

    def _said(self) -> dict[str, Any]:
        plan = vars(self._cut)
        return {"about": self.about, "plan": plan, "check": _check(self.about, plan)}

    def finished(self) -> bool:
        """Whether every block is there."""
        found = self._description()
        if found is None:
            return False
        first, second = len(found["plan"].get("first", ())), len(found["plan"].get("second", ()))
        symmetric = self.about.get("second") is None
        return all(self._path(i, j).exists() for i in range(first) for j in range(i if symmetric else 0, second))

    def get(self, i: int, j: int) -> torch.Tensor | None:
        """The finished block, or `None`.

        Raises:
            InputError: its file is truncated or of another kernel.
        """
        path = self._path(i, j)
        if not path.exists():
            return None
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                block = file.get_tensor("kernel")
        except (SafetensorError, OSError) as error:
            raise InputError(
                f"the kernel block {path} cannot be read ({first_line(error)}); delete the file, or "
                "pass overwrite_kernels, and run again"
            ) from error
        first, second = (b - a for a, b in (self._cut.first[i], self._cut.second[j]))
        shape = tuple(block.shape)
        last = () if self.about.get("class_diagonal") else shape[2:3]
        if metadata.get("key") != self.folder.name or shape != (*shape[:1], first, *shape[2:3], second, *last):
            raise InputError(
                f"the kernel block {path} is of another kernel: it holds {shape}, expected [kernels, {first}, c, "
                f"{second}{', c' if last else ''}] of {self.folder.name}; delete the file and run again"
            )
        if metadata.get("block") != f"{i} {j}":
            raise InputError(
                f"the kernel block {path} is another block of its kernel ({metadata.get('block')}, not {i} {j}); "
                "delete the file and run again"
            )
        return block

    def put(self, i: int, j: int, block: torch.Tensor) -> None:
        """Keep a finished block."""
        with self._writing(), replacing(self._path(i, j)) as temporary:
            save_file({"kernel": block.contiguous()}, temporary, {"key": self.folder.name, "block": f"{i} {j}"})

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise InputError(
                f"the kernel cannot be written to {self.folder} ({error.strerror or error}); pass kernel_dir with a "
                "folder that is writable and has room: finished blocks are kept"
            ) from error

    def _path(self, i: int, j: int) -> Path:
        return self.folder / f"block-{i:05d}-{j:05d}.safetensors"

    def _description(self) -> dict[str, Any] | None:
        path = self.folder / DESCRIPTION
        if not path.exists():
            return None
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise InputError(f"{path} is no description of a kernel ({error}); delete the folder") from error
        if not (
            isinstance(found, dict) and isinstance(found.get("about"), dict) and isinstance(found.get("plan"), dict)
        ):
            raise InputError(f"{path} is no description of a kernel (about and plan are missing); delete the folder")
        return found


def _check(about: dict[str, Any], plan: dict[str, Any]) -> str:
    """Of a description, so that a digit that changed does not move the edge of a block."""
    return hashlib.sha256(json.dumps([about, plan], sort_keys=True).encode()).hexdigest()[:32]


def _difference(found: dict[str, Any], wanted: dict[str, Any]) -> str:
    keys = [key for key in wanted if found.get(key) != wanted[key]]
    return ", ".join(f"{key}: {found.get(key)!r}, not {wanted[key]!r}" for key in keys[:3]) or "unknown"


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
