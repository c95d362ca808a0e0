"""What a SparseGrad run with a fixed support changed, as a small file of its own.

`sparse_delta.safetensors` holds the changes of the chosen entries, where they lie (rows, columns, the columns of `V`
and `U`; once for all layers that share them, and anew for each refresh of the basis), and every other parameter that
trained. Dynamic support has none: after some hundred steps it has been at a quarter of all entries. The delta belongs
to the very weights that training started from: their hash is in its metadata, and other weights are refused.
"""

import hashlib
import json
import logging
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from hf_ft_ext.errors import InputError
from hf_ft_ext.sparse.convert import sparse_layers
from hf_ft_ext.sparse.fixed import FixedSupport
from hf_ft_ext.training.files import replacing, tensor_hash

DELTA_FILE = "sparse_delta.safetensors"
_FORMAT = "hf_ft_ext sparse delta 2"
_PARTS = ("rows", "columns", "entries", "out_columns", "in_columns")

logger = logging.getLogger(__name__)


def save_delta(model: nn.Module, folder: str | os.PathLike) -> int:
    """Write the delta of a trained model into `folder` and return its size in bytes.

    Args:
        model: a converted model with static or structured support, after training.

    Raises:
        InputError: the support is dynamic or not chosen yet.
    """
    layers = sparse_layers(model)
    if not layers or any(layer.support is None for layer in layers.values()):
        raise InputError(
            "a delta needs a fixed support that has been chosen; train with sparse_support=structured or static, or "
            "save the whole model"
        )
    tensors, places, numbers = {}, {}, {}
    for name, layer in layers.items():
        places[name] = []
        for support, change in layer.changes():
            number = numbers.setdefault(id(support), len(numbers))
            for part in _PARTS:
                value = getattr(support, part)
                if value is not None:
                    tensors[f"support.{number}.{part}"] = value.cpu().contiguous()
            tensors[f"change.{name}.{len(places[name])}"] = change.cpu()
            places[name].append(number)
    rest = {name: p for name, p in _others(model, layers) if p.requires_grad}
    tensors |= {f"rest.{name}": parameter.detach().cpu().clone() for name, parameter in rest.items()}
    frozen = [(name, p) for name, p in _others(model, layers) if not p.requires_grad]
    base = _base_hash([(f"{name}.weight", layer.base_hash) for name, layer in layers.items()], frozen)
    metadata = {"format": _FORMAT, "base": base, "layers": json.dumps(places), "rest": json.dumps(sorted(rest))}
    path = Path(folder) / DELTA_FILE
    with replacing(path) as temporary:
        save_file(tensors, temporary, metadata=metadata)
    size = path.stat().st_size
    whole = sum(p.numel() * p.element_size() for name, p in model.named_parameters() if not name.endswith(".values"))
    logger.info("delta of %.2f MB, %.1f %% of the model: %s", size / 1e6, 100 * size / whole, path)
    return size


def load_delta(model: nn.Module, folder: str | os.PathLike) -> nn.Module:
    """Apply the delta in `folder` to a plain model with the weights that training started from, in place.

    Returns:
        The model, equal to the trained one to rounding.

    Raises:
        InputError: there is no delta, it is damaged, or it belongs to another model; the model is then unchanged.
    """
    path = Path(folder) / DELTA_FILE
    if not path.is_file():
        raise InputError(f"{os.fspath(folder)!r} holds no {DELTA_FILE}; pass the folder that save_delta wrote")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a mapping)
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} cannot be read ({error}); copy it anew from where it was saved") from error
    if metadata.get("format") != _FORMAT:
        raise InputError(f"{path} is no sparse delta of this version; pass the folder that save_delta wrote")
    places, rest = json.loads(metadata["layers"]), set(json.loads(metadata["rest"]))
    parameters = dict(model.named_parameters())
    expected = {f"{name}.weight" for name in places} | rest
    if missing := sorted(expected - parameters.keys()):
        raise InputError(f"{path} belongs to another model: this one has no {missing[0]}")
    weights = [(f"{name}.weight", _oriented(model, name)) for name in places]
    frozen = [(name, p) for name, p in parameters.items() if name not in expected]
    if _base_hash([(name, tensor_hash(weight)) for name, weight in weights], frozen) != metadata["base"]:
        raise InputError(
            f"{path} belongs to other weights than this {type(model).__name__} has; load the model that training "
            "started from, in the same dtype, and apply the delta once"
        )
    if wrong := [name for name in rest if parameters[name].shape != tensors[f"rest.{name}"].shape]:
        raise InputError(f"{path} belongs to another model: {wrong[0]} has another shape here (the label count, say)")
    with torch.no_grad():
        for name, numbers in places.items():
            weight = _oriented(model, name)
            device = weight.device
            for i, number in enumerate(numbers):
                parts = {part: tensors.get(f"support.{number}.{part}") for part in _PARTS}
                support = FixedSupport(**{part: None if v is None else v.to(device) for part, v in parts.items()})
                support.add_to(weight, tensors[f"change.{name}.{i}"].to(device))
        for name in rest:
            parameters[name].copy_(tensors[f"rest.{name}"])
    return model


def _others(model: nn.Module, layers: Iterable[str]) -> Iterator[tuple[str, nn.Parameter]]:
    own = {f"{name}.{part}" for name in layers for part in ("weight", "values")}
    return ((name, parameter) for name, parameter in model.named_parameters() if name not in own)


def _oriented(model: nn.Module, name: str) -> torch.Tensor:
    """The weight of a plain layer as (out, in); a view, so that changing it changes the layer."""
    layer = model.get_submodule(name)
    return layer.weight.detach().T if isinstance(layer, Conv1D) else layer.weight.detach()


def _base_hash(weights: list[tuple[str, str]], frozen: list[tuple[str, torch.Tensor]]) -> str:
    entries = [*weights, *((name, tensor_hash(parameter)) for name, parameter in frozen)]
    return hashlib.sha256(json.dumps(sorted(entries)).encode()).hexdigest()
