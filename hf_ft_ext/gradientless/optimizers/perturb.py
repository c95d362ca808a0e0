"""Forward passes with perturbed weights: the stored weights are never touched, and no second model exists.

While a module's forward runs, each searched parameter that it owns is replaced by a perturbed copy, dropped right
after. The weights of linear layers and embeddings, where most of a model is, are never copied as a whole (see
`owners`): dense changes are made and used chunk by chunk; a low-rank one, `x (W + L R^T)^T = x W^T + (x R) L^T`, is
added to the layer's output. Several perturbations can run as one forward pass over the batch repeated that many times.
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from hf_ft_ext.gradientless.optimizers.directions import Directions, Draw, compute_type
from hf_ft_ext.gradientless.optimizers.owners import CannotBatch, Combination, Owner


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
        self.owners: list[Owner] = []
        for name, holder in module.named_modules():
            names = {key: number[id(p)] for key, p in holder._parameters.items() if id(p) in number}
            if names:
                # containers have no forward: their parameters are read in that of the module around them
                inside = isinstance(holder, nn.ParameterDict | nn.ParameterList)
                user = module.get_submodule(name.rpartition(".")[0]) if inside else holder
                self.owners.append(Owner(self, user, holder, names))
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
                self.owners.append(Owner(self, self.module, owner.holder, own, by_weight=False))

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
        if self.tangent:
            tangent = torch.empty_like(parameter)
            for part in self.directions.chunks(parameter):
                tangent.view(-1)[part] = self._change(parameter, number, combination, part)
            return forward_ad.make_dual(parameter.detach(), tangent)
        result = torch.empty_like(parameter)
        for part in self.directions.chunks(parameter):
            result.view(-1)[part] = self.moved(parameter, number, combination, part)
        return result

    def moved(self, parameter: torch.Tensor, number: int, combination: Combination, part: slice) -> torch.Tensor:
        """A chunk of the parameter plus the combination's part of it: flat, in the parameter's type."""
        change = self._change(parameter, number, combination, part)
        return change.add_(parameter.detach().view(-1)[part]).to(parameter.dtype)

    def _change(self, parameter: torch.Tensor, number: int, combination: Combination, part: slice) -> torch.Tensor:
        """What the combination adds to a chunk: `sum of factor * z`."""
        if not self.directions.has_factors(parameter.shape):
            return self.dense(parameter.detach().view(-1)[part], number, combination, part)
        left, right = self.factors(parameter, number, combination)
        rows = slice(part.start // parameter.shape[1], part.stop // parameter.shape[1])
        return (left[rows] @ right.t()).view(-1)

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
