"""Weights that accelerate's hooks offload and load for each forward pass: their identity, their values, new values.

`cpu_offload`, `disk_offload`, `dispatch_model` and `device_map` of `from_pretrained` put such hooks on a model's
modules. Between forward passes these parameters are on the meta device, and their values in the hooks' weight maps.
"""

import contextlib
import functools
import math
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from accelerate.hooks import AlignDevicesHook, SequentialHook
from accelerate.utils import (
    OffloadedWeightsLoader,
    PrefixedDataset,
    named_module_tensors,
    set_module_tensor_to_device,
)
from safetensors.torch import save_file
from torch import nn

from hf_ft_ext.errors import InputError


class StoredTensor:
    """An offloaded tensor, where accelerate keeps it.

    Args:
        device: where the hooks load it.
        dtype: its type in the model.

    Attributes:
        places: weight map and key of the tensor; tied weights have several.
        loaded: whether a hook has loaded it for its module.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype):
        self.places: list[tuple[Any, str]] = []
        self.device, self.dtype, self.loaded = device, dtype, False

    def read(self) -> torch.Tensor:
        """The values on `device`; where that is the CPU and they are kept in memory, the kept tensor itself."""
        weights, key = self.places[0]
        return weights[key].detach().to(self.device, self.dtype).contiguous()

    @torch.no_grad()
    def write(self, value: torch.Tensor) -> None:
        """Replace the values, in all places. Values on disk get a new file in the offload folder; others stay."""
        entries: dict[str, dict[str, str]] = {}
        for weights, key in self.places:
            if isinstance(weights, OffloadedWeightsLoader) and key not in weights.state_dict:
                folder = weights.save_folder
                weights.index[key] = entries[folder] = entries.get(folder) or _saved(value, key, folder)
                continue
            kept = (weights.state_dict if isinstance(weights, OffloadedWeightsLoader) else weights)[key]
            if kept.data_ptr() != value.data_ptr():
                kept.copy_(value)

    def check_writable(self, shape: Sequence[int]) -> None:
        """Raise an `InputError` if new values cannot be stored."""
        for weights, key in self.places:
            loader = isinstance(weights, OffloadedWeightsLoader)
            if loader and key not in weights.state_dict and weights.save_folder is None:
                raise InputError(
                    f"{key}, of shape {tuple(shape)}, is read from the checkpoint's own file, which a search does not "
                    "change; pass offload_folder to from_pretrained, a folder for the changed weights"
                )
            if not loader and not isinstance(weights, dict):
                raise InputError(
                    f"{key}, of shape {tuple(shape)}, is kept in a {type(weights).__name__}, which cannot be changed; "
                    "offload the model with cpu_offload, disk_offload or device_map"
                )


class ReadableTensors(Sequence[torch.Tensor]):
    """Parameters with the offloaded ones read when they are asked for, one at a time.

    Args:
        parameters: the parameters.
        stored: where the offloaded ones are kept, by their number.
    """

    def __init__(self, parameters: Sequence[torch.Tensor], stored: Mapping[int, StoredTensor]):
        self.parameters, self.stored = parameters, stored

    def __len__(self) -> int:
        return len(self.parameters)

    def __getitem__(self, number: Any) -> Any:
        if number >= len(self):
            raise IndexError(number)
        return self.stored[number].read() if number in self.stored else self.parameters[number].detach()

    @contextlib.contextmanager
    def changed(self, number: int) -> Iterator[torch.Tensor]:
        """A parameter to be changed in place; an offloaded one is written back at the end."""
        value = self[number]
        yield value
        if number in self.stored:
            self.stored[number].write(value)

    def device(self, number: int) -> torch.device:
        """The device of a parameter, or the one that it is loaded to."""
        return self.stored[number].device if number in self.stored else self.parameters[number].device


def is_offloaded(module: nn.Module) -> bool:
    """Whether accelerate loads the module's tensors for its forward; not true for modules inside or around it."""
    return next(_hooks(module), None) is not None


def has_offloaded(model: nn.Module) -> bool:
    """Whether accelerate offloads any part of the model."""
    return any(map(is_offloaded, model.modules()))


