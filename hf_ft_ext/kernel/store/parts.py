"""Kernels and projected gradients on disk: parts in safetensors, a description in JSON, a folder named by content."""

import contextlib
import hashlib
import json
import logging
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from hf_ft_ext.errors import InputError, first_line
from hf_ft_ext.files import replacing, tensor_hash, write_json
from hf_ft_ext.kernel.rows import ExampleRows
from hf_ft_ext.kernel.schedule import Bounds, Edges, Plan

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


class _Store:
    """A folder of finished parts of something, named by a hash of what it is of.

    An interrupted computation finds its parts again, cut at the same rows whatever memory or processes there are now,
    and loses at most the part it was in. Another model, other data, another formula or template never meet the same
    folder.

    Args:
        folder: where such folders are kept.
        about: what the content is of, as JSON values.
        overwrite: delete what is there.
        write: whether this process may delete and write the description (the first one of a machine).

    Raises:
        InputError: the folder's description is of something else or no description.
    """

    what = "kernel"  # in messages
    part = "kernel block"
    tensor = "kernel"  # its name in a part's file

    def __init__(self, folder: str | Path, about: dict[str, Any], overwrite: bool = False, write: bool = True):
        key = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:32]
        self.folder, self.about, self._write = Path(folder).expanduser() / key, about, write
        if overwrite and write and self.folder.exists():
            shutil.rmtree(self.folder)
        found = self._description()
        if found is not None and found.get("about") != about:
            raise InputError(
                f"the {self.what} in {self.folder} is of something else "
                f"({_difference(found.get('about', {}), about)}); pass overwrite_kernels, or another kernel_dir"
            )

    def _stored_cut(self) -> dict[str, Any] | None:
        """The cut that the folder holds."""
        found = self._description()
        if found is None:
            return None
        if found.get("check") != _check(found["about"], found["plan"]):
            raise InputError(
                f"{self.folder / DESCRIPTION} is damaged: its check does not fit what it says; delete the folder"
            )
        return found["plan"]

    def _describe(self, cut: dict[str, Any]) -> None:
        if self._write:
            with self._writing():
                description = {"about": self.about, "plan": cut, "check": _check(self.about, cut)}
                write_json(self.folder / DESCRIPTION, description)

    def _read(self, path: Path) -> tuple[torch.Tensor, dict[str, str]] | None:
        """A part and its metadata, mapped from its file, or `None`."""
        if not path.exists():
            return None
        try:
            with safe_open(path, framework="pt") as file:
                return file.get_tensor(self.tensor), file.metadata() or {}
        except (SafetensorError, OSError) as error:
            raise InputError(
                f"the {self.part} {path} cannot be read ({first_line(error)}); delete the file, or "
                "pass overwrite_kernels, and run again"
            ) from error

    def _check_part(self, path: Path, metadata: dict[str, str], held: tuple, expected: str, number: str) -> None:
        """Refuse a part of something else; `expected`: its shape, empty if it has it; `number`: which part it is."""
        if metadata.get("key") != self.folder.name or expected:
            raise InputError(
                f"the {self.part} {path} is of another {self.what}: it holds {held}, expected {expected or held} of "
                f"{self.folder.name}; delete the file and run again"
            )
        if metadata.get("block") != number:
            raise InputError(
                f"the {self.part} {path} is another part of its {self.what} ({metadata.get('block')}, not {number}); "
                "delete the file and run again"
            )

    def _keep(self, path: Path, value: torch.Tensor, number: str) -> None:
        with self._writing(), replacing(path) as temporary:
            save_file({self.tensor: value.contiguous()}, temporary, {"key": self.folder.name, "block": number})

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise InputError(
                f"the {self.what} cannot be written to {self.folder} ({error.strerror or error}); "
                "pass kernel_dir with a folder that is writable and has room: finished blocks are kept"
            ) from error

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


class KernelStore(_Store):
    """The blocks of one kernel, finished ones on disk.

    Their edges stay; batch size and memory are those of the running computation. Arguments as for `_Store`.
    """

    _cut: Plan | None = None

    def plan(self, make: Callable[[Edges | None], Plan]) -> Plan:
        """The plan that `make` gives for the edges of the blocks that the folder holds, or for `None`."""
        stored, edges = self._stored_cut(), None
        if stored is not None:
            first, second = ([tuple(bounds) for bounds in stored[side]] for side in ("first", "second"))
            edges = first, second
        self._cut = make(edges) if edges is None or not self.finished() else Plan.of_blocks(*edges)
        if stored is None:
            self._describe({"first": self._cut.first, "second": self._cut.second})
        return self._cut

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
        found = self._read(self._path(i, j))
        if found is None:
            return None
        block, metadata = found
        first, second = (b - a for a, b in (self._cut.first[i], self._cut.second[j]))
        shape = tuple(block.shape)
        last = () if self.about.get("class_diagonal") else shape[2:3]
        expected = ""
        if shape != (*shape[:1], first, *shape[2:3], second, *last):
            expected = f"[kernels, {first}, c, {second}{', c' if last else ''}]"
        self._check_part(self._path(i, j), metadata, shape, expected, f"{i} {j}")
        return block

    def put(self, i: int, j: int, block: torch.Tensor) -> None:
        """Keep a finished block."""
        self._keep(self._path(i, j), block, f"{i} {j}")

    def _path(self, i: int, j: int) -> Path:
        return self.folder / f"block-{i:05d}-{j:05d}.safetensors"


class FeatureStore(_Store):
    """Projected gradients `[N, C, k]` of one set of rows, chunk by chunk on disk (see `engines.projected.Chunks`).

    Arguments as for `_Store`; `about` is of these rows alone, so that they serve every kernel with other rows.
    """

    what = "set of projected gradients"
    part = "chunk of projected gradients"
    tensor = "features"
    edges: list[Bounds]

    def cut(self, edges: list[Bounds]) -> list[Bounds]:
        """Take the chunks that the folder holds, or else these; which it is."""
        stored = self._stored_cut()
        self.edges = edges if stored is None else [(first, last) for first, last in stored["chunks"]]
        if stored is None:
            self._describe({"chunks": edges})
        return self.edges

    def get(self, i: int) -> torch.Tensor | None:
        """The finished chunk `[rows, c, k]`, mapped from its file, or `None`.

        Raises:
            InputError: its file is truncated or of other gradients.
        """
        found = self._read(self._path(i))
        if found is None:
            return None
        features, metadata = found
        shape, rows = tuple(features.shape), self.edges[i][1] - self.edges[i][0]
        expected = ""
        if len(shape) != 3 or (shape[0], shape[2]) != (rows, self.about["dimension"]):
            expected = f"({rows}, c, {self.about['dimension']})"
        self._check_part(self._path(i), metadata, shape, expected, str(i))
        return features

    def put(self, i: int, features: torch.Tensor) -> None:
        """Keep a finished chunk."""
        self._keep(self._path(i), features, str(i))

    def _path(self, i: int) -> Path:
        return self.folder / f"features-{i:05d}.safetensors"


def _check(about: dict[str, Any], plan: dict[str, Any]) -> str:
    """Of a description, so that a digit that changed does not move the edge of a block."""
    return hashlib.sha256(json.dumps([about, plan], sort_keys=True).encode()).hexdigest()[:32]


def _difference(found: dict[str, Any], wanted: dict[str, Any]) -> str:
    keys = [key for key in wanted if found.get(key) != wanted[key]]
    return ", ".join(f"{key}: {found.get(key)!r}, not {wanted[key]!r}" for key in keys[:3]) or "unknown"
