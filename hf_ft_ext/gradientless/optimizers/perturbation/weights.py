"""Perturbed values of parameters: the stored value plus a sum of directions, each times a factor."""

import contextlib
from collections.abc import Iterator, Sequence

import torch
import torch.autograd.forward_ad as forward_ad

from hf_ft_ext.gradientless.optimizers.perturbation.directions import (
    Directions,
    Draw,
    compute_type,
    without_autocast,
)

# What is added to the weights: `sum of factor * direction`, as pairs of direction and factor.
Combination = Sequence[tuple[Draw, float]]


class PerturbedWeights:
    """Computes perturbed values of parameters for the active candidate.

    Args:
        directions: how directions are drawn.
        count: number of parameters.

    Attributes:
        combinations: what each candidate adds to the weights.
        active: indices of the candidates that the current forward pass evaluates.
        rows: rows of the batch, if several candidates run as one forward pass over the repeated batch; 0 before it.
        tangent: whether perturbed weights are dual numbers, for forward-mode differentiation.
        unread: numbers of the parameters that no forward pass has read so far.
    """

    def __init__(self, directions: Directions, count: int):
        self.directions = directions
        self.unread = set(range(count))
        self.combinations: Sequence[Combination] = ()
        self.active: Sequence[int] = ()
        self.rows = 0
        self.tangent = False
        self.weights: Sequence[float] | None = None

    @contextlib.contextmanager
    def weighted(self, weights: Sequence[float]) -> Iterator[None]:
        """Within this context, the change of tensor `i` is multiplied by `weights[i]`."""
        self.weights = weights
        try:
            yield
        finally:
            self.weights = None

    @contextlib.contextmanager
    def only(self, candidate: int) -> Iterator[None]:
        """Within this context, forward passes evaluate this candidate only."""
        before, self.active = self.active, [candidate]
        try:
            yield
        finally:
            self.active = before

    def perturbed(self, parameter: torch.Tensor, number: int) -> torch.Tensor:
        """The parameter plus the active candidate's change of it; with `tangent` a dual number."""
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
            result.view(-1)[part] = self.perturbed_chunk(parameter, number, combination, part)
        return result

    def perturbed_chunk(
        self, parameter: torch.Tensor, number: int, combination: Combination, part: slice
    ) -> torch.Tensor:
        """A chunk of the parameter plus the combination's change of it: flat, in the parameter's type."""
        change = self._change(parameter, number, combination, part)
        return change.add_(parameter.detach().view(-1)[part]).to(parameter.dtype)

    def _change(self, parameter: torch.Tensor, number: int, combination: Combination, part: slice) -> torch.Tensor:
        """The combination's change of a chunk: `sum of factor * z`, flat."""
        if not self.directions.has_factors(parameter.shape):
            return self.dense(parameter.detach().view(-1)[part], number, combination, part)
        left, right = self.factors(parameter, number, combination)
        rows = slice(part.start // parameter.shape[1], part.stop // parameter.shape[1])
        with without_autocast(parameter.device):
            return (left[rows] @ right.t()).view(-1)

    def dense(self, values: torch.Tensor, number: int, combination: Combination, part: slice) -> torch.Tensor:
        """`sum of factor * z` on a chunk of a tensor with dense directions.

        Args:
            values: the current entries of this chunk.
        """
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
        """Factors `L` `[out, r]` and `R` `[in, r]` of `sum of factor * z = L R^T` over a combination.

        With a common right factor, `L = sum of factor * left`; otherwise left and right factors are concatenated.
        """
        dtype, shape = compute_type(parameter.dtype), parameter.shape
        pairs = [self.directions.factors(shape, number, draw, dtype, parameter.device) for draw, _ in combination]
        weight = self._weight(number)
        lefts = [left * (weight * factor) for (left, _), (_, factor) in zip(pairs, combination, strict=True)]
        if self.directions.right_stays() and len({draw.basis for draw, _ in combination}) == 1:
            return torch.stack(lefts).sum(0), pairs[0][1]
        return torch.cat(lefts, 1), torch.cat([right for _, right in pairs], 1)
