"""`SPSA`: simultaneous perturbation: any of the directions, estimates and updates of zeroth-order fine-tuning."""

import logging
import math
import zlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
from torch import nn
from torch.optim.optimizer import ParamsT

from hf_ft_ext.errors import InputError
from hf_ft_ext.gradientless.optimizers.base import Closure, GradientFreeOptimizer, keep_freed_memory
from hf_ft_ext.gradientless.optimizers.groups import check_block
from hf_ft_ext.gradientless.optimizers.perturbation.directions import GAUSSIAN, Directions, Draw, mixed
from hf_ft_ext.gradientless.optimizers.perturbation.estimates import FORWARD, TWO_SIDED, Estimate
from hf_ft_ext.gradientless.optimizers.perturbation.moves import Moves, check_replay
from hf_ft_ext.gradientless.optimizers.perturbation.owners import CannotBatch
from hf_ft_ext.gradientless.optimizers.perturbation.perturb import PerturbedForward
from hf_ft_ext.gradientless.optimizers.perturbation.updates import CONSERVATIVE, SGD, Rounding, Update
from hf_ft_ext.gradientless.optimizers.perturbation.weights import Combination

logger = logging.getLogger(__name__)

# Losses of several candidates at once may differ from those of one after the other by so much of their size.
_CLOSE, _CLOSE_IN_16_BITS = 1e-4, 3e-2


