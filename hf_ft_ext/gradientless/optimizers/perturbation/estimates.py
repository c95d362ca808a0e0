"""Estimates of the gradient from losses: which perturbed losses a step needs, and one slope for each direction.

The estimate is the mean over the directions of slope times direction (low-rank directions have a scale, see
`directions`).
"""

from collections.abc import Sequence

import torch

from hf_ft_ext.errors import InputError
from hf_ft_ext.gradientless.optimizers.perturbation.directions import Draw
from hf_ft_ext.gradientless.optimizers.perturbation.weights import Combination

ESTIMATES = TWO_SIDED, ONE_SIDED, POPULATION, FORWARD = ("two-sided", "one-sided", "population", "forward")
_LEAST = {TWO_SIDED: 1, ONE_SIDED: 2, POPULATION: 2, FORWARD: 1}


class Estimate:
    """How slopes are found.

    | kind | slope of direction `z_i` | losses per step | source |
    | --- | --- | --- | --- |
    | `two-sided` | `(L(theta + eps z_i) - L(theta - eps z_i)) / (2 eps)` | 2 n | SPSA; MeZO, arXiv 2305.17333 |
    | `one-sided` | `(L_i - L(theta)) / sigma` | n + 1 | FZOO, arXiv 2506.09034 |
    | `population` | `(L_i - mean) / deviation`, divided by n: z-scores | n | Qiu et al., arXiv 2509.24372 |
    | `forward` | the derivative along `z_i`, by forward-mode differentiation | n | Baydin et al., arXiv 2202.08587 |

    `L_i = L(theta + eps z_i)`, and sigma is their standard deviation. Slopes of `one-sided` and `population` do not
    have the unit of the loss: the learning rate is the length of the step. FZOO's paper has a factor `1 / eps` more;
    its authors' code (DKmiyan/FZOO) leaves it out, as here, so that the rates of its scripts can be used. That code
    divides by n, not n - 1, in sigma. The step of a population is called alpha in the paper.

    Args:
        kind: one of `ESTIMATES`.
        eps: size of the perturbation, above 0; not used by `forward`.
        directions: directions per step, 1 or more; 2 or more for a standard deviation.
    """

    def __init__(self, kind: str, eps: float, directions: int):
        if kind not in ESTIMATES:
            raise InputError(f"estimate={kind!r} is unknown; choose from: {', '.join(ESTIMATES)}")
        if directions < _LEAST[kind]:
            least = _LEAST[kind]
            why = "leaves nothing to compare" if least == 1 else f"has no deviation of its losses for {kind}"
            raise InputError(f"num_directions={directions} {why}; pass {least} or more")
        self.kind, self.eps, self.directions = kind, eps, directions

    def evaluations(self) -> int:
        """Losses of a step."""
        return {TWO_SIDED: 2 * self.directions, ONE_SIDED: self.directions + 1}.get(self.kind, self.directions)

    def perturbations(self, draws: Sequence[Draw]) -> list[Combination]:
        """What is added to the weights for each loss."""
        if self.kind == TWO_SIDED:
            return [[(draw, sign * self.eps)] for draw in draws for sign in (1.0, -1.0)]
        plus: list[Combination] = [[(draw, self.eps)] for draw in draws]
        return [[], *plus] if self.kind == ONE_SIDED else plus

    def slopes(self, losses: torch.Tensor) -> torch.Tensor:
        """`[n]` from the losses of `perturbations` (of `forward`: from the derivatives)."""
        if self.kind == FORWARD:
            return losses
        if self.kind == TWO_SIDED:
            return (losses[0::2] - losses[1::2]) / (2 * self.eps)
        moved = losses[1:] if self.kind == ONE_SIDED else losses
        # FZOO: sigma^2 = sum (L_i - mean)^2 / (n - 1); z-scores: divided by n.
        deviation = moved.std(correction=1 if self.kind == ONE_SIDED else 0)
        centre = losses[0] if self.kind == ONE_SIDED else moved.mean()
        return (moved - centre) / deviation if deviation > 0 else torch.zeros_like(moved)
