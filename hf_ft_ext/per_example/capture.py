"""`Capture`: one forward pass and one backward pass per scalar, whose hooks compute each parameter's gradients."""

import contextlib
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from hf_ft_ext.per_example.rules import Rule, expands_for_examples, is_sum_of_products, rows_and_factors
from hf_ft_ext.per_example.state import Batch, float64_stays, in_float64_mode, only_trainable
from hf_ft_ext.per_example.types import DenseGradient, Gradient

# Maps model and batch to one scalar per example, `[n]`, or several, `[n, c]`.
Function = Callable[[nn.Module, Batch], torch.Tensor]
# Takes a parameter's name, one gradient per use of it (to be summed), the scalar's index, and the first example.
Receiver = Callable[[str, list[Gradient], int, int], None]

# What a rule may raise on inputs that it was not written for. The parameter's gradients are then taken row by row.
RULE_ERRORS = (AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError, ArithmeticError)


@dataclass(eq=False)
class HookedModule:
    """A module with hooks, from whose calls the gradients of its parameters are computed.

    Attributes:
        path: its name in the model.
        module: the module.
        rule: maps its input and output gradient to per-example gradients; `None` = the module is called again for
            each example separately.
        names: name of each parameter within the module -> its name in the model.
        verified: whether the rule was compared with autograd. It is false if the trial's examples do not depend on
            the module.
        layouts: shapes of the calls that were verified. Calls with other layouts are not trusted.
    """

    path: str
    module: nn.Module
    rule: Rule | None
    names: dict[str, str]
    verified: bool = False
    layouts: list[Any] = field(default_factory=list)


@dataclass(eq=False)
class _Call:
    hooked: HookedModule
    index: int
    recorded: bool = False  # whether everything that its gradients need is stored
    inputs: torch.Tensor | None = None
    factors: torch.Tensor | None = None  # factors of an embedding that scales its rows
    leaves: list[Any] | None = None  # all arguments, for modules that are called again
    layout: Any = None