def hold_offloaded(model: nn.Module, check_ties: bool = True) -> dict[int, StoredTensor]:
    """Let the offloaded parameters keep their identity, and find where their values are kept.

    accelerate replaces a module's parameters by new ones before and after each forward. Afterwards the same objects
    are put back, so that optimizers and others recognize them, and `load_state_dict` changes the kept values, where
    it would do nothing for a parameter on the meta device. Modules that share a weight get the same object again,
    as far as the sharing can be seen: in the weight maps, or in the model's list of tied weights.

    Args:
        check_ties: whether to refuse ties that offloading has broken, which matter if the weights are changed.

    Returns:
        Where each offloaded parameter is kept, by its `id`; also by that of objects replaced because they are tied.

    Raises:
        InputError: a weight is offloaded, and another one that shares its values is not.
    """
    sources = _tied_names(model)
    if check_ties:
        _check_ties(model, sources)
    found: dict[int, StoredTensor] = {}
    first: dict[Any, nn.Parameter] = {}
    for prefix, module in model.named_modules():
        for hook in _hooks(module):
            held = []
            for holder, name, path in _offloaded_parameters(module, hook):
                parameter = holder._parameters[name]
                weights, key = _resolved(hook.weights_map, path)
                full = f"{prefix}.{path}" if prefix else path
                same = first.setdefault(_source(weights, key), parameter)
                same = first.setdefault(("name", sources.get(full, full)), same)
                if id(same) not in found:
                    found[id(same)] = StoredTensor(torch.device(hook.execution_device), parameter.dtype)
                stored = found[id(parameter)] = found[id(same)]
                if not any(weights is other and key == known for other, known in stored.places):
                    stored.places.append((weights, key))
                holder._parameters[name] = same
                held.append((holder, name, path, stored))
            _hold(module, hook, held)
    return found


def keep_loaded(model: nn.Module, parameters: Collection[torch.Tensor]) -> int:
    """Load the modules that hold these offloaded parameters, for good; return the bytes that this takes."""
    hold_offloaded(model)
    ids, loaded, size = set(map(id, parameters)), {}, 0
    for module in model.modules():
        for hook in _hooks(module):
            held = list(_offloaded_parameters(module, hook))
            if ids.isdisjoint(id(holder._parameters[name]) for holder, name, _ in held):
                continue
            for holder, name, path in held:
                parameter = holder._parameters[name]
                if id(parameter) not in loaded:
                    value = hook.weights_map[path].detach().clone()
                    set_module_tensor_to_device(holder, name, hook.execution_device, value=value)
                    loaded[id(parameter)] = holder._parameters[name], parameter
                    size += value.numel() * value.element_size()
                holder._parameters[name] = loaded[id(parameter)][0]
            if hook.offload_buffers:
                for path, buffer in module.named_buffers(recurse=hook.place_submodules):
                    if buffer.is_meta:
                        set_module_tensor_to_device(module, path, hook.execution_device, value=hook.weights_map[path])
            hook.offload = False
            # peft copies modules that train in full with all that hooks refer to: not with the weights of the model
            hook.weights_map = hook.tied_params_map = None
            hook.of_state_dict.remove()
            del hook.post_forward, hook.of_state_dict
    return size


def reader_of(model: nn.Module) -> Callable[[str, torch.Tensor], torch.Tensor]:
    """A function of name and tensor of the model's parameters and buffers that reads the tensor if it is offloaded."""
    places = {}
    for prefix, module in model.named_modules():
        for hook in _hooks(module):
            tensors = named_module_tensors(module, hook.offload_buffers, hook.place_submodules, True)
            places.update({f"{prefix}.{path}".removeprefix("."): (hook.weights_map, path) for path, _ in tensors})

    def read(name: str, tensor: torch.Tensor) -> torch.Tensor:
        if not tensor.is_meta or name not in places:
            return tensor
        weights, path = places[name]
        return weights[path].to(tensor.dtype)

    return read


def input_device(model: nn.Module) -> torch.device:
    """The device of the model's first parameter, or the one that it is loaded to, if it is offloaded."""
    first = next(model.parameters())
    hooks = (hook for module in model.modules() for hook in _hooks(module))
    return torch.device(next(hooks).execution_device) if first.is_meta and has_offloaded(model) else first.device


def runs_own_forward(module: nn.Module) -> bool:
    """Whether a call runs the forward of the module's class, within accelerate's hooks or without."""
    forward = vars(module).get("_old_forward" if "_hf_hook" in vars(module) else "forward")
    return forward is None or getattr(forward, "__func__", None) is type(module).forward


@contextlib.contextmanager
def placeholders(model: nn.Module) -> Iterator[None]:
    """Within this context, offloaded parameters are NaN on the device that they are loaded to, and take no memory.

    peft puts a new adapter on the device of the weight that it adapts, where it would lose its values if that is the
    meta device. A value that is computed from a placeholder is NaN, too.
    """
    held = [(holder, name, hook.execution_device, holder._parameters[name])
            for module in model.modules() for hook in _hooks(module)
            for holder, name, _ in _offloaded_parameters(module, hook)]  # fmt: skip
    for holder, name, device, parameter in held:
        value = math.nan if parameter.is_floating_point() else 0
        one = torch.full((), value, dtype=parameter.dtype, device=device).expand(parameter.shape)
        holder._parameters[name] = nn.Parameter(one, requires_grad=parameter.requires_grad)
    try:
        yield
    finally:
        for holder, name, _, parameter in held:
            parameter.requires_grad_(holder._parameters[name].requires_grad)
            holder._parameters[name] = parameter


