"""Kernels and projected gradients on disk: safetensors and a JSON description, in a folder named by a hash."""

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
from hf_ft_ext.files import adapters_text, atomic_write, tensor_hash, write_json
from hf_ft_ext.kernel.rows import ExampleRows
from hf_ft_ext.kernel.schedule import BlockSchedule, Bounds, Edges

logger = logging.getLogger(__name__)

DESCRIPTION = "kernel.json"
# Fields of the configuration that do not affect gradients. `architectures` changes when a model is saved; the class
# of the model is hashed separately.
_FIELDS_WITHOUT_EFFECT = ("_name_or_path", "architectures", "transformers_version", "id2label", "label2id")


def model_hash(model: nn.Module) -> str:
    """SHA-256 over configuration, settings of adapters, weights, buffers, and which parameters are trainable."""
    digest = hashlib.sha256(type(model).__name__.encode())
    config = getattr(model, "config", None)
    if config is not None and hasattr(config, "to_dict"):
        about = {key: value for key, value in config.to_dict().items() if key not in _FIELDS_WITHOUT_EFFECT}
        digest.update(json.dumps(about, sort_keys=True, default=str).encode())
    digest.update(adapters_text(model).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor_hash(tensor)}\n".encode())
    for name, parameter in sorted(model.named_parameters()):
        digest.update(f"{name} {parameter.requires_grad}\n".encode())
    return digest.hexdigest()


def rows_hash(rows: ExampleRows) -> str:
    """SHA-256 over the inputs of all rows, without padding at the right."""
    digest = hashlib.sha256()
    for i in range(len(rows)):
        for key, value in sorted(rows.batch([i]).items()):
            digest.update(f"{key} {tensor_hash(value)}\n".encode())
    return digest.hexdigest()


class _Store:
    """A folder of finished parts of a result, named by a hash of everything that the result depends on.

    An interrupted computation finds its finished parts again and loses at most the part that it was computing. The
    parts keep their row ranges even if memory or the number of processes have changed. Another model, other data,
    another formula or template have another folder.

    Args:
        folder: the parent folder.
        about: everything that the content depends on, as JSON values.
        overwrite: delete existing parts.
        write: whether this process may delete parts and write the description (the first one of a machine).

    Raises:
        InputError: the folder's description is invalid, or describes something else.
    """

    what = "kernel"  # in messages
    part = "kernel block"
    tensor = "kernel"  # name of the tensor in a part's file

    def __init__(self, folder: str | Path, about: dict[str, Any], overwrite: bool = False, write: bool = True):
        key = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:32]
        self.folder, self.about, self._write = Path(folder).expanduser() / key, about, write
        if overwrite and write and self.folder.exists():
            shutil.rmtree(self.folder)
        found = self._description()
        if found is not None and found.get("about") != about:
            raise InputError(
                f"the {self.what} in {self.folder} belongs to something else "
                f"({_difference(found.get('about', {}), about)}); pass overwrite_kernels, or another kernel_dir"
            )

    def _stored_division(self) -> dict[str, Any] | None:
        """The division into parts that the folder describes, or `None`."""
        found = self._description()
        if found is None:
            return None
        if found.get("check") != checksum_of_description(found["about"], found["plan"]):
            raise InputError(
                f"{self.folder / DESCRIPTION} is damaged: its checksum does not fit its content; delete the folder"
            )
        return found["plan"]

    def _describe(self, cut: dict[str, Any]) -> None:
        if self._write:
            with self._writing():
                description = {"about": self.about, "plan": cut, "check": checksum_of_description(self.about, cut)}
                write_json(self.folder / DESCRIPTION, description)

    def _read(self, path: Path) -> tuple[torch.Tensor, dict[str, str]] | None:
        """A part, memory-mapped from its file, and its metadata; `None` if it does not exist."""
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
        """Refuse a part that belongs elsewhere.

        Args:
            held: its shape.
            expected: the expected shape, or "" if it is the same.
            number: its expected number.
        """
        if metadata.get("key") != self.folder.name or expected:
            raise InputError(
                f"the {self.part} {path} belongs to another {self.what}: it holds {held}, expected "
                f"{expected or held} of {self.folder.name}; delete the file and run again"
            )
        if metadata.get("block") != number:
            raise InputError(
                f"the {self.part} {path} is another part of its {self.what} ({metadata.get('block')}, not {number}); "
                "delete the file and run again"
            )

    def _keep(self, path: Path, value: torch.Tensor, number: str) -> None:
        with self._writing(), atomic_write(path) as temporary:
            save_file({self.tensor: value.contiguous()}, temporary, {"key": self.folder.name, "block": number})

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise InputError(
                f"the {self.what} cannot be written to {self.folder} ({error.strerror or error}); "
                "pass kernel_dir with a writable folder that has enough space: finished blocks stay"
            ) from error

    def _description(self) -> dict[str, Any] | None:
        path = self.folder / DESCRIPTION
        if not path.exists():
            return None
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise InputError(f"{path} is not a description of a kernel ({error}); delete the folder") from error
        if not (
            isinstance(found, dict) and isinstance(found.get("about"), dict) and isinstance(found.get("plan"), dict)
        ):
            raise InputError(
                f"{path} is not a description of a kernel (about and plan are missing); delete the folder"
            )
        return found


