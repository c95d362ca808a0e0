"""`Trial`: verifies the rules by comparing one example's gradients with autograd's."""

import contextlib
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import nn

from hf_ft_ext.errors import InputError
from hf_ft_ext.per_example.capture import Capture, Function, HookedModule
from hf_ft_ext.per_example.comparison import differing_parameters, sparse_tables
from hf_ft_ext.per_example.rules import find_rule
from hf_ft_ext.per_example.shortcuts import first_position_only, last_feed_forward, skipping_zero_rows
from hf_ft_ext.per_example.state import Batch, only_trainable, row
from hf_ft_ext.per_example.types import Gradient

# Weight of the second example in the trial's backward pass (the first has 1). A rule that mixes the two examples then
# fails even where the examples are equal.
_SECOND_WEIGHT = -1.7
# Largest relative difference between a rule's gradient and autograd's that is explained by rounding.
TOLERANCE = {torch.float64: 1e-7, torch.float32: 1e-2}
_HALF_PRECISION_TOLERANCE = 0.2
# Modules that only hold others, and are never called.
_CONTAINERS = (nn.ModuleDict, nn.ModuleList, nn.ParameterDict, nn.ParameterList)


class NotFinite(InputError):
    """The model's outputs are NaN or infinite."""


@dataclass
class Shortcuts:
    """Shortcuts for running a model; the trial disables those that the model does not support.

    Attributes:
        expand: see `Capture`.
        skip_zero_gradients: frozen linear layers skip positions whose output gradient is zero.
        first_position_layer: the layer whose feed-forward part runs on the first position only.
    """

    expand: bool = True
    skip_zero_gradients: bool = True
    first_position_layer: nn.Module | None = None

    @contextlib.contextmanager
    def applied(self, model: nn.Module) -> Iterator[None]:
        """Run `model` with these shortcuts inside."""
        with (
            first_position_only(self.first_position_layer),
            skipping_zero_rows(model) if self.skip_zero_gradients else contextlib.nullcontext(),
        ):
            yield


