"""The tuner of per-layer prefixes."""

import functools
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from hf_ft_ext.adapters.layer_prefix.attention import uses_interface
from hf_ft_ext.adapters.layer_prefix.config import LayerPrefixConfig
from hf_ft_ext.adapters.layer_prefix.layer import PrefixLayer, Table
from hf_ft_ext.adapters.layers import plain_name, split_layer
from hf_ft_ext.adapters.table import AdapterType
from hf_ft_ext.adapters.tuner import LayerTuner, refuse_unfit_layers
from hf_ft_ext.errors import InputError

EMBEDDING, HIDDEN = "layer_prefix_embedding", "layer_prefix_hidden"
_CROSS = ("cross", "encoder_attn", "encdec")  # attention to another sequence, by name


class LayerPrefixModel(LayerTuner):
    """Puts `PrefixLayer`s around attention modules; see `LayerPrefixConfig`."""

    prefix = "layer_prefix_"
    tuner_layer_cls = PrefixLayer
    uses_shared_state = True  # embedding and first layer of the projection
    cannot_merge = "a prefix changes what attention sees, not weights, and cannot be merged into them"

    def _prepare_model(self, peft_config: LayerPrefixConfig, model: nn.Module) -> None:
        found = attention_modules(model, peft_config.layers_pattern)
        if not found:
            raise InputError(
                f"{type(model).__name__} has no attention that goes through transformers' attention interface, so a "
                "prefix cannot reach it; choose another adapter"
            )
        refuse_unfit_layers(
            model, "prefix", peft_config.layers_to_transform, sorted({layer for layer, _ in found.values()})
        )
        if peft_config.target_modules is None:
            peft_config.target_modules = sorted({rest for _, rest in found.values()})

    def _create_and_replace(self, peft_config, adapter_name, target, target_name, parent, current_key, **kwargs):
        base = target.get_base_layer() if hasattr(target, "get_base_layer") else target
        if not uses_interface(base):
            raise InputError(
                f"{plain_name(current_key)} ({type(base).__name__}) does not go through transformers' attention "
                "interface, so a prefix cannot reach it; leave target_modules out, or choose another adapter"
            )
        embed = None
        if peft_config.projection_size is not None:
            embed = self.shared_network(adapter_name, peft_config, base)
        if isinstance(target, PrefixLayer):
            target.update_layer(adapter_name, peft_config, embed)
            return
        layer = PrefixLayer(target, adapter_name, peft_config, embed)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)

    def shared_network(self, adapter_name: str, config: LayerPrefixConfig, attention: nn.Module):
        """Embedding and first layer of the projection of `adapter_name`, made when first asked for."""
        if not hasattr(self, EMBEDDING):
            setattr(self, EMBEDDING, nn.ModuleDict())
            setattr(self, HIDDEN, nn.ModuleDict())
        embedding, hidden = getattr(self, EMBEDDING), getattr(self, HIDDEN)
        if adapter_name not in embedding:
            width = attention.config.hidden_size
            embedding[adapter_name] = Table(config.prefix_length, width, 1.0)
            hidden[adapter_name] = nn.Linear(width, config.projection_size)
            reference = next(attention.parameters(), None)
            if reference is not None and reference.device.type != "meta" and reference.is_floating_point():
                embedding[adapter_name].to(reference.device, reference.dtype)
                hidden[adapter_name].to(reference.device, reference.dtype)
            trains = adapter_name in self.active_adapters and not config.inference_mode
            embedding[adapter_name].requires_grad_(trains)
            hidden[adapter_name].requires_grad_(trains)
        return functools.partial(_embed, embedding[adapter_name], hidden[adapter_name])

    # --- the shared part follows the layers -------------------------------------------------------

    def _shared(self, adapter_name: str) -> list[nn.Module]:
        return [
            getattr(self, part)[adapter_name]
            for part in (EMBEDDING, HIDDEN)
            if part in self._modules and adapter_name in self._modules[part]
        ]

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
        if autocast_adapter_dtype:
            for module in self._shared(adapter_name):
                if module.weight.dtype in (torch.float16, torch.bfloat16):
                    module.float()

    def _mark_only_adapters_as_trainable(self, model: nn.Module) -> None:
        super()._mark_only_adapters_as_trainable(model)
        for name in self._modules.get(EMBEDDING, ()):
            for module in self._shared(name):
                module.requires_grad_(name in self.active_adapters and not self.peft_config[name].inference_mode)

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        super().set_adapter(adapter_name, inference_mode)
        active = [adapter_name] if isinstance(adapter_name, str) else adapter_name
        for name in self._modules.get(EMBEDDING, ()):
            for module in self._shared(name):
                module.requires_grad_(name in active and not inference_mode)

    def set_requires_grad(self, adapter_names, requires_grad: bool = True) -> None:
        super().set_requires_grad(adapter_names, requires_grad)
        for name in [adapter_names] if isinstance(adapter_names, str) else adapter_names:
            for module in self._shared(name):
                module.requires_grad_(requires_grad)

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        self.delete_shared(adapter_name)

    def delete_shared(self, adapter_name: str) -> None:
        """Drop the network that the prefixes of an adapter share."""
        for part in (EMBEDDING, HIDDEN):
            if part in self._modules:
                shared = self._modules[part]
                if adapter_name in shared:
                    del shared[adapter_name]

    # --- files ------------------------------------------------------------------------------------

    @classmethod
    def _get_adapter_state_dict(cls, model, config, adapter_name, state_dict, unwanted_adapter_names):
        found = super()._get_adapter_state_dict(model, config, adapter_name, state_dict, unwanted_adapter_names)
        if config.projection_size is None or getattr(config, "saves_projection", False):
            return found
        return folded(model, adapter_name, found)

    @classmethod
    def _remap_adapter_state_dict_for_load(cls, model, config, adapter_name, state_dict):
        refuse_folded(config, state_dict)
        return super()._remap_adapter_state_dict_for_load(
            model=model, config=config, adapter_name=adapter_name, state_dict=state_dict
        )


