"""`find_structure`: find the parts of a model by one traced forward pass."""

from collections.abc import Iterator
from weakref import WeakKeyDictionary

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from hf_ft_ext.errors import InputError, first_line
from hf_ft_ext.structure.heads import head_modules
from hf_ft_ext.structure.layers import find_layers
from hf_ft_ext.structure.parts import Structure, unwrapped_name
from hf_ft_ext.structure.roles import find_attentions, find_feed_forwards, first_calls
from hf_ft_ext.structure.rows import trial_copy, trial_device, trial_rows
from hf_ft_ext.structure.trace import Trace, run

_found: WeakKeyDictionary[nn.Module, tuple[tuple, Structure]] = WeakKeyDictionary()


def find_structure(model: nn.Module) -> Structure:
    """Find layers, feed-forwards, attentions, head and embeddings of `model` by tracing a forward pass of two rows.

    A copy that shares the tensors of `model` runs once, without gradients; `model` and the random state do not change.
    Adapters are disabled in the copy, and names are those of the model without adapters. For a model on the meta
    device, the copy has substitute tensors that take no memory.

    Args:
        model: a transformers model of any class, with or without peft adapters.

    Raises:
        InputError: the model does not run on any of the trial rows.
    """
    model = model.get_base_model() if hasattr(model, "get_base_model") else model
    modules = tuple(_base_modules(model))
    known = _found.get(model)
    if known is None or known[0] != modules:
        _found[model] = known = (modules, trace_structure(model))
    return known[1]


def trace_structure(model: nn.Module) -> Structure:
    """`find_structure` of a model without its cache and without unwrapping PEFT models."""
    trace = _trace(model)
    calls = first_calls(trace)
    attentions = find_attentions(trace)
    feed_forwards = find_feed_forwards(trace, attentions)
    modules = {unwrapped_name(name): module for name, module in model.named_modules()}
    return Structure(
        model=type(model).__name__,
        layers=find_layers(trace, calls, attentions, feed_forwards, modules),
        embeddings=tuple(name.removesuffix(".weight") for name in trace.embeddings),
        head=_head(model),
        kinds={name: "tensor" if kind is None else kind.__name__ for name, kind in trace.kinds.items()},
    )


def _base_modules(module: nn.Module, name: str = "") -> Iterator[tuple[str, str]]:
    """Names and classes of the modules of a model without adapters, which determine its structure."""
    if isinstance(module, BaseTunerLayer):
        yield from _base_modules(module.base_layer, name)
        return
    yield name, type(module).__name__
    for own, child in module.named_children():
        yield from _base_modules(child, f"{name}.{own}")


def _trace(model: nn.Module) -> Trace:
    first: Exception | None = None
    with trial_device(model):  # takes precedence over a `with torch.device(...)` of the caller
        for batch in trial_rows(model):
            try:
                return run(trial_copy(model), batch)
            except Exception as error:  # a model may raise anything on inputs that it does not support
                first = first or error
    reason = "none fit its inputs" if first is None else first_line(first)
    raise InputError(
        f"the parts of {type(model).__name__} cannot be found: it does not run on trial rows ({reason}); "
        "pass the names of the layers (sparse_target_modules, lora_target_modules, target_modules)"
    ) from first


def _head(model: nn.Module) -> tuple[str, ...]:
    """Modules outside of the base model."""
    path = getattr(model, "encoder_path", None)
    if path is None:
        return tuple(head_modules(model))
    holder, _, base = path.rpartition(".")  # of a prompt model: the head of the language model inside
    outer = model.get_submodule(holder)
    names = [
        name for name, module in outer.named_children() if name != base and any(True for _ in module.parameters())
    ]
    return tuple(f"{holder}.{name}".removeprefix(".") for name in names)
