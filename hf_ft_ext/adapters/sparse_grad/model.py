"""The tuner of structured SparseGrad adapters."""

from collections.abc import Iterator

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from hf_ft_ext.adapters.layers import (
    fold_layer_numbers,
    names_by_layer,
    other_holder,
    plain_name,
    shown_name,
    split_layer,
)
from hf_ft_ext.adapters.sparse_grad.config import PER_KIND, SVD, SparseGradConfig
from hf_ft_ext.adapters.sparse_grad.layer import SparseGradColumns, SparseGradLayer, new_columns, singular_vectors
from hf_ft_ext.adapters.sparse_grad.subspace import seed_of
from hf_ft_ext.adapters.sparse_grad.targets import can_be_adapted, feed_forward_linears, linear_kinds
from hf_ft_ext.adapters.tuner import LayerTuner, refuse_nested_targets, refuse_unfit_layers
from hf_ft_ext.errors import InputError

_COLUMNS = ("out_columns", "in_columns")


class SparseGradModel(LayerTuner):
    """Wraps linear layers of a model in `SparseGradLayer`s; see `SparseGradConfig`."""

    prefix = "sparse_grad_"
    tuner_layer_cls = SparseGradLayer

    def _choose_targets(self, peft_config: SparseGradConfig, model: nn.Module) -> None:
        layers = names_by_layer(model, peft_config.layers_pattern)
        refuse_unfit_layers(model, "sparse_grad", peft_config.layers_to_transform, list(layers))
        if peft_config.target_modules is None:
            names = feed_forward_linears(model, can_be_adapted, "target_modules", "stay frozen")
            peft_config.target_modules = within_layers(model, [plain_name(name) for name in names])
        refuse_nested_targets(model, "sparse_grad", peft_config)

    def _supports(self, module: nn.Module) -> bool:
        return can_be_adapted(module)

    def _create_and_replace(self, peft_config, adapter_name, target, target_name, parent, current_key, **kwargs):
        name = plain_name(current_key)
        if not can_be_adapted(target):
            kind = type(target.get_base_layer() if isinstance(target, BaseTunerLayer) else target).__name__
            raise InputError(
                f"{name} is a {kind}, and SparseGrad trains linear layers; narrow target_modules to some of: "
                f"{', '.join(linear_kinds(self.model))}"
            )
        columns = self._columns(adapter_name, peft_config, target, name)
        self._wrap(adapter_name, parent, target_name, target, peft_config, columns)

    def _columns(self, adapter_name: str, config: SparseGradConfig, target: nn.Module, name: str) -> SparseGradColumns:
        """The columns of a layer: new ones, or those of another layer of its kind."""
        base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        if config.scope != PER_KIND:
            return new_columns(base, name, config)
        kind = kind_of(name, base)
        for other, layer in sparse_grad_layers(self.model):
            if adapter_name in layer.sparse_grad_columns and kind_of(other, layer.get_base_layer()) == kind:
                return layer.sparse_grad_columns[adapter_name]
        return new_columns(base, kind, config)

    @torch.no_grad()
    def _post_injection_hook(self, model: nn.Module, config: SparseGradConfig, adapter_name: str) -> None:
        if config.init != SVD:
            return
        for columns, layers in layers_by_columns(model, adapter_name):
            if not columns.out_columns.is_meta and not layers[0][1].weight.is_meta:
                block = (columns.out_columns.shape[1], columns.in_columns.shape[1])
                weights = [layer.oriented_weight() for _, layer in layers]
                columns.fill(*singular_vectors(weights, block, seed_of(config.seed, plain_name(layers[0][0]))))

    def delete_adapter(self, adapter_name: str) -> None:
        if any(adapter_name in layer.merged_adapters for _, layer in sparse_grad_layers(self.model)):
            self.unmerge_adapter()
        super().delete_adapter(adapter_name)

    def _check_merge_allowed(self) -> None:
        super()._check_merge_allowed()
        refuse_merging_into(self.model)

    # --- files ------------------------------------------------------------------------------------

    @classmethod
    def _to_save(cls, model, config, adapter_name, state_dict):
        """Save columns that several layers share once, under the first of them."""
        dropped = set()
        for names in _sharing(model, adapter_name):
            dropped |= {_key(name, adapter_name, part) for name in names[1:] for part in _COLUMNS}
        return {key: tensor for key, tensor in state_dict.items() if key not in dropped}

    @classmethod
    def _remap_adapter_state_dict_for_load(cls, model, config, adapter_name, state_dict):
        found = super()._remap_adapter_state_dict_for_load(
            model=model, config=config, adapter_name=adapter_name, state_dict=state_dict
        )
        for first, *others in _sharing(model, adapter_name):
            for part in _COLUMNS:
                tensor = found.get(_key(first, adapter_name, part))
                if any(_differs(found.get(_key(name, adapter_name, part)), tensor) for name in others):
                    raise InputError(
                        f"the file holds columns of its own for {shown_name(others[0])}, which shares those of "
                        f"{shown_name(first)} here; load it with scope='layer'"
                    )
                if tensor is not None:
                    found |= {_key(name, adapter_name, part): tensor for name in others}
        return found


