"""`find_structure`: the parts of a model, from one trial pass."""

from collections.abc import Iterator
from weakref import WeakKeyDictionary

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from hf_ft_ext.errors import InputError
from hf_ft_ext.structure.layers import find_layers
from hf_ft_ext.structure.parts import Structure
from hf_ft_ext.structure.roles import find_attentions, find_feed_forwards, first_calls
from hf_ft_ext.structure.rows import trial_copy, trial_device, trial_rows
from hf_ft_ext.structure.trace import Trace, run

_found: WeakKeyDictionary[nn.Module, tuple[tuple, Structure]] = WeakKeyDictionary()


def find_structure(model: nn.Module) -> Structure:
    """Layers, feed-forwards, attentions, head and embeddings of `model`, from what its modules do with two rows.

    A copy that shares the tensors of `model` runs once, without gradients; `model` and the random state stay as they
    are. Adapters are switched off for it, and names are those of the model without adapters. A model on the meta
    device runs on stand-ins that take no memory.

    Args:
        model: a transformers model of any class, with or without peft's adapters.

    Raises:
        InputError: no trial rows pass through the model.
    """
    model = model.get_base_model() if hasattr(model, "get_base_model") else model
    modules = tuple(_base_modules(model))
    known = _found.get(model)
    if known is None or known[0] != modules:
        _found[model] = known = (modules, _find(model))
    return known[1]


def _base_modules(module: nn.Module, name: str = "") -> Iterator[tuple[str, str]]:
    """Names and classes of the modules of a model without adapters: what its structure depends on."""
    if isinstance(module, BaseTunerLayer):
        yield from _base_modules(module.base_layer, name)
        return
    yield name, type(module).__name__
    for own, child in module.named_children():
        yield from _base_modules(child, f"{name}.{own}")


def _find(model: nn.Module) -> Structure:
    trace = _trace(model)
    calls = first_calls(trace)
    attentions = find_attentions(trace)
    feed_forwards = find_feed_forwards(trace, attentions)
    modules = {plain_name(name): module for name, module in model.named_modules()}
    return Structure(
        model=type(model).__name__,
        layers=find_layers(trace, calls, attentions, feed_forwards, modules),
        embeddings=tuple(name.removesuffix(".weight") for name in trace.embeddings),
        head=_head(model),
        kinds={name: "tensor" if kind is None else kind.__name__ for name, kind in trace.kinds.items()},
    )


def plain_name(name: str) -> str:
    """`name` as it is in the model without adapters: the steps into wrapped modules left out."""
    wrappers = ("base_layer", "original_module")
    return ".".join(part for part in name.split(".") if part not in wrappers)


def _trace(model: nn.Module) -> Trace:
    first: Exception | None = None
    with trial_device(model):  # and not what the caller's `with torch.device(...)` says
        for batch in trial_rows(model):
            try:
                return run(trial_copy(model), batch, plain_name)
            except Exception as error:  # whatever a model's code raises on rows that it does not take
                first = first or error
    reason = next(iter(str(first).strip().splitlines()), "") or type(first).__name__
    raise InputError(
        f"the parts of {type(model).__name__} cannot be found: it does not run on trial rows of token ids ({reason}); "
        "name the layers by hand (sparse_target_modules, lora_target_modules, target_modules)"
    ) from first


def _head(model: nn.Module) -> tuple[str, ...]:
    """Modules outside of the base model."""
    path = getattr(model, "encoder_path", None) or getattr(model, "base_model_prefix", None)
    if not path or not any(name == path for name, _ in model.named_modules()):
        return ()
    holder, _, base = path.rpartition(".")
    outer = model.get_submodule(holder)
    names = [
        name for name, module in outer.named_children() if name != base and any(True for _ in module.parameters())
    ]
    return tuple(f"{holder}.{name}".removeprefix(".") for name in names)
