"""Which rule holds for which parameter, found out by comparing one example's gradients with autograd's."""

import contextlib
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from math import inf

import torch
from torch import nn

from hf_ft_ext.errors import InputError
from hf_ft_ext.per_example.capture import Capture, Function, Owner
from hf_ft_ext.per_example.rules import find_rule
from hf_ft_ext.per_example.shortcuts import first_position_only, last_feed_forward, skipping_zero_rows
from hf_ft_ext.per_example.state import Batch, only_trainable
from hf_ft_ext.per_example.types import EmbeddingGradient, Gradient, LinearGradient, dense, largest

# What the second example counts in the trial's backward pass: a rule that mixes the two examples is noticed even where
# they are equal.
_SECOND = -1.7
# Relative differences beyond which a rule's gradient is another one than autograd's.
TOLERANCE = {torch.float64: 1e-7, torch.float32: 1e-2}
_HALF = 0.2
# Modules that only hold others, and are never called.
_CONTAINERS = (nn.ModuleDict, nn.ModuleList, nn.ParameterDict, nn.ParameterList)


class NotFinite(InputError):
    """The model's outputs are NaN or infinite."""


@dataclass
class Shortcuts:
    """How a model is run, as far as it bears it.

    Attributes:
        expand: see `Capture`.
        skip: frozen linear layers skip positions without gradient.
        short: the layer whose feed-forward part runs on the first position alone.
    """

    expand: bool = True
    skip: bool = True
    short: nn.Module | None = None

    @contextlib.contextmanager
    def used(self, model: nn.Module) -> Iterator[None]:
        """Inside, `model` runs so."""
        with first_position_only(self.short), skipping_zero_rows(model) if self.skip else contextlib.nullcontext():
            yield


