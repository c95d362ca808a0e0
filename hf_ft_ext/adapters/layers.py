"""Parse module names: the layer's number, and the module's name within the layer."""

import re
from collections import defaultdict
from collections.abc import Iterable
from typing import NamedTuple

from peft.tuners.tuners_utils import BaseTunerLayer, _ExcludedModule
from torch import nn

_NUMBERED = re.compile(r"(?P<stack>.*?[^.]*)\.(?P<index>\d+)\.(?P<rest>.+)")


class NameInLayer(NamedTuple):
    """A module by the number of its layer and its name within the layer."""

    layer: int
    name: str


def plain_name(name: str) -> str:
    """`name` as in the model without adapters: without the `base_layer` parts of wrapped modules.

    The original of a module that trains in full keeps its `original_module`: it is not used, so no configuration may
    target it by the name of the module.
    """
    return re.sub(r"(^|\.)base_layer(?=\.|$)", "", name).removeprefix(".")


def shown_name(name: str) -> str:
    """As `plain_name`, without peft's prefix of a wrapped model: for messages."""
    return plain_name(name).removeprefix("base_model.model.")


def fold_layer_numbers(name: str) -> str:
    """Replace layer numbers: `encoder.layer.3.output.dense` -> `encoder.layer.*.output.dense`."""
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name)


def split_layer(name: str, layers_pattern: str | Iterable[str] | None = None) -> NameInLayer | None:
    """Return the number of a module's layer and the module's name within it; `None` for a module outside of layers.

    Args:
        name: dotted name; the first number in it is the layer's, as in peft.
        layers_pattern: name(s) of the list of layers (such as `layer`), regular expressions as in peft; none = any.
    """
    if layers_pattern:
        patterns = [layers_pattern] if isinstance(layers_pattern, str) else layers_pattern
        for pattern in patterns:
            match = re.match(rf"(?:^|.*?\.)(?:{pattern})\.(?P<index>\d+)\.(?P<rest>.+)", name)
            if match:
                return NameInLayer(int(match["index"]), match["rest"])
        return None
    match = _NUMBERED.match(name)
    return NameInLayer(int(match["index"]), match["rest"]) if match else None


def names_by_layer(model: nn.Module, layers_pattern: str | Iterable[str] | None = None) -> dict[int, list[str]]:
    """For each layer, the names of its modules within the layer, in the model's order."""
    found: dict[int, list[str]] = defaultdict(list)
    for name, _ in model.named_modules():
        inner = split_layer(plain_name(name), layers_pattern)
        if inner is not None and inner.name:
            found[inner.layer].append(inner.name)
    return dict(sorted(found.items()))


def matches(config, name: str) -> bool | _ExcludedModule:
    """Whether the configuration targets the module called `name` (a plain name).

    `target_modules` is a regular expression that matches full names, or a list of names. A name in the list is a full
    name or the complete name within a layer: `output.dense` does not match `attention.output.dense`.
    """
    inner = split_layer(name, config.layers_pattern)
    if any(re.match(rf"(^|.*\.){part}($|\..*)", name) for part in config.modules_to_save or ()):
        return False
    if _named(config.exclude_modules, name, inner):
        return _ExcludedModule()  # falsy; tells peft that exclude_modules had an effect, so it does not warn
    return _named(config.target_modules, name, inner) and in_layers(config, inner)


def in_layers(config, inner: NameInLayer | None) -> bool:
    """Whether `layers_to_transform` of `config` allows this module; `None` is a module outside of layers."""
    layers = config.layers_to_transform
    if layers is None or layers == []:
        return True
    return inner is not None and inner.layer in ([layers] if isinstance(layers, int) else layers)


def inside_adapter(name: str, model: nn.Module) -> bool:
    """Whether a module is part of an adapter, or the module inside of an adapter's wrapper."""
    if name.endswith("base_layer"):
        return True
    owner = ""
    for part in name.split(".")[:-1]:
        owner = f"{owner}.{part}".removeprefix(".")
        module = model.get_submodule(owner)
        if isinstance(module, BaseTunerLayer) and not name.startswith(f"{owner}.base_layer."):
            return True
    return False


def other_holder(model: nn.Module, module: nn.Module) -> str | None:
    """Name of another module that holds the weight of `module`, or another name of it; `None` if there is none."""
    weight, named = module.weight, list(model.named_modules(remove_duplicate=False))
    if again := [name for name, other in named if other is module][1:]:
        return again[0]
    others = ((name, other) for name, other in named if other is not module)
    return next((name for name, other in others if any(p is weight for p in other._parameters.values())), None)


def _named(targets: str | Iterable[str] | None, name: str, inner: NameInLayer | None) -> bool:
    if not targets:
        return False
    if isinstance(targets, str):
        return re.fullmatch(targets, name) is not None
    return name in targets or (inner is not None and inner.name in targets)
