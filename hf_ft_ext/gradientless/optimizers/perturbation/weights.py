"""What a perturbation makes of the weights: a parameter, or a chunk of it, plus directions with their factors."""

import contextlib
from collections.abc import Iterator, Sequence

import torch
import torch.autograd.forward_ad as forward_ad

from hf_ft_ext.gradientless.optimizers.perturbation.directions import Directions, Draw, compute_type

# What is added to the weights: directions with their factors.
Combination = Sequence[tuple[Draw, float]]


class PerturbedWeights:
    """Perturbed values of parameters, by the number of the parameter and the candidates that are active.

    Args:
        directions: how directions are drawn.
        count: number of parameters.

    Attributes:
        combinations: what each candidate adds to the weights.
        active: the candidates that the present forward pass is about.
        rows: rows of the batch, where several candidates run as one forward pass over its repetitions.
        tangent: whether perturbed weights are dual numbers, for forward-mode differentiation.
        unseen: numbers of the parameters that no forward has read so far.
    """

    def __init__(self, directions: Directions, count: int):
        self.directions = directions
        self.unseen = set(range(count))
        self.combinations: Sequence[Combination] = ()
        self.active: Sequence[int] = ()
        self.rows: int | None = None
        self.tangent = False
        self.weights: Sequence[float] | None = None

    @contextlib.contextmanager
    def weighted(self, weights: Sequence[float]) -> Iterator[None]:
        """Within, what combinations add to tensor `i` is multiplied with `weights[i]`."""
        self.weights = weights
        try:
            yield
        finally:
            self.weights = None

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
