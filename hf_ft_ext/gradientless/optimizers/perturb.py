"""Forward passes with perturbed weights: the stored weights are never touched, and no second model exists.

While a module's forward runs, each searched parameter that it owns is replaced by a perturbed copy, dropped right
after. A low-rank change of a linear layer or an embedding needs no copy: `x (W + L R^T)^T = x W^T + (x R) L^T` is
added to the layer's output. Several perturbations can run as one forward pass over the batch repeated that many times.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers.pytorch_utils import Conv1D

from hf_ft_ext.gradientless.optimizers.directions import Directions, Draw, compute_type

# What is added to the weights: directions with their factors.
Combination = Sequence[tuple[Draw, float]]


class CannotBatch(Exception):
    """These perturbations have to run one after the other."""


class PerturbedForward:
    """Lets a module's forward see perturbed weights.

    A parameter that several modules share is perturbed alike in all of them.

    Args:
        module: the model.
        parameters: those to perturb; the number of a parameter in this list goes to the directions.
        directions: how directions are drawn.

    Attributes:
        missing: numbers of the parameters that no module holds.
        unseen: numbers of the parameters that no forward has read so far.
        elsewhere: numbers of those that another module than their own reads.
    """

    def __init__(self, module: nn.Module, parameters: Sequence[torch.Tensor], directions: Directions):
        self.module, self.directions = module, directions
        number = {id(parameter): i for i, parameter in enumerate(parameters)}
        self.owners: list[_Owner] = []
        for name, holder in module.named_modules():
            names = {key: number[id(p)] for key, p in holder._parameters.items() if id(p) in number}
            if names:
                # containers have no forward: their parameters are read in that of the module around them
                inside = isinstance(holder, nn.ParameterDict | nn.ParameterList)
                user = module.get_submodule(name.rpartition(".")[0]) if inside else holder
                self.owners.append(_Owner(self, user, holder, names))
        found = {i for owner in self.owners for i in owner.names.values()}
        self.missing = sorted(set(number.values()) - found)
        self.unseen = set(range(len(parameters)))
        self.combinations: Sequence[Combination] = ()
        self.active: Sequence[int] = ()
        self.rows: int | None = None
        self.tangent = False
        self.weights: Sequence[float] | None = None
        self.elsewhere: set[int] = set()

    def read_elsewhere(self, number: int) -> None:
        """Perturb this parameter while the whole model runs: another module than its own reads it.

        DeBERTa's encoder, for one, takes the weight of an embedding that is never called.
        """
        self.elsewhere.add(number)
        self.unseen.discard(number)
        for owner in list(self.owners):
            if number in owner.names.values() and owner.user is not self.module:
                own = {name: i for name, i in owner.names.items() if i == number}
                owner.names = {name: i for name, i in owner.names.items() if i != number}
                self.owners.append(_Owner(self, self.module, owner.holder, own, on_output=False))

    @contextlib.contextmanager
    def weighted(self, weights: Sequence[float]) -> Iterator[None]:
        """Within, what combinations add to tensor `i` is multiplied with `weights[i]`."""
        self.weights = weights
        try:
            yield
        finally:
            self.weights = None

    @contextlib.contextmanager
    def __call__(self, *combinations: Combination) -> Iterator[None]:
        """Within, forwards see the weights plus the combination.

        With several, the forward of the model has to run over the batch repeated so many times, along the first
        dimension of all inputs, repetition by repetition.

        Raises:
            CannotBatch: in the forward: a module does not treat the repeated rows one by one.
        """
        self.combinations, self.active, self.rows = combinations, range(len(combinations)), None
        handles: list[Any] = []
        try:
            if len(combinations) > 1:
                handles.append(self.module.register_forward_pre_hook(self._count_rows, with_kwargs=True))
            for owner in self.owners:
                owner.install(handles, split=len(combinations) > 1)
            yield
        finally:
            for handle in handles:
                handle.remove()
            for owner in self.owners:
                owner.restore()
            self.combinations = self.active = ()

    @contextlib.contextmanager
    def along(self, draw: Draw) -> Iterator[None]:
        """Within, weights are dual numbers whose tangent is the direction: forward-mode differentiation.

        `forward_ad.unpack_dual(loss).tangent` is then the loss's derivative along it. Fused attention kernels have no
        forward derivative, so attention is computed by the plain formula.
        """
        self.tangent = True
        try:
            with forward_ad.dual_level(), sdpa_kernel(SDPBackend.MATH), self([(draw, 1.0)]):
                yield
        finally:
            self.tangent = False

    def _count_rows(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        values = [*args, *kwargs.values()]
        total = next((len(value) for value in values if isinstance(value, torch.Tensor) and value.ndim), 0)
        if total % len(self.combinations):
            raise CannotBatch(f"{total} rows are no {len(self.combinations)} repetitions of a batch")
        self.rows = total // len(self.combinations)

    @contextlib.contextmanager
    def only(self, candidate: int) -> Iterator[None]:
        """Within, a forward pass is about one of the candidates."""
        before, self.active = self.active, [candidate]
        try:
            yield
        finally:
            self.active = before

    def perturbed(self, parameter: torch.Tensor, number: int) -> torch.Tensor:
        """The parameter plus the active combination's part of it; with `tangent` a dual number."""
        (candidate,) = self.active
        combination = self.combinations[candidate]
        if not combination:
            return parameter.detach()
        result = parameter.detach().clone()
        if self.tangent:
            result.zero_()
        for part, change in self._changes(parameter, number, combination):
            chunk = result.view(-1)[part]
            if chunk.dtype == change.dtype:
                chunk.add_(change)
            else:
                chunk.copy_(change.add_(chunk))
        return forward_ad.make_dual(parameter.detach(), result) if self.tangent else result

    def _changes(
        self, parameter: torch.Tensor, number: int, combination: Combination
    ) -> Iterator[tuple[slice, torch.Tensor]]:
        """Chunk by chunk what the combination adds: `sum of factor * z`."""
        low_rank = self.directions.has_factors(parameter.shape)
        if low_rank:
            left, right = self.factors(parameter, number, combination)
        flat = parameter.detach().view(-1)
        for part in self.directions.chunks(parameter):
            if low_rank:
                rows = slice(part.start // parameter.shape[1], part.stop // parameter.shape[1])
                yield part, (left[rows] @ right.t()).view(-1)
                continue
            yield part, self.dense(flat[part], number, combination, part)

    def dense(self, values: torch.Tensor, number: int, combination: Combination, part: slice) -> torch.Tensor:
        """`sum of factor * z` on a chunk of a tensor, whose present entries there are `values`."""
        weight, total = self._weight(number), None
        for draw, factor in combination:
            z = self.directions.dense(values, number, draw, part)
            total = z.mul_(weight * factor) if total is None else total.add_(z, alpha=weight * factor)
        return total

    def _weight(self, number: int) -> float:
        return 1.0 if self.weights is None else self.weights[number]

    def factors(
        self, parameter: torch.Tensor, number: int, combination: Combination
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Factors `[out, r]`, `[in, r]` of the sum over a combination."""
        dtype, shape = compute_type(parameter.dtype), parameter.shape
        pairs = [self.directions.factors(shape, number, draw, dtype, parameter.device) for draw, _ in combination]
        weight = self._weight(number)
        lefts = [left * (weight * factor) for (left, _), (_, factor) in zip(pairs, combination, strict=True)]
        if self.directions.right_stays() and len({draw.basis for draw, _ in combination}) == 1:
            return torch.stack(lefts).sum(0), pairs[0][1]
        return torch.cat(lefts, 1), torch.cat([right for _, right in pairs], 1)


class _Owner:
    """One module that holds searched parameters, and how its forward is made to see them perturbed."""

    def __init__(
        self,
        forward: PerturbedForward,
        user: nn.Module,
        holder: nn.Module,
        names: dict[str, int],
        on_output: bool | None = None,
    ):
        self.forward, self.user, self.holder, self.names = forward, user, holder, names
        self.stored: dict[str, torch.Tensor] = {}
        self.original: Callable | None = None
        self.on_output = self._on_output() if on_output is None else on_output

    def _on_output(self) -> bool:
        """Whether a change of the weight can be added to the output instead."""
        kinds = {nn.Linear: nn.Linear.forward, nn.Embedding: nn.Embedding.forward, Conv1D: Conv1D.forward}
        plain = any(isinstance(self.holder, kind) and type(self.holder).forward is f for kind, f in kinds.items())
        if not plain or "weight" not in self.names or getattr(self.holder, "max_norm", None) is not None:
            return False
        return self.forward.directions.has_factors(self.holder._parameters["weight"].shape)

    def install(self, handles: list, split: bool) -> None:
        self.copied = {name: i for name, i in self.names.items() if not (self.on_output and name == "weight")}
        if not self.names:
            return
        if self.copied:
            handles.append(self.user.register_forward_pre_hook(self._enter))
            handles.append(self.user.register_forward_hook(self._leave, always_call=True))
        if self.on_output and "weight" in self.names:
            handles.append(self.user.register_forward_hook(self._add_to_output))
        if self.copied and split:
            self.original = self.user.forward
            self.had_own = "forward" in self.user.__dict__
            self.user.__dict__["forward"] = functools.partial(self._one_by_one, self.original)

    def restore(self) -> None:
        self._leave()
        if self.original is not None:
            if self.had_own:
                self.user.__dict__["forward"] = self.original
            else:
                del self.user.__dict__["forward"]
            self.original = None

    # --- parameters replaced by copies ---------------------------------------------------------------

    def _enter(self, *_: Any) -> None:
        if self.stored or len(self.forward.active) != 1:  # called from within its own forward, or one by one later
            return
        self.stored = {name: self.holder._parameters[name] for name in self.copied}
        for name, number in self.copied.items():
            self.holder._parameters[name] = self.forward.perturbed(self.stored[name], number)
        self.forward.unseen.difference_update(self.copied.values())

    def _leave(self, *_: Any) -> None:
        self.holder._parameters.update(self.stored)
        self.stored = {}

    def _one_by_one(self, original: Callable, *args: Any, **kwargs: Any) -> Any:
        """The module's forward on the rows of each active candidate by itself."""
        active = self.forward.active
        if len(active) == 1:
            return original(*args, **kwargs)
        total = len(active) * self.forward.rows
        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor) and value.ndim]
        by_rows = bool(tensors) and len(tensors[0]) == total
        if not by_rows and not (tensors and len(tensors[0]) == 1):
            raise CannotBatch(f"{type(self.user).__name__} does not get one input for each row")
        results = []
        for position, candidate in enumerate(active):
            rows = slice(position * self.forward.rows, (position + 1) * self.forward.rows)

            def part(value: Any, rows: slice = rows) -> Any:
                whole = isinstance(value, torch.Tensor) and value.ndim and len(value) == total
                return value[rows] if whole and by_rows else value

            with self.forward.only(candidate):
                self._enter()
                try:
                    results.append(original(*map(part, args), **{key: part(value) for key, value in kwargs.items()}))
                finally:
                    self._leave()
        return _joined(results, 1 if by_rows else self.forward.rows)

    # --- changes added to the output -----------------------------------------------------------------

    def _add_to_output(self, module: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor:
        number, weight, active = self.names["weight"], self.holder._parameters["weight"], self.forward.active
        self.forward.unseen.discard(number)
        combinations = [self.forward.combinations[candidate] for candidate in active]
        if not any(combinations):
            return output
        pairs = [self.forward.factors(weight, number, c) if c else None for c in combinations]
        first = next(pair for pair in pairs if pair is not None)
        pairs = [(torch.zeros_like(first[0]), first[1]) if pair is None else pair for pair in pairs]
        left, right = (_stacked([pair[side] for pair in pairs]).to(output.dtype) for side in (0, 1))
        n, x = len(active), args[0]
        if self.forward.tangent:
            x = forward_ad.unpack_dual(x).primal
        if n > 1 and len(x) != n * self.forward.rows:
            if len(x) != 1:
                raise CannotBatch(f"{type(module).__name__} does not get one input for each row")
            change = self._change(x.expand(n, *x.shape[1:]), left, right)
            return (output + change).repeat_interleave(self.forward.rows, 0)
        change = self._change(x, left, right).view(output.shape)
        if self.forward.tangent:
            return output + forward_ad.make_dual(torch.zeros_like(change), change)
        return output.add_(change) if not output.requires_grad else output + change

    def _change(self, x: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        """`(x R) L^T` for each of the `n` candidates: `x` `[n * rows, ...]` -> `[n * rows, ..., out]`."""
        n = len(left)
        if isinstance(self.holder, nn.Embedding):  # the weight is [words, width]: rows of L, times R^T
            words = x.reshape(n, -1)
            rows = torch.stack([one[ids] for one, ids in zip(left, words, strict=True)])
            return torch.bmm(rows, right.transpose(1, 2)).view(*x.shape, -1)
        if isinstance(self.holder, Conv1D):  # stored as [in, out]
            left, right = right, left
        inputs = x.to(left.dtype).reshape(n, -1, x.shape[-1])
        return torch.bmm(torch.bmm(inputs, right), left.transpose(1, 2)).view(*x.shape[:-1], -1)


def _stacked(factors: list[torch.Tensor]) -> torch.Tensor:
    """Factors of unequal rank as one tensor, with columns of zeros."""
    rank = max(factor.shape[1] for factor in factors)
    return torch.stack([nn.functional.pad(factor, [0, rank - factor.shape[1]]) for factor in factors])


def _joined(results: list[Any], repeat: int) -> Any:
    """Outputs of the candidates one behind the other; what was computed once for all rows is repeated for each."""
    first = results[0]
    if first is None:
        return None
    if isinstance(first, torch.Tensor):
        if repeat > 1 and len(first) != 1:
            raise CannotBatch("a module's output is not by rows")
        return torch.cat([result.repeat_interleave(repeat, 0) if repeat > 1 else result for result in results])
    if type(first) in (tuple, list):
        return type(first)(_joined(list(parts), repeat) for parts in zip(*results, strict=True))
    raise CannotBatch(f"a module gives a {type(first).__name__}")
