"""Perturbing weights where they are used: the stored weights are never touched, no second model exists."""

import contextlib
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
        for owner in module.modules():
            names = {name: number[id(p)] for name, p in owner._parameters.items() if id(p) in number}
            if names:
                self.owners.append((owner, names))
        found = {i for _, names in self.owners for i in names.values()}
        self.missing = sorted(set(number.values()) - found)
        self.unseen = set(range(len(parameters)))

    @contextlib.contextmanager
    def __call__(self, perturbation: Perturbation) -> Iterator[None]:
        """Within, forwards see `perturbation(parameter, number)` in place of each parameter."""
        handles, stored = [], {}

        def enter(owner: nn.Module, names: dict[str, int]) -> None:
            if id(owner) in stored:  # called again from within its own forward
                return
            stored[id(owner)] = {name: owner._parameters[name] for name in names}
            for name, number in names.items():
                owner._parameters[name] = perturbation(stored[id(owner)][name], number)
            self.unseen.difference_update(names.values())

        def leave(owner: nn.Module) -> None:
            owner._parameters.update(stored.pop(id(owner), {}))

        for owner, names in self.owners:
            handles.append(owner.register_forward_pre_hook(lambda module, _, names=names: enter(module, names)))
            handles.append(owner.register_forward_hook(lambda module, *_: leave(module), always_call=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            for owner, _ in self.owners:
                leave(owner)