class Capture:
    """Computes the gradients of one batch's examples: by the modules' rules, and by autograd for `direct`.

    Args:
        hooked_modules: modules with rules.
        direct: parameters, by name, whose gradients autograd computes; only for a batch of one example.
        n: examples in the batch.
        receive: called with a parameter's gradients as soon as all its uses have theirs.
        expand: repeat the output of an embedding that runs on one row for the whole batch n times.
        trial: accept calls of any layout and record the layouts.
        first: position of the batch's first example among the caller's; passed to `receive`.
        skip: (name, scalar) pairs that `receive` does not get.

    Attributes:
        failed: names of parameters whose rule failed for some scalar.
        delivered: (name, scalar) pairs that were passed to `receive`.
    """

    def __init__(
        self,
        hooked_modules: list[HookedModule],
        direct: dict[str, nn.Parameter],
        n: int,
        receive: Receiver,
        expand: bool = True,
        trial: bool = False,
        first: int = 0,
        skip: Collection[tuple[str, int]] = (),
    ):
        self.hooked_modules, self.direct, self.n, self.receive = hooked_modules, direct, n, receive
        self.expand, self.trial, self.first, self.skip = expand, trial, first, skip
        self.failed: set[str] = set()
        self.delivered: set[tuple[str, int]] = set()
        self._by_hooks: dict[int, str] = {}  # id of each parameter of the modules -> its name
        self._calls: list[_Call] = []
        self._graph_inputs: list[torch.Tensor] = []  # leaves of the graph
        self._mode: Callable = contextlib.nullcontext
        self._paused = False
        self._scalar = 0
        self._last = False
        self._pending: dict[str, int] = {}
        self._found: dict[str, list[tuple[int, Gradient]]] = defaultdict(list)

    def forward(self, model: nn.Module, batch: Batch, function: Function) -> torch.Tensor:
        """Return the scalars `[n, c]` with their graph.

        The caller puts the model into evaluation mode and lets only `direct` require gradients.
        """
        self._mode = float64_stays if in_float64_mode() else contextlib.nullcontext
        with torch.enable_grad(), self._hooks(), self._direct_reads_in_the_graph():
            scalars = function(model, batch)
        scalars = scalars[:, None] if scalars.ndim == 1 else scalars
        self._refuse_direct_reads(scalars)
        return scalars

    def backward(self, scalars: torch.Tensor) -> None:
        """Pass the gradients of the scalars that `forward` returned to `receive`, one scalar after the other."""
        sources = [*self._graph_inputs, *self.direct.values()]
        if not scalars.requires_grad or not sources:
            return
        c = scalars.shape[1]
        for self._scalar in range(c):
            self._last = self._scalar + 1 == c
            self._begin_backward()
            grads = torch.autograd.grad(
                scalars[:, self._scalar].sum(), sources, retain_graph=not self._last, allow_unused=True
            )
            for name in list(self._found):  # this scalar does not depend on some uses of the parameter
                self._deliver(name)
            for name, grad in zip(self.direct, grads[len(self._graph_inputs) :], strict=True):
                if grad is not None:
                    self._pass_on(name, [DenseGradient(_at_least_float32(grad.detach().to_dense())[None])])

    # --- forward pass -------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _hooks(self) -> Iterator[None]:
        expanding = [hooked.module for hooked in self.hooked_modules if expands_for_examples(hooked.module)]
        with contextlib.ExitStack() as stack:
            for hooked in self.hooked_modules:
                stack.callback(hooked.module.register_forward_hook(self._hook(hooked), with_kwargs=True).remove)
            for module in expanding:
                module.per_example = True
                stack.callback(delattr, module, "per_example")
            yield

    @contextlib.contextmanager
    def _direct_reads_in_the_graph(self) -> Iterator[None]:
        """Let the modules' parameters require gradients, except while their own module runs.

        So the graph holds those that other code reads, such as the weight of an embedding that an output layer
        multiplies by. Hooks do not see such a use, and a later batch may contain one that the trial's rows did not.
        """

        def switch(parameters: list[nn.Parameter], on: bool) -> Callable:
            def hook(*_: Any) -> None:
                if not self._paused:
                    for parameter in parameters:
                        parameter.requires_grad_(on)

            return hook

        with contextlib.ExitStack() as stack:
            for hooked in self.hooked_modules:
                own = dict(hooked.module.named_parameters(remove_duplicate=False))
                parameters = [own[name] for name in hooked.names]
                self._by_hooks |= {id(own[inner]): name for inner, name in hooked.names.items()}
                stack.callback(hooked.module.register_forward_pre_hook(switch(parameters, False)).remove)
                stack.callback(hooked.module.register_forward_hook(switch(parameters, True), always_call=True).remove)
                switch(parameters, True)()
                stack.callback(switch(parameters, False))
            yield

    def _refuse_direct_reads(self, scalars: torch.Tensor) -> None:
        """Count parameters with a use outside of their module as failed: their gradients come from autograd."""
        seen, nodes = set(), [scalars.grad_fn]
        while nodes:
            node = nodes.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            nodes += [following for following, _ in node.next_functions]
            if name := self._by_hooks.get(id(getattr(node, "variable", None))):
                self.failed.add(name)

    def _hook(self, hooked: HookedModule) -> Callable:
        def hook(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
            if self._paused or not torch.is_grad_enabled():
                return None
            is_tuple = isinstance(output, tuple) and len(output) > 0
            output, *rest = output if is_tuple else (output,)
            if not isinstance(output, torch.Tensor) or not output.ndim or not output.is_floating_point():
                self.failed |= set(hooked.names.values())
                return None
            call, given = _Call(hooked, len(self._calls)), output
            self._calls.append(call)
            # A failure here matters only if the output gets a gradient.
            with contextlib.suppress(_NotPerExample, *RULE_ERRORS):
                if hooked.verified or self.trial:
                    given = self._record(call, args, kwargs, output, is_tuple)
                    call.recorded = True
            given = self._with_gradient_hook(call, given, args)
            if given is output:
                return None
            return (given, *rest) if is_tuple else given

        return hook

    def _with_gradient_hook(self, call: _Call, output: torch.Tensor, args: tuple) -> torch.Tensor:
        """Return `output` with a hook on its gradient; if it requires none, it becomes a leaf of the graph."""
        starts_graph = not output.requires_grad
        if starts_graph:
            output = output.detach().requires_grad_(True)
            self._graph_inputs.append(output)
        elif any(output is argument for argument in args):
            output = output.view_as(output)  # other modules may read the argument too
        output.register_hook(lambda grad: self._on_output_gradient(call, grad.detach()))
        return output.clone() if starts_graph else output  # the model may change it in place; a leaf forbids that

    def _record(self, call: _Call, args: tuple, kwargs: dict, output: torch.Tensor, is_tuple: bool) -> torch.Tensor:
        """Store what the call's gradients need, and return its output with one row per example."""
        hooked = call.hooked
        if hooked.rule is None:
            self._record_arguments(call, args, kwargs, output)
            return output
        if is_tuple:
            raise _NotPerExample
        if expands_for_examples(hooked.module):
            inputs = output
        elif isinstance(hooked.module, nn.Embedding) and type(hooked.module).forward is not nn.Embedding.forward:
            inputs, call.factors = rows_and_factors(hooked.module, args, kwargs)
        else:
            inputs = args[0] if args else next(iter(kwargs.values()), None)
        if not isinstance(inputs, torch.Tensor) or not inputs.ndim or len(inputs) != len(output):
            raise _NotPerExample
        # Position and token-type ids often come as one row that is broadcast to the batch. The gradient of such an
        # output would be summed over the examples, so the row is repeated per example.
        one_for_all = isinstance(hooked.module, nn.Embedding) and len(inputs) == 1 and inputs.ndim > 1
        if one_for_all and self.expand and self.n > 1:
            inputs, output = (tensor.expand(self.n, *tensor.shape[1:]) for tensor in (inputs, output))
            if call.factors is not None:
                call.factors = call.factors.expand(self.n, *call.factors.shape[1:])
        # The first axis holds the examples, or examples times tokens (OPT's feed-forward part).
        if len(inputs) % self.n:
            raise _NotPerExample
        call.layout = (inputs.ndim, output.ndim, len(inputs) != self.n, one_for_all)
        call.inputs = inputs.detach()
        return output

    def _record_arguments(self, call: _Call, args: tuple, kwargs: dict, output: torch.Tensor) -> None:
        """Store all arguments of the call, and which of them have a row per example."""
        leaves, spec = tree_flatten((args, kwargs))
        rows = tuple(i for i, leaf in enumerate(leaves) if self._has_rows(leaf))
        if len(output) != self.n or not rows:
            raise _NotPerExample
        call.leaves = [leaf.detach() if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
        call.layout = (spec, rows)

    def _check_layout(self, call: _Call) -> None:
        """Raise `_NotPerExample` if the trial saw no call of this layout.

        The trial decides which arguments have a row per example. So an axis that happens to be as long as the batch
        is not mistaken for the examples.
        """
        known = call.hooked.layouts
        if self.trial:
            known.append(call.layout)
        if call.hooked.rule is None:
            spec, rows = call.layout
            verified = {other_rows for other, other_rows in known if other == spec}
            if len(verified) != 1 or not set(*verified) <= set(rows):
                raise _NotPerExample
            call.layout = (spec, *verified)
            return
        ndim, out, flat, one_for_all = call.layout
        alike = [call.layout]
        if self.n == 1:  # with one example, one row for the batch and one row per example look the same
            alike.append((ndim, out, flat, not one_for_all))
        if not flat:  # examples of one token look the same as flattened tokens
            alike += [(ndim, out, True, shared) for _, _, _, shared in alike]
        if not any(layout in known for layout in alike):
            raise _NotPerExample

    def _has_rows(self, value: Any) -> bool:
        return isinstance(value, torch.Tensor) and value.ndim > 0 and len(value) == self.n

    # --- backward pass ------------------------------------------------------------------------------

    def _begin_backward(self) -> None:
        self._pending = defaultdict(int)
        for call in self._calls:
            for name in call.hooked.names.values():
                self._pending[name] += 1
        self._found.clear()

    def _on_output_gradient(self, call: _Call, grad: torch.Tensor) -> None:
        hooked = call.hooked
        names = set(hooked.names.values())
        if names <= self.failed:
            return
        try:
            gradients: dict[str, Gradient] = {}
            if call.recorded:
                self._check_layout(call)
                mode = contextlib.nullcontext if is_sum_of_products(hooked.rule) else self._mode
                with torch.no_grad(), mode():
                    rule = hooked.rule
                    gradients = self._by_rule(rule, call, grad) if rule else self._call_again(call, grad)
            elif grad.any():
                raise _NotPerExample
            # Otherwise the gradient is 0: dL/dW is linear in dL/dy, and dL/dy = 0 (lora_A while lora_B is zero).
        except torch.OutOfMemoryError:
            raise
        except (_NotPerExample, *RULE_ERRORS):
            self.failed |= names
            return
        if self._last:
            call.inputs = call.factors = call.leaves = None
        for own, name in hooked.names.items():
            self._pending[name] -= 1
            if own in gradients:
                self._found[name].append((call.index, gradients[own]))
            if not self._pending[name]:
                self._deliver(name)

    def _deliver(self, name: str) -> None:
        found = self._found.pop(name, None)
        if found and name not in self.failed:
            found.sort(key=lambda use: use[0])  # in the order of the forward pass
            self.delivered.add((name, self._scalar))
            self._pass_on(name, [gradient for _, gradient in found])

    def _pass_on(self, name: str, gradients: list[Gradient]) -> None:
        if (name, self._scalar) not in self.skip:
            self.receive(name, gradients, self._scalar, self.first)

    def _by_rule(self, rule: Rule, call: _Call, grad: torch.Tensor) -> dict[str, Gradient]:
        inputs, grad = _at_least_float32(call.inputs), _at_least_float32(grad)
        if call.factors is not None:  # y_t = f_t * W[id_t], so dL/dW[id_t] = f_t * dL/dy_t
            grad = grad * call.factors.to(grad.dtype)
        if len(inputs) != self.n:  # [n * tokens, ...] to [n, tokens, ...]
            inputs, grad = (x.reshape(self.n, -1, *x.shape[1:]) for x in (inputs, grad))
        return rule(call.hooked.module, inputs, grad)

    def _call_again(self, call: _Call, grad: torch.Tensor) -> dict[str, Gradient]:
        """Call the module for each example separately, and take its parameters' gradients from autograd."""
        module, own = call.hooked.module, dict(call.hooked.module.named_parameters(remove_duplicate=False))
        parameters = [own[name] for name in call.hooked.names]
        totals: list[torch.Tensor | None] = [None] * len(parameters)
        spec, sliced = call.layout
        assert call.leaves is not None  # recorded, as the module has no rule
        self._paused = True  # the hooks of submodules must ignore these calls
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
                        # dL/dtheta = (dy/dtheta)^T dL/dy, for example i alone
                        found = torch.autograd.grad(
                            output, parameters, grad[i : i + 1].to(output.dtype), allow_unused=True
                        )
                        _add_rows(totals, found, i, self.n)
        finally:
            self._paused = False
        return {
            name: DenseGradient(total)
            for name, total in zip(call.hooked.names, totals, strict=True)
            if total is not None
        }


class _NotPerExample(Exception):
    """The first axis of the module's tensors does not index the examples in a verified layout."""


def _add_rows(totals: list[torch.Tensor | None], found: tuple, i: int, n: int) -> None:
    for k, gradient in enumerate(found):
        if gradient is None:
            continue
        total = totals[k]
        if total is None:
            total = totals[k] = _at_least_float32(gradient).new_zeros(n, *gradient.shape)
        total[i] = gradient


def _at_least_float32(values: torch.Tensor) -> torch.Tensor:
    """Return `values` in float32 or wider, in which products of half-precision gradients are summed."""
    return values.to(torch.promote_types(values.dtype, torch.float32)) if values.is_floating_point() else values