class KernelStore(_Store):
    """The finished blocks of one kernel on disk.

    The row ranges of the blocks are fixed by the first run; batch size and memory limit are those of the current
    computation. Arguments as for `_Store`.
    """

    _cut: BlockSchedule | None = None

    def schedule(self, make: Callable[[Edges | None], BlockSchedule]) -> BlockSchedule:
        """Return the schedule that `make` gives for the row ranges in the folder, or for `None` if it is new."""
        stored, edges = self._stored_division(), None
        if stored is not None:
            first, second = ([tuple(bounds) for bounds in stored[side]] for side in ("first", "second"))
            edges = first, second
        self._cut = make(edges) if edges is None or not self.finished() else BlockSchedule.of_blocks(*edges)
        if stored is None:
            self._describe({"first": self._cut.first, "second": self._cut.second})
        return self._cut

    def finished(self) -> bool:
        """Whether every block exists."""
        found = self._description()
        if found is None:
            return False
        first, second = len(found["plan"].get("first", ())), len(found["plan"].get("second", ()))
        symmetric = self.about.get("second") is None
        return all(self._path(i, j).exists() for i in range(first) for j in range(i if symmetric else 0, second))

    def get(self, i: int, j: int) -> torch.Tensor | None:
        """Return the finished block (i, j), or `None`; call `schedule` before.

        Raises:
            InputError: its file is truncated or belongs to another kernel.
        """
        found = self._read(self._path(i, j))
        if found is None:
            return None
        block, metadata = found
        assert self._cut is not None  # made by `schedule`
        first, second = (b - a for a, b in (self._cut.first[i], self._cut.second[j]))
        shape = tuple(block.shape)
        last = () if self.about.get("class_diagonal") else shape[2:3]
        expected = ""
        if shape != (*shape[:1], first, *shape[2:3], second, *last):
            expected = f"[kernels, {first}, c, {second}{', c' if last else ''}]"
        self._check_part(self._path(i, j), metadata, shape, expected, f"{i} {j}")
        return block

    def put(self, i: int, j: int, block: torch.Tensor) -> None:
        """Store a finished block."""
        self._keep(self._path(i, j), block, f"{i} {j}")

    def _path(self, i: int, j: int) -> Path:
        return self.folder / f"block-{i:05d}-{j:05d}.safetensors"


class FeatureStore(_Store):
    """Projected gradients `[N, C, k]` of one set of rows, chunk by chunk on disk (see `engines.projected.Chunks`).

    Arguments as for `_Store`. `about` describes only these rows, so that the features serve kernels with any others.
    """

    what = "set of projected gradients"
    part = "chunk of projected gradients"
    tensor = "features"
    edges: list[Bounds]

    def cut(self, edges: list[Bounds]) -> list[Bounds]:
        """Use the chunks that the folder describes, or `edges` if it is new; return those that are used."""
        stored = self._stored_division()
        self.edges = edges if stored is None else [(first, last) for first, last in stored["chunks"]]
        if stored is None:
            self._describe({"chunks": edges})
        return self.edges

    def get(self, i: int) -> torch.Tensor | None:
        """Return the finished chunk `[rows, c, k]`, memory-mapped from its file, or `None`.

        Raises:
            InputError: its file is truncated or belongs to other gradients.
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
        """Store a finished chunk."""
        self._keep(self._path(i), features, str(i))

    def _path(self, i: int) -> Path:
        return self.folder / f"features-{i:05d}.safetensors"


def checksum_of_description(about: dict[str, Any], plan: dict[str, Any]) -> str:
    """Checksum of a description, so that a damaged one cannot shift the row ranges of blocks."""
    return hashlib.sha256(json.dumps([about, plan], sort_keys=True).encode()).hexdigest()[:32]


def _difference(found: dict[str, Any], wanted: dict[str, Any]) -> str:
    keys = [key for key in wanted if found.get(key) != wanted[key]]
    return ", ".join(f"{key}: {found.get(key)!r}, not {wanted[key]!r}" for key in keys[:3]) or "unknown"
