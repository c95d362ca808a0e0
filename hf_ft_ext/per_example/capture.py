"""Inputs and output gradients of the modules that own a parameter, taken by hooks in one forward and backward pass."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import nn

from hf_ft_ext.per_example.forms import Dense, Form
from hf_ft_ext.per_example.rules import Rule
from hf_ft_ext.per_example.state import Batch

# From model and batch to one scalar per example, `[n]`, or several, `[n, c]`.
Function = Callable[[nn.Module, Batch], torch.Tensor]


@dataclass
class Owner:
    """A module with chosen parameters: its rule, and the parameters' names in the model by their own."""

    name: str
    module: nn.Module
    rule: Rule
    names: dict[str, str]


@dataclass
class _Call:
    owner: Owner
    inputs: torch.Tensor
    output: torch.Tensor


class NoSplit(Exception):
    """The module ran on something else than one row per example, so its rule cannot tell the examples apart."""

    def __init__(self, owner: Owner):
        super().__init__(owner.name)
        self.owner = owner


def gradients(
    model: nn.Module,
    batch: Batch,
    function: Function,
    owners: list[Owner],
    direct: dict[str, nn.Parameter],
    n: int,
    expand: bool,
) -> tuple[torch.Tensor, list[dict[str, list[Form]]]]:
    """Scalars and their gradients by the owners' rules, and by autograd for `direct`; parameters hold no gradients.

    The model must be in the state that is wanted: evaluation mode, only `direct` requiring gradients.

    Args:
        n: examples in the batch; 1 if there are direct parameters.
        expand: give embeddings that would run on one row for the whole batch that row n times.

    Returns:
        Scalars `[n, c]`, and for each of the c the forms by parameter name. A parameter that the scalars do not
        depend on is absent.

    Raises:
        NoSplit: an owner ran on something else than `n` rows.
    """
    with torch.enable_grad(), _recording(owners, n, expand) as calls:
        scalars = function(model, batch)
    scalars = scalars[:, None] if scalars.ndim == 1 else scalars
    sources = [call.output for call in calls] + list(direct.values())
    found: list[dict[str, list[Form]]] = []
    for c in range(scalars.shape[1]):
        last = c + 1 == scalars.shape[1]
        grads: tuple = (None,) * len(sources)
        if scalars.requires_grad:
            grads = torch.autograd.grad(scalars[:, c].sum(), sources, retain_graph=not last, allow_unused=True)
        forms: dict[str, list[Form]] = {}
        for call, grad in zip(calls, grads, strict=False):
            if grad is not None:
                for own, form in call.owner.rule(call.owner.module, call.inputs, grad).items():
                    if own in call.owner.names:
                        forms.setdefault(call.owner.names[own], []).append(form)
        for name, grad in zip(direct, grads[len(calls) :], strict=True):
            if grad is not None:
                forms.setdefault(name, []).append(Dense(grad[None]))
        found.append(forms)
    return scalars.detach(), found


@contextlib.contextmanager
def _recording(owners: list[Owner], n: int, expand: bool) -> Iterator[list[_Call]]:
    calls: list[_Call] = []

    def repeat(module: nn.Module, args: tuple) -> tuple | None:
        # Position and token-type ids often come as one row, and the sum with the word embeddings broadcasts it: the
        # gradient of such a module's output would be summed over the examples.
        ids, *rest = args
        return (ids.expand(n, *ids.shape[1:]), *rest) if ids.ndim > 1 and len(ids) == 1 < n else None

    def record(owner: Owner) -> Callable:
        def hook(module: nn.Module, args: tuple, output: torch.Tensor) -> None:
            if not args or not isinstance(output, torch.Tensor) or len(args[0]) != n or len(output) != n:
                raise NoSplit(owner)
            if not output.requires_grad:  # no parameter below requires gradients: the graph begins here
                output.requires_grad_(True)
            calls.append(_Call(owner, args[0].detach(), output))

        return hook

    with contextlib.ExitStack() as stack:
        for owner in owners:
            if expand and isinstance(owner.module, nn.Embedding):
                stack.callback(owner.module.register_forward_pre_hook(repeat).remove)
            stack.callback(owner.module.register_forward_hook(record(owner)).remove)
        yield calls
