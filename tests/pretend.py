"""An accelerator that computes on the CPU and refuses what CUDA refuses to mix.

Tensors on `DEVICE` hold a tensor of the CPU. An operation on them gives such tensors again. Refused are: tensors of
both devices in one operation (but for CPU tensors without dimensions, copies, and CPU indices into a tensor of the
device), a generator of the other device, and `.numpy()`.

The device type is torch's `lazy`: no backend is needed for its name, and its backward pass runs on the caller's
thread, so that nothing of the process has to be registered. All of it holds inside `pretend_accelerator()` only.
"""

import contextlib
import weakref
from collections.abc import Iterator
from typing import Any, ClassVar
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

DEVICE = torch.device("lazy", 0)
_Generator = torch.Generator
_MIXES = {torch.ops.aten.copy_.default, torch.ops.aten._to_copy.default}
_INDEXING = {torch.ops.aten.index.Tensor, torch.ops.aten.index_put_.default, torch.ops.aten.index_put.default,
             torch.ops.aten._index_put_impl_.default}  # fmt: skip


class PretendTensor(torch.Tensor):
    """A tensor on `DEVICE`; `held` is the one that computes."""

    held: torch.Tensor

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> "PretendTensor":
        made = torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype,
            device=DEVICE,
        )  # fmt: skip
        made.held = inner
        return made

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func is torch.Tensor.numpy or func is torch.Tensor.__array__:
            raise TypeError(f"can't convert {DEVICE} device type tensor to numpy. Use Tensor.cpu() to copy it first")
        if func == torch.Tensor.data.__set__:
            target, value = args
            if not (isinstance(target, PretendTensor) and isinstance(value, PretendTensor)):
                raise RuntimeError("incompatible tensor type: data of a tensor set to one of another device")
            target.held = value.held
        with torch._C.DisableTorchFunctionSubclass():  # the usual way makes results of `.cpu()` such tensors too
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        return _run(func, args, kwargs or {})

    def untyped_storage(self) -> torch.UntypedStorage:
        """That of `held`: who shares memory with whom."""
        return self.held.untyped_storage()

    def data_ptr(self) -> int:
        return self.held.data_ptr()

    def tolist(self) -> list:
        return self.held.tolist()

    def __reduce_ex__(self, protocol: int) -> Any:
        """In a file it is a tensor of the CPU, as which `map_location="cpu"` loads those of a device."""
        return self.held.__reduce_ex__(protocol)

    def __repr__(self, **_: Any) -> str:
        return f"PretendTensor({self.held!r})"


class PretendGenerator(_Generator):
    """A generator of `DEVICE`. Operations get it as another object, so it is known by its address."""

    known: ClassVar[weakref.WeakValueDictionary] = weakref.WeakValueDictionary()

    @classmethod
    def new(cls) -> "PretendGenerator":
        generator = cls()
        cls.known[generator._cdata] = generator
        return generator

    @property
    def device(self) -> torch.device:
        return DEVICE


class _Generators(type):
    def __call__(cls, device: Any = "cpu") -> torch.Generator:
        return PretendGenerator.new() if torch.device(device).type == DEVICE.type else _Generator(device)

    def __instancecheck__(cls, value: Any) -> bool:
        return isinstance(value, _Generator)


class _AnyGenerator(metaclass=_Generators):
    """`torch.Generator` that knows `DEVICE`."""


class _Factories(TorchDispatchMode):
    """Makes tensors on `DEVICE` where a call asks for it, and watches calls that have tensors of the CPU alone."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        return _run(func, args, kwargs or {})


def _run(func: Any, args: tuple, kwargs: dict) -> Any:
    leaves = tree_leaves((args, kwargs))
    here = [leaf for leaf in leaves if isinstance(leaf, PretendTensor)]
    asked = kwargs.get("device")
    result_here = bool(here) if asked is None else torch.device(asked).type == DEVICE.type
    _refuse_mixing(func, args, leaves, here)
    for leaf in leaves:
        if isinstance(leaf, _Generator) and (leaf._cdata in PretendGenerator.known) != result_here:
            raise RuntimeError(f"Expected a '{DEVICE if result_here else 'cpu'}' device type for generator")
    if not here and not result_here:
        return func(*args, **kwargs)
    inner_args, inner_kwargs = tree_map(lambda v: v.held if isinstance(v, PretendTensor) else v, (args, kwargs))
    if asked is not None:
        inner_kwargs = {**inner_kwargs, "device": torch.device("cpu")}
    found = func(*inner_args, **inner_kwargs)
    if not result_here:
        return found
    # torch has no sparse tensors of this device type: gradients of embeddings are dense instead
    found = tree_map(lambda v: PretendTensor(v.to_dense()) if isinstance(v, torch.Tensor) else v, found)
    changed = _changed(func, args, kwargs)
    if changed is None:
        return found
    if changed.shape != changed.held.shape:
        raise NotImplementedError(
            f"{func} changes the shape of a tensor in place, which `PretendTensor` does not follow"
        )
    return changed


def _changed(func: Any, args: tuple, kwargs: dict) -> PretendTensor | None:
    """The argument that an operation in place, or with `out`, changes and returns."""
    returns = func._schema.returns
    if not returns or returns[0].alias_info is None or not returns[0].alias_info.is_write:
        return None
    for i, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            return kwargs[argument.name] if argument.name in kwargs else args[i]
    return None


def _refuse_mixing(func: Any, args: tuple, leaves: list, here: list) -> None:
    others = [v for v in leaves if isinstance(v, torch.Tensor) and not isinstance(v, PretendTensor) and v.ndim]
    if not here or not others or func in _MIXES:
        return
    if func in _INDEXING and isinstance(args[0], PretendTensor):
        values = args[2:3]
        if all(isinstance(v, PretendTensor) or not v.ndim for v in values):
            return
    raise RuntimeError(
        f"Expected all tensors to be on the same device, but found at least two devices, {DEVICE} and cpu! ({func})"
    )


@contextlib.contextmanager
def _lifted_from_the_cpu() -> Iterator[None]:
    """`torch.tensor(numbers, device=...)` makes a tensor of the CPU and moves it, where operations are seen."""
    before = torch._C._only_lift_cpu_tensors()
    torch._C._set_only_lift_cpu_tensors(True)
    try:
        yield
    finally:
        torch._C._set_only_lift_cpu_tensors(before)


@contextlib.contextmanager
def pretend_accelerator() -> Iterator[torch.device]:
    """Within, `DEVICE` is there."""
    autocast = torch.is_autocast_enabled

    def no_autocast(*kind: Any) -> bool:
        return False if kind == (DEVICE.type,) else autocast(*kind)

    with (
        _lifted_from_the_cpu(),
        mock.patch.object(torch, "Generator", _AnyGenerator),
        mock.patch.object(torch, "is_autocast_enabled", no_autocast),
        _Factories(),
    ):
        yield DEVICE
