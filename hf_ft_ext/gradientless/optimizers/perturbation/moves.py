"""What one step of `SPSA` does to the weights, tensor by tensor and chunk by chunk, and the state it needs."""

import math
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from hf_ft_ext.errors import InputError
from hf_ft_ext.gradientless.optimizers.perturbation.directions import Directions, Draw, compute_type, mixed
from hf_ft_ext.gradientless.optimizers.perturbation.perturb import PerturbedForward
from hf_ft_ext.gradientless.optimizers.perturbation.updates import BUFFER, MOMENTUM, RMS, Rounding, Update
from hf_ft_ext.gradientless.optimizers.perturbation.weights import Combination

_NO_MOMENTS = ("sgd", "sign", "rms", "conservative")


class Moves:
    """Moves the searched tensors by `sum of slope times direction`, under a rule.

    Args:
        use: makes the directions of a combination.
        searched: the tensors, in the order of their numbers.
        rule: what a step does with the estimate of the gradient.
        rounding: how 16-bit weights take small changes.

    Attributes:
        second: running mean of the squared slopes.
        buffers: moments by number of the tensor, flat; of a momentum in factors the left one.
        factor_basis: the basis that a factor of momentum belongs to.
        history: draws and slopes of the steps before, the latest first, for `replay`.
    """

    def __init__(self, use: PerturbedForward, searched: Sequence[torch.Tensor], rule: Update, rounding: Rounding):
        self.use, self.searched, self.rule, self.rounding = use, searched, rule, rounding
        self.directions: Directions = use.directions
        self.second = 0.0
        self.buffers: dict[int, tuple[torch.Tensor, ...]] = {}
        self.factor_basis: dict[int, int] = {}
        self.history: deque[tuple[list[Draw], list[float]]] = deque(maxlen=rule.replayed - 1)

    def take(
        self,
        step: int,
        basis: int,
        draws: list[Draw],
        slopes: list[float],
        rates: list[float],
        groups: Sequence[dict[str, Any]],
        waiting: set[int],
    ) -> None:
        """Move all tensors.

        Args:
            step: steps taken, this one included.
            basis: seed of what lasts.
            draws, slopes: of this step's directions.
            rates: of the groups.
            groups: of the optimizer.
            waiting: numbers of the tensors that stay.
        """
        self.step, self.basis = step, basis
        estimate = [(draw, slope / len(draws)) for draw, slope in zip(draws, slopes, strict=True)]
        root = self._root(slopes) if self.rule.rule == RMS else 1.0
        number = -1
        for group, rate in zip(groups, rates, strict=True):
            decay, lr = 1 - rate * float(group["weight_decay"]), rate / root
            still = self.rule.rule in _NO_MOMENTS and decay == 1 and not (lr and any(slopes))
            for parameter in group["params"]:
                number += 1
                if not still and number not in waiting:
                    self._move_tensor(parameter.detach(), number, estimate, lr, decay)
        if self.rule.replays:
            self.history.appendleft((draws, slopes))

    def _root(self, slopes: Sequence[float]) -> float:
        """Root of the running mean of the squared slopes, with bias correction."""
        beta = self.rule.betas[1]
        self.second = beta * self.second + (1 - beta) * sum(slope**2 for slope in slopes) / len(slopes)
        return math.sqrt(self.second / (1 - beta**self.step)) + self.rule.adam_eps

    def _move_tensor(
        self, parameter: torch.Tensor, number: int, estimate: Combination, lr: float, decay: float
    ) -> None:
        directions, scale = self.directions, self.directions.scale(parameter.shape)
        combination = [(draw, slope * scale) for draw, slope in estimate]
        low_rank, buffers = directions.has_factors(parameter.shape), self._buffers(parameter, number)
        if low_rank and self.rule.rule == MOMENTUM and self.rule.moments != BUFFER and directions.right_stays():
            left, right = self._factor_momentum(parameter, number, combination)
        else:
            if self.rule.replays and not buffers:
                combination = [*combination, *self._replayed(scale)]
            left, right = self.use.factors(parameter, number, combination) if low_rank else (None, None)
        seed = mixed(estimate[0][0].seed, number)
        for part in directions.chunks(parameter):
            exact = self.rounding.exact(parameter, number, part)
            if low_rank:
                rows = slice(part.start // parameter.shape[1], part.stop // parameter.shape[1])
                gradient = (left[rows] @ right.t()).view(-1)
            else:
                gradient = self.use.dense(parameter.view(-1)[part], number, combination, part)
            if decay != 1:
                exact.mul_(decay)
            self.rule.apply(exact, gradient, lr, self.step, [buffer[part] for buffer in buffers])
            self.rounding.store(parameter, number, part, exact, mixed(seed, 0, part.start) ^ 1)

    def _replayed(self, scale: float) -> Iterable[tuple[Draw, float]]:
        """`sum over j >= 1 of momentum^j g_(t-j) z_(t-j)`, of the steps that are kept."""
        for age, (draws, slopes) in enumerate(self.history, start=1):
            weight = self.rule.momentum**age * scale / len(draws)
            for draw, slope in zip(draws, slopes, strict=True):
                yield draw, weight * slope

    def _buffers(self, parameter: torch.Tensor, number: int) -> tuple[torch.Tensor, ...]:
        names = self.rule.buffers()
        needed = self.rule.moments == BUFFER or parameter.ndim < 2
        if not names or not needed:
            return ()
        if number not in self.buffers:
            kind = compute_type(parameter.dtype)
            size = parameter.numel()
            self.buffers[number] = tuple(torch.zeros(size, dtype=kind, device=parameter.device) for _ in names)
        return self.buffers[number]

    def _factor_momentum(
        self, parameter: torch.Tensor, number: int, combination: Combination
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Momentum of a matrix as a left factor to the present right one."""
        left, right = self.use.factors(parameter, number, combination)
        if number not in self.buffers:
            self.buffers[number] = (torch.zeros_like(left),)
        elif self.factor_basis[number] != self.basis:
            old = Draw(0, self.factor_basis[number])
            _, before = self.directions.factors(parameter.shape, number, old, left.dtype, left.device)
            # The nearest N V_new^T to N_old V_old^T: N = N_old V_old^T V_new (V_new^T V_new)^-1
            overlap = torch.linalg.solve(right.t() @ right, right.t() @ before).t()
            self.buffers[number] = (self.buffers[number][0] @ overlap,)
        self.factor_basis[number] = self.basis
        return self.buffers[number][0].mul_(self.rule.momentum).add_(left), right

    # --- state -------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """What the next step depends on."""
        return {
            "second": self.second,
            "buffers": {number: list(buffers) for number, buffers in self.buffers.items()},
            "factor_basis": dict(self.factor_basis),
            "carried": dict(self.rounding.kept),
            "history": [[[[draw.seed, draw.basis] for draw in draws], list(slopes)] for draws, slopes in self.history],
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Take what `state` gave, or an optimizer's state with it inside."""
        devices = [parameter.device for parameter in self.searched]
        self.second, self.factor_basis = state["second"], dict(state["factor_basis"])
        self.buffers = {i: tuple(b.to(devices[i]).clone() for b in found) for i, found in state["buffers"].items()}
        self.rounding.kept = {i: kept.to(devices[i]).clone() for i, kept in state["carried"].items()}
        self.history.clear()
        for draws, slopes in state["history"]:
            self.history.append(([Draw(*draw) for draw in draws], list(slopes)))


def check_replay(directions: Directions, rule: Update) -> None:
    """Raise an `InputError` if earlier directions would have to be made anew and cannot be."""
    if directions.moving_mask and rule.replays:
        raise InputError(
            f"small={directions.small} looks at the present weights, so directions of earlier steps cannot be made "
            "anew; pass moments=buffer"
        )
