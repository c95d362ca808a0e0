"""`Entries`: train only chosen entries of a weight.

The weight becomes a buffer of its module, and a vector of the chosen entries is the parameter. Reading the weight
writes changed values into it and connects it with the vector in the autograd graph. The full gradient of the weight
exists only during its backward step; only the chosen entries of it are kept.
"""

import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from hf_ft_ext.errors import InputError
from hf_ft_ext.files import tensor_hash

_SUFFIX = "_entries"
_CLASS_MARK = "_made_for_entries"  # attribute of the classes that `_reading_class` makes: the weight's name


class Entries(nn.Module):
    """The trained entries of one weight.

    They are not part of the `state_dict()`, which holds the weight itself.

    Attributes:
        values: shape (k,), in float32 or wider.
        indices: flat positions in the weight, shape (k,), ascending.
        initial: the values before training, shape (k,).
        may_have_changed: whether there was a backward pass since the values were last compared with the weight.
        base_hash: SHA-256 of the weight before training.
    """

    def __init__(self, weight: torch.Tensor, indices: torch.Tensor):
        super().__init__()
        flat = weight.detach().reshape(-1)
        self.values = nn.Parameter(flat[indices].to(torch.promote_types(weight.dtype, torch.float32)))
        self.register_buffer("indices", indices, persistent=False)
        self.base_hash = tensor_hash(weight)
        self.initial = self._folded = self.values.detach().clone()
        self.may_have_changed = False
        self._version = self.values._version

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        self.fold(weight)
        return _ReadWeight.apply(self.values, weight, self.indices, self)

    def fold(self, weight: torch.Tensor, compare: bool = False) -> None:
        """Write the values into `weight` if they have changed.

        The values are compared only if they may have changed: after a backward pass (fused optimizers change a tensor
        without a new version), or if their version is new. A comparison waits for the device, so it is not made at
        each read. Nothing is written unless needed, because an autograd graph may hold the weight. Without gradients,
        values are written at each read: code that exchanges them for an evaluation (`parameter.data`, such as averaged
        weights) leaves no other trace.

        Args:
            compare: compare the values in any case.
        """
        values, version = self.values.detach(), self.values._version
        if not torch.is_grad_enabled() and not compare:
            # Through `data`, as autograd may have saved the weight, and equal values leave its gradients right.
            weight.data.view(-1)[self.indices] = values.to(weight.dtype)
            self._folded, self.may_have_changed = values.clone(), True
            return
        other_device = self._folded.device != values.device
        if not (compare or other_device or self.may_have_changed or version != self._version):
            return
        if other_device or not torch.equal(values, self._folded):
            weight.view(-1)[self.indices] = values.to(weight.dtype)
            self._folded = values.clone()
        self.may_have_changed, self._version = False, version

    def read_from(self, weight: torch.Tensor) -> None:
        """Update the values from `weight` after it was changed from outside, such as by `load_state_dict`."""
        with torch.no_grad():
            self.values.copy_(weight.reshape(-1)[self.indices])
        self._folded = self.values.detach().clone()
        self.may_have_changed, self._version = False, self.values._version

    def _save_to_state_dict(self, *args, **kwargs) -> None:
        pass

    def _load_from_state_dict(self, *args, **kwargs) -> None:
        pass


def attach_entries(model: nn.Module, chosen: dict[str, torch.Tensor]) -> None:
    """Let only chosen entries of parameters train; the parameters become buffers.

    `state_dict()` keeps its names, so the plain model is saved. Other parameters do not change.

    Args:
        chosen: parameter name -> flat indices.

    Raises:
        InputError: an unknown parameter, one that several modules share or whose entries train already, or indices
            that are out of range, repeated, or not a vector of integers, such as a mask.
    """
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    trained = entries_of(model)
    for name, indices in chosen.items():
        if (weight := name.removesuffix(f"{_SUFFIX}.values")) in trained:
            raise InputError(f"the model already trains entries of {weight}; call merge_entries(model) first")
        if name not in parameters:
            raise InputError(f"the model has no parameter {name!r}; pass names of model.named_parameters()")
        if len(shared := names[id(parameters[name])]) > 1:
            other = next(n for n in shared if n != name)
            raise InputError(
                f"{name} is also {other}; entries of shared weights cannot train separately: leave it out"
            )
        _check_indices(name, indices)
        if not len(indices) or int(indices.min()) < 0 or int(indices.max()) >= parameters[name].numel():
            raise InputError(
                f"{name} has {parameters[name].numel()} entries; pass at least one index, and only indices from 0 to "
                f"{parameters[name].numel() - 1}"
            )
    # In the model's order, whatever that of `chosen`: an optimizer's state is saved by the order of its parameters.
    for name in [name for name in parameters if name in chosen]:
        owner, _, own = name.rpartition(".")
        _attach(model.get_submodule(owner), own, chosen[name])
    # DDP need not synchronize these buffers: every process makes the same changes to them.
    ignored = getattr(model, "_ddp_params_and_buffers_to_ignore", [])
    model._ddp_params_and_buffers_to_ignore = [*ignored, *(buffer for name in chosen for buffer in _buffers_of(name))]


def _buffers_of(name: str) -> tuple[str, str]:
    """Names of the buffers that a weight with trained entries has."""
    return name, f"{name}{_SUFFIX}.indices"


