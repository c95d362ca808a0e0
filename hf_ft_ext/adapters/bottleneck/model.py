"""The tuner of bottleneck adapters."""

import inspect

from torch import nn

from hf_ft_ext.adapters.bottleneck.config import HOULSBY, PARALLEL, PFEIFFER, BottleneckConfig
from hf_ft_ext.adapters.bottleneck.layer import BottleneckLayer, width_of
from hf_ft_ext.adapters.layers import names_by_layer, plain_name, split_layer
from hf_ft_ext.adapters.tuner import LayerTuner, refuse_nested_targets, refuse_unfit_layers
from hf_ft_ext.errors import InputError
from hf_ft_ext.structure.find import find_structure
from hf_ft_ext.structure.parts import FeedForward, Layer


class BottleneckModel(LayerTuner):
    """Wraps modules of a model in `BottleneckLayer`s; see `BottleneckConfig`."""

    prefix = "bottleneck_"
    tuner_layer_cls = BottleneckLayer
    cannot_merge = "a bottleneck adapter has an activation between its projections and cannot be merged into weights"

    def _choose_targets(self, peft_config: BottleneckConfig, model: nn.Module) -> None:
        layers = names_by_layer(model, peft_config.layers_pattern)
        refuse_unfit_layers(model, "bottleneck", peft_config.layers_to_transform, list(layers))
        if peft_config.target_modules is None:
            peft_config.target_modules = default_targets(model, peft_config.placement)
        refuse_nested_targets(model, "bottleneck", peft_config)

    def _create_and_replace(self, peft_config, adapter_name, target, target_name, parent, current_key, **kwargs):
        width: tuple[int, ...] = ()
        if not isinstance(target, BottleneckLayer):
            hidden = getattr(getattr(self.model, "config", None), "hidden_size", None)
            base = target.get_base_layer() if hasattr(target, "get_base_layer") else target
            width = (width_of(base, peft_config, hidden),)
        self._wrap(adapter_name, parent, target_name, target, peft_config, *width)


def default_targets(model: nn.Module, placement: str) -> list[str]:
    """Return the modules that get an adapter: names within a layer, or full names if those are ambiguous.

    `pfeiffer`: the normalization at the end of the layer, else the feed-forward. `houlsby`: the attention's output
    projection and the feed-forward. `parallel`: the feed-forward. If the feed-forward is not a module of its own (its
    projections are direct children of the layer), its last projection is used instead.

    Raises:
        InputError: no layer of the model has a module for this placement.
    """
    structure = find_structure(model)
    plain = {plain_name(name): module for name, module in model.named_modules()}
    found: dict[str, None] = {}
    for layer in structure.layers:
        for name in _targets_in_layer(layer, placement, plain):
            found[name] = None
    if not found:
        reason = ""
        if placement == PARALLEL and structure.feed_forwards:
            reason = " (its feed-forwards are not single modules)"
        raise InputError(
            f"{type(model).__name__} has no layers that fit a bottleneck adapter of placement {placement!r}{reason}; "
            "pass target_modules, or choose another placement or adapter"
        )
    within = sorted({inner.name for name in found if (inner := split_layer(name)) is not None})
    reached = {name for name in plain if (inner := split_layer(name)) is not None and inner.name in within}
    return within if reached == found.keys() else sorted(found)


def _targets_in_layer(layer: Layer, placement: str, modules: dict[str, nn.Module]) -> list[str]:
    """Full names of the modules of one layer that get an adapter."""
    if placement == PFEIFFER and layer.norm is not None and split_layer(layer.norm) is not None:
        return [layer.norm]
    names = []
    if placement == HOULSBY:
        blocks = [block for block in layer.attentions if not block.cross]
        names = [name for block in blocks for name in block.output if _can_get_adapter(name, modules)]
        if blocks and not names:
            return []
    for block in layer.feed_forwards if placement == HOULSBY else layer.feed_forwards[-1:]:
        choices = [block.module, *block.down]
        if placement == PARALLEL:  # in a pre-norm layer, the residual input is not the feed-forward's input
            choices = [block.module, *(_residual_block(block, modules) if layer.norm is not None else ())]
        chosen = next((name for name in choices if name is not None and _can_get_adapter(name, modules)), None)
        if chosen is None:
            return []
        # Experts may be inside of the module of another block, which adds a shared expert (Llama 4).
        others = (other.module for other in layer.feed_forwards if other is not block and other.module is not None)
        around = (other for other in others if chosen.startswith(f"{other}."))
        names.append(next(around, chosen))
    return list(dict.fromkeys(names))


def _can_get_adapter(name: str, modules: dict[str, nn.Module]) -> bool:
    """Whether the module can get an adapter: it is in a numbered layer and has features in the last dimension."""
    return name in modules and split_layer(name) is not None and not isinstance(modules[name], nn.Conv1d)


def _residual_block(block: FeedForward, modules: dict[str, nn.Module]) -> list[str]:
    """BERT's output block, which adds the feed-forward's input, passed as `input_tensor`; empty for other models."""
    names = [name.rpartition(".")[0] for name in block.down]
    return [n for n in names if n in modules and "input_tensor" in inspect.signature(modules[n].forward).parameters]