def _saved(value: torch.Tensor, key: str, folder: str) -> dict[str, str]:
    """Save a tensor in a file of its own; return the entry of accelerate's index."""
    path = os.path.join(folder, f"{key}.safetensors")
    temporary = f"{path}.{os.getpid()}.tmp"
    try:
        save_file({key: value.cpu()}, temporary)  # an earlier file may be mapped into memory: it is replaced
        os.replace(temporary, path)
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)
    return {"safetensors_file": path, "weight_name": key, "dtype": str(value.dtype).removeprefix("torch.")}


def _hooks(module: nn.Module) -> Iterator[AlignDevicesHook]:
    """The module's hooks that load tensors before its forward and drop them afterwards."""
    waiting = [getattr(module, "_hf_hook", None)]
    while waiting:
        hook = waiting.pop()
        if isinstance(hook, SequentialHook):
            waiting.extend(hook.hooks)
        elif isinstance(hook, AlignDevicesHook) and hook.offload:
            yield hook


def _offloaded_parameters(module: nn.Module, hook: AlignDevicesHook) -> Iterator[tuple[nn.Module, str, str]]:
    """Holder, name in the holder, and name in `module` of each parameter that the hook loads."""
    for prefix, holder in module.named_modules():
        for name, parameter in holder._parameters.items():
            if parameter is not None and parameter.is_meta:
                yield holder, name, f"{prefix}.{name}" if prefix else name
        if not hook.place_submodules:
            return


def _hold(module: nn.Module, hook: AlignDevicesHook, held: list[tuple[nn.Module, str, str, StoredTensor]]) -> None:
    """Put the same parameters back after each forward, and let `load_state_dict` change the kept values."""
    parameters = [(holder, name, holder._parameters[name], one) for holder, name, _, one in held]
    before = hook.post_forward
    known = isinstance(before, functools.partial)
    hook.post_forward = functools.partial(_post_forward, before.args[0] if known else before, parameters)
    if not known:
        stored = {path: one for _, _, path, one in held}
        hook.of_state_dict = module.register_load_state_dict_pre_hook(functools.partial(_write_state, stored))


def _post_forward(
    original: Any,
    parameters: Sequence[tuple[nn.Module, str, nn.Parameter, StoredTensor]],
    module: nn.Module,
    output: Any,
) -> Any:
    result = original(module, output)
    for holder, name, parameter, stored in parameters:
        stored.loaded = True
        if holder._parameters[name].is_meta:  # not in a module that is kept loaded
            holder._parameters[name] = parameter
    return result


def _write_state(
    stored: Mapping[str, StoredTensor], module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any
) -> None:
    for path, one in stored.items():
        value = state_dict.get(prefix + path)
        if value is None or value.is_meta or next(_hooks(module), None) is None:
            continue
        value = value.detach().to(one.device, one.dtype)
        if not torch.equal(one.read(), value):
            one.check_writable(value.shape)
            one.write(value)
        state_dict[prefix + path] = value.to("meta")  # torch warns of a copy into the meta device


def _resolved(weights: Any, key: str) -> tuple[Any, str]:
    """The weight map without prefixes, and the key in it."""
    while isinstance(weights, PrefixedDataset):
        weights, key = weights.dataset, f"{weights.prefix}{key}"
    return weights, key


def _source(weights: Any, key: str) -> tuple:
    """Equal for entries of weight maps that are the same memory or the same tensor of a file."""
    if isinstance(weights, OffloadedWeightsLoader) and key not in weights.state_dict:
        about = weights.index[key]
        file = about.get("safetensors_file")
        # changed weights have a file for each key
        return (id(weights), key) if file is None else (file, about.get("weight_name", key))
    value = weights[key]
    return (value.data_ptr(), value.shape) if value.numel() else (id(weights), key)


def _tied_names(model: nn.Module) -> dict[str, str]:
    """The tied weights that transformers knows: full name of each, and of the one that it shares."""
    names = {}
    for prefix, module in model.named_modules():
        for tied, source in (getattr(module, "all_tied_weights_keys", None) or {}).items():
            names[f"{prefix}.{tied}" if prefix else tied] = f"{prefix}.{source}" if prefix else source
    return names


def _check_ties(model: nn.Module, sources: Mapping[str, str]) -> None:
    offloaded = set()
    for prefix, module in model.named_modules():
        for hook in _hooks(module):
            names = [name for name, _ in module.named_parameters(prefix, recurse=hook.place_submodules)]
            offloaded.update(names)
    for tied, source in sources.items():
        if (tied in offloaded) != (source in offloaded):
            here, there = (tied, source) if tied in offloaded else (source, tied)
            raise InputError(
                f"{here} is offloaded, and {there}, which shares its values, is not, so they would become different; "
                "put both in the same place (device_map)"
            )
