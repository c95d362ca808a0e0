"""Delta files of trained entries: small, and only for the base model that training started from.

`entries_delta.safetensors` holds indices and values of the entries, and every other trained parameter and running
statistic in full.
"""

import hashlib
import json
import os
from pathlib import Path

import torch
from torch import nn

from hf_ft_ext.entries.layer import Entries, weights_with_entries
from hf_ft_ext.errors import InputError
from hf_ft_ext.files import tensor_hash
from hf_ft_ext.training.saved.delta_files import (
    check_parameters,
    load_statistics,
    other_weights,
    read_delta,
    statistics_of,
    write_delta,
)

DELTA_FILE = "entries_delta.safetensors"
_FORMAT = "hf_ft_ext entries 1"


def save_entries(model: nn.Module, folder: str | os.PathLike) -> int:
    """Write the trained entries and parameters of `model` into `folder` and return the file's size in bytes.

    Raises:
        InputError: no entries and no parameters train.
    """
    tensors, hashes, inside = {}, {}, set()
    for name, weight, entries in weights_with_entries(model):
        tensors[f"indices.{name}"] = entries.indices.cpu()
        tensors[f"values.{name}"] = weight.reshape(-1)[entries.indices].cpu()
        hashes[name] = entries.base_hash
        inside.add(id(entries.values))
    rest = {name: p for name, p in model.named_parameters() if p.requires_grad and id(p) not in inside}
    if not tensors and not rest:
        raise InputError("no part of the model trains, so there is no delta; call attach_entries first")
    tensors |= {f"rest.{name}": p.detach().cpu().clone() for name, p in rest.items()}
    tensors |= {name: buffer.cpu().clone() for name, buffer in statistics_of(model).items()}
    for name, p in model.named_parameters():
        if not p.requires_grad:
            hashes[name] = tensor_hash(p)
    metadata = {"format": _FORMAT, "base": _hash(hashes)}
    path = Path(folder) / DELTA_FILE
    write_delta(path, tensors, metadata)
    return path.stat().st_size


def read_indices(folder: str | os.PathLike) -> dict[str, torch.Tensor]:
    """Return the entries of the delta in `folder`: parameter name -> flat indices.

    Raises:
        InputError: the folder holds no delta, or a damaged one.
    """
    return read_choice(folder)[0]


def read_choice(folder: str | os.PathLike) -> tuple[dict[str, torch.Tensor], list[str]]:
    """Return the entries of a delta (flat indices by parameter name), and the names of parameters trained in full.

    Raises:
        InputError: the folder holds no delta, or a damaged one.
    """
    _, _, tensors = read_delta(folder, DELTA_FILE, _FORMAT, "save_entries")
    indices = {name.removeprefix("indices."): t for name, t in tensors.items() if name.startswith("indices.")}
    return indices, [name.removeprefix("rest.") for name in tensors if name.startswith("rest.")]


def load_entries(model: nn.Module, folder: str | os.PathLike) -> nn.Module:
    """Apply the delta in `folder` to a plain model with the weights that training started from, in place.

    Returns:
        The model, bit for bit equal to the trained one.

    Raises:
        InputError: there is no delta, it is damaged, or it belongs to another model. The model is then unchanged.
    """
    if any(isinstance(module, Entries) for module in model.modules()):
        raise InputError("the model already trains entries; load the delta into the plain model")
    path, metadata, tensors = read_delta(folder, DELTA_FILE, _FORMAT, "save_entries")
    chosen = {n.removeprefix("values."): t for n, t in tensors.items() if n.startswith("values.")}
    rest = {n.removeprefix("rest."): t for n, t in tensors.items() if n.startswith("rest.")}
    parameters = check_parameters(path, model, set(chosen), rest)
    if _hash({name: tensor_hash(p) for name, p in parameters.items() if name not in rest}) != metadata["base"]:
        raise other_weights(path, model)
    with torch.no_grad():
        for name, values in chosen.items():
            weight = parameters[name]
            flat = weight.flatten()  # a copy if the weight is not contiguous
            flat[tensors[f"indices.{name}"].to(weight.device)] = values.to(weight.device)
            weight.copy_(flat.view_as(weight))
        for name, tensor in rest.items():
            parameters[name].copy_(tensor)
        load_statistics(model, tensors)
    return model


def _hash(hashes: dict[str, str]) -> str:
    return hashlib.sha256(json.dumps(sorted(hashes.items())).encode()).hexdigest()
