"""Structured support as a standard LoRA adapter.

The change of a weight is `V_r (S - S_0) U_c^T`, a product of thin matrices: with `A = U_c^T` and
`B = V_r (S - S_0)` (or the block on the other side, whichever makes the smaller rank) it is exactly what peft's
LoRA adds, so plain peft loads it.
"""

import copy
import os

import torch
from peft import LoraConfig, TaskType, get_peft_model
from torch import nn

from hf_ft_ext.adapters.folder import name_base, save_configuration
from hf_ft_ext.errors import InputError
from hf_ft_ext.sparse.convert import merge_sparse, sparse_layers
from hf_ft_ext.sparse.fixed import FixedSupport
from hf_ft_ext.sparse.layer import SparseGradLinear


def export_lora(model: nn.Module, folder: str | os.PathLike) -> None:
    """Write what training changed in `model` as a LoRA adapter that `PeftModel.from_pretrained(base, folder)` loads.

    The head, and other modules that trained, are saved with the adapter (`modules_to_save`), and the model's
    configuration beside it. The adapter belongs to the weights that training started from. The model itself is left
    as it is.

    Args:
        model: a converted model with structured support, after training.
        folder: where `adapter_config.json` and `adapter_model.safetensors` go.

    Raises:
        InputError: a layer has no structured support, or a module trained that holds converted layers.
    """
    layers = sparse_layers(model)
    if not layers:
        raise InputError(f"this {type(model).__name__} has no converted layers to export; pass the model in training")
    for name, layer in layers.items():
        if layer.support is None or layer.support.entries is not None:
            raise InputError(
                f"{name} has no structured support, and only that is of low rank; train with "
                "sparse_support='structured', or save the whole model"
            )
    others = _trained_modules(model, layers)
    factors = {name: _factors(layer) for name, layer in layers.items()}
    ranks = {name: a.shape[0] for name, (a, _) in factors.items()}
    rank = max(ranks.values())
    config = LoraConfig(
        task_type=TaskType.SEQ_CLS if type(model).__name__.endswith("ForSequenceClassification") else None,
        r=rank,
        lora_alpha=rank,
        rank_pattern={name: r for name, r in ranks.items() if r != rank},
        alpha_pattern={name: r for name, r in ranks.items() if r != rank},
        target_modules=list(layers),
        modules_to_save=others or None,
        fan_in_fan_out=any(layer.transposed for layer in layers.values()),
    )
    adapted = get_peft_model(merge_sparse(copy.deepcopy(model)), config)
    with torch.no_grad():
        for name, (a, b) in factors.items():
            lora = adapted.base_model.model.get_submodule(name)
            lora.lora_A["default"].weight.copy_(a)
            lora.lora_B["default"].weight.copy_(b)
    name_base(adapted)
    adapted.save_pretrained(folder)
    save_configuration(adapted, folder)


def _factors(layer: SparseGradLinear) -> tuple[torch.Tensor, torch.Tensor]:
    """`(A, B)` with `B A` the change of the weight; shapes (rank, in), (out, rank). A refreshed basis adds ranks."""
    pieces = [_factors_of(support, change, layer.weight.shape) for support, change in layer.changes()]
    return torch.cat([a for a, _ in pieces]), torch.cat([b for _, b in pieces], dim=1)


def _factors_of(support: FixedSupport, change: torch.Tensor, shape: torch.Size) -> tuple[torch.Tensor, torch.Tensor]:
    block = change.view(len(support.rows), len(support.columns))
    if support.out_columns is None:
        eye_out, eye_in = (torch.eye(n, device=block.device) for n in shape)
        out_columns, in_columns = eye_out[:, support.rows], eye_in[:, support.columns]
    else:
        out_columns, in_columns = support.out_columns, support.in_columns
    if block.shape[0] < block.shape[1]:
        return block @ in_columns.T, out_columns
    return in_columns.T, out_columns @ block


def _trained_modules(model: nn.Module, layers: dict[str, SparseGradLinear]) -> list[str]:
    """Top-most modules below the encoder, or beside it, that hold the other trained parameters, or fresh ones."""
    trained = {
        name.rpartition(".")[0]
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and name.rpartition(".")[0] not in layers
    }
    biases = [name for name, layer in layers.items() if layer.bias is not None and layer.bias.requires_grad]
    if biases:
        raise InputError(
            f"the bias of {biases[0]} trained, which a LoRA adapter has no place for; train with "
            "sparse_train_rest='head', or save the whole model"
        )
    children = {name for name, _ in model.named_children()}
    # What came without pretrained weights would be drawn anew when the base is loaded.
    trained |= {name.rpartition(".")[0] for name in getattr(model, "fresh_parameters", ())} - set(layers)
    head = {name.split(".")[0] for name in trained if name.split(".")[0] in children - {model.base_model_prefix}}
    return sorted(head | {name for name in trained if name.split(".")[0] not in head})
