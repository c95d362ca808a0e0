"""What training of chosen entries changed, as a small file that only its own base model takes.

`entries_delta.safetensors` holds indices and values of the entries, and in full every other parameter that trained.
"""

import hashlib
import json
import os
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from hf_ft_ext.entries.layer import Entries, weights_with_entries
from hf_ft_ext.errors import InputError
from hf_ft_ext.training.files import replacing, tensor_hash

DELTA_FILE = "entries_delta.safetensors"
_FORMAT = "hf_ft_ext entries 1"


def save_entries(model: nn.Module, folder: str | os.PathLike) -> int:
    """Write what trained of `model` into `folder` and return the file's size in bytes.

    Raises:
        InputError: neither entries nor anything else trains.
    """
    tensors, hashes, inside = {}, {}, set()
    for name, weight, entries in weights_with_entries(model):
        tensors[f"indices.{name}"] = entries.indices.cpu()
        tensors[f"values.{name}"] = weight.reshape(-1)[entries.indices].cpu()
        hashes[name] = entries.base_hash
        inside.add(id(entries.values))
    rest = {name: p for name, p in model.named_parameters() if p.requires_grad and id(p) not in inside}
    if not tensors and not rest:
        raise InputError("nothing of the model trains, so there is no delta; attach_entries first")
    tensors |= {f"rest.{name}": p.detach().cpu().clone() for name, p in rest.items()}
    for name, p in model.named_parameters():
        if not p.requires_grad:
            hashes[name] = tensor_hash(p)
    metadata = {"format": _FORMAT, "base": _hash(hashes)}
    path = Path(folder) / DELTA_FILE
    with replacing(path) as temporary:
        save_file(tensors, temporary, metadata=metadata)
    return path.stat().st_size


def read_indices(folder: str | os.PathLike) -> dict[str, torch.Tensor]:
    """Which entries a delta in `folder` is about: parameter name -> flat indices.

    Raises:
        InputError: there is no delta, or it cannot be read.
    """
    _, tensors = _read(folder)
    return {name.removeprefix("indices."): t for name, t in tensors.items() if name.startswith("indices.")}


def load_entries(model: nn.Module, folder: str | os.PathLike) -> nn.Module:
    """Apply the delta in `folder` to a plain model with the weights that training started from, in place.

    Returns:
        The model, equal to the trained one bit for bit.

    Raises:
        InputError: there is no delta, it is damaged, or it belongs to another model, which is then unchanged.
    """
    path = Path(folder) / DELTA_FILE
    if any(isinstance(module, Entries) for module in model.modules()):
        raise InputError("the model trains entries already; load the delta into the plain model")
    metadata, tensors = _read(folder)
    parameters = dict(model.named_parameters())
    chosen = {n.removeprefix("values."): t for n, t in tensors.items() if n.startswith("values.")}
    rest = {n.removeprefix("rest."): t for n, t in tensors.items() if n.startswith("rest.")}
    if missing := sorted({*chosen, *rest} - parameters.keys()):
        raise InputError(f"{path} belongs to another model: this one has no {missing[0]}")
    if wrong := [name for name, tensor in rest.items() if tensor.shape != parameters[name].shape]:
        raise InputError(f"{path} belongs to another model: {wrong[0]} has another shape here (the label count, say)")
    if _hash({name: tensor_hash(p) for name, p in parameters.items() if name not in rest}) != metadata["base"]:
        raise InputError(
            f"{path} belongs to other weights than this {type(model).__name__} has; load the model that training "
            "started from, in the same dtype, and apply the delta once"
        )
    with torch.no_grad():
        for name, values in chosen.items():
            weight = parameters[name]
            weight.view(-1)[tensors[f"indices.{name}"].to(weight.device)] = values.to(weight.device)
        for name, tensor in rest.items():
            parameters[name].copy_(tensor)
    return model


def _read(folder: str | os.PathLike) -> tuple[dict, dict[str, torch.Tensor]]:
    path = Path(folder) / DELTA_FILE
    if not path.is_file():
        raise InputError(f"{os.fspath(folder)!r} holds no {DELTA_FILE}; pass the folder that save_entries wrote")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a mapping)
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} cannot be read ({error}); copy it anew from where it was saved") from error
    if metadata.get("format") != _FORMAT:
        raise InputError(f"{path} is no delta of entries of this version; pass the folder that save_entries wrote")
    return metadata, tensors


def _hash(hashes: dict[str, str]) -> str:
    return hashlib.sha256(json.dumps(sorted(hashes.items())).encode()).hexdigest()
