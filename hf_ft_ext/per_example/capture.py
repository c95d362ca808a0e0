"""Inputs and output gradients of the modules that own a parameter, taken by hooks in one forward and backward pass."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import nn

from hf_ft_ext.per_example.forms import Dense, Form
from hf_ft_ext.per_example.rules import Rule, looked_up
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
    tried: bool = True  # whether its rule was compared with autograd, or is about to be


@dataclass
class _Call:
    owner: Owner
    inputs: torch.Tensor
    output: torch.Tensor
    factors: torch.Tensor | None = None  # of an embedding that multiplies the rows that it reads


class NoSplit(Exception):
    """The module's rule cannot give the gradients of single examples: the module ran on something else than one row
    per example, the rule failed on what it was given, or it was never compared with autograd."""

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
    copy: bool = False,
) -> tuple[torch.Tensor, list[dict[str, list[Form]]]]:
    """Scalars and their gradients by the owners' rules, and by autograd for `direct`; parameters hold no gradients.

    The model must be in the state that is wanted: evaluation mode, only `direct` requiring gradients.

    Args:
        n: examples in the batch; 1 if there are direct parameters.
        expand: give embeddings that would run on one row for the whole batch that row n times.
        copy: let the model go on with copies of the lowest modules' outputs, for models that change these in place.

    Returns:
        Scalars `[n, c]`, and for each of the c the forms by parameter name. A parameter that the scalars do not
        depend on is absent.

    Raises:
        NoSplit: an owner has no gradients of single examples.
    """
    with torch.enable_grad(), _recording(owners, n, expand, copy) as calls:
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
                for own, form in _by_rule(call, grad).items():
                    if own in call.owner.names:
                        forms.setdefault(call.owner.names[own], []).append(form)
        for name, grad in zip(direct, grads[len(calls) :], strict=True):
            if grad is not None:
                forms.setdefault(name, []).append(Dense(grad[None]))
        found.append(forms)
    return scalars.detach(), found


def _by_rule(call: _Call, grad: torch.Tensor) -> dict[str, Form]:
    owner = call.owner
    if not owner.tried:
        raise NoSplit(owner)
    try:  # a rule may be made for another kind of input than this module takes
        grad = grad if call.factors is None else grad * call.factors.to(grad.dtype)
        return owner.rule(owner.module, call.inputs, grad)
    except (
        AttributeError,
        IndexError,
        RuntimeError,
        TypeError,
        ValueError,
    ) as error:
        raise NoSplit(owner) from error


@contextlib.contextmanager
def _recording(owners: list[Owner], n: int, expand: bool, copy: bool) -> Iterator[list[_Call]]:
    calls: list[_Call] = []

    def repeat(module: nn.Module, args: tuple) -> tuple | None:
        # Position and token-type ids often come as one row, and the sum with the word embeddings broadcasts it: the
        # gradient of such a module's output would be summed over the examples.
        if not args or not isinstance(args[0], torch.Tensor):
            return None
        ids, *rest = args
        return (ids.expand(n, *ids.shape[1:]), *rest) if ids.ndim > 1 and len(ids) == 1 < n else None

    def record(owner: Owner) -> Callable:
        def hook(module: nn.Module, args: tuple, kwargs: dict, output: torch.Tensor) -> torch.Tensor | None:
            tensors = (*args[:1], output)
            if len(tensors) < 2 or not all(isinstance(t, torch.Tensor) and t.ndim and len(t) == n for t in tensors):
                raise NoSplit(owner)
            lowest = not output.requires_grad  # no parameter below requires gradients: the graph begins here
            if lowest:
                output.requires_grad_(True)
            call = _Call(owner, args[0].detach(), output)
            if isinstance(module, nn.Embedding) and type(module).forward is not nn.Embedding.forward:
                try:
                    call.inputs, call.factors = looked_up(module, args, kwargs)
                except (IndexError, RuntimeError, TypeError, ValueError) as error:
                    raise NoSplit(owner) from error
            calls.append(call)
            return output.clone() if lowest and copy else None

        return hook

    with contextlib.ExitStack() as stack:
        for owner in owners:
            if expand and isinstance(owner.module, nn.Embedding):
                stack.callback(owner.module.register_forward_pre_hook(repeat).remove)
            stack.callback(owner.module.register_forward_hook(record(owner), with_kwargs=True).remove)
        yield calls
