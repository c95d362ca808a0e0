"""The weight update of `SPSA`, tensor by tensor and chunk by chunk, and its state."""

import itertools
import math
from collections import deque
from collections.abc import Collection, Iterable, Sequence
from typing import Any

import torch

from hf_ft_ext.errors import InputError
from hf_ft_ext.gradientless.optimizers.perturbation.directions import (
    Directions,
    Draw,
    compute_type,
    derived_seed,
    without_autocast,
)
from hf_ft_ext.gradientless.optimizers.perturbation.perturb import PerturbedForward
from hf_ft_ext.gradientless.optimizers.perturbation.update_rules import BUFFER, MOMENTUM, RMS, Rounding, UpdateRule
from hf_ft_ext.gradientless.optimizers.perturbation.weights import Combination

_NO_MOMENTS = ("sgd", "sign", "rms", "conservative")


class WeightUpdates:
    """Updates the searched tensors by the gradient estimate `G = 1/n sum_i slope_i z_i`, with an update rule.

    Args:
        perturbed_forward: computes directions and their sums; its `tensors` are updated.
        rule: the update rule.
        rounding: how small changes of 16-bit weights are rounded.

    Attributes:
        second: running mean of the squared slopes (rule `rms`).
        buffers: moments by number of the tensor, flat; the left factor of a low-rank momentum.
        factor_basis: the basis seed of each low-rank momentum.
        history: draws and slopes of the previous steps, the latest first, for `replay`.
        first_steps: the first step that updates a tensor, by its number; 1 for tensors that are not listed.
    """

    def __init__(self, perturbed_forward: PerturbedForward, rule: UpdateRule, rounding: Rounding):
        self.perturbed_forward, self.rule, self.rounding = perturbed_forward, rule, rounding
        self.tensors = perturbed_forward.tensors
        for number, stored in self.tensors.stored.items():
            stored.check_writable(self.tensors.parameters[number].shape)
        self.directions: Directions = perturbed_forward.directions
        self.second = 0.0
        self.buffers: dict[int, tuple[torch.Tensor, ...]] = {}
        self.factor_basis: dict[int, int] = {}
        self.history: deque[tuple[list[Draw], list[float]]] = deque(maxlen=rule.replayed - 1)
        self.first_steps: dict[int, int] = {}

    def apply(
        self,
        step: int,
        basis: int,
        draws: list[Draw],
        slopes: list[float],
        rates: list[float],
        groups: Sequence[dict[str, Any]],
        unread: Collection[int],
    ) -> None:
        """Update all tensors in one step.

        Args:
            step: number of this step, from 1.
            basis: seed of the factors that are kept for several steps.
            draws, slopes: of this step's directions.
            rates: learning rate of each group.
            groups: parameter groups of the optimizer.
            unread: numbers of the tensors that no forward pass has read so far: they are not updated.
        """
        self.step, self.basis = step, basis
        estimate = [(draw, slope / len(draws)) for draw, slope in zip(draws, slopes, strict=True)]
        root = self._root(slopes) if self.rule.rule == RMS else 1.0
        number = -1
        for group, rate in zip(groups, rates, strict=True):
            decay, lr = 1 - rate * float(group["weight_decay"]), rate / root
            unchanged = self.rule.rule in _NO_MOMENTS and decay == 1 and not (lr and any(slopes))
            for _ in group["params"]:
                number += 1
                if not unchanged and number not in unread and self.first_steps.get(number, 1) <= step:
                    with self.tensors.changed(number) as value, without_autocast(value.device):
                        self._update_tensor(value, number, estimate, lr, decay)
        if self.rule.replays:
            self.history.appendleft((draws, slopes))

    def _root(self, slopes: Sequence[float]) -> float:
        """Root of the running mean of the squared slopes, with bias correction.

        `s_t = beta s_(t-1) + (1 - beta) mean_i slope_i^2`; `sqrt(s_t / (1 - beta^t)) + adam_eps`.
        """
        beta = self.rule.betas[1]
        self.second = beta * self.second + (1 - beta) * sum(slope**2 for slope in slopes) / len(slopes)
        return math.sqrt(self.second / (1 - beta**self.step)) + self.rule.adam_eps

    def _update_tensor(
        self, parameter: torch.Tensor, number: int, estimate: Combination, lr: float, decay: float
    ) -> None:
        directions, scale = self.directions, self.directions.scale(parameter.shape)
        own_step = self.step - self.first_steps.get(number, 1) + 1  # of the steps that update this tensor
        combination = [(draw, slope * scale) for draw, slope in estimate]
        low_rank, buffers = directions.has_factors(parameter.shape), self._buffers(parameter, number)
        if low_rank and self.rule.rule == MOMENTUM and self.rule.moments != BUFFER and directions.right_stays():
            left, right = self._factor_momentum(parameter, number, combination)
        else:
            if self.rule.replays and not buffers:
                combination = [*combination, *self._replayed(scale, own_step)]
            left, right = self.perturbed_forward.factors(parameter, number, combination) if low_rank else (None, None)
        seed = derived_seed(estimate[0][0].seed, number)
        for part in directions.chunks(parameter):
            movable = directions.movable(parameter.view(-1)[part], number, part)  # by the weights before this step
            exact = self.rounding.exact(parameter, number, part)
            if low_rank:
                rows = slice(part.start // parameter.shape[1], part.stop // parameter.shape[1])
                gradient = (left[rows] @ right.t()).view(-1)
            else:
                gradient = self.perturbed_forward.dense(parameter.view(-1)[part], number, combination, part)
            if decay != 1:  # decoupled weight decay, of entries that may change: theta *= 1 - lr * weight_decay
                exact[... if movable is None else movable] *= decay
            before = exact.clone() if directions.moving_mask and buffers else None
            self.rule.apply(exact, gradient, lr, own_step, [buffer[part] for buffer in buffers])
            if before is not None and movable is not None:  # moments remember entries that have left the mask
                exact.copy_(torch.where(movable, exact, before))
            self.rounding.store(parameter, number, part, exact, derived_seed(seed, 0, part.start) ^ 1)

    def _replayed(self, scale: float, own_step: int) -> Iterable[tuple[Draw, float]]:
        """Terms of `sum over 1 <= j < own_step of momentum^j G_(t-j)`, `G` the estimate of each stored step."""
        for age, (draws, slopes) in enumerate(itertools.islice(self.history, own_step - 1), start=1):
            weight = self.rule.momentum**age * scale / len(draws)
            for draw, slope in zip(draws, slopes, strict=True):
                yield draw, weight * slope

    def _buffers(self, parameter: torch.Tensor, number: int) -> tuple[torch.Tensor, ...]:
        """Moment buffers of a tensor, flat; empty if the rule has none or recomputes them (`replay`)."""
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
        """Momentum of a matrix as factors: `m = N V^T`, with `N` kept and `V` the current right factor (LOZO-M).

        LOZO's paper projects with `V_old^T V_new / in`, which approximates least squares, because `V^T V` is close to
        `in I` for normal entries.
        """
        left, right = self.perturbed_forward.factors(parameter, number, combination)
        if number not in self.buffers:
            self.buffers[number] = (torch.zeros_like(left),)
        elif self.factor_basis[number] != self.basis:
            old = Draw(0, self.factor_basis[number])
            _, before = self.directions.factors(parameter.shape, number, old, left.dtype, left.device)
            # V was drawn again. Least squares: N V_new^T nearest to N_old V_old^T is
            # N = N_old V_old^T V_new (V_new^T V_new)^-1
            overlap = torch.linalg.solve(right.t() @ right, right.t() @ before).t()
            self.buffers[number] = (self.buffers[number][0] @ overlap,)
        self.factor_basis[number] = self.basis
        return self.buffers[number][0].mul_(self.rule.momentum).add_(left), right  # N = momentum N + L, for G = L V^T

    # --- state -------------------------------------------------------------------------------------

    def remembers_steps(self) -> bool:
        """Whether the next update depends on more than the weights: moments, or rounding errors that are kept."""
        return bool(self.second or self.buffers or self.factor_basis or self.history or self.rounding.kept)

    def state(self) -> dict[str, Any]:
        """The state that the next step depends on."""
        return {
            "second": self.second,
            "buffers": {number: list(buffers) for number, buffers in self.buffers.items()},
            "factor_basis": dict(self.factor_basis),
            "carried": dict(self.rounding.kept),
            "first_steps": dict(self.first_steps),
            "history": [[[[draw.seed, draw.basis] for draw in draws], list(slopes)] for draws, slopes in self.history],
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Load what `state` returned, or an optimizer's state that contains these entries."""
        devices = [self.tensors.device(number) for number in range(len(self.tensors))]
        self.second, self.factor_basis = state["second"], dict(state["factor_basis"])
        self.first_steps = dict(state["first_steps"])
        self.buffers = {i: tuple(b.to(devices[i]).clone() for b in found) for i, found in state["buffers"].items()}
        self.rounding.kept = {i: kept.to(devices[i]).clone() for i, kept in state["carried"].items()}
        self.history.clear()
        for draws, slopes in state["history"]:
            self.history.append(([Draw(*draw) for draw in draws], list(slopes)))


def check_replay(directions: Directions, rule: UpdateRule) -> None:
    """Raise an `InputError` if momentum has to recompute earlier directions and `directions` cannot."""
    if directions.moving_mask and rule.replays:
        raise InputError(
            f"small={directions.small} depends on the current weights, so directions of earlier steps cannot be "
            "recomputed for momentum; pass moments=buffer"
        )