@dataclass
class Trial:
    """Comparison of the rules with autograd, on two examples.

    Each parameter starts with the rule for its module. If that fails, the module is called again for each example
    separately; if that fails too, the module around it is. Parameters for which everything fails are `uncovered`.

    Attributes:
        model, function, parameters: as for `ExampleGradients`.
        shortcuts: how the model runs; after `run`, only shortcuts that the model supports are on.
        hooked_modules: after `run`, the modules whose rules hold.
        uncovered: after `run`, names of the parameters that no rule covers; `None` if an example's outputs in the
            batch differ from its outputs alone.
    """

    model: nn.Module
    function: Function
    parameters: Mapping[str, nn.Parameter]
    shortcuts: Shortcuts = field(default_factory=Shortcuts)
    hooked_modules: list[HookedModule] = field(default_factory=list)
    uncovered: list[str] | None = None

    def run(self, few: Batch, tolerance: float) -> None:
        """Verify all rules on the two examples of `few`.

        With so few rows a forward pass is bound by reading the weights, so passes serve several comparisons.

        Raises:
            InputError: the model draws random numbers, or the function does not give scalars per example.
            NotFinite: the scalars are not finite.
        """
        self.shortcuts.first_position_layer = last_feed_forward(self.model)
        self._run(few, tolerance)
        if self.uncovered != [] and self.shortcuts.first_position_layer is not None:
            # The NaN at other positions may have caused the failure: try again without this shortcut.
            self.shortcuts.first_position_layer = None
            self._run(few, tolerance)

    def _run(self, few: Batch, tolerance: float) -> None:
        self.hooked_modules, self.uncovered = [], None
        together = self._outputs(few)
        if self.shortcuts.first_position_layer is not None and not together.isfinite().all():
            return
        _check(together)
        weights = _combination(together)
        pending = initial_modules(self.model, self.parameters)
        missing = set(self.parameters) - {name for hooked in pending for name in hooked.names.values()}
        uncovered = set(missing)
        compared = False
        while pending or not compared:
            wanted = {name: self.parameters[name] for hooked in pending for name in hooked.names.values()}
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
                except ValueError:  # a batch norm refuses a batch of one
                    return
                scalar = _weighted(first, weights)[0, 0]
                sizes: dict[str, float] = {}
                if scalar.requires_grad:
                    failed |= differing_parameters(wanted, scalar, found, tolerance, failed, sizes)
            self.hooked_modules += keep_verified(pending, failed, sizes)
            pending, exhausted = self._next_modules(pending, failed)
            uncovered |= exhausted
        if uncovered:
            # Examples run one by one for these. Then autograd also gives the parameters of modules that would be
            # called again, at no extra cost.
            uncovered |= {
                name for hooked in self.hooked_modules if hooked.rule is None for name in hooked.names.values()
            }
            self.hooked_modules = without_parameters(self.hooked_modules, uncovered)
        self.uncovered = [name for name in self.parameters if name in uncovered]

    def _next_modules(
        self, hooked_modules: list[HookedModule], failed: set[str]
    ) -> tuple[list[HookedModule], set[str]]:
        """Return the modules to try next for the failed parameters, and the parameters with none left to try."""
        paths_by_name: dict[str, dict[str, None]] = {}
        exhausted: set[str] = set()
        for hooked in hooked_modules:
            for name in hooked.names.values():
                if name in failed:
                    path = hooked.path if hooked.rule else parent(self.model, hooked.path)
                    if path is None:
                        exhausted.add(name)
                    else:
                        paths_by_name.setdefault(name, {})[path] = None
        grouped: dict[str, dict[str, str]] = {}
        for name, paths in paths_by_name.items():
            if name in exhausted:
                continue
            for path in paths:
                module = self.model.get_submodule(path)
                for own, parameter in module.named_parameters():
                    if parameter is self.parameters[name]:
                        grouped.setdefault(path, {})[own] = name
        return [HookedModule(p, self.model.get_submodule(p), None, names) for p, names in grouped.items()], exhausted

    def _refuse_random(self, few: Batch, together: torch.Tensor) -> None:
        if not torch.equal(together, self._outputs(few)):
            raise InputError(
                f"{type(self.model).__name__} gives different outputs for the same batch in evaluation mode; "
                "remove what draws random numbers"
            )

    def _outputs(self, few: Batch) -> torch.Tensor:
        with torch.no_grad(), first_position_only(self.shortcuts.first_position_layer):
            return self.function(self.model, few)

    def _by_rules(
        self, few: Batch, weights: torch.Tensor, hooked_modules: list[HookedModule]
    ) -> tuple[torch.Tensor, dict[str, list[Gradient]], set[str]]:
        """Return the combined scalars, the first example's gradients by name, and the names whose rule failed."""
        seeds = torch.tensor([1.0, _SECOND_WEIGHT])

        def function(model: nn.Module, batch: Batch) -> torch.Tensor:
            combined = _weighted(self.function(model, batch), weights)
            scalars.append(combined.detach())
            return combined * seeds.to(combined)[:, None]

        while True:
            found: dict[str, list[Gradient]] = {}
            scalars: list[torch.Tensor] = []

            def receive(name: str, gradients: list[Gradient], scalar: int, first: int) -> None:
                found[name] = [gradient[:1] for gradient in gradients]  # noqa: B023

            for hooked in hooked_modules:
                hooked.layouts.clear()
            capture = Capture(hooked_modules, {}, 2, receive, self.shortcuts.expand, trial=True)
            try:
                with only_trainable(self.model, ()), self.shortcuts.applied(self.model):
                    capture.backward(capture.forward(self.model, few, function))
                return scalars[0], found, capture.failed
            except torch.OutOfMemoryError:
                raise
            except RuntimeError:
                # A shortcut failed: the model itself repeats an embedding's output, or changes a linear layer's
                # output in place. Try the other combinations.
                if self.shortcuts.expand and self.shortcuts.skip_zero_gradients:
                    self.shortcuts.skip_zero_gradients = False
                elif self.shortcuts.expand:
                    self.shortcuts.skip_zero_gradients, self.shortcuts.expand = True, False
                elif self.shortcuts.skip_zero_gradients:
                    self.shortcuts.skip_zero_gradients = False
                else:
                    raise


