"""The tuner of bottleneck adapters."""

from torch import nn

from hf_ft_ext.adapters.bottleneck.config import HOULSBY, PARALLEL, PFEIFFER, BottleneckConfig
from hf_ft_ext.adapters.bottleneck.layer import BottleneckLayer, width_of
from hf_ft_ext.adapters.layers import names_by_layer
from hf_ft_ext.adapters.tuner import LayerTuner, refuse_nested_targets, refuse_unfit_layers
from hf_ft_ext.errors import InputError

# What a layer holds, and from it, by placement, the modules that get an adapter: names within the layer.
_STRUCTURES: tuple[tuple[tuple[str, ...], dict[str, tuple[str, ...]]], ...] = (
    (  # BERT, RoBERTa, ELECTRA, ...
        ("attention.output.dense", "output.dense", "output.LayerNorm"),
        {
            PFEIFFER: ("output.LayerNorm",),
            HOULSBY: ("attention.output.dense", "output.dense"),
            PARALLEL: ("output",),
        },
    ),
    (  # DistilBERT
        ("attention.out_lin", "ffn", "output_layer_norm"),
        {PFEIFFER: ("output_layer_norm",), HOULSBY: ("attention.out_lin", "ffn"), PARALLEL: ("ffn",)},
    ),
)
# Layers that normalise first and have their feed-forward as one module.
_FEED_FORWARD = "mlp"
_ATTENTION_OUTPUTS = ("self_attn.o_proj", "attn.c_proj", "attention.dense", "self_attn.dense", "attn.Wo")


class BottleneckModel(LayerTuner):
    """Puts `BottleneckLayer`s around modules of a model; see `BottleneckConfig`."""

    prefix = "bottleneck_"
    tuner_layer_cls = BottleneckLayer
    cannot_merge = "a bottleneck adapter has an activation between its projections and cannot be merged into weights"

    def _prepare_model(self, peft_config: BottleneckConfig, model: nn.Module) -> None:
        layers = names_by_layer(model, peft_config.layers_pattern)
        refuse_unfit_layers(model, "bottleneck", peft_config.layers_to_transform, list(layers))
        if peft_config.target_modules is None:
            peft_config.target_modules = default_targets(model, peft_config.placement, layers)
        refuse_nested_targets(model, "bottleneck", peft_config)

    def _create_and_replace(self, peft_config, adapter_name, target, target_name, parent, current_key, **kwargs):
        if isinstance(target, BottleneckLayer):
            target.update_layer(adapter_name, peft_config)
            return
        hidden = getattr(getattr(self.model, "config", None), "hidden_size", None)
        base = target.get_base_layer() if hasattr(target, "get_base_layer") else target
        layer = BottleneckLayer(target, adapter_name, peft_config, width_of(base, peft_config, hidden))
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)


def default_targets(model: nn.Module, placement: str, layers: dict[int, list[str]]) -> list[str]:
    """Names, within a layer, of the modules that adapters of this placement go to.

    Raises:
        InputError: the model's layers are of no known structure.
    """
    names = set(next(iter(layers.values()), []))
    for needed, targets in _STRUCTURES:
        if names.issuperset(needed):
            return list(targets[placement])
    if _FEED_FORWARD in names:
        attention = next((name for name in _ATTENTION_OUTPUTS if name in names), None)
        if placement != HOULSBY:
            return [_FEED_FORWARD]
        if attention is not None:
            return [attention, _FEED_FORWARD]
    shown = ", ".join(sorted(name for name in names if "." not in name)) or "none"
    raise InputError(
        f"{type(model).__name__} has layers of an unknown structure (in each: {shown}); pass target_modules with the "
        f"modules that a bottleneck of placement {placement!r} goes to"
    )
