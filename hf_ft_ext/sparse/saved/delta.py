"""Save and load the changes of a SparseGrad run (a delta).

`sparse_delta.safetensors` holds the changes of the trained entries, their positions, the columns of `V` and `U` that
they need, and every other trained parameter and running statistic. Fixed support: rows and columns are saved once for
all layers that share them, and again for each refresh of the basis. Dynamic support: all entries that differ from the
base are saved (some hundred steps change a quarter of them), and the whole factors once per kind of layer. A delta
applies only to the weights that training started from: their hash is in its metadata, and other weights are refused.
"""

import hashlib
import json
import logging
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from hf_ft_ext.errors import InputError
from hf_ft_ext.files import tensor_hash
from hf_ft_ext.sparse.basis import Basis, by_columns
from hf_ft_ext.sparse.convert import sparse_layers
from hf_ft_ext.sparse.fixed import FixedSupport
from hf_ft_ext.sparse.layer import SparseGradLinear
from hf_ft_ext.sparse.saved.difference import Difference, differences
from hf_ft_ext.training.saved.delta_files import (
    check_parameters,
    load_statistics,
    other_weights,
    read_delta,
    statistics_of,
    write_delta,
)

DELTA_FILE = "sparse_delta.safetensors"
_FORMAT = "hf_ft_ext sparse delta 3"
_SIDES = ("out_factor", "in_factor")
_PARTS = ("rows", "columns", "entries", "out_columns", "in_columns")

logger = logging.getLogger(__name__)


def save_delta(model: nn.Module, folder: str | os.PathLike, base: nn.Module | None = None) -> int:
    """Write the delta of a trained model into `folder` and return its size in bytes.

    Args:
        model: a converted model after training.
        base: the plain model that training started from. Required with dynamic support, which does not record the
            entries that left it. With fixed support it is only checked.

    Raises:
        InputError: no converted layers, one with a shared weight, a basis or support that was not chosen, dynamic
            support without a base, or a base that differs from the weights that training started from (as far as the
            model records them).
    """
    layers = sparse_layers(model)
    dynamic = {name: layer for name, layer in layers.items() if layer.values is None}
    chosen = (layer.basis.ready if name in dynamic else layer.support is not None for name, layer in layers.items())
    if not layers or not all(chosen):
        raise InputError(
            "a delta needs converted layers and a support that has been chosen: train first, merge afterwards"
        )
    if dynamic and base is None:
        raise InputError(
            "dynamic support does not record what it changed: pass base=, the plain model that training started from"
        )
    if shared := [name for name, layer in layers.items() if layer.shared]:
        raise InputError(
            f"{shared[0]} shares its weight with another module, which a delta cannot hold; save the model"
        )
    hashes = {name: layer.base_hash for name, layer in layers.items() if layer.base_hash is not None}
    if base is not None:
        hashes |= _checked_base(model, base, layers)
    tensors, pieces = _dynamic_parts(dynamic, base) if dynamic else _fixed_parts(layers)
    rest = {name: p for name, p in _others(model, layers) if p.requires_grad}
    tensors |= {f"rest.{name}": parameter.detach().cpu().clone() for name, parameter in rest.items()}
    tensors |= {name: buffer.cpu().clone() for name, buffer in statistics_of(model).items()}
    frozen = [(name, p) for name, p in _others(model, layers) if not p.requires_grad]
    digest = _base_hash([(f"{name}.weight", value) for name, value in hashes.items()], frozen)
    metadata = {"format": _FORMAT, "base": digest, "layers": json.dumps(pieces), "rest": json.dumps(sorted(rest))}
    path = Path(folder) / DELTA_FILE
    write_delta(path, tensors, metadata)
    size = path.stat().st_size
    whole = sum(p.numel() * p.element_size() for name, p in model.named_parameters() if not name.endswith(".values"))
    logger.info("delta of %.2f MB, %.1f %% of the model: %s", size / 1e6, 100 * size / whole, path)
    return size


def load_delta(model: nn.Module, folder: str | os.PathLike) -> nn.Module:
    """Apply the delta in `folder` to a plain model with the weights that training started from, in place.

    Returns:
        The model, equal to the trained one up to rounding.

    Raises:
        InputError: the delta is missing, is damaged, or belongs to another model. The model is unchanged then.
    """
    path, metadata, tensors = read_delta(folder, DELTA_FILE, _FORMAT, "save_delta")
    pieces = json.loads(metadata["layers"])
    rest = {name: tensors[f"rest.{name}"] for name in json.loads(metadata["rest"])}
    trained = {f"{name}.weight" for name in pieces}
    parameters = check_parameters(path, model, trained, rest)
    hashes = [(f"{name}.weight", tensor_hash(_oriented(model, name))) for name in pieces]
    frozen = [(name, p) for name, p in parameters.items() if name not in trained | rest.keys()]
    if _base_hash(hashes, frozen) != metadata["base"]:
        raise other_weights(path, model)
    with torch.no_grad():
        for name, numbers in pieces.items():
            weight = _oriented(model, name)
            # Half precision: add in float32 and round once, as merge_sparse does.
            trained = weight.to(torch.promote_types(weight.dtype, torch.float32)).contiguous()
            for i, number in enumerate(numbers):
                _add_piece(trained, tensors, f"{name}.{i}", number)
            weight.copy_(trained)
        for name, tensor in rest.items():
            parameters[name].copy_(tensor)
        load_statistics(model, tensors)
    return model


