"""Deltas: files of the weights that training changed, valid only for the exact weights it started from."""

import hashlib
import json
import os
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from hf_ft_ext.errors import InputError
from hf_ft_ext.files import atomic_write, tensor_hash

_CHECK = "check"
_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


def write_delta(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    """Write a delta with a checksum of its content, so that a damaged file is never applied."""
    metadata = {**metadata, _CHECK: _checksum(tensors, metadata)}
    with atomic_write(path) as temporary:
        save_file(tensors, temporary, metadata=metadata)


def read_delta(
    folder: str | os.PathLike, name: str, form: str, writer: str
) -> tuple[Path, dict[str, str], dict[str, torch.Tensor]]:
    """Path, metadata and tensors of the delta `name` in `folder`.

    Args:
        form: the required value of `format` in its metadata.
        writer: the function that writes such files, for messages.

    Raises:
        InputError: there is no such file, it is damaged, or it has another format.
    """
    path = Path(folder) / name
    if not path.is_file():
        raise InputError(f"{os.fspath(folder)!r} holds no {name}; pass the folder that {writer} wrote")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a mapping)
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} cannot be read ({error}); copy it again from where it was saved") from error
    if metadata.get("format") != form:
        raise InputError(f"{path} is not of the format {form!r}; pass the folder that {writer} of this version wrote")
    check = metadata.pop(_CHECK, None)
    if check != _checksum(tensors, metadata):
        raise InputError(f"{path} is damaged: its checksum differs; copy it again from where it was saved")
    return path, metadata, tensors


def check_parameters(
    path: Path, model: nn.Module, names: set[str], rest: dict[str, torch.Tensor]
) -> dict[str, nn.Parameter]:
    """The parameters of `model` by name, after checking that the delta fits them.

    Args:
        names: parameters that the model must have.
        rest: tensors by name; the model must have parameters of the same names and shapes.

    Raises:
        InputError: the delta belongs to another model.
    """
    parameters = dict(model.named_parameters())
    if missing := sorted((names | rest.keys()) - parameters.keys()):
        raise InputError(f"{path} belongs to another model: this one has no {missing[0]}")
    if wrong := [name for name, tensor in rest.items() if tensor.shape != parameters[name].shape]:
        raise InputError(f"{path} belongs to another model: {wrong[0]} has another shape here (the label count, say)")
    return parameters


def modules_with_statistics(model: nn.Module) -> list[str]:
    """Names of the normalizations over the batch: training changes their running statistics, frozen or not."""
    kind = nn.modules.batchnorm._NormBase
    return [name for name, m in model.named_modules() if isinstance(m, kind) and m.running_mean is not None]


def statistics_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """The running statistics of normalizations, which training changes too, by their names in a delta."""
    buffers = dict(model.named_buffers())
    names = (f"{name}.{part}".removeprefix(".") for name in modules_with_statistics(model) for part in _STATISTICS)
    return {f"statistics.{name}": buffers[name] for name in names if name in buffers}


def load_statistics(model: nn.Module, tensors: dict[str, torch.Tensor]) -> None:
    """Set the running statistics of normalizations to those in a delta's tensors, if it has any."""
    for name, buffer in statistics_of(model).items():
        if name in tensors:
            buffer.copy_(tensors[name])


def other_weights(path: Path, model: nn.Module) -> InputError:
    """The error for a base model whose hash differs from the delta's."""
    return InputError(
        f"{path} belongs to other weights than this {type(model).__name__} has; load the model that training started "
        "from, in the same dtype, and apply the delta once"
    )


def _checksum(tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> str:
    hashes = {name: tensor_hash(tensor) for name, tensor in tensors.items()}
    return hashlib.sha256(json.dumps([hashes, metadata], sort_keys=True).encode()).hexdigest()
