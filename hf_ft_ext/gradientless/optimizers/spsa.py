"""`SPSA`: simultaneous perturbation, with the directions, estimates and updates of zeroth-order fine-tuning."""

import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
from torch import nn
from torch.optim.optimizer import ParamsT

from hf_ft_ext.errors import InputError
from hf_ft_ext.gradientless.optimizers.base import (
    Closure,
    GradientFreeOptimizer,
    check_rates,
    keep_freed_memory,
    loss_of,
    sample_sum,
)
from hf_ft_ext.gradientless.optimizers.groups import check_block
from hf_ft_ext.gradientless.optimizers.perturbation.directions import GAUSSIAN, Directions, Draw
from hf_ft_ext.gradientless.optimizers.perturbation.estimates import FORWARD, ONE_SIDED, TWO_SIDED, Estimate
from hf_ft_ext.gradientless.optimizers.perturbation.module_patch import PerturbationsCannotBatch
from hf_ft_ext.gradientless.optimizers.perturbation.perturb import PerturbedForward
from hf_ft_ext.gradientless.optimizers.perturbation.update_rules import CONSERVATIVE, SGD, Rounding, UpdateRule
from hf_ft_ext.gradientless.optimizers.perturbation.watch import Reads
from hf_ft_ext.gradientless.optimizers.perturbation.weight_updates import WeightUpdates, check_replay
from hf_ft_ext.gradientless.optimizers.perturbation.weights import Combination
from hf_ft_ext.offload import hold_offloaded
from hf_ft_ext.per_example.state import has_mixed_precision

logger = logging.getLogger(__name__)

# Relative and absolute tolerance between the losses of one batched forward pass and of separate ones.
_TOLERANCE, _TOLERANCE_16_BITS = 1e-4, 3e-2


