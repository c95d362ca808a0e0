"""Batches, and context managers that put a model into a state for exact gradients and restore it."""

import contextlib
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack

from hf_ft_ext.errors import InputError

Batch = Mapping[str, torch.Tensor]


def row(batch: Batch, i: int) -> Batch:
    """One example as a batch."""
    return rows(batch, i, i + 1)


def rows(batch: Batch, first: int, last: int) -> Batch:
    """Return the examples `first` to `last` (exclusive); inputs without a row per example stay as they are."""
    n = batch_size(batch)
    return {
        key: value[first:last] if isinstance(value, torch.Tensor) and value.ndim and len(value) == n else value
        for key, value in batch.items()
    }


def batch_size(batch: Batch) -> int:
    """Examples in `batch`."""
    return next(len(value) for value in batch.values() if isinstance(value, torch.Tensor) and value.ndim)


def refuse_single_batch(batches: Any, name: str) -> None:
    """Raise an `InputError` if the argument `name` is one batch, whose keys would be taken for batches."""
    if isinstance(batches, Mapping):
        raise InputError(f"{name} is a single batch, and an iterable of batches is needed; pass [batch]")


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put the model into evaluation mode; restore the mode of every module afterwards."""
    modes = [(module, module.training) for module in model.modules() if module.training]
    for module, _ in modes:
        module.training = False
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def has_mixed_precision(model: nn.Module) -> bool:
    """Whether accelerate has put autocast around the model's forward, or autocast is enabled on its device."""
    if any("_original_forward" in vars(module) for module in model.modules()):  # of the model inside peft's wrapper
        return True
    kinds = {p.device.type for p in model.parameters()} - {"meta"}
    return any(torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind) for kind in kinds)


@contextlib.contextmanager
def own_precision(model: nn.Module) -> Iterator[None]:
    """Inside, the model's forward is its own, without the autocast that accelerate puts around it.

    A comparison of a part of the model with the whole needs it: autocast is then around one of them only.
    """
    wrapped = [(module, module.forward) for module in model.modules() if "_original_forward" in vars(module)]
    for module, _ in wrapped:
        module.forward = module._original_forward
    try:
        yield
    finally:
        for module, forward in wrapped:
            module.forward = forward


def forget_preparation(model: nn.Module) -> None:
    """Undo what accelerate does to a model that it prepares for evaluation, in place.

    It puts autocast around the forward, and marks the model, and peft's wrapper around it, as prepared for training
    too: without `DistributedDataParallel` and `torch.compile`.
    """
    for module in model.modules():
        own = vars(module).pop("_original_forward", None)
        if own is not None:
            module.forward = own
        vars(module).pop("_is_accelerate_prepared", None)


@contextlib.contextmanager
def dtypes_kept(model: nn.Module) -> Iterator[None]:
    """Restore weights and buffers afterwards whose number format was changed inside. Both are in memory meanwhile."""
    weights = [(weight, weight.data) for weight in model.parameters()]
    # `Module.to` changes the data of a weight, and puts another tensor in place of a buffer
    buffers = [
        (module._buffers, name, buffer)
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    try:
        yield
    finally:
        for weight, data in weights:
            if weight.dtype != data.dtype:
                weight.data = data.to(weight.device)
        for owner, name, buffer in buffers:
            now = owner.get(name)
            if now is not None and now.dtype != buffer.dtype:
                owner[name] = buffer.to(now.device)


@contextlib.contextmanager
def without_cache(model: nn.Module) -> Iterator[None]:
    """Disable the key-value cache of decoders."""
    config = getattr(model, "config", None)
    before = getattr(config, "use_cache", None)
    if config is not None and before:
        config.use_cache = False
    try:
        yield
    finally:
        if config is not None and before:
            config.use_cache = before


@contextlib.contextmanager
def only_trainable(model: nn.Module, parameters: Collection[nn.Parameter]) -> Iterator[None]:
    """Let only these parameters require gradients; restore the flags afterwards."""
    chosen = {id(parameter) for parameter in parameters}
    before = [(p, p.requires_grad) for p in model.parameters() if p.requires_grad != (id(p) in chosen)]
    for parameter, flag in before:
        parameter.requires_grad_(not flag)
    try:
        yield
    finally:
        for parameter, flag in before:
            parameter.requires_grad_(flag)


@contextlib.contextmanager
def computing_in(model: nn.Module, dtype: torch.dtype | None, only_weights: bool = False) -> Iterator[None]:
    """Convert weights and buffers to `dtype` (`None`: leave them); restore the original tensors afterwards.

    In float64, casts to float32 inside the model (norms and softmax of some models) are suppressed. That intercepts
    every torch call, so pass `only_weights` around code that does more than run the model.
    """
    if dtype is None:
        with own_precision(model):
            yield
        return
    tensors = {id(t): t for t in [*model.parameters(), *model.buffers()] if t.is_floating_point()}
    before = [(tensor, tensor.data) for tensor in tensors.values() if tensor.dtype != dtype]
    try:
        for tensor, old in before:
            tensor.data = old.to(dtype)
        mode = float64_stays() if dtype == torch.float64 and not only_weights else contextlib.nullcontext()
        with own_precision(model), mode:
            yield
    finally:
        for tensor, old in before:
            tensor.data = old


def batch_in(batch: Batch, dtype: torch.dtype | None) -> dict[str, torch.Tensor]:
    """Return `batch` with its floating-point inputs in `dtype` (`None`: unchanged)."""
    converted = {}
    for key, value in batch.items():
        floating = isinstance(value, torch.Tensor) and value.is_floating_point()
        converted[key] = value.to(dtype) if dtype is not None and floating else value
    return converted


def supports_float64(device: torch.device) -> bool:
    """Whether `device` computes in float64."""
    return device.type != "mps"


def in_float64_mode() -> bool:
    """Whether `float64_stays` is active."""
    return any(isinstance(mode, _Float64Stays) for mode in _get_current_function_mode_stack())


def float64_stays() -> contextlib.AbstractContextManager:
    """Inside, casts from float64 to float32 are suppressed.

    Hooks of a backward pass run outside the modes of the code that started it, so they have to enter this one again.
    """
    return contextlib.nullcontext() if in_float64_mode() else _Float64Stays()


class _Float64Stays(TorchFunctionMode):
    """Suppresses casts from float64 to float32."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if args and isinstance(args[0], torch.Tensor) and args[0].dtype == torch.float64:
            if func is torch.Tensor.float:
                return args[0]
            if func in _CASTS:
                args = tuple(torch.float64 if arg is torch.float32 else arg for arg in args)
            if kwargs.get("dtype") is torch.float32:
                kwargs = {**kwargs, "dtype": torch.float64}
        return func(*args, **kwargs)


_CASTS = (torch.Tensor.to, torch.Tensor.type, torch.softmax, torch.Tensor.softmax)
