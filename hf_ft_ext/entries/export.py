"""Export trained entries of linear weights as a SHiRA adapter of peft (Bhardwaj et al. 2024, arXiv 2406.13175).

SHiRA adds a sparse matrix with fixed indices to each weight. It has `r (in + out)` values per layer, with one `r` for
all layers; shorter lists are padded with zeros.
"""

import math
import os
from pathlib import Path

import torch
from peft import ShiraConfig
from safetensors.torch import save_file
from torch import nn

from hf_ft_ext.adapters.folder import ADAPTER_WEIGHTS, save_base_configuration, set_base_name_of
from hf_ft_ext.entries.layer import weights_with_entries
from hf_ft_ext.errors import InputError
from hf_ft_ext.files import atomic_write
from hf_ft_ext.models.peft import saved_by_peft, task_type_of
from hf_ft_ext.training.saved.delta_files import modules_with_statistics

Changes = dict[str, tuple[torch.Tensor, torch.Tensor]]


def export_shira(model: nn.Module, folder: str | os.PathLike) -> None:
    """Write the changes of training as a SHiRA adapter that `PeftModel.from_pretrained(base, folder)` loads.

    Other trained modules are saved in full (`modules_to_save`), and so are modules with trained entries that are not
    linear layers or have too many of them for SHiRA, with all modules inside. The adapter is valid only for the
    weights that training started from.

    Args:
        model: a model with trained entries (`attach_entries`, FISH masks), or with layers converted with static
            support and no basis (MeProp).
        folder: folder for `adapter_config.json` and `adapter_model.safetensors`.

    Raises:
        InputError: no such entries train, or a bias of the same layers trained, which SHiRA does not support.
    """
    changes, own = _changes(model)
    linear = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    elsewhere = {name.rpartition(".")[0] for name in changes if not _is_weight_of(name, linear)}
    changes = {name.rpartition(".")[0]: change for name, change in changes.items() if _is_weight_of(name, linear)}
    if not changes:
        raise InputError(
            "no entries of linear weights train, but SHiRA supports only those; use save_entries or save_pretrained"
        )
    trained = {n.rpartition(".")[0] for n, p in model.named_parameters() if p.requires_grad and n not in own}
    if both := sorted((elsewhere | trained) & changes.keys()):
        raise InputError(
            f"the bias of {both[0]} trained in addition to entries of its weight, which SHiRA does not support; "
            "choose only entries of weights, or use save_entries"
        )
    full = _outermost({*elsewhere, *trained, *saved_by_peft(model), *modules_with_statistics(model)})
    changes = {name: change for name, change in changes.items() if not _is_inside(name, full)}
    layers = {name: model.get_submodule(name) for name in changes}
    r, dense = _rank_for(changes, layers)
    changes = {name: change for name, change in changes.items() if name not in dense}
    saved = sorted(full | dense)
    if not changes:
        raise InputError(
            f"all linear weights with trained entries would be saved in full, in {', '.join(saved[:3])}, but SHiRA "
            "needs one with few entries; use save_entries or save_pretrained"
        )
    config = ShiraConfig(
        task_type=task_type_of(model),
        r=r,
        target_modules=sorted(changes),
        modules_to_save=saved or None,
        base_model_name_or_path=getattr(model, "name_or_path", None),
        inference_mode=True,
    )
    set_base_name_of(config, model)
    tensors = {}
    for name, (indices, values) in changes.items():
        n_in = layers[name].in_features
        count = r * (n_in + layers[name].out_features)
        padded = values.new_zeros(count)
        padded[: len(values)] = values
        positions = torch.zeros(2, count, dtype=torch.int32)  # padding adds 0 at entry (0, 0)
        positions[0, : len(indices)] = indices // n_in
        positions[1, : len(indices)] = indices % n_in
        tensors[f"base_model.model.{name}.shira_weight"] = padded
        tensors[f"base_model.model.{name}.shira_indices"] = positions
    for name in saved:
        for part, tensor in model.get_submodule(name).state_dict().items():
            tensors[f"base_model.model.{name}.{part}"] = tensor.detach().cpu().contiguous().clone()
    with atomic_write(Path(folder) / ADAPTER_WEIGHTS) as temporary:
        save_file(tensors, temporary, metadata={"format": "pt"})
    config.save_pretrained(folder)
    save_base_configuration(model, folder, config.revision)


def _rank_for(changes: Changes, layers: dict[str, nn.Module]) -> tuple[int, set[str]]:
    """The `r` for all layers, and the names of those that cannot hold `r (in + out)` values, as peft requires."""
    sums = {name: layer.in_features + layer.out_features for name, layer in layers.items()}
    largest = {name: layer.in_features * layer.out_features // sums[name] for name, layer in layers.items()}
    needed = {name: math.ceil(len(values) / sums[name]) for name, (_, values) in changes.items()}
    r = max((rank for name, rank in needed.items() if rank <= largest[name]), default=0)
    return r, {name for name, rank in needed.items() if max(rank, r) > largest[name]}


def _outermost(modules: set[str]) -> set[str]:
    """These modules without those inside of others."""
    return {name for name in modules if not _is_inside(name.rpartition(".")[0], modules)}


def _is_inside(name: str, modules: set[str]) -> bool:
    return any(f"{name}.".startswith(f"{module}.") for module in modules)


def _is_weight_of(name: str, linear: set[str]) -> bool:
    owner, _, own = name.rpartition(".")
    return owner in linear and own == "weight"


def _changes(model: nn.Module) -> tuple[Changes, set[str]]:
    """Return flat indices and changes by weight name, on the CPU, and the names of the parameters that hold them."""
    changes: Changes = {}
    own = set()
    for name, _, entries in weights_with_entries(model):
        change = entries.values.detach() - entries.initial.to(entries.values)
        changes[name] = (entries.indices.long().cpu(), change.cpu())
        own.add(f"{name}_entries.values")
    for name, module in model.named_modules():
        support = getattr(module, "support", None)  # a layer converted by method sparse, which is not imported here
        if support is None or getattr(support, "entries", None) is None or support.out_columns is not None:
            continue
        rows = support.rows[support.entries // len(support.columns)]
        columns = support.columns[support.entries % len(support.columns)]
        change = module.values.detach() - module.initial
        changes[f"{name}.weight"] = ((rows * module.in_features + columns).cpu(), change.cpu())
        own.add(f"{name}.values")
    return changes, own
