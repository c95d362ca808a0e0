"""The tuner of per-layer prefixes."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from peft import PeftConfig
from torch import nn

from hf_ft_ext.adapters import AdapterType
from hf_ft_ext.adapters.layer_prefix.attention import uses_interface
from hf_ft_ext.adapters.layer_prefix.config import LayerPrefixConfig
from hf_ft_ext.adapters.layer_prefix.layer import SHARED, PrefixLayer, PrefixProjection, hidden_size
from hf_ft_ext.adapters.layers import NameInLayer, plain_name, split_layer
from hf_ft_ext.adapters.tuner import LayerTuner, refuse_nested_targets, refuse_unfit_layers
from hf_ft_ext.errors import InputError

_CROSS = ("cross", "encoder_attn", "encdec")  # parts of the names of cross-attentions


class LayerPrefixModel(LayerTuner):
    """Wraps attention modules in `PrefixLayer`s; see `LayerPrefixConfig`."""

    prefix = "layer_prefix_"
    tuner_layer_cls = PrefixLayer
    cannot_merge = "a prefix adds keys and values to the attention and cannot be merged into weights"

    def _choose_targets(self, peft_config: LayerPrefixConfig, model: nn.Module) -> None:
        found = attention_modules(model, peft_config.layers_pattern)
        if not found:
            raise InputError(
                f"{type(model).__name__} has no attention that uses transformers' attention interface, which a prefix "
                "needs; choose another adapter"
            )
        refuse_unfit_layers(
            model, "prefix", peft_config.layers_to_transform, sorted({layer for layer, _ in found.values()})
        )
        if peft_config.target_modules is None:
            peft_config.target_modules = sorted({rest for _, rest in found.values()})
        refuse_nested_targets(model, "prefix", peft_config)

    def _create_and_replace(self, peft_config, adapter_name, target, target_name, parent, current_key, **kwargs):
        base = target.get_base_layer() if hasattr(target, "get_base_layer") else target
        if not uses_interface(base):
            raise InputError(
                f"{plain_name(current_key)} ({type(base).__name__}) does not use transformers' attention interface, "
                "which a prefix needs; leave target_modules out, or choose another adapter"
            )
        projection = None
        if peft_config.projection_size is not None:
            projection = self._projection(adapter_name, peft_config, base)
        self._wrap(adapter_name, parent, target_name, target, peft_config, projection)

    def _projection(self, adapter_name: str, config: LayerPrefixConfig, attention: nn.Module) -> PrefixProjection:
        """The network that the layers of `adapter_name` share; created for the first layer."""
        for _, layer in prefix_layers(self.model):
            if (found := layer.projection(adapter_name)) is not None:
                return found
        return PrefixProjection.draw(config, hidden_size(attention))

    # --- files ------------------------------------------------------------------------------------

    @classmethod
    def _to_save(cls, model, config, adapter_name, state_dict):
        return saved_prefixes(model, config, adapter_name, state_dict)

    @classmethod
    def _remap_adapter_state_dict_for_load(cls, model, config, adapter_name, state_dict):
        fold_to_load(model, config, config, adapter_name, state_dict)
        found = super()._remap_adapter_state_dict_for_load(
            model=model, config=config, adapter_name=adapter_name, state_dict=state_dict
        )
        return with_shared_projection(model, adapter_name, found)


def prefix_layers(model: nn.Module) -> Iterator[tuple[str, PrefixLayer]]:
    """Name and module of each prefixed attention."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, PrefixLayer))


def saved_prefixes(
    model: nn.Module, config: LayerPrefixConfig, adapter_name: str, state: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """The saved tensors of an adapter's prefixes: the projection once, or the keys and values that it computes."""
    if config.projection_size is None:
        return state
    state = dict(state)
    kept = getattr(config, "saves_projection", False)
    for position, (name, layer) in enumerate(_projected(model, adapter_name)):
        dropped = ("layer_prefix_out", *SHARED) if not kept else SHARED if position else ()
        for key in [k for k in state if k.startswith(tuple(f"{name}.{part}." for part in dropped))]:
            del state[key]
        if not kept:
            with torch.no_grad():
                state[f"{name}.layer_prefix_table.{adapter_name}.weight"] = layer.rows(adapter_name)[0].clone()
    return state


def with_shared_projection(
    model: nn.Module, adapter_name: str, state: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Copy the tensors of the projection, saved once, to the names of all layers that share it."""
    layers = _projected(model, adapter_name)
    result = dict(state)
    for part in SHARED:
        prefixes = [f"{name}.{part}.{adapter_name}." for name, _ in layers]
        for key, tensor in state.items():
            saved_under = next((prefix for prefix in prefixes if key.startswith(prefix)), None)
            if saved_under is not None:
                result |= {prefix + key.removeprefix(saved_under): tensor for prefix in prefixes}
    return result


def fold_to_load(
    model: nn.Module, config: PeftConfig, prefix: LayerPrefixConfig, adapter_name: str, state: dict[str, torch.Tensor]
) -> None:
    """Replace a prefix's projection by keys and values if the file holds only these; for inference.

    Args:
        config: configuration of the adapter, with `inference_mode`.
        prefix: configuration of the prefix: the same, or one kind of a mixture.

    Raises:
        InputError: the adapter is loaded for training, and the file has no projection.
    """
    if prefix.projection_size is None or not any(".layer_prefix_table." in key for key in state):
        return
    if not config.inference_mode:
        raise InputError(
            "this file holds only the keys and values of a prefix, and the model trains a projection that computes "
            "them; load it into the base model with PeftModel.from_pretrained, or, to resume training, save within "
            "`with keep_projection(model)`"
        )
    for _, layer in _projected(model, adapter_name):
        layer.fold(adapter_name)
    prefix.projection_size = None


@contextmanager
def keep_projection(model: nn.Module) -> Iterator[None]:
    """Context manager in which adapters are saved with the projections of prefixes, so that training can resume.

    Args:
        model: with a prefix that has a `projection_size`, alone or in a mixture; other models are saved as usual.
    """
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
    """The configurations of the kinds of a mixture; empty for another adapter."""
    return list(config.configs.values()) if config.peft_type == AdapterType.LAYER_MIXTURE else []


def attention_modules(model: nn.Module, layers_pattern=None) -> dict[str, NameInLayer]:
    """Self-attentions that support a prefix: plain name -> number of the layer, name within it."""
    found = {}
    for name, module in model.named_modules():
        name = plain_name(name)
        inner = split_layer(name, layers_pattern)
        if inner is not None and uses_interface(module) and not _is_cross(module, inner.name):
            found[name] = inner
    return found


def _projected(model: nn.Module, adapter_name: str) -> list[tuple[str, PrefixLayer]]:
    """Name and module of the prefixed attentions with a projection of this adapter."""
    return [(name, layer) for name, layer in prefix_layers(model) if layer.projection(adapter_name) is not None]


def _is_cross(module: nn.Module, name: str) -> bool:
    lowered = (name.lower(), type(module).__name__.lower())
    return any(word in text for word in _CROSS for text in lowered)