class SPSA(GradientFreeOptimizer):
    """Simultaneous perturbation (MeZO and its successors): one number per direction says how far all weights move.

    A step draws `num_directions` directions (see `Directions`), finds a slope for each from losses at perturbed
    weights (see `Estimate`), and moves the weights by the mean of slope times direction (see `Update`). Directions
    are made anew from seeds wherever they are needed.

    The perturbed weights are made where a forward uses them and dropped behind it, so the stored weights do not
    drift in any type, and no second copy of the model exists. Low-rank directions are added to the outputs of linear
    layers and embeddings, and copy no weight at all. The update goes through each tensor in chunks. That of 16-bit
    weights is rounded up or down at random with the right mean: to the nearest, most updates would be lost (see
    `Rounding`).

    Every step is recorded, as its slopes and rates: `save_trajectory` writes them, `apply_trajectory` repeats them.

    Args:
        params: parameters or groups (`lr` and `weight_decay` can be set per group).
        module: the model whose forward the closure runs, with all of `params` in its modules.
        lr: learning rate, 0 or more.
        eps: size of the perturbation, above 0.
        num_directions: directions per step, 1 or more.
        block: consecutive entries of a tensor that move alike: `z` has one number for each block, so the search is in
            fewer numbers, such as one per attention head. Has to divide the size of every tensor.
        update: the rule of `Update`.
        momentum, betas, adam_eps, moments: of the rule.
        weight_decay: decoupled, 0 or more: `theta *= 1 - lr * weight_decay`.
        seed: of the private generator.
        max_evaluations: most evaluations that one step may need.
        direction, rank, renew, masks, small: of `Directions`; `masks` in the order of the parameters.
        estimate: `"two-sided"`, `"one-sided"`, `"population"` or `"forward"` (whose closure returns a tensor).
        carry: keep what rounding leaves out of 16-bit weights: 2 bytes an entry more, no noise of rounding.
        candidates_per_forward: perturbations that run as one forward pass, 1 or more; needs an `evaluate` that repeats
            the batch. Their activations are in memory at the same time.

    Raises:
        InputError: a value out of range, or two that contradict each other; a parameter that `module` does not hold;
            in `step`: the loss is not finite.

    Source: SPSA (Spall 1992); MeZO, arXiv 2305.17333, whose +eps, -2 eps, +eps on the stored weights drifts
    (3.9 % after 100 steps in bfloat16).
    """

    def __init__(
        self,
        params: ParamsT,
        module: nn.Module,
        lr: float = 1e-6,
        eps: float = 1e-3,
        num_directions: int = 1,
        block: int = 1,
        update: str = SGD,
        momentum: float = 0.9,
        betas: tuple[float, float] = (0.9, 0.999),
        adam_eps: float = 1e-8,
        weight_decay: float = 0.0,
        seed: int = 0,
        max_evaluations: int = 10_000,
        direction: str = GAUSSIAN,
        rank: int | None = None,
        renew: int | None = None,
        masks: Sequence[torch.Tensor] | None = None,
        small: float | None = None,
        estimate: str = TWO_SIDED,
        moments: str | None = None,
        carry: bool = False,
        candidates_per_forward: int = 1,
    ):
        for name, value in (("lr", lr), ("weight_decay", weight_decay)):
            if not value >= 0:
                raise InputError(f"{name}={value} is below 0; pass 0 or more")
        if not (eps > 0 and math.isfinite(eps)):
            raise InputError(f"eps={eps} is no size of a perturbation; pass a number above 0, such as 1e-3")
        if candidates_per_forward < 1:
            raise InputError(f"candidates_per_forward={candidates_per_forward} must be 1 or more")
        self.eps, self.num_directions, self.block, self.update = eps, num_directions, block, update
        self.estimate = Estimate(estimate, eps, num_directions)
        rule = Update(update, momentum, betas, adam_eps, moments)
        self.candidates_per_forward = candidates_per_forward
        if self.evaluations_per_step() > max_evaluations:
            raise InputError(
                f"a step would need {self.evaluations_per_step():,} evaluations, more than max_evaluations_per_step="
                f"{max_evaluations:,}; take fewer directions, or raise it"
            )
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay}, seed)
        self.searched = [parameter for group in self.param_groups for parameter in group["params"]]
        self.directions = Directions(direction, max(block, 1), rank, renew, masks, small)
        check_block(block, self.searched)
        self.directions.prepare(self.searched)
        check_replay(self.directions, rule)
        keep_freed_memory()
        self.use = PerturbedForward(module, self.searched, self.directions)
        if self.use.missing:
            shape = tuple(self.searched[self.use.missing[0]].shape)
            raise InputError(f"a parameter of shape {shape} belongs to no part of the module; pass the one it is in")
        self.basis = 0  # seed of what lasts
        self.moves = Moves(self.use, self.searched, rule, Rounding(carry))
        self.double = any(parameter.dtype == torch.float64 for parameter in self.searched)
        self.record: list[tuple[list[float], list[float]]] = []  # slopes and rates of each step
        self.first_seed, self.start = seed, sample_sum(self.searched)
        self.batches = candidates_per_forward > 1
        self.checked = False
        self.late: list[int] = []  # tensors that move from the second step on

    def evaluations_per_step(self) -> int:
        """Losses that one step evaluates."""
        return self.estimate.evaluations() + (3 if self.update == CONSERVATIVE else 0)

    # --- a step ------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Closure | None = None, evaluate: Callable | None = None) -> float | None:
        """Perturb, compare, move; return the mean of all losses that the estimate took.

        Args:
            closure: returns the loss of the batch, by a forward of the module.
            evaluate: what a trainer hands over. Of it, `repeated(n)` is used where several candidates run as one
                forward pass (the losses `[n]` of the batch repeated `n` times), and `differentiable()` in place of
                `closure` by `estimate="forward"`.
        """
        if self._already_taken(closure):
            return None
        self.steps += 1
        draws = self._draws()
        if self.estimate.kind == FORWARD:
            mean, slopes = self._forward_slopes(draws, getattr(evaluate, "differentiable", closure))
        else:
            losses = self._losses(self.estimate.perturbations(draws), closure, evaluate)
            mean, slopes = self._checked_current(losses.mean()), self.estimate.slopes(losses)
        if self.steps == 1 and self.use.unseen:
            self._look_elsewhere(closure)
        if self.steps == 1 and self.use.unseen:
            logger.warning(
                "%d searched tensors are read by no module's forward: they are not perturbed; leave them out",
                len(self.use.unseen),
            )
        rates = [self._number(group["lr"]) for group in self.param_groups]
        found = [self._number(slope) for slope in slopes]
        if self.update == CONSERVATIVE:
            sign = self._best_sign(draws, found, rates, closure, evaluate)
            found = [sign * slope for slope in found]
        self.record.append((found, rates))
        self._move(draws, found, rates)
        return mean

    def _look_elsewhere(self, closure: Closure) -> None:
        """Find which of the tensors that their own modules do not read change the loss all the same.

        They are perturbed, and move, from the second step on.
        """
        draw = Draw(mixed(self.first_seed, 1), self.basis)

        def loss_with(number: int | None) -> torch.Tensor:
            # large, as a tensor may have little effect, and losses are float32 numbers
            with self.use.weighted([100.0 * (i == number) for i in range(len(self.searched))]):
                loss = self.perturbed_loss(closure, [(draw, 1.0)])
            self.evaluations += 1
            return self.exchange.combine(torch.tensor([loss], dtype=torch.float64))

        here = loss_with(None)
        for number in sorted(self.use.unseen):
            self.use.read_elsewhere(number)
            if torch.equal(loss_with(number), here):
                self.use.elsewhere.discard(number)
                self.use.unseen.add(number)
        self.late = sorted(self.use.elsewhere)

    def _number(self, value: Any) -> float:
        """As it is recorded: 4 bytes, 8 for weights of 8 bytes."""
        return float(value) if self.double else float(torch.tensor(float(value), dtype=torch.float32))

    def _draws(self) -> list[Draw]:
        renew = self.directions.renew
        if renew is not None and (self.steps - 1) % renew == 0:
            self.basis = self._draw_seed()
        return [Draw(self._draw_seed(), self.basis) for _ in range(self.num_directions)]

    def _losses(self, combinations: Sequence[Combination], closure: Closure, evaluate: Any) -> torch.Tensor:
        """Loss of each combination, from all processes: float64."""
        losses = torch.zeros(len(combinations), dtype=torch.float64)
        mine = list(self.exchange.mine(len(combinations)))
        repeated = getattr(evaluate, "repeated", None) if self.batches else None
        size = 1 if repeated is None else self.candidates_per_forward
        for start in range(0, len(mine), size):
            part = mine[start : start + size]
            found = None
            if repeated is not None and self.batches and len(part) > 1:
                found = self._losses_at_once([combinations[i] for i in part], closure, repeated)
            if found is None:
                found = [self.perturbed_loss(closure, combinations[i]) for i in part]
            losses[part] = torch.as_tensor(found, dtype=torch.float64).cpu()
        self.evaluations += len(combinations)
        return self.exchange.combine(losses)

    def perturbed_loss(self, closure: Closure, combination: Combination) -> float:
        """The closure's loss with all searched weights moved by the combination wherever they are used."""
        if not combination:
            return float(closure())
        with self.use(combination):
            return float(closure())

    def _losses_at_once(
        self, combinations: Sequence[Combination], closure: Closure, repeated: Callable
    ) -> torch.Tensor | None:
        """The same for several combinations in one forward pass; `None`, once and for all, where that cannot be."""
        try:
            with self.use(*combinations):
                losses = repeated(len(combinations))
            if losses is None:
                raise CannotBatch("the objective is known for whole batches only")
            losses = losses.double().cpu()
            if not self.checked:
                self._check_batching(combinations, closure, losses)
            return losses
        except (CannotBatch, RuntimeError, ValueError, IndexError) as error:
            # What fails for another reason fails one by one too.
            if self.checked and not isinstance(error, CannotBatch):
                raise
            logger.info("candidates are evaluated one by one: %s", error)
            self.batches = False
            return None

    def _check_batching(self, combinations: Sequence[Combination], closure: Closure, losses: torch.Tensor) -> None:
        expected = torch.tensor([self.perturbed_loss(closure, c) for c in combinations], dtype=torch.float64)
        small = any(p.element_size() == 2 for p in self.searched) or torch.is_autocast_enabled("cpu")
        small = small or torch.is_autocast_enabled("cuda")
        tolerance = _CLOSE_IN_16_BITS if small else _CLOSE
        if not torch.allclose(losses, expected, rtol=tolerance, atol=tolerance, equal_nan=True):
            raise CannotBatch(
                f"losses of the repeated batch differ by {float((losses - expected).abs().max()):.2g} from those of "
                "one after the other"
            )
        self.checked = True

    def _forward_slopes(self, draws: Sequence[Draw], closure: Callable) -> tuple[float, torch.Tensor]:
        slopes, losses = torch.zeros(2, len(draws), dtype=torch.float64)
        for i in self.exchange.mine(len(draws)):
            with self.use.along(draws[i]):
                loss = closure()
                if not isinstance(loss, torch.Tensor):
                    raise InputError("estimate=forward needs a closure that returns the loss as a tensor")
                loss, tangent = forward_ad.unpack_dual(loss)
                losses[i], slopes[i] = float(loss), 0.0 if tangent is None else float(tangent)
        self.evaluations += len(draws)
        return self._checked_current(self.exchange.combine(losses).mean()), self.exchange.combine(slopes)

    def _best_sign(
        self, draws: Sequence[Draw], slopes: Sequence[float], rates: Sequence[float], closure: Closure, evaluate: Any
    ) -> float:
        """1 if `theta - lr G` has the lowest loss on this batch, 0 if `theta` has, -1 if `theta + lr G` has."""
        change = [(draw, -slope / len(draws)) for draw, slope in zip(draws, slopes, strict=True)]
        opposite = [(draw, -factor) for draw, factor in change]
        members = [len(group["params"]) for group in self.param_groups]
        spread = [rate for rate, n in zip(rates, members, strict=True) for _ in range(n)]
        steps = [rate * self.directions.scale(p.shape) for rate, p in zip(spread, self.searched, strict=True)]
        with self.use.weighted(steps):
            losses = self._losses([[], change, opposite], closure, evaluate)
        losses = torch.where(losses.isfinite(), losses, torch.full_like(losses, math.inf))
        return (0.0, 1.0, -1.0)[int(losses.argmin())]

    def _move(self, draws: list[Draw], slopes: list[float], rates: list[float]) -> None:
        """Move all tensors by the estimate that these slopes make."""
        waiting = self.use.unseen | (set(self.late) if self.steps == 1 else set())
        self.moves.take(self.steps, self.basis, draws, slopes, rates, self.param_groups, waiting)

    # --- trajectory --------------------------------------------------------------------------------

    @torch.no_grad()
    def repeat(
        self, record: Sequence[tuple[list[float], list[float]]], unseen: Iterable[int] = (), late: Iterable[int] = ()
    ) -> None:
        """Take recorded steps again, without a loss: the weights end bit for bit where the recorded run's did.

        Args:
            record: slopes and rates of each step.
            unseen: numbers of the tensors that no forward read in the recorded run.
            late: numbers of those that moved from its second step on.
        """
        self.use.unseen, self.late = set(unseen), list(late)
        for slopes, rates in record:
            self.steps += 1
            self.record.append((slopes, rates))
            self._move(self._draws(), slopes, rates)

    # --- state -------------------------------------------------------------------------------------

    def _own_state(self) -> dict:
        slopes = torch.tensor([slopes for slopes, _ in self.record], dtype=torch.float64)
        rates = torch.tensor([rates for _, rates in self.record], dtype=torch.float64)
        return {
            **super()._own_state(),
            "kind": [self.directions.kind, self.estimate.kind, self.update, self.num_directions],
            "basis": self.basis,
            **self.moves.state(),
            "thresholds": self.directions.thresholds,
            "unseen": sorted(self.use.unseen),
            "late": list(self.late),
            "record": [slopes, rates],
            "first_seed": self.first_seed,
            "start": self.start,
        }

    def _load_own_state(self, state: dict) -> None:
        kind = [self.directions.kind, self.estimate.kind, self.update, self.num_directions]
        if list(state.get("kind", ())) != kind:
            raise ValueError(
                f"the state is of another method or number of directions ({state.get('kind')}, not {kind}); pass the "
                "same arguments"
            )
        super()._load_own_state(state)
        self.basis = state["basis"]
        self.moves.load_state(state)
        self.directions.thresholds, self.use.unseen = state["thresholds"], set(state["unseen"])
        self.late = list(state["late"])
        for number in self.late:
            self.use.read_elsewhere(number)
        slopes, rates = (part.tolist() for part in state["record"])
        self.record = list(zip(slopes, rates, strict=True))
        self.first_seed, self.start = state["first_seed"], state["start"]


def sample_sum(parameters: Iterable[torch.Tensor]) -> int:
    """A checksum of up to 64 entries of each tensor: whether two models start alike."""
    total = 0
    for parameter in parameters:
        flat = parameter.detach().view(-1)
        sample = flat[:: max(1, flat.numel() // 64)][:64].cpu().contiguous()
        total = zlib.crc32(sample.view(torch.uint8).numpy().tobytes(), total)
    return total