class SPSA(GradientFreeOptimizer):
    """Simultaneous perturbation (MeZO and its successors): estimate the slope of the loss along random directions.

    A step draws `num_directions` directions `z_i` (see `Directions`), estimates the slope along each from losses at
    perturbed weights (see `Estimate`), and updates the weights with `G = 1/n sum_i slope_i z_i` (see `UpdateRule`).
    Directions are recomputed from seeds when they are needed.

    Perturbed weights exist only while a module's forward uses them, so the stored weights do not drift in any type,
    and there is no second copy of the model. The effect of low-rank directions is added to the outputs of linear
    layers and embeddings, without copying a weight. Parameters that accelerate offloads are perturbed while their
    module is loaded, and updated one by one where they are kept. Updates are computed in chunks of each tensor. 16-bit
    weights are rounded stochastically: rounding to nearest would lose most updates (see `Rounding`).

    Slopes and learning rates of all steps are recorded: `save_trajectory` writes them, and `apply_trajectory` repeats
    the run from them.

    Args:
        params: parameters or groups (`lr` and `weight_decay` can be set per group).
        module: the model whose forward the closure runs, with all of `params` in its modules.
        lr: learning rate, 0 or more.
        eps: size of the perturbation, above 0.
        num_directions: directions per step, 1 or more.
        block: number of consecutive entries of a tensor with the same `z`. This reduces the number of searched
            parameters, for example to one per attention head. Has to divide the size of every tensor.
        update: the rule of `UpdateRule`.
        momentum, betas, adam_eps, moments: parameters of the rule.
        weight_decay: decoupled, 0 or more: `theta *= 1 - lr * weight_decay`, for the entries that may change.
        seed: of the private generator.
        max_evaluations: largest number of evaluations that one step may need.
        direction, rank, renew, masks, small: of `Directions`; `masks` in the order of the parameters.
        estimate: `"two-sided"`, `"one-sided"`, `"population"` or `"forward"` (with a closure that returns a tensor).
        carry: keep the rounding error of 16-bit weights for the next step (2 more bytes per entry) instead of
            rounding stochastically.
        candidates_per_forward: number of perturbations that run as one forward pass, 1 or more; needs an `evaluate`
            that repeats the batch. Their activations are in memory at the same time.

    Raises:
        InputError: a value out of range, or two that contradict each other; a parameter that `module` does not hold;
            in `step`: the loss is not finite.

    Source: SPSA (Spall 1992); MeZO, arXiv 2305.17333. MeZO adds +eps, -2 eps, +eps to the stored weights, which drift
    by rounding (3.9 % after 100 steps in bfloat16).
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
        check_rates(lr, weight_decay)
        if candidates_per_forward < 1:
            raise InputError(f"candidates_per_forward must be 1 or more, got {candidates_per_forward}")
        self.eps, self.num_directions, self.block, self.update = eps, num_directions, block, update
        self.estimate = Estimate(estimate, eps, num_directions)
        rule = UpdateRule(update, momentum, betas, adam_eps, moments)
        self.candidates_per_forward = candidates_per_forward
        if self.evaluations_per_step() > max_evaluations:
            raise InputError(
                f"a step would need {self.evaluations_per_step():,} evaluations, more than max_evaluations_per_step="
                f"{max_evaluations:,}; use fewer directions, or raise max_evaluations_per_step"
            )
        self.module = module
        offloaded = hold_offloaded(module)
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay}, seed, offloaded)
        self.searched = [parameter for group in self.param_groups for parameter in group["params"]]
        self.directions = Directions(direction, max(block, 1), rank, renew, masks, small)
        check_block(block, self.searched)
        self.perturbed_forward = PerturbedForward(module, self.searched, self.directions, offloaded)
        self.directions.prepare(self.perturbed_forward.tensors)
        check_replay(self.directions, rule)
        keep_freed_memory()
        if self.perturbed_forward.missing:
            shape = tuple(self.searched[self.perturbed_forward.missing[0]].shape)
            raise InputError(
                f"a parameter of shape {shape} is in no part of the module; pass the module that contains it"
            )
        self.basis = 0  # seed of the factors that are kept for several steps
        self.weight_updates = WeightUpdates(self.perturbed_forward, rule, Rounding(carry))
        self.double = any(parameter.dtype == torch.float64 for parameter in self.searched)
        self.record: list[tuple[list[float], list[float]]] = []  # slopes and learning rates of each step
        self.first_seed, self.start = seed, sample_sum(self.perturbed_forward.tensors)
        self.batches = candidates_per_forward > 1
        self.checked = False

    def evaluations_per_step(self) -> int:
        """Largest number of losses that one step evaluates."""
        # of theta - lr G and theta + lr G, and of theta unless the estimate evaluates it
        compared = 2 if self.estimate.kind == ONE_SIDED else 3
        return self.estimate.evaluations() + (compared if self.update == CONSERVATIVE else 0)

    # --- a step ------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Closure | None = None, evaluate: Callable | None = None) -> float | None:
        """Estimate the gradient and update the weights; return the mean of the losses of the estimate.

        Args:
            closure: returns the loss of the batch, by a forward pass of the module.
            evaluate: an object with optional methods. `repeated(n)` returns the losses `[n]` of the batch repeated `n`
                times, for several candidates in one forward pass. `differentiable()` replaces `closure` with
                `estimate="forward"`.
        """
        if not self._takes_step(closure):
            return None
        self.steps += 1
        draws = self._draws()
        unread = set(self.perturbed_forward.unread)
        if self.steps == 1:
            with self.perturbed_forward.watched() as reads:
                mean, slopes, here = self._estimated(draws, closure, evaluate)
            # If other modules read a tensor too, these losses lack its perturbation there: compute them again with it.
            if self._look_elsewhere(reads):
                mean, slopes, here = self._estimated(draws, closure, evaluate)
        else:
            mean, slopes, here = self._estimated(draws, closure, evaluate)
        rates = [self._number(group["lr"]) for group in self.param_groups]
        found = [self._number(slope) for slope in slopes]
        if self.update == CONSERVATIVE:
            sign = self._best_sign(draws, found, rates, here, closure, evaluate)
            found = [sign * slope for slope in found]
        self._note_first_reads(unread)
        self._update_weights(draws, found, rates)
        self.record.append((found, rates))
        return mean

    def _estimated(
        self, draws: Sequence[Draw], closure: Closure, evaluate: Any
    ) -> tuple[float, torch.Tensor, torch.Tensor | None]:
        """Mean loss, slopes along the directions, and the loss `[1]` at the current weights, if it is among them."""
        if self.estimate.kind == FORWARD:
            return *self._forward_slopes(draws, getattr(evaluate, "differentiable", closure)), None
        losses = self._losses(self.estimate.perturbations(draws), closure, evaluate)
        here = losses[:1] if self.estimate.kind == ONE_SIDED else None
        return self._checked_current(losses.mean()), self.estimate.slopes(losses), here

    def _look_elsewhere(self, reads: Reads) -> bool:
        """Perturb tensors that another module reads while the whole model runs; return whether there are any."""
        n = len(self.searched)
        if outside := self.exchange.union(reads.outside, n):
            shape = tuple(self.searched[min(outside)].shape)
            logger.warning(
                "%d searched tensors (the first of shape %s) are read outside of the forward of %s. They are not "
                "perturbed there, so the search ignores this part of the loss; move it into the model's forward",
                len(outside),
                shape,
                type(self.perturbed_forward.module).__name__,
            )
        found = self.exchange.union(reads.inside, n)
        for number in sorted(found):
            self.perturbed_forward.read_elsewhere(number)
        return bool(found)

    def _note_first_reads(self, unread: set[int]) -> None:
        """Note which of the tensors that were `unread` before this step it has read; they are updated from now on."""
        if not unread:
            return
        forward = self.perturbed_forward
        read = self.exchange.union(unread - forward.unread, len(self.searched))
        forward.unread = unread - read
        if self.steps > 1:
            self.weight_updates.first_steps.update(dict.fromkeys(read, self.steps))
        elif forward.unread:
            forward.check_unread()
            logger.warning(
                "%d searched tensors are read by no forward pass, so they are not searched; leave them out",
                len(forward.unread),
            )

    def _number(self, value: Any) -> float:
        """Round to the type of the record: float32, or float64 for float64 weights."""
        return float(value) if self.double else float(torch.tensor(float(value), dtype=torch.float32))

    def _draws(self) -> list[Draw]:
        renew = self.directions.renew
        if renew is not None and (self.steps - 1) % renew == 0:
            self.basis = self._draw_seed()
        return [Draw(self._draw_seed(), self.basis) for _ in range(self.num_directions)]

    def _losses(self, combinations: Sequence[Combination], closure: Closure, evaluate: Any) -> torch.Tensor:
        """Loss of each combination, over all processes: float64."""
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
        """The closure's loss with the combination added to the searched weights."""
        if not combination:
            return loss_of(closure)
        with self.perturbed_forward(combination):
            return loss_of(closure)

    def _losses_at_once(
        self, combinations: Sequence[Combination], closure: Closure, repeated: Callable
    ) -> torch.Tensor | None:
        """Losses of several combinations in one forward pass; `None` if that is not possible (not tried again)."""
        try:
            with self.perturbed_forward(*combinations):
                losses = repeated(len(combinations))
            if losses is None:
                raise PerturbationsCannotBatch("this evaluation takes one at a time, as on cached features")
            losses = losses.double().cpu()
            if not self.checked:
                self._check_batching(combinations, closure, losses)
            return losses
        except (PerturbationsCannotBatch, RuntimeError, ValueError, IndexError) as error:
            # Other errors are not specific to the batched pass: separate passes would raise them too.
            if self.checked and not isinstance(error, PerturbationsCannotBatch):
                raise
            logger.warning("candidates_per_forward has no effect, candidates are evaluated one by one: %s", error)
            self.batches = False
            return None

    def _check_batching(self, combinations: Sequence[Combination], closure: Closure, losses: torch.Tensor) -> None:
        expected = torch.tensor([self.perturbed_loss(closure, c) for c in combinations], dtype=torch.float64)
        rounded = any(p.element_size() == 2 for p in self.searched) or has_mixed_precision(self.module)
        tolerance = _TOLERANCE_16_BITS if rounded else _TOLERANCE
        if not torch.allclose(losses, expected, rtol=tolerance, atol=tolerance, equal_nan=True):
            raise PerturbationsCannotBatch(
                f"losses of the repeated batch differ by {float((losses - expected).abs().max()):.2g} from those of "
                "separate forward passes"
            )
        self.checked = True

    def _forward_slopes(self, draws: Sequence[Draw], closure: Callable) -> tuple[float, torch.Tensor]:
        slopes, losses = torch.zeros(2, len(draws), dtype=torch.float64)
        for i in self.exchange.mine(len(draws)):
            with self.perturbed_forward.along(draws[i]):
                loss = closure()
                if not isinstance(loss, torch.Tensor):
                    raise InputError("estimate=forward needs a closure that returns the loss as a tensor")
                loss, tangent = forward_ad.unpack_dual(loss)
                losses[i], slopes[i] = float(loss), 0.0 if tangent is None else float(tangent)
        self.evaluations += len(draws)
        return self._checked_current(self.exchange.combine(losses).mean()), self.exchange.combine(slopes)

    def _best_sign(
        self,
        draws: Sequence[Draw],
        slopes: Sequence[float],
        rates: Sequence[float],
        here: torch.Tensor | None,
        closure: Closure,
        evaluate: Any,
    ) -> float:
        """1 if `theta - lr G` has the lowest loss on this batch, 0 if `theta` has, -1 if `theta + lr G` has.

        `theta + lr G` is evaluated only where `theta - lr G` does not lower the loss. To second order
        `loss(theta + lr G) - loss(theta - lr G) = 2 lr <gradient, G> >= 0`, so elsewhere it is not the lowest.

        Args:
            here: the loss `[1]` of `theta`, if the estimate has evaluated it.
        """
        # change = -G = -1/n sum_i slope_i z_i, multiplied below by lr (and LOZO's 1 / rank) for each tensor
        change = [(draw, -slope / len(draws)) for draw, slope in zip(draws, slopes, strict=True)]
        members = [len(group["params"]) for group in self.param_groups]
        spread = [rate for rate, n in zip(rates, members, strict=True) for _ in range(n)]
        steps = [rate * self.directions.scale(p.shape) for rate, p in zip(spread, self.searched, strict=True)]
        with self.perturbed_forward.weighted(steps):
            losses = self._losses([[], change] if here is None else [change], closure, evaluate)
            losses = losses if here is None else torch.cat([here, losses])
            losses = torch.where(losses.isfinite(), losses, torch.full_like(losses, math.inf))
            if losses[1] < losses[0]:
                return 1.0
            last = float(self._losses([[(draw, -factor) for draw, factor in change]], closure, evaluate))
        return -1.0 if math.isfinite(last) and last < losses[0] else 0.0

    def _update_weights(self, draws: list[Draw], slopes: list[float], rates: list[float]) -> None:
        """Update all tensors with the gradient estimate of these slopes."""
        unread = self.perturbed_forward.unread
        self.weight_updates.apply(self.steps, self.basis, draws, slopes, rates, self.param_groups, unread)

    # --- trajectory --------------------------------------------------------------------------------

    @torch.no_grad()
    def repeat(
        self,
        record: Sequence[tuple[list[float], list[float]]],
        unread: Iterable[int] = (),
        first_steps: Mapping[int, int] | None = None,
    ) -> None:
        """Repeat recorded steps without a loss; the final weights equal those of the recorded run bit for bit.

        Args:
            record: slopes and learning rates of each step.
            unread: numbers of the tensors that no forward pass read in the recorded run.
            first_steps: the first step that updated a tensor, by its number; 1 for tensors that are not listed.
        """
        self.perturbed_forward.unread, self.weight_updates.first_steps = set(unread), dict(first_steps or {})
        for slopes, rates in record:
            self.steps += 1
            self.record.append((slopes, rates))
            self._update_weights(self._draws(), slopes, rates)

    # --- state -------------------------------------------------------------------------------------

    def _own_state(self) -> dict:
        slopes = torch.tensor([slopes for slopes, _ in self.record], dtype=torch.float64)
        rates = torch.tensor([rates for _, rates in self.record], dtype=torch.float64)
        return {
            **super()._own_state(),
            "kind": self._kind(),
            "basis": self.basis,
            **self.weight_updates.state(),
            "thresholds": self.directions.thresholds,
            "unseen": sorted(self.perturbed_forward.unread),
            "elsewhere": sorted(self.perturbed_forward.elsewhere),
            "record": [slopes, rates],
            "first_seed": self.first_seed,
            "start": self.start,
        }

    def _kind(self) -> list[Any]:
        directions = self.directions
        own = [directions.kind, directions.block, directions.rank, directions.renew, directions.small]
        return [*own, self.estimate.kind, self.update, self.num_directions]

    def _load_own_state(self, state: dict) -> None:
        if list(state.get("kind", ())) != self._kind():
            raise ValueError(
                f"the state is of another method or number of directions ({state.get('kind')}, not {self._kind()}); "
                "pass the same arguments"
            )
        super()._load_own_state(state)
        self.basis = state["basis"]
        self.weight_updates.load_state(state)
        self.directions.thresholds, self.perturbed_forward.unread = state["thresholds"], set(state["unseen"])
        for number in state["elsewhere"]:
            self.perturbed_forward.read_elsewhere(number)
        slopes, rates = (part.tolist() for part in state["record"])
        self.record = list(zip(slopes, rates, strict=True))
        self.first_seed, self.start = state["first_seed"], state["start"]