@dataclass
class Trial:
    """Comparison with autograd, on two examples.

    Every parameter begins with the rule for its module; where that fails, the module is called again for each example
    alone, then the module around it. What is left is `uncovered`.

    Attributes:
        model, function, parameters: as for `ExampleGradients`.
        shortcuts: how the model is run; afterwards the ways that it bears.
        owners: after `run`, those whose rules hold.
        uncovered: after `run`, names of the parameters without a rule that holds; `None` if an example's outputs
            are others in the batch than alone.
    """

    model: nn.Module
    function: Function
    parameters: Mapping[str, nn.Parameter]
    shortcuts: Shortcuts = field(default_factory=Shortcuts)
    owners: list[Owner] = field(default_factory=list)
    uncovered: list[str] | None = None

    def run(self, few: Batch, tolerance: float) -> None:
        """Try all rules on the two examples of `few`.

        A forward pass costs about as much as it takes to read the weights, so none is made only to be compared.

        Raises:
            InputError: the model draws random numbers, or the function does not give scalars of each example.
            NotFinite: its scalars are not finite.
        """
        self.shortcuts.short = last_feed_forward(self.model)
        self._run(few, tolerance)
        if self.uncovered != [] and self.shortcuts.short is not None:  # maybe only for NaN that nobody reads
            self.shortcuts.short = None
            self._run(few, tolerance)

    def _run(self, few: Batch, tolerance: float) -> None:
        self.owners, self.uncovered = [], None
        together = self._outputs(few)
        if self.shortcuts.short is not None and not together.isfinite().all():
            return
        _check(together)
        weights = _combination(together)
        pending = first_owners(self.model, self.parameters)
        missing = set(self.parameters) - {name for owner in pending for name in owner.names.values()}
        uncovered = set(missing)
        compared = False
        while pending or not compared:
            wanted = {name: self.parameters[name] for owner in pending for name in owner.names.values()}
            combined, found, failed = self._by_rules(few, weights, pending)
            if not torch.equal(_weighted(together, weights), combined):
                self._refuse_random(few, together)
            with only_trainable(self.model, wanted.values()), sparse_tables(self.model):
                try:
                    first = self.function(self.model, row(few, 0))
                    if not compared:
                        compared = True
                        with torch.no_grad():
                            alone = torch.cat([first, self.function(self.model, row(few, 1))])
                        if not (together - alone).abs().max() <= tolerance * (1 + together.abs().max()):
                            return
                except ValueError:  # a norm over the batch refuses a batch of one
                    return
                scalar = _weighted(first, weights)[0, 0]
                sizes: dict[str, float] = {}
                if scalar.requires_grad:
                    failed |= differing(wanted, scalar, found, tolerance, failed, sizes)
            self.owners += settled(pending, failed, sizes)
            pending, hopeless = self._next_owners(pending, failed)
            uncovered |= hopeless
        if uncovered:
            # Examples run one by one for these, and then autograd gives the others that a module would be called
            # again for.
            uncovered |= {name for owner in self.owners if owner.rule is None for name in owner.names.values()}
            self.owners = without(self.owners, uncovered)
        self.uncovered = [name for name in self.parameters if name in uncovered]

    def _next_owners(self, owners: list[Owner], failed: set[str]) -> tuple[list[Owner], set[str]]:
        """What to try next for the failed parameters, and those for which nothing is left."""
        places: dict[str, dict[str, None]] = {}
        hopeless: set[str] = set()
        for owner in owners:
            for name in owner.names.values():
                if name in failed:
                    path = owner.path if owner.rule else parent(self.model, owner.path)
                    if path is None:
                        hopeless.add(name)
                    else:
                        places.setdefault(name, {})[path] = None
        grouped: dict[str, dict[str, str]] = {}
        for name, paths in places.items():
            if name in hopeless:
                continue
            for path in paths:
                module = self.model.get_submodule(path)
                for own, parameter in module.named_parameters():
                    if parameter is self.parameters[name]:
                        grouped.setdefault(path, {})[own] = name
        return [Owner(p, self.model.get_submodule(p), None, names) for p, names in grouped.items()], hopeless

    def _refuse_random(self, few: Batch, together: torch.Tensor) -> None:
        if not torch.equal(together, self._outputs(few)):
            raise InputError(
                f"{type(self.model).__name__} gives other outputs for the same batch in evaluation mode; "
                "remove what draws random numbers"
            )

    def _outputs(self, few: Batch) -> torch.Tensor:
        with torch.no_grad(), first_position_only(self.shortcuts.short):
            return self.function(self.model, few)

    def _by_rules(
        self, few: Batch, weights: torch.Tensor, owners: list[Owner]
    ) -> tuple[torch.Tensor, dict[str, list[Gradient]], set[str]]:
        """Combined scalars, the first example's gradients by name, and the names that can have none."""
        seeds = torch.tensor([1.0, _SECOND])

        def function(model: nn.Module, batch: Batch) -> torch.Tensor:
            combined = _weighted(self.function(model, batch), weights)
            scalars.append(combined.detach())
            return combined * seeds.to(combined)[:, None]

        while True:
            found: dict[str, list[Gradient]] = {}
            scalars: list[torch.Tensor] = []

            def receive(name: str, gradients: list[Gradient], scalar: int, first: int) -> None:
                found[name] = [gradient[:1] for gradient in gradients]  # noqa: B023

            for owner in owners:
                owner.layouts.clear()
            capture = Capture(owners, {}, 2, receive, self.shortcuts.expand, trial=True)
            try:
                with only_trainable(self.model, ()), self.shortcuts.used(self.model):
                    capture.run(self.model, few, function)
                return scalars[0], found, capture.failed
            except torch.OutOfMemoryError:
                raise
            except RuntimeError:
                # The model itself repeats what an embedding gives, or changes a linear layer's output in place.
                if self.shortcuts.expand and self.shortcuts.skip:
                    self.shortcuts.skip = False
                elif self.shortcuts.expand:
                    self.shortcuts.skip, self.shortcuts.expand = True, False
                elif self.shortcuts.skip:
                    self.shortcuts.skip = False
                else:
                    raise


