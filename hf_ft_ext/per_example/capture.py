"""One forward pass and a backward pass per scalar, in which hooks hand on each parameter's gradients as they come."""

import contextlib
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from hf_ft_ext.per_example.rules import Rule, expands_for_examples, rows_and_factors
from hf_ft_ext.per_example.state import Batch, float64_stays, in_float64_mode, only_trainable
from hf_ft_ext.per_example.types import DenseGradient, Gradient

# From model and batch to one scalar per example, `[n]`, or several, `[n, c]`.
Function = Callable[[nn.Module, Batch], torch.Tensor]
# Takes the name of a parameter, what its uses give it (to be summed), the number of the scalar, and the first example.
Receiver = Callable[[str, list[Gradient], int, int], None]

# What a rule raises that was made for another kind of input; the parameter goes row by row then.
RULE_ERRORS = (AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError, ArithmeticError)


@dataclass(eq=False)
class Owner:
    """A module whose calls give the gradients of parameters.

    Attributes:
        path: its name in the model.
        module: the module.
        rule: from its input and output gradient to gradients per example; `None`: the module is called again for each
            example alone.
        names: name of each parameter within the module -> its name in the model.
        tried: whether it was compared with autograd: an example that depends on it was among those of the trial.
        layouts: of the calls that were tried; a call of another layout has no gradients of single examples.
    """

    path: str
    module: nn.Module
    rule: Rule | None
    names: dict[str, str]
    tried: bool = False
    layouts: list[Any] = field(default_factory=list)


@dataclass(eq=False)
class _Call:
    owner: Owner
    index: int
    noted: bool = False  # what its gradients need is there
    inputs: torch.Tensor | None = None
    factors: torch.Tensor | None = None  # of an embedding that multiplies the rows that it reads
    leaves: list[Any] | None = None  # all arguments, where the module is called again
    layout: Any = None


class _NotSplit(Exception):
    """The module's first axis does not count the examples in a way that was tried."""


