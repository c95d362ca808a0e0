"""Chosen entries of linear weights as a SHiRA adapter of peft (Bhardwaj et al. 2024, arXiv 2406.13175).

SHiRA adds a sparse matrix to each weight: values at indices that stay. It holds `r (in + out)` of them in every layer,
with one `r` for all; shorter lists are filled up with zeros.
"""

import math
import os
from pathlib import Path

import torch
from peft import ShiraConfig
from safetensors.torch import save_file
from torch import nn

from hf_ft_ext.adapters.folder import ADAPTER_WEIGHTS, name_base_in, save_base_configuration
from hf_ft_ext.entries.layer import weights_with_entries
from hf_ft_ext.errors import InputError
from hf_ft_ext.files import replacing
from hf_ft_ext.models.peft import saved_by_peft, task_type_of

Changes = dict[str, tuple[torch.Tensor, torch.Tensor]]


def export_shira(model: nn.Module, folder: str | os.PathLike) -> None:
    """Write what training changed as a SHiRA adapter that `PeftModel.from_pretrained(base, folder)` loads.

    Modules that trained besides, in full or by entries of a weight that is no linear layer's, are saved in full
    (`modules_to_save`). The adapter belongs to the weights that training started from.

    Args:
        model: with trained entries (`attach_entries`, FISH masks), or with layers converted with static support and
            no basis (MeProp).
        folder: where `adapter_config.json` and `adapter_model.safetensors` go.

    Raises:
        InputError: no such entries, or a bias of the same layers trained, which SHiRA has no place for.
    """
    changes, own = _changes(model)
    linear = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    elsewhere = {name.rpartition(".")[0] for name in changes if not _is_weight_of(name, linear)}
    changes = {name.rpartition(".")[0]: change for name, change in changes.items() if _is_weight_of(name, linear)}
    if not changes:
        raise InputError(
            "no entries of linear weights train, and SHiRA holds those alone; save_entries or save_pretrained keeps "
            "what there is"
        )
    trained = {n.rpartition(".")[0] for n, p in model.named_parameters() if p.requires_grad and n not in own}
    if both := sorted((elsewhere | trained) & changes.keys()):
        raise InputError(
            f"the bias of {both[0]} trained beside entries of its weight, which SHiRA has no place for; choose "
            "entries of weights alone, or keep the result by save_entries"
        )
    layers = {name: model.get_submodule(name) for name in changes}
    sums = {name: layer.in_features + layer.out_features for name, layer in layers.items()}
    r = max(math.ceil(len(values) / sums[name]) for name, (_, values) in changes.items())
    saved = sorted(elsewhere | trained | set(saved_by_peft(model)))
    config = ShiraConfig(
        task_type=task_type_of(model),
        r=r,
        target_modules=sorted(changes),
        modules_to_save=saved or None,
        base_model_name_or_path=getattr(model, "name_or_path", None),
        inference_mode=True,
    )
    name_base_in(config, model)
    tensors = {}
    for name, (indices, values) in changes.items():
        count, n_in = r * sums[name], layers[name].in_features
        padded = values.new_zeros(count)
        padded[: len(values)] = values
        places = torch.zeros(2, count, dtype=torch.int32)  # the filling adds nothing, at the first entry
        places[0, : len(indices)] = indices // n_in
        places[1, : len(indices)] = indices % n_in
        tensors[f"base_model.model.{name}.shira_weight"] = padded
        tensors[f"base_model.model.{name}.shira_indices"] = places
    for name in saved:
        for part, tensor in model.get_submodule(name).state_dict().items():
            tensors[f"base_model.model.{name}.{part}"] = tensor.detach().cpu().contiguous().clone()
    with replacing(Path(folder) / ADAPTER_WEIGHTS) as temporary:
        save_file(tensors, temporary, metadata={"format": "pt"})
    config.save_pretrained(folder)
    save_base_configuration(model, folder, config.revision)


def _is_weight_of(name: str, linear: set[str]) -> bool:
    owner, _, own = name.rpartition(".")
    return owner in linear and own == "weight"


def _changes(model: nn.Module) -> tuple[Changes, set[str]]:
    """Flat indices and changes by the weight's name, on the CPU, and the names of the parameters that hold them."""
    changes: Changes = {}
    own = set()
    for name, _, entries in weights_with_entries(model):
        change = entries.values.detach() - entries.initial.to(entries.values)
        changes[name] = (entries.indices.long().cpu(), change.cpu())
        own.add(f"{name}_entries.values")
    for name, module in model.named_modules():
        support = getattr(module, "support", None)  # a converted layer's; it lives in another method's package
        if support is None or getattr(support, "entries", None) is None or support.out_columns is not None:
            continue
        rows = support.rows[support.entries // len(support.columns)]
        columns = support.columns[support.entries % len(support.columns)]
        change = module.values.detach() - module.initial
        changes[f"{name}.weight"] = ((rows * module.in_features + columns).cpu(), change.cpu())
        own.add(f"{name}.values")
    return changes, own
