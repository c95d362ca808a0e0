"""Watch which searched parameters are read outside of the forward of the modules that hold them.

Such reads do not see the perturbed copies that exist while a module's own forward runs. Examples: an output layer that
multiplies by the weight of the embedding, fused kernels that get the weights of several modules.
"""

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map


class Reads:
    """Reads of parameters outside of the forward of their module.

    Attributes:
        inside: numbers of the parameters that were read while the whole model ran.
        outside: numbers of those that were read by other code.
    """

    def __init__(self) -> None:
        self.inside: set[int] = set()
        self.outside: set[int] = set()


@contextlib.contextmanager
def watched_reads(model: nn.Module, users: Mapping[int, nn.Module], number_of: Mapping[int, int]) -> Iterator[Reads]:
    """Within this context, record reads of parameters outside of the forward of their module.

    Reading `dtype`, `shape` and other properties does not count; an operation on the values does.

    Args:
        model: the whole model.
        users: by `id` of each module that holds parameters, the module whose forward uses them.
        number_of: number of each parameter, by its `id`.
    """
    reads, running = Reads(), Counter[int]()
    original = nn.Module.__getattr__

    def record(number: int) -> None:
        (reads.inside if running[id(model)] else reads.outside).add(number)

    def read(module: nn.Module, name: str) -> Any:
        value = original(module, name)
        number = number_of.get(id(value)) if isinstance(value, torch.Tensor) else None
        if number is None or running[id(users.get(id(module), module))]:
            return value
        return _watched(value, lambda: record(number))

    def begin(module: nn.Module, *_: Any) -> None:
        running[id(module)] += 1

    def end(module: nn.Module, *_: Any) -> None:
        running[id(module)] -= 1

    handles = []
    for module in {id(module): module for module in (model, *users.values())}.values():
        handles.append(module.register_forward_pre_hook(begin))
        handles.append(module.register_forward_hook(end, always_call=True))
    nn.Module.__getattr__ = read
    try:
        yield reads
    finally:
        nn.Module.__getattr__ = original
        for handle in handles:
            handle.remove()


class _Watched(torch.Tensor):
    """A parameter whose first operation with a tensor as result is reported; results are ordinary tensors."""

    plain: torch.Tensor
    report: Callable[[], None]

    @classmethod
    def __torch_function__(cls, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        watched = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, _Watched)]
        args, kwargs = tree_map(lambda leaf: leaf.plain if isinstance(leaf, _Watched) else leaf, (args, kwargs or {}))
        result = func(*args, **kwargs)
        if any(isinstance(leaf, torch.Tensor) for leaf in tree_leaves(result)):
            for one in watched:
                one.report()
        return result


def _watched(parameter: torch.Tensor, report: Callable[[], None]) -> torch.Tensor:
    plain = parameter.detach()
    watched = plain.as_subclass(_Watched)
    watched.plain, watched.report = plain, report
    return watched