def _checked_base(model: nn.Module, base: nn.Module, layers: dict[str, SparseGradLinear]) -> dict[str, str]:
    """Return hashes of the converted layers' weights in the base; raise `InputError` if it is another model."""
    own, found = dict(model.named_parameters()), dict(base.named_parameters())
    for name in (f"{layer}.weight" for layer in layers):
        if name not in found or found[name].numel() != own[name].numel():
            raise InputError(
                f"base= is not a plain model of the trained model's architecture: {name} is missing or differs"
            )
    hashes = {name: tensor_hash(_oriented(base, name)) for name in layers}
    other = [name for name, layer in layers.items() if layer.base_hash not in (None, hashes[name])]
    other += [
        name
        for name, parameter in _others(model, layers)
        if not parameter.requires_grad and (name not in found or not torch.equal(parameter.cpu(), found[name].cpu()))
    ]
    if other:
        raise InputError(f"base= differs from the weights that training started from ({other[0]}); load it again")
    return hashes


def _fixed_parts(layers: dict[str, SparseGradLinear]) -> tuple[dict[str, torch.Tensor], dict[str, list[int]]]:
    """Return the tensors of the delta, and for each layer the support numbers of its pieces."""
    tensors, pieces, numbers = {}, {}, {}
    for name, layer in layers.items():
        pieces[name] = []
        for support, change in layer.changes():
            number = numbers.setdefault(id(support), len(numbers))
            for part in _PARTS:
                value = getattr(support, part)
                if value is not None:
                    tensors[f"support.{number}.{part}"] = value.cpu().contiguous()
            tensors[f"change.{name}.{len(pieces[name])}"] = change.cpu()
            pieces[name].append(number)
    return tensors, pieces


def _dynamic_parts(
    layers: dict[str, SparseGradLinear], base: nn.Module
) -> tuple[dict[str, torch.Tensor], dict[str, list[int]]]:
    """As `_fixed_parts` for dynamic support; the numbers are those of the bases."""
    tensors, pieces = {}, {}
    kinds: dict[str, dict[str, SparseGradLinear]] = {}
    for name, layer in layers.items():
        kinds.setdefault(layer.kind, {})[name] = layer
    for number, members in enumerate(kinds.values()):
        pairs = {
            name: (layer.weight.detach(), _oriented(base, name).to(layer.weight)) for name, layer in members.items()
        }
        basis, found = differences(pairs, next(iter(members.values())).basis)
        if not basis.identity:
            for side, factor in zip(_SIDES, basis.factors, strict=True):
                tensors[f"basis.{number}.{side}"] = factor.cpu().contiguous()
        for name, difference in found.items():
            tensors |= {f"mask.{name}.0": difference.mask, f"change.{name}.0": difference.values}
            pieces[name] = [number]
    return tensors, pieces


def _add_piece(weight: torch.Tensor, tensors: dict[str, torch.Tensor], piece: str, number: int) -> None:
    """Add one piece of a layer's change to its weight, in place."""
    change, mask = tensors[f"change.{piece}"], tensors.get(f"mask.{piece}")
    if mask is None:
        parts = {part: tensors.get(f"support.{number}.{part}") for part in _PARTS}
        support = FixedSupport(**{part: None if v is None else v.to(weight.device) for part, v in parts.items()})
        support.add_to(weight, change.to(weight.device))
        return
    basis = Basis(identity=True)
    if f"basis.{number}.{_SIDES[0]}" in tensors:
        basis = Basis(*(by_columns(tensors[f"basis.{number}.{side}"].to(weight.device)) for side in _SIDES))
    Difference(mask, change).add_to(weight, basis)


def _others(model: nn.Module, layers: Iterable[str]) -> Iterator[tuple[str, nn.Parameter]]:
    own = {f"{name}.{part}" for name in layers for part in ("weight", "values")}
    return ((name, parameter) for name, parameter in model.named_parameters() if name not in own)


def _oriented(model: nn.Module, name: str) -> torch.Tensor:
    """Return the weight of a plain layer as (out, in): a view, so that changing it changes the layer."""
    layer = model.get_submodule(name)
    return layer.weight.detach().T if isinstance(layer, Conv1D) else layer.weight.detach()


def _base_hash(weights: list[tuple[str, str]], frozen: list[tuple[str, torch.Tensor]]) -> str:
    entries = [*weights, *((name, tensor_hash(parameter)) for name, parameter in frozen)]
    return hashlib.sha256(json.dumps(sorted(entries)).encode()).hexdigest()
