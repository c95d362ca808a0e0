"""Which rule holds for which parameter, found out by comparing one example's gradients with autograd's."""

import contextlib
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import nn

from hf_ft_ext.errors import InputError
from hf_ft_ext.per_example.capture import Capture, Function, Owner
from hf_ft_ext.per_example.comparison import differing, sparse_tables
from hf_ft_ext.per_example.rules import find_rule
from hf_ft_ext.per_example.shortcuts import first_position_only, last_feed_forward, skipping_zero_rows
from hf_ft_ext.per_example.state import Batch, only_trainable, row
from hf_ft_ext.per_example.types import Gradient

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
