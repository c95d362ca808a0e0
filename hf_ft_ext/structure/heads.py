"""The base model inside a model with a head, and the modules of the head."""

from collections.abc import Iterable

from torch import nn
from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES


def encoder_path(model: nn.Module) -> str | None:
    """Dotted name of the base model within `model`; `None` if it cannot be told from the rest.

    A model whose base model is nested deeper than `base_model_prefix` defines an attribute `encoder_path`. Some models
    have no submodule of that name (the classifiers of CLIP, SigLIP and Whisper): then it is the only module before the
    head.
    """
    path = getattr(model, "encoder_path", None) or getattr(model, "base_model_prefix", None)
    if not path:
        return None
    try:
        model.get_submodule(path)
    except AttributeError:
        head = head_modules(model)
        before = [name for name in _with_parameters(model) if name not in head]
        return before[0] if head and len(before) == 1 else None
    return path


def head_modules(model: nn.Module) -> list[str]:
    """Names of the modules that a pretrained base model lacks: those outside of it; of Perceiver, its decoder.

    Where `base_model_prefix` is no submodule, or there is nothing outside of it, the head is what follows the last
    module with a list of layers.
    """
    prefix, names = getattr(model, "base_model_prefix", None), _with_parameters(model)
    if prefix not in dict(model.named_children()):
        return [] if _is_base_model(model) else _after_layers(model, names)
    outside = [name for name in names if name != prefix]
    if outside:
        return outside
    inner = model.get_submodule(prefix)
    names = _with_parameters(inner)
    found = _after_layers(inner, names)
    body = {id(p) for name in names if name not in found for p in inner.get_submodule(name).parameters()}
    own = [name for name in found if any(id(p) not in body for p in inner.get_submodule(name).parameters())]
    return [f"{prefix}.{name}" for name in own]  # without output embeddings that are tied to the input embeddings


def names_in_head(model: nn.Module, names: Iterable[str]) -> set[str]:
    """Those of the parameters `names` that belong to the head: outside of the base model."""
    path, head = encoder_path(model), tuple(f"{name}." for name in head_modules(model))
    if path is not None:
        return {name for name in names if not name.startswith(f"{path}.") or name.startswith(head)}
    return {name for name in names if name.startswith(head) or "." not in name}


def _with_parameters(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_children() if any(True for _ in module.parameters())]


def _is_base_model(model: nn.Module) -> bool:
    """Whether transformers loads this class as a model without a head."""
    known: set[str] = set()
    for names in MODEL_MAPPING_NAMES.values():
        known.update([names] if isinstance(names, str) else names)
    return type(model).__name__ in known


def _after_layers(model: nn.Module, names: list[str]) -> list[str]:
    """Those of the children `names` that follow the last one with a list of layers, or the largest one."""
    children = [model.get_submodule(name) for name in names]
    lists = [i for i, child in enumerate(children) if any(isinstance(m, nn.ModuleList) for m in child.modules())]
    sizes = [sum(p.numel() for p in child.parameters()) for child in children]
    last = lists[-1] if lists else sizes.index(max(sizes, default=0)) if sizes else -1
    return names[last + 1 :]
