"""Export structured support as a standard LoRA adapter.

The change of a weight is `V_r D U_c^T`, a product of thin matrices. With `A = U_c^T` and `B = V_r D`, or `A = D U_c^T`
and `B = V_r`, it is the `B A` of LoRA, so plain peft loads it. The choice with the smaller rank is taken: the rank is
the smaller side of the block. With a lower `max_rank` the largest singular values are kept.
"""

import logging
import math
import os
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from safetensors.torch import save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from hf_ft_ext.adapters.folder import ADAPTER_WEIGHTS, save_base_configuration, set_base_name_of
from hf_ft_ext.adapters.layers import shown_name
from hf_ft_ext.adapters.sparse_grad.layer import SparseGradLayer
from hf_ft_ext.adapters.sparse_grad.model import sparse_grad_layers
from hf_ft_ext.errors import InputError
from hf_ft_ext.files import atomic_write
from hf_ft_ext.models.peft import saved_by_peft, task_type_of
from hf_ft_ext.sparse.convert import sparse_layers
from hf_ft_ext.sparse.fixed import FixedSupport
from hf_ft_ext.sparse.layer import SparseGradLinear
from hf_ft_ext.structure.heads import head_modules
from hf_ft_ext.training.saved.delta_files import modules_with_statistics

logger = logging.getLogger(__name__)

Factors = dict[str, tuple[torch.Tensor, torch.Tensor]]


def export_lora(model: nn.Module, folder: str | os.PathLike, max_rank: int | None = None) -> float:
    """Write the changes of `model` as a LoRA adapter that `PeftModel.from_pretrained(base, folder)` loads.

    The head and other trained modules are saved with the adapter (`modules_to_save`), and so is the model's
    configuration. The adapter applies to the weights that training started from. The model is neither changed nor
    copied.

    Args:
        model: with a SparseGrad adapter, or converted with structured support, after training.
        folder: where `adapter_config.json` and `adapter_model.safetensors` are written.
        max_rank: the largest rank of a layer; the largest singular values are kept. `None` = the exact change.

    Returns:
        The largest relative error over layers, `||change - B A|| / ||change||` in the Frobenius norm; 0 if no rank was
        dropped. It is also logged.

    Raises:
        InputError: nothing to export, a layer without structured support, or a trained parameter that a LoRA adapter
            cannot hold.
    """
    if max_rank is not None and max_rank < 1:
        raise InputError(f"max_rank must be 1 or more, got {max_rank}")
    if isinstance(model, PeftModel):
        base, factors, transposed = model.get_base_model(), _adapter_factors(model), _any_conv1d(model)
        saved = _saved_with_adapters(base, model.active_adapters)
    else:
        base, factors, transposed = model, *_converted_factors(model)
        names = sorted({*_trained_modules(model, sparse_layers(model)), *saved_by_peft(model)})
        saved = {name: model.get_submodule(name).state_dict() for name in names}
    error, worst = 0.0, ""
    for name, (a, b) in factors.items():
        if max_rank is not None and len(a) > max_rank:
            a, b, lost = _truncated(a, b, max_rank)
            factors[name] = (a, b)
            error, worst = max((error, worst), (lost, name))
    if max_rank is not None:
        logger.info("export_lora: rank %d, relative error at most %.3g (%s)", max_rank, error, worst or "none dropped")
    ranks = {name: len(a) for name, (a, _) in factors.items()}
    rank = max(ranks.values())
    config = LoraConfig(
        task_type=task_type_of(base),
        r=rank,
        lora_alpha=rank,
        rank_pattern={name: r for name, r in ranks.items() if r != rank},
        alpha_pattern={name: r for name, r in ranks.items() if r != rank},
        target_modules=list(factors),
        modules_to_save=sorted(saved) or None,
        fan_in_fan_out=transposed,
        base_model_name_or_path=getattr(base, "name_or_path", None),
        inference_mode=True,
    )
    set_base_name_of(config, base)
    tensors = {}
    for name, (a, b) in factors.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = a.contiguous().cpu()
        tensors[f"base_model.model.{name}.lora_B.weight"] = b.contiguous().cpu()
    for name, state in saved.items():
        for part, tensor in state.items():
            tensors[f"base_model.model.{name}.{part}"] = tensor.detach().contiguous().cpu().clone()
    os.makedirs(folder, exist_ok=True)
    with atomic_write(Path(folder) / ADAPTER_WEIGHTS) as temporary:
        save_file(tensors, temporary, metadata={"format": "pt"})
    config.save_pretrained(folder)
    save_base_configuration(base, folder, config.revision)
    return error


