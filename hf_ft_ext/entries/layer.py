"""A weight of which only chosen entries train.

The weight stays where it is, as a buffer of the module; a vector of the chosen entries is the parameter. Reading the
weight brings changed values into it and connects it with them in the graph: the weight's gradient exists while the
backward pass is at that weight, and its chosen entries are what is kept.
"""

from collections.abc import Iterator

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from hf_ft_ext.errors import InputError
from hf_ft_ext.files import tensor_hash

_SUFFIX = "_entries"
_MADE = "_made_for_entries"


class _Read(torch.autograd.Function):
    """The weight as it is; its gradient goes to the chosen entries."""

    @staticmethod
    def forward(ctx, values, weight, indices, entries):
        ctx.save_for_backward(indices)
        ctx.dtype, ctx.entries = values.dtype, entries
        return weight.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        (indices,) = ctx.saved_tensors
        ctx.entries.may_have_changed = True  # a step follows
        return gradient.reshape(-1)[indices].to(ctx.dtype), None, None, None


class Entries(nn.Module):
    """The trained entries of one weight.

    Not part of any `state_dict()`: the weight that they are in is.

    Attributes:
        values: shape (k,), in single precision at least.
        indices: flat positions in the weight, shape (k,), rising.
        initial: the values before training, shape (k,).
        may_have_changed: whether gradients have come since the values were last compared with the weight.
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
        return _Read.apply(self.values, weight, self.indices, self)

    def fold(self, weight: torch.Tensor, compare: bool = False) -> None:
        """Bring values into `weight` if they have changed.

        They are compared where they may have changed: after a backward pass (fused optimizers change a tensor
        without counting it as a new version) or as a new version. A comparison waits for the device, so it is not
        made at each read; and nothing is written without need, because a graph may hold the weight.

        Args:
            compare: in any case.
        """
        values, version = self.values.detach(), self.values._version
        moved = self._folded.device != values.device
        if not (compare or moved or self.may_have_changed or version != self._version):
            return
        if moved or not torch.equal(values, self._folded):
            weight.view(-1)[self.indices] = values.to(weight.dtype)
            self._folded = values.clone()
        self.may_have_changed, self._version = False, version

    def take(self, weight: torch.Tensor) -> None:
        """Take the values from `weight`, which somebody else has changed."""
        with torch.no_grad():
            self.values.copy_(weight.reshape(-1)[self.indices])
        self._folded = self.values.detach().clone()
        self.may_have_changed, self._version = False, self.values._version

    def _save_to_state_dict(self, *args, **kwargs) -> None:
        pass

    def _load_from_state_dict(self, *args, **kwargs) -> None:
        pass


def attach_entries(model: nn.Module, chosen: dict[str, torch.Tensor]) -> None:
    """Train the entries at `chosen`, parameter name -> flat indices, of parameters that are then parameters no more.

    Names in `state_dict()` stay: what is saved is the plain model. Other parameters are left alone.

    Raises:
        InputError: an unknown parameter, one that several modules share, or indices out of range.
    """
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, indices in chosen.items():
        if name not in parameters:
            raise InputError(f"the model has no parameter {name!r}; pass names of model.named_parameters()")
        if len(shared := owners[id(parameters[name])]) > 1:
            other = next(n for n in shared if n != name)
            raise InputError(f"{name} is also {other}; entries of shared weights cannot train alone: leave it out")
        if not len(indices) or int(indices.min()) < 0 or int(indices.max()) >= parameters[name].numel():
            raise InputError(f"{name} has {parameters[name].numel()} entries; pass at least one index, from 0 on")
    for name, indices in chosen.items():
        owner, _, own = name.rpartition(".")
        _attach(model.get_submodule(owner), own, indices)
    # Every process makes the same changes to these buffers by itself.
    ignored = getattr(model, "_ddp_params_and_buffers_to_ignore", [])
    buffers = [n for name in chosen for n in (name, f"{name}{_SUFFIX}.indices")]
    model._ddp_params_and_buffers_to_ignore = [*ignored, *buffers]


def _attach(module: nn.Module, name: str, indices: torch.Tensor) -> None:
    weight = module._parameters.pop(name)
    indices = indices.sort().values.to(weight.device)
    small = weight.numel() <= torch.iinfo(torch.int32).max
    entries = Entries(weight, indices.int() if small else indices.long())
    module.register_buffer(name, weight.detach())
    module.add_module(f"{name}{_SUFFIX}", entries)

    def read(self: nn.Module) -> torch.Tensor:
        return self._modules[f"{name}{_SUFFIX}"](self._buffers[name])

    # torch's parametrize makes a class for the module as well, and renames the weight in `state_dict()`.
    kind = type(module)
    module.__class__ = type(kind.__name__, (kind,), {name: property(read), "__module__": kind.__module__, _MADE: True})
    module.register_state_dict_pre_hook(_fold_first(name))
    module.register_load_state_dict_post_hook(_take_after(name))


def _fold_first(name: str):
    def hook(module: nn.Module, prefix: str, keep_vars: bool) -> None:
        if f"{name}{_SUFFIX}" in module._modules:
            module._modules[f"{name}{_SUFFIX}"].fold(module._buffers[name], compare=True)

    return hook


def _take_after(name: str):
    def hook(module: nn.Module, incompatible) -> None:
        if f"{name}{_SUFFIX}" in module._modules:
            module._modules[f"{name}{_SUFFIX}"].take(module._buffers[name])

    return hook


def entries_of(model: nn.Module) -> dict[str, Entries]:
    """The trained entries by the name of their weight."""
    return {name.removesuffix(_SUFFIX): m for name, m in model.named_modules() if isinstance(m, Entries)}


def weights_with_entries(model: nn.Module) -> Iterator[tuple[str, torch.Tensor, Entries]]:
    """Name, weight (up to date) and entries of each."""
    for name, entries in entries_of(model).items():
        owner, _, own = name.rpartition(".")
        weight = model.get_submodule(owner)._buffers[own]
        entries.fold(weight, compare=True)
        yield name, weight, entries


def merge_entries(model: nn.Module) -> nn.Module:
    """Make the weights plain parameters again, changed as trained, in place; returns the model."""
    for name, weight, _ in list(weights_with_entries(model)):
        owner, _, own = name.rpartition(".")
        module = model.get_submodule(owner)
        del module._modules[f"{own}{_SUFFIX}"], module._buffers[own]
        if not any(isinstance(child, Entries) for child in module.children()):
            module.__class__ = next(kind for kind in type(module).__mro__ if not kind.__dict__.get(_MADE))
        module._parameters[own] = nn.Parameter(weight, requires_grad=weight.is_floating_point())
    return model