class Capture:
    """Gradients of the examples of one batch by the owners' rules, and by autograd for `direct`.

    Args:
        owners: modules with rules.
        direct: parameters, by name, that require gradients themselves; only for a batch of one example.
        n: examples in the batch.
        receive: gets a parameter's gradients as soon as the last of its uses has its own, and keeps them or not.
        expand: embeddings that run on one row for the whole batch give it n times.
        trial: take calls of any layout and note them.

    Attributes:
        failed: names of parameters whose rule failed, for some scalar.
        handed_on: name and scalar of what `receive` got.
    """

    def __init__(
        self,
        owners: list[Owner],
        direct: dict[str, nn.Parameter],
        n: int,
        receive: Receiver,
        expand: bool = True,
        trial: bool = False,
    ):
        self.owners, self.direct, self.n, self.receive = owners, direct, n, receive
        self.expand, self.trial = expand, trial
        self.failed: set[str] = set()
        self.handed_on: set[tuple[str, int]] = set()
        self._calls: list[_Call] = []
        self._lowest: list[torch.Tensor] = []  # where the graph begins
        self._mode: Callable = contextlib.nullcontext
        self._paused = False
        self._scalar = 0
        self._last = False
        self._pending: dict[str, int] = {}
        self._found: dict[str, list[tuple[int, Gradient]]] = defaultdict(list)

    def run(self, model: nn.Module, batch: Batch, function: Function, check: Callable | None = None) -> torch.Tensor:
        """The scalars `[n, c]`, detached; their gradients go to `receive`.

        The model must be in the state that is wanted: evaluation mode, only `direct` requiring gradients.

        Args:
            check: called with the scalars before the first backward pass; it may raise.
        """
        self._mode = float64_stays if in_float64_mode() else contextlib.nullcontext
        with torch.enable_grad(), self._recording():
            scalars = function(model, batch)
        scalars = scalars[:, None] if scalars.ndim == 1 else scalars
        if check is not None:
            check(scalars)
        sources = [*self._lowest, *self.direct.values()]
        if not scalars.requires_grad or not sources:
            return scalars.detach()
        c = scalars.shape[1]
        for self._scalar in range(c):
            self._last = self._scalar + 1 == c
            self._begin()
            grads = torch.autograd.grad(
                scalars[:, self._scalar].sum(), sources, retain_graph=not self._last, allow_unused=True
            )
            for name in list(self._found):  # some uses have no part in this scalar
                self._hand_on(name)
            for name, grad in zip(self.direct, grads[len(self._lowest) :], strict=True):
                if grad is not None:
                    self.receive(name, [DenseGradient(_wide(grad.detach().to_dense())[None])], self._scalar, 0)
        return scalars.detach()

    # --- forward pass -------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _recording(self) -> Iterator[None]:
        expanding = [owner.module for owner in self.owners if expands_for_examples(owner.module)]
        with contextlib.ExitStack() as stack:
            for owner in self.owners:
                stack.callback(owner.module.register_forward_hook(self._hook(owner), with_kwargs=True).remove)
            for module in expanding:
                module.per_example = True
                stack.callback(delattr, module, "per_example")
            yield

    def _hook(self, owner: Owner) -> Callable:
        def hook(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
            if self._paused or not torch.is_grad_enabled():
                return None
            is_tuple = isinstance(output, tuple) and len(output) > 0
            output, *rest = output if is_tuple else (output,)
            if not isinstance(output, torch.Tensor) or not output.ndim or not output.is_floating_point():
                self.failed |= set(owner.names.values())
                return None
            call, given = _Call(owner, len(self._calls)), output
            self._calls.append(call)
            # A failure here matters only if a gradient arrives.
            with contextlib.suppress(_NotSplit, *RULE_ERRORS):
                if owner.tried or self.trial:
                    given = self._note(call, args, kwargs, output, is_tuple)
                    call.noted = True
            given = self._watched(call, given, args)
            if given is output:
                return None
            return (given, *rest) if is_tuple else given

        return hook

    def _watched(self, call: _Call, output: torch.Tensor, args: tuple) -> torch.Tensor:
        """`output` with a hook on its gradient; where no parameter below requires one, the graph begins here."""
        lowest = not output.requires_grad
        if lowest:
            output = output.detach().requires_grad_(True)
            self._lowest.append(output)
        elif any(output is argument for argument in args):
            output = output.view_as(output)  # other modules may read the argument too
        output.register_hook(lambda grad: self._arrived(call, grad.detach()))
        return output.clone() if lowest else output  # the model may change it in place, which leaves do not allow

    def _note(self, call: _Call, args: tuple, kwargs: dict, output: torch.Tensor, is_tuple: bool) -> torch.Tensor:
        """Keep of a call what its gradients need; its output, a row for each example."""
        owner = call.owner
        if owner.rule is None:
            self._note_arguments(call, args, kwargs, output)
            return output
        if is_tuple:
            raise _NotSplit
        if expands_for_examples(owner.module):
            inputs = output
        elif isinstance(owner.module, nn.Embedding) and type(owner.module).forward is not nn.Embedding.forward:
            inputs, call.factors = rows_and_factors(owner.module, args, kwargs)
        else:
            inputs = args[0] if args else next(iter(kwargs.values()), None)
        if not isinstance(inputs, torch.Tensor) or not inputs.ndim or len(inputs) != len(output):
            raise _NotSplit
        # Position and token-type ids often come as one row, and the sum with the word embeddings broadcasts it: the
        # gradient of such a module's output would be summed over the examples.
        one_for_all = isinstance(owner.module, nn.Embedding) and len(inputs) == 1 and inputs.ndim > 1
        if one_for_all and self.expand and self.n > 1:
            inputs, output = (tensor.expand(self.n, *tensor.shape[1:]) for tensor in (inputs, output))
            if call.factors is not None:
                call.factors = call.factors.expand(self.n, *call.factors.shape[1:])
        # The first axis counts examples, or examples and their tokens (OPT's feed-forward part).
        if len(inputs) % self.n:
            raise _NotSplit
        call.layout = (inputs.ndim, output.ndim, len(inputs) != self.n, one_for_all)
        call.inputs = inputs.detach()
        return output

    def _note_arguments(self, call: _Call, args: tuple, kwargs: dict, output: torch.Tensor) -> None:
        """Keep all arguments, and which of them have a row per example."""
        leaves, spec = tree_flatten((args, kwargs))
        rows = tuple(i for i, leaf in enumerate(leaves) if self._has_rows(leaf))
        if len(output) != self.n or not rows:
            raise _NotSplit
        call.leaves = [leaf.detach() if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
        call.layout = (spec, rows)

    def _check_layout(self, call: _Call) -> None:
        """Raise `_NotSplit` if the trial knows no call of this layout; what has a row per example is as it was there.

        So an axis that is as long as the batch by accident is not taken for the examples.
        """
        known = call.owner.layouts
        if self.trial:
            known.append(call.layout)
        if call.owner.rule is None:
            spec, rows = call.layout
            tried = {other_rows for other, other_rows in known if other == spec}
            if len(tried) != 1 or not set(*tried) <= set(rows):
                raise _NotSplit
            call.layout = (spec, *tried)
            return
        ndim, out, flat, one_for_all = call.layout
        alike = [call.layout]
        if self.n == 1:  # one example alone does not tell one row for all from one row for each
            alike.append((ndim, out, flat, not one_for_all))
        if not flat:  # examples of one token
            alike += [(ndim, out, True, shared) for _, _, _, shared in alike]
        if not any(layout in known for layout in alike):
            raise _NotSplit

    def _has_rows(self, value: Any) -> bool:
        return isinstance(value, torch.Tensor) and value.ndim > 0 and len(value) == self.n

    # --- backward pass ------------------------------------------------------------------------------

    def _begin(self) -> None:
        self._pending = defaultdict(int)
        for call in self._calls:
            for name in call.owner.names.values():
                self._pending[name] += 1
        self._found.clear()

    def _arrived(self, call: _Call, grad: torch.Tensor) -> None:
        owner = call.owner
        names = set(owner.names.values())
        if names <= self.failed:
            return
        try:
            gradients: dict[str, Gradient] = {}
            if call.noted:
                self._check_layout(call)
                with torch.no_grad(), self._mode():
                    gradients = self._by_rule(call, grad) if owner.rule else self._call_again(call, grad)
            elif grad.any():
                raise _NotSplit
            # else nothing: dL/dW is linear in dL/dy, and dL/dy = 0 (of lora_A while lora_B is zero)
        except torch.OutOfMemoryError:
            raise
        except (_NotSplit, *RULE_ERRORS):
            self.failed |= names
            return
        if self._last:
            call.inputs = call.factors = call.leaves = None
        for own, name in owner.names.items():
            self._pending[name] -= 1
            if own in gradients:
                self._found[name].append((call.index, gradients[own]))
            if not self._pending[name]:
                self._hand_on(name)

    def _hand_on(self, name: str) -> None:
        found = self._found.pop(name, None)
        if found and name not in self.failed:
            found.sort(key=lambda use: use[0])  # in the order of the forward pass
            self.handed_on.add((name, self._scalar))
            self.receive(name, [gradient for _, gradient in found], self._scalar, 0)

    def _by_rule(self, call: _Call, grad: torch.Tensor) -> dict[str, Gradient]:
        inputs, grad = _wide(call.inputs), _wide(grad)
        if call.factors is not None:
            grad = grad * call.factors.to(grad.dtype)
        if len(inputs) != self.n:  # examples and tokens in one axis
            inputs, grad = (x.reshape(self.n, -1, *x.shape[1:]) for x in (inputs, grad))
        return call.owner.rule(call.owner.module, inputs, grad)

    def _call_again(self, call: _Call, grad: torch.Tensor) -> dict[str, Gradient]:
        """The module called for each example alone, with autograd's gradients of its parameters."""
        module, own = call.owner.module, dict(call.owner.module.named_parameters(remove_duplicate=False))
        parameters = [own[name] for name in call.owner.names]
        totals: list[torch.Tensor | None] = [None] * len(parameters)
        spec, sliced = call.layout
        self._paused = True  # what the module's parts do now is no call of the model's
        try:
            with only_trainable(module, parameters), torch.enable_grad():
                for i in range(self.n):
                    leaves = list(call.leaves)
                    for position in sliced:
                        leaves[position] = leaves[position][i : i + 1]
                    args, kwargs = tree_unflatten(leaves, spec)
                    output = module.forward(*args, **kwargs)
                    output = output[0] if isinstance(output, tuple) else output
                    if output.requires_grad:
                        found = torch.autograd.grad(
                            output, parameters, grad[i : i + 1].to(output.dtype), allow_unused=True
                        )
                        _add_rows(totals, found, i, self.n)
        finally:
            self._paused = False
        return {
            name: DenseGradient(total)
            for name, total in zip(call.owner.names, totals, strict=True)
            if total is not None
        }


def _add_rows(totals: list[torch.Tensor | None], found: tuple, i: int, n: int) -> None:
    for k, gradient in enumerate(found):
        if gradient is None:
            continue
        if totals[k] is None:
            totals[k] = _wide(gradient).new_zeros(n, *gradient.shape)
        totals[k][i] = gradient


def _wide(values: torch.Tensor) -> torch.Tensor:
    """In single precision at least: products of half-precision gradients are summed in it."""
    return values.to(torch.promote_types(values.dtype, torch.float32)) if values.is_floating_point() else values
