"""Gradient estimates from losses: the perturbations that a step evaluates, and the slope along each direction.

The estimate is `G = 1/n sum_i slope_i z_i` (with an additional factor for LOZO, see `Directions.scale`).
"""

from collections.abc import Sequence

import torch

from hf_ft_ext.errors import InputError
from hf_ft_ext.gradientless.optimizers.base import check_perturbation
from hf_ft_ext.gradientless.optimizers.perturbation.directions import Draw
from hf_ft_ext.gradientless.optimizers.perturbation.weights import Combination

ESTIMATES = TWO_SIDED, ONE_SIDED, POPULATION, FORWARD = ("two-sided", "one-sided", "population", "forward")
_LEAST = {TWO_SIDED: 1, ONE_SIDED: 2, POPULATION: 2, FORWARD: 1}


class Estimate:
    """Computes slopes along directions.

    | kind | slope of direction `z_i` | losses per step | source |
    | --- | --- | --- | --- |
    | `two-sided` | `(L(theta + eps z_i) - L(theta - eps z_i)) / (2 eps)` | 2 n | SPSA; MeZO, arXiv 2305.17333 |
    | `one-sided` | `(L_i - L(theta)) / sigma` | n + 1 | FZOO, arXiv 2506.09034 |
    | `population` | `(L_i - mean) / sigma`: z-scores | n | Qiu et al., arXiv 2509.24372 |
    | `forward` | the derivative along `z_i`, by forward-mode differentiation | n | Baydin et al., arXiv 2202.08587 |

    `L_i = L(theta + eps z_i)`, and sigma is their standard deviation (with n - 1 for `one-sided`, n for `population`).
    Slopes of `one-sided` and `population` are normalised, so the learning rate sets the length of the step; they are 0
    if all `L_i` are equal. FZOO's paper has another factor `1 / eps`; its authors' code (DKmiyan/FZOO) omits it, as
    here, so that the learning rates of its scripts can be used. That code divides by n, not n - 1, in sigma. The
    learning rate of a population is called alpha in the paper.

    Args:
        kind: one of `ESTIMATES`.
        eps: size of the perturbation, above 0; not used by `forward`.
        directions: directions per step, 1 or more; 2 or more for a standard deviation.
    """

    def __init__(self, kind: str, eps: float, directions: int):
        if kind not in ESTIMATES:
            raise InputError(f"estimate={kind!r} is unknown; choose from: {', '.join(ESTIMATES)}")
        if directions < _LEAST[kind] > 1:
            raise InputError(
                f"num_directions must be {_LEAST[kind]} or more for estimate={kind}, which divides by the standard "
                f"deviation of the losses, got {directions}"
            )
        check_perturbation(eps, directions)
        self.kind, self.eps, self.directions = kind, eps, directions

    def evaluations(self) -> int:
        """Number of losses of a step."""
        return {TWO_SIDED: 2 * self.directions, ONE_SIDED: self.directions + 1}.get(self.kind, self.directions)

    def perturbations(self, draws: Sequence[Draw]) -> list[Combination]:
        """What is added to the weights for each loss, in the order that `slopes` expects."""
        if self.kind == TWO_SIDED:
            return [[(draw, sign * self.eps)] for draw in draws for sign in (1.0, -1.0)]
        plus: list[Combination] = [[(draw, self.eps)] for draw in draws]
        return [[], *plus] if self.kind == ONE_SIDED else plus

    def slopes(self, losses: torch.Tensor) -> torch.Tensor:
        """Slopes `[n]` from the losses of `perturbations` (for `forward`: the derivatives themselves)."""
        if self.kind == FORWARD:
            return losses
        if self.kind == TWO_SIDED:  # (L(theta + eps z) - L(theta - eps z)) / (2 eps)
            return (losses[0::2] - losses[1::2]) / (2 * self.eps)
        perturbed = losses[1:] if self.kind == ONE_SIDED else losses
        # FZOO: sigma^2 = sum (L_i - mean)^2 / (n - 1); z-scores of a population: divided by n
        sigma = perturbed.std(correction=1 if self.kind == ONE_SIDED else 0)
        center = losses[0] if self.kind == ONE_SIDED else perturbed.mean()
        # Of equal losses, as an accuracy often gives, mean and deviation are rounding errors, and so is their ratio.
        equal = bool((perturbed == perturbed[0]).all())
        return torch.zeros_like(perturbed) if equal else (perturbed - center) / sigma
