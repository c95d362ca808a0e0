"""Perturbing weights where they are used: the stored weights are never touched, no second model exists."""

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import nn

Perturbation = Callable[[torch.Tensor, int], torch.Tensor]


class PerturbedUse:
    """Lets a module's forward see changed weights.

    While a module's forward runs, each searched parameter that the module owns is replaced by a changed copy, which
    is dropped right after: at any time the changed copies of one module exist, no more. A parameter that several
    modules share is changed alike in all of them.

    Args:
        module: the model.
        parameters: those to change; the number of a parameter in this list goes to the perturbation.

    Attributes:
        unseen: numbers of the parameters that no forward has read so far.
    """

    def __init__(self, module: nn.Module, parameters: Sequence[torch.Tensor]):
        number = {id(parameter): i for i, parameter in enumerate(parameters)}
        self.owners = []
        for name, holder in module.named_modules():
            names = {key: number[id(p)] for key, p in holder._parameters.items() if id(p) in number}
            if names:
                # containers have no forward: their parameters are read in that of the module around them
                inside = isinstance(holder, nn.ParameterDict | nn.ParameterList)
                user = module.get_submodule(name.rpartition(".")[0]) if inside else holder
                self.owners.append((user, holder, names))
        found = {i for *_, names in self.owners for i in names.values()}
        self.missing = sorted(set(number.values()) - found)
        self.unseen = set(range(len(parameters)))

    @contextlib.contextmanager
    def __call__(self, perturbation: Perturbation) -> Iterator[None]:
        """Within, forwards see `perturbation(parameter, number)` in place of each parameter."""
        handles, stored = [], {}

        def enter(holder: nn.Module, names: dict[str, int]) -> None:
            if id(holder) in stored:  # called again from within its own forward
                return
            stored[id(holder)] = {name: holder._parameters[name] for name in names}
            for name, number in names.items():
                holder._parameters[name] = perturbation(stored[id(holder)][name], number)
            self.unseen.difference_update(names.values())

        def leave(holder: nn.Module) -> None:
            holder._parameters.update(stored.pop(id(holder), {}))

        for user, holder, names in self.owners:
            before = functools.partial(lambda holder, names, *_: enter(holder, names), holder, names)
            after = functools.partial(lambda holder, *_: leave(holder), holder)
            handles.append(user.register_forward_pre_hook(before))
            handles.append(user.register_forward_hook(after, always_call=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            for _, holder, _ in self.owners:
                leave(holder)