def initial_modules(model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> list[HookedModule]:
    """Return each module with chosen parameters and its rule, or the module to call again where there is no rule."""
    name_of = {id(parameter): name for name, parameter in parameters.items()}
    ruled: list[HookedModule] = []
    again: dict[str, dict[str, str]] = {}
    for path, module in model.named_modules():
        own = dict(module.named_parameters(recurse=False, remove_duplicate=False))
        names = {key: name_of[id(parameter)] for key, parameter in own.items() if id(parameter) in name_of}
        if not names:
            continue
        rule = find_rule(module)
        if rule is not None:
            ruled.append(HookedModule(path, module, rule, names))
            continue
        called = path if not isinstance(module, _CONTAINERS) else parent(model, path)
        if called:
            inside = f"{path.removeprefix(called).removeprefix('.')}." if called != path else ""
            again.setdefault(called, {}).update({inside + key: name for key, name in names.items()})
    by_rule = {name for hooked in ruled for name in hooked.names.values()}
    called_again = [HookedModule(path, model.get_submodule(path), None, names) for path, names in again.items()]
    return ruled + without_parameters(called_again, by_rule)


def parent(model: nn.Module, path: str) -> str | None:
    """Return the path of the module around the one at `path`, or `None` if that is more than a layer."""
    while path:
        path = path.rpartition(".")[0]
        module = model.get_submodule(path)
        if isinstance(module, _CONTAINERS):
            if isinstance(module, nn.ModuleList):
                return None  # a list of layers or experts: the module around it is more than a layer
            continue
        stack = any(isinstance(child, nn.ModuleList) for child in module.children())
        return None if stack or not path else path
    return None


def keep_verified(
    hooked_modules: list[HookedModule], failed: Collection[str], sizes: Mapping[str, float]
) -> list[HookedModule]:
    """Return the modules without the failed parameters, and mark which of them were compared.

    If the example does not depend on a module, nothing was compared: its parameters become uncovered as soon as a
    batch depends on it.
    """
    for hooked in hooked_modules:
        hooked.verified = any(sizes.get(name, 0.0) > 0 for name in hooked.names.values() if name not in failed)
    return without_parameters(hooked_modules, failed)


def without_parameters(hooked_modules: list[HookedModule], names: Collection[str]) -> list[HookedModule]:
    """Return the modules without the parameters `names`; modules with no parameter left are dropped."""
    left = []
    for hooked in hooked_modules:
        kept = {own: name for own, name in hooked.names.items() if name not in names}
        if len(kept) == len(hooked.names):
            left.append(hooked)
        elif kept:
            left.append(HookedModule(hooked.path, hooked.module, hooked.rule, kept, hooked.verified, hooked.layouts))
    return left


def tolerance_of(dtype: torch.dtype) -> float:
    """Return the relative difference that rounding in `dtype` explains."""
    return TOLERANCE.get(dtype, _HALF_PRECISION_TOLERANCE)


def _check(outputs: torch.Tensor) -> None:
    if outputs.ndim not in (1, 2) or len(outputs) != 2:
        raise InputError(
            f"the function returned shape {tuple(outputs.shape)} for 2 examples; it has to return one scalar "
            "per example [n], or several [n, c]"
        )
    if not outputs.isfinite().all():
        raise NotFinite("the model's outputs are not finite (NaN or infinite); check the weights, or load the model "
                        "in float32 or bfloat16 (float16 overflows)")  # fmt: skip


def _combination(scalars: torch.Tensor) -> torch.Tensor:
    """Draw random weights for the scalars of an example, none near 0: `[c]`."""
    count = 1 if scalars.ndim == 1 else scalars.shape[1]
    if count == 1:
        return scalars.new_ones(1)
    drawn = torch.randn(count, generator=torch.Generator().manual_seed(0)).to(scalars)
    return drawn + drawn.sign()


def _weighted(scalars: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """`sum_c weights[c] scalars[:, c]`: `[n, 1]`."""
    scalars = scalars[:, None] if scalars.ndim == 1 else scalars
    return (scalars * weights).sum(1, keepdim=True)