def _truncated(a: torch.Tensor, b: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Return the best approximation of `B A` of the given rank, `(A', B', relative error)`, by the SVD of its core."""
    q_out, r_out = torch.linalg.qr(b.double())
    q_in, r_in = torch.linalg.qr(a.T.double())
    u, s, vt = torch.linalg.svd(r_out @ r_in.T)  # B A = Q_out (R_out R_in^T) Q_in^T
    root = s[:rank].sqrt()
    total = float(s.square().sum())
    lost = math.sqrt(float(s[rank:].square().sum()) / total) if total else 0.0
    # A' = S^1/2 V^T Q_in^T and B' = Q_out U S^1/2, of the largest singular values; error |S omitted| / |S|
    return (root[:, None] * (q_in @ vt[:rank].T).T).to(a.dtype), ((q_out @ u[:, :rank]) * root).to(b.dtype), lost


# --- from an adapter ------------------------------------------------------------------------------


def _adapter_factors(model: PeftModel) -> Factors:
    """`(A, B)` of each layer, for the sum of the changes of all active adapters."""
    found, active = {}, model.active_adapters
    for path, layer in sparse_grad_layers(model):
        pieces = [_factors_of_adapter(layer, name) for name in active if name in layer.sparse_grad_values]
        if pieces:
            found[shown_name(path)] = torch.cat([a for a, _ in pieces]), torch.cat([b for _, b in pieces], dim=1)
    known = {name for _, layer in sparse_grad_layers(model) for name in layer.sparse_grad_values}
    other = [name for name in active if name not in known]
    if not found or other:
        names = ", ".join(map(repr, other or active))
        raise InputError(
            f"the active adapter {names} is not a SparseGrad adapter; call model.set_adapter with the one to export"
        )
    of_others = (
        (path, module)
        for path, module in model.named_modules()
        if isinstance(module, BaseTunerLayer) and not isinstance(module, SparseGradLayer)
    )
    for path, module in of_others:  # kinds of a mixture
        if not module._get_available_adapters().isdisjoint(active):
            raise InputError(
                f"the active adapter also changes {shown_name(path)} by a {type(module).__name__}, which this export "
                "would leave out; keep the adapter as it is"
            )
    return found


def _factors_of_adapter(layer: SparseGradLayer, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    columns, block = layer.sparse_grad_columns[name], layer.sparse_grad_values[name].detach()
    dtype = torch.promote_types(block.dtype, torch.float32)
    return _thin(columns.out_columns.to(dtype), block.to(dtype), columns.in_columns.to(dtype))


def _any_conv1d(model: PeftModel) -> bool:
    return any(isinstance(layer.get_base_layer(), Conv1D) for _, layer in sparse_grad_layers(model))


def _saved_with_adapters(base: nn.Module, active: list[str]) -> dict[str, dict[str, torch.Tensor]]:
    return {
        name: module.modules_to_save[adapter].state_dict()
        for name, module in base.named_modules()
        if isinstance(module, ModulesToSaveWrapper)
        for adapter in active
        if adapter in module.modules_to_save
    }


# --- from converted layers ------------------------------------------------------------------------


def _converted_factors(model: nn.Module) -> tuple[Factors, bool]:
    layers = sparse_layers(model)
    if not layers:
        raise InputError(
            f"this {type(model).__name__} has no converted layers and no SparseGrad adapter to export; pass the model "
            "in training"
        )
    for name, layer in layers.items():
        if layer.support is None or layer.support.entries is not None:
            raise InputError(
                f"{name} has no structured support, and only that is of low rank; train with "
                "sparse_support='structured', or save the whole model"
            )
    return {name: _factors(layer) for name, layer in layers.items()}, any(la.transposed for la in layers.values())


def _factors(layer: SparseGradLinear) -> tuple[torch.Tensor, torch.Tensor]:
    """Return `(A, B)` with `B A` the change of the weight, shapes (rank, in) and (out, rank); refreshes add ranks."""
    pieces = [_factors_of(support, change, layer.weight.shape) for support, change in layer.changes()]
    return torch.cat([a for a, _ in pieces]), torch.cat([b for _, b in pieces], dim=1)


def _factors_of(support: FixedSupport, change: torch.Tensor, shape: torch.Size) -> tuple[torch.Tensor, torch.Tensor]:
    block = change.view(len(support.rows), len(support.columns))
    if support.out_columns is None:
        eye_out, eye_in = (torch.eye(n, device=block.device) for n in shape)
        return _thin(eye_out[:, support.rows], block, eye_in[:, support.columns])
    return _thin(support.out_columns, block, support.in_columns)


def _thin(
    out_columns: torch.Tensor, block: torch.Tensor, in_columns: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return `(A, B)` with `B A = V D U^T`; the rank is the smaller side of `D`."""
    if block.shape[0] < block.shape[1]:
        return block @ in_columns.T, out_columns  # A = D U^T, B = V
    return in_columns.T, out_columns @ block  # A = U^T, B = V D


def _trained_modules(model: nn.Module, layers: dict[str, SparseGradLinear]) -> list[str]:
    """Return the modules with other trained parameters or new ones; modules beside the encoder count as a whole."""
    trained = {
        name.rpartition(".")[0]
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and name.rpartition(".")[0] not in layers
    }
    biases = [name for name, layer in layers.items() if layer.bias is not None and layer.bias.requires_grad]
    if biases:
        raise InputError(
            f"the bias of {biases[0]} trained, which a LoRA adapter cannot hold; train with "
            "sparse_train_rest='head', or save the whole model"
        )
    if around := sorted(name for name in trained if any(layer.startswith(f"{name}.") for layer in layers)):
        raise InputError(
            f"a parameter of {around[0]} trained, which has converted layers inside, so a LoRA adapter cannot hold "
            "it; train with sparse_train_rest='head', or save the whole model"
        )
    # Parameters without pretrained weights are initialized at random when the base is loaded.
    trained |= {name.rpartition(".")[0] for name in getattr(model, "fresh_parameters", ())} - set(layers)
    trained.update(modules_with_statistics(model))
    modules = head_modules(model)
    head = {module for module in modules if any(f"{name}.".startswith(f"{module}.") for name in trained)}
    return sorted(head | {name for name in trained if not any(f"{name}.".startswith(f"{part}.") for part in head)})