def _check_indices(name: str, indices: Any) -> None:
    """Raise an `InputError` unless `indices` is a vector of different integers."""
    if not isinstance(indices, torch.Tensor):
        raise InputError(f"the indices of {name} are a {type(indices).__name__}; pass torch.tensor(indices)")
    if indices.dtype == torch.bool:  # as integers they would be the entries 0 and 1
        raise InputError(f"{name} got a boolean mask, not indices; pass mask.flatten().nonzero().squeeze(1)")
    if indices.ndim != 1 or indices.is_floating_point() or indices.is_complex():
        kind = str(indices.dtype).removeprefix("torch.")
        raise InputError(
            f"the indices of {name} have the shape {tuple(indices.shape)} and type {kind}; pass flat positions in the "
            "weight, a vector of integers"
        )
    if (count := len(indices.unique())) < len(indices):
        raise InputError(
            f"the indices of {name} name some entries more than once ({len(indices)} indices of {count} "
            "entries), which would train separate values for one entry; pass indices.unique()"
        )


def entries_of(model: nn.Module) -> dict[str, Entries]:
    """Return the trained entries by the name of their weight."""
    return {name.removesuffix(_SUFFIX): m for name, m in model.named_modules() if isinstance(m, Entries)}


def weights_with_entries(model: nn.Module) -> Iterator[tuple[str, torch.Tensor, Entries]]:
    """Yield name, current weight and entries of each weight with trained entries."""
    for name, entries in entries_of(model).items():
        owner, _, own = name.rpartition(".")
        weight = model.get_submodule(owner)._buffers[own]
        entries.fold(weight, compare=True)
        yield name, weight, entries


def merge_entries(model: nn.Module) -> nn.Module:
    """Turn the weights into plain parameters again, with their trained values, in place; return the model."""
    merged: set[str] = set()
    for name, weight, _ in list(weights_with_entries(model)):
        merged.update(_buffers_of(name))
        owner, _, own = name.rpartition(".")
        module = model.get_submodule(owner)
        del module._modules[f"{own}{_SUFFIX}"], module._buffers[own]
        if not any(isinstance(child, Entries) for child in module.children()):
            module.__class__ = _plain_class(type(module))
        module._parameters[own] = nn.Parameter(weight, requires_grad=weight.is_floating_point())
    ignored = getattr(model, "_ddp_params_and_buffers_to_ignore", [])
    model._ddp_params_and_buffers_to_ignore = [name for name in ignored if name not in merged]
    return model


class _ReadWeight(torch.autograd.Function):
    """Returns the weight unchanged; `dL/dvalues = (dL/dW)[indices]`."""

    @staticmethod
    def forward(ctx, values, weight, indices, entries):
        ctx.save_for_backward(indices)
        ctx.dtype, ctx.entries = values.dtype, entries
        return weight.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        (indices,) = ctx.saved_tensors
        ctx.entries.may_have_changed = True  # an optimizer step will follow
        return gradient.reshape(-1)[indices].to(ctx.dtype), None, None, None


def _attach(module: nn.Module, name: str, indices: torch.Tensor) -> None:
    weight = module._parameters.pop(name)
    indices = indices.sort().values.to(weight.device)
    small = weight.numel() <= torch.iinfo(torch.int32).max
    entries = Entries(weight, indices.int() if small else indices.long())
    module.register_buffer(name, _alone(weight.detach()))
    module.add_module(f"{name}{_SUFFIX}", entries)

    module.__class__ = _reading_class(type(module), name)
    module.register_state_dict_pre_hook(functools.partial(_fold_before_saving, name))
    module.register_load_state_dict_post_hook(functools.partial(_read_after_loading, name))


def _reading_class(kind: type[nn.Module], name: str) -> type[nn.Module]:
    """A class per module, as in torch's parametrize, which would rename the weight `name` in `state_dict()`."""

    def read(self: nn.Module) -> torch.Tensor:
        return self._modules[f"{name}{_SUFFIX}"](self._buffers[name])

    own = {"__module__": kind.__module__, "__reduce_ex__": _reduce, name: property(read), _CLASS_MARK: name}
    return type(kind.__name__, (kind,), own)


def _alone(weight: torch.Tensor) -> torch.Tensor:
    """Return the weight, or a contiguous copy if other weights lie in its storage or it is not contiguous.

    transformers loads GTE and Nomic BERT so, by cutting up stored weights. Such weights count their versions together,
    so autograd would take a change of one for a change of all.
    """
    alone = weight.untyped_storage().nbytes() == weight.numel() * weight.element_size()
    return weight if alone and weight.is_contiguous() else weight.clone(memory_format=torch.contiguous_format)


def _reduce(module: nn.Module, protocol: int) -> tuple[Any, ...]:
    """Pickle and copy by the class that the module had before; its own class cannot be imported by name."""
    kinds = type(module).__mro__
    names = [kind.__dict__[_CLASS_MARK] for kind in kinds if _CLASS_MARK in kind.__dict__]
    return _without_init, (_plain_class(type(module)), names[::-1]), object.__reduce_ex__(module, 2)[2]


def _without_init(kind: type[nn.Module], names: list[str]) -> nn.Module:
    for name in names:
        kind = _reading_class(kind, name)
    return object.__new__(kind)


def _plain_class(kind: type[nn.Module]) -> type[nn.Module]:
    return next(parent for parent in kind.__mro__ if _CLASS_MARK not in parent.__dict__)


def _fold_before_saving(name: str, module: nn.Module, prefix: str, keep_vars: bool) -> None:
    if f"{name}{_SUFFIX}" in module._modules:
        module._modules[f"{name}{_SUFFIX}"].fold(module._buffers[name], compare=True)


def _read_after_loading(name: str, module: nn.Module, incompatible: Any) -> None:
    if f"{name}{_SUFFIX}" in module._modules:
        module._modules[f"{name}{_SUFFIX}"].read_from(module._buffers[name])