def refuse_merging_into(model: nn.Module) -> None:
    """Raise an `InputError` if changes cannot be added to the weights of the adapted layers."""
    for name, layer in sparse_grad_layers(model):
        base = layer.get_base_layer()
        if layer.quantization_backend is not None or not base.weight.is_floating_point():
            raise InputError(
                f"{shown_name(name)} is quantized ({type(base).__name__}), and merging would round the weight to "
                "its format; keep the adapter, or load the base without quantization and merge there"
            )
        if (other := other_holder(model, base)) is not None:
            raise InputError(
                f"{shown_name(name)} shares its weight with {shown_name(other)}, so merging would change both; "
                "keep the adapter, or load the base with tie_word_embeddings=False"
            )


def sparse_grad_layers(model: nn.Module) -> Iterator[tuple[str, SparseGradLayer]]:
    """Name and module of each layer with SparseGrad adapters."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, SparseGradLayer))


def kind_of(name: str, base: nn.Module) -> str:
    """The kind of a layer: its name without layer numbers, and its shape."""
    shape = "x".join(map(str, base.weight.shape)) if hasattr(base, "weight") else ""
    return f"{fold_layer_numbers(plain_name(name))} {shape}"


def within_layers(model: nn.Module, names: list[str]) -> list[str]:
    """Names within a layer that match exactly the modules `names`; full names if there are none."""
    in_layers = [inner for name in names if (inner := split_layer(name)) is not None]
    if len(in_layers) == len(names):
        within = sorted({inner.name for inner in in_layers})
        plain = (plain_name(name) for name, _ in model.named_modules())
        reached = {name for name in plain if (inner := split_layer(name)) is not None and inner.name in within}
        if reached == set(names):
            return within
    return sorted(names)


def layers_by_columns(
    model: nn.Module, adapter_name: str
) -> list[tuple[SparseGradColumns, list[tuple[str, SparseGradLayer]]]]:
    """Each set of columns of an adapter, with names and modules of the layers that share it, in the model's order."""
    groups: dict[int, tuple[SparseGradColumns, list[tuple[str, SparseGradLayer]]]] = {}
    for name, layer in sparse_grad_layers(model):
        if adapter_name in layer.sparse_grad_columns:
            columns = layer.sparse_grad_columns[adapter_name]
            groups.setdefault(id(columns), (columns, []))[1].append((name, layer))
    return list(groups.values())


def _differs(own: torch.Tensor | None, shared: torch.Tensor | None) -> bool:
    return own is not None and shared is not None and not torch.equal(own, shared)


def _sharing(model: nn.Module, adapter_name: str) -> list[list[str]]:
    """Groups of names of the layers that share columns of this adapter; without layers that have their own."""
    groups = [[name for name, _ in layers] for _, layers in layers_by_columns(model, adapter_name)]
    return [names for names in groups if len(names) > 1]


def _key(name: str, adapter_name: str, part: str) -> str:
    return f"{name}.sparse_grad_columns.{adapter_name}.{part}"