def _embed(embedding: Table, hidden: nn.Linear, batch: int) -> torch.Tensor:
    """`[batch or 1, length, projection_size]`: what the second layer of each layer's projection reads."""
    return torch.tanh(hidden(embedding(batch)))


def folded(model: nn.Module, adapter_name: str, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """`state` of an adapter with its projections replaced by the keys and values that they make."""
    kept = {k: v for k, v in state.items() if not any(f".{p}." in k for p in (EMBEDDING, HIDDEN, "layer_prefix_out"))}
    with torch.no_grad():
        for name, module in model.named_modules():
            if isinstance(module, PrefixLayer) and adapter_name in module.layer_prefix_out:
                kept[f"{name}.layer_prefix_table.{adapter_name}.weight"] = module.rows(adapter_name)[0].clone()
    return kept


def refuse_folded(config, state_dict: dict[str, torch.Tensor]) -> None:
    """Raise an `InputError` if a prefix with projection is to be loaded from keys and values alone."""
    if config.projection_size is not None and any(".layer_prefix_table." in key for key in state_dict):
        raise InputError(
            "this file holds a prefix's keys and values alone, and the model trains a projection that makes them; "
            "load it into the base model with PeftModel.from_pretrained, or save inside keep_projection(model) what "
            "training is to be resumed from"
        )


@contextmanager
def keep_projection(model: nn.Module) -> Iterator[None]:
    """What is saved inside holds the projections of prefixes, so that training can go on from it."""
    configs = [c for config in getattr(model, "peft_config", {}).values() for c in (config, *nested(config))]
    changed = [c for c in configs if not getattr(c, "saves_projection", False)]
    for config in changed:
        config.saves_projection = True
    try:
        yield
    finally:
        for config in changed:
            del config.saves_projection


def nested(config) -> list:
    """The configurations that a mixture of kinds consists of."""
    return list(config.configs.values()) if config.peft_type == AdapterType.LAYER_MIXTURE else []


def attention_modules(model: nn.Module, layers_pattern=None) -> dict[str, tuple[int, str]]:
    """Self-attentions that a prefix can reach: plain name -> number of the layer, name within it."""
    found = {}
    for name, module in model.named_modules():
        name = plain_name(name)
        place = split_layer(name, layers_pattern)
        if place is not None and uses_interface(module) and not _is_cross(module, place[1]):
            found[name] = place
    return found


def _is_cross(module: nn.Module, name: str) -> bool:
    lowered = (name.lower(), type(module).__name__.lower())
    return any(word in text for word in _CROSS for text in lowered)