def first_owners(model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> list[Owner]:
    """For each module with chosen parameters its rule, or the module that is to be called again."""
    name_of = {id(parameter): name for name, parameter in parameters.items()}
    ruled: list[Owner] = []
    again: dict[str, dict[str, str]] = {}
    for path, module in model.named_modules():
        own = dict(module.named_parameters(recurse=False, remove_duplicate=False))
        names = {key: name_of[id(parameter)] for key, parameter in own.items() if id(parameter) in name_of}
        if not names:
            continue
        rule = find_rule(module)
        if rule is not None:
            ruled.append(Owner(path, module, rule, names))
            continue
        called = path if not isinstance(module, _CONTAINERS) else parent(model, path)
        if called:
            inside = f"{path.removeprefix(called).removeprefix('.')}." if called != path else ""
            again.setdefault(called, {}).update({inside + key: name for key, name in names.items()})
    by_rule = {name for owner in ruled for name in owner.names.values()}
    again_owners = [Owner(path, model.get_submodule(path), None, names) for path, names in again.items()]
    return ruled + without(again_owners, by_rule)


def parent(model: nn.Module, path: str) -> str | None:
    """The module around the one at `path`, as long as it is part of a layer and not a stack of layers."""
    while path:
        path = path.rpartition(".")[0]
        module = model.get_submodule(path)
        if isinstance(module, _CONTAINERS):
            if isinstance(module, nn.ModuleList):
                return None  # the list of layers, or of experts: what is around it is more than a layer
            continue
        stack = any(isinstance(child, nn.ModuleList) for child in module.children())
        return None if stack or not path else path
    return None


def settled(owners: list[Owner], failed: Collection[str], sizes: Mapping[str, float]) -> list[Owner]:
    """The owners of the parameters whose rules hold.

    Where the example does not depend on a module at all nothing was compared: a batch that depends on it makes its
    parameters uncovered.
    """
    for owner in owners:
        owner.tried = any(sizes.get(name, 0.0) > 0 for name in owner.names.values() if name not in failed)
    return without(owners, failed)


def without(owners: list[Owner], names: Collection[str]) -> list[Owner]:
    """The owners, of the other parameters alone."""
    left = []
    for owner in owners:
        kept = {own: name for own, name in owner.names.items() if name not in names}
        if len(kept) == len(owner.names):
            left.append(owner)
        elif kept:
            left.append(Owner(owner.path, owner.module, owner.rule, kept, owner.tried, owner.layouts))
    return left


def tolerance_of(dtype: torch.dtype) -> float:
    """Relative difference that rounding explains."""
    return TOLERANCE.get(dtype, _HALF)


def row(batch: Batch, i: int) -> Batch:
    """One example as a batch."""
    return rows(batch, i, i + 1)


def rows(batch: Batch, first: int, last: int) -> Batch:
    """The examples `first` to `last` (exclusive); what has no row per example stays."""
    n = batch_size(batch)
    return {
        key: value[first:last] if isinstance(value, torch.Tensor) and value.ndim and len(value) == n else value
        for key, value in batch.items()
    }


def batch_size(batch: Batch) -> int:
    """Examples in `batch`."""
    return next(len(value) for value in batch.values() if isinstance(value, torch.Tensor) and value.ndim)


def _check(outputs: torch.Tensor) -> None:
    if outputs.ndim not in (1, 2) or len(outputs) != 2:
        raise InputError(
            f"the function gave shape {tuple(outputs.shape)} for 2 examples; it has to give one scalar "
            "per example [n], or several [n, c]"
        )
    if not outputs.isfinite().all():
        raise NotFinite("the model's outputs are not finite (NaN or infinite); look for bad weights, or load "
                        "the model in float32 or bfloat16 (float16 overflows)")  # fmt: skip


def _combination(scalars: torch.Tensor) -> torch.Tensor:
    """Random weights of the scalars of an example, none near 0: `[c]`."""
    count = 1 if scalars.ndim == 1 else scalars.shape[1]
    if count == 1:
        return scalars.new_ones(1)
    drawn = torch.randn(count, generator=torch.Generator().manual_seed(0)).to(scalars)
    return drawn + drawn.sign()


def _weighted(scalars: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """`sum_c weights[c] scalars[:, c]`: `[n, 1]`."""
    scalars = scalars[:, None] if scalars.ndim == 1 else scalars
    return (scalars * weights).sum(1, keepdim=True)


# --- comparison, parameter by parameter, without all gradients at once in memory ----------------------


def differing(
    parameters: Mapping[str, nn.Parameter],
    scalar: torch.Tensor,
    found: dict[str, list[Gradient]],
    tolerance: float,
    failed: Collection[str],
    sizes: dict[str, float],
) -> set[str]:
    """Names of the parameters whose gradients by rules, for the first example, are not the gradient of `scalar`.

    Args:
        parameters: those to look at, which require gradients.
        scalar: of the first example, with its graph; it is used up.
        found: by name; a parameter that is absent is said to have gradient 0.
        tolerance: of the largest entry of a parameter's gradient, and its square of the largest of all.
        failed: names to pass over.
        sizes: gets the largest entry of each parameter's gradient by autograd.
    """
    errors: dict[str, float] = {}
    sizes |= dict.fromkeys(parameters, 0.0)

    def compare(name: str, expected: torch.Tensor) -> None:
        expected = expected.coalesce() if expected.is_sparse else expected
        sizes[name] = largest(expected.values() if expected.is_sparse else expected)
        if name not in failed and name in found:
            try:
                errors[name] = _error(found[name], expected)
            except (IndexError, RuntimeError, TypeError):  # a rule made for other inputs: ids that are no ids, say
                errors[name] = inf

    with _each_gradient(parameters, compare):
        scalar.backward()
    top = max(sizes.values(), default=0.0)
    for name in parameters:
        if name not in errors and name not in failed:  # a hook saw it and autograd did not, or the reverse
            by_rule = largest(dense(found[name])) if name in found else 0.0
            errors[name] = abs(by_rule - sizes[name])
    return {n for n, error in errors.items() if not error <= tolerance * (sizes[n] + tolerance * top)}


def _error(gradients: list[Gradient], expected: torch.Tensor) -> float:
    """Largest difference between one example's gradient by rules and autograd's, which may be sparse by rows."""
    if all(isinstance(gradient, EmbeddingGradient) for gradient in gradients):  # a table is nearly all zero
        ids = torch.cat([gradient.ids[0] for gradient in gradients])
        read, places = ids.clamp_min(0).unique(return_inverse=True)
        grads = torch.cat([gradient.output_gradients[0] for gradient in gradients]) * (ids >= 0)[:, None]
        found = grads.new_zeros(len(read), expected.shape[1]).index_add_(0, places, grads)
        there = expected.index_select(0, read)
        entries = expected
        if expected.is_sparse:
            there, entries = there.to_dense(), expected.values()
        elsewhere = torch.linalg.vector_norm(entries, 1) - torch.linalg.vector_norm(there, 1)
        return max(largest(found - there), float(elsewhere.abs()))
    expected = expected.to_dense()
    expected = expected.to(torch.promote_types(expected.dtype, torch.float32))
    if all(isinstance(gradient, LinearGradient) and gradient.shape == expected.shape for gradient in gradients):
        for gradient in gradients:
            gradient.subtract_from(expected)  # dropped anyway
        return largest(expected)
    found = dense(gradients)[0]
    if found.shape != expected.shape:
        return inf
    return largest(found.sub_(expected))


@contextlib.contextmanager
def sparse_tables(model: nn.Module) -> Iterator[None]:
    """Embeddings give gradients of the rows that they read: a table may be most of a model."""
    tables = [m for m in model.modules() if isinstance(m, nn.Embedding) and not (m.sparse or m.scale_grad_by_freq)]
    for table in tables:
        table.sparse = True
    try:
        yield
    finally:
        for table in tables:
            table.sparse = False


@contextlib.contextmanager
def _each_gradient(
    parameters: Mapping[str, nn.Parameter], look: Callable[[str, torch.Tensor], None]
) -> Iterator[None]:
    """In a backward pass, hand each gradient to `look` and drop it: they never exist all at once."""
    before = {name: parameter.grad for name, parameter in parameters.items()}

    def hook(name: str) -> Callable[[nn.Parameter], None]:
        def received(parameter: nn.Parameter) -> None:
            gradient, parameter.grad = parameter.grad, None
            look(name, gradient)

        return received

    handles = []
    try:
        for name, parameter in parameters.items():
            parameter.grad = None
            handles.append(parameter.register_post_accumulate_grad_hook(hook(name)))
        yield
    finally:
        for handle in handles:
            handle.remove()
        for name, parameter in parameters.items():
            parameter.grad = before[name]
