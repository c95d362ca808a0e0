"""`SPSA`: simultaneous perturbation, in place by seed, as MeZO uses it."""

import logging
import math
from collections.abc import Callable, Sequence

import torch
from torch import nn
from torch.optim.optimizer import ParamsT

from hf_ft_ext.errors import InputError
from hf_ft_ext.gradientless.optimizers.base import Closure, GradientFreeOptimizer
from hf_ft_ext.gradientless.optimizers.groups import check_block
from hf_ft_ext.gradientless.optimizers.perturb import PerturbedUse

logger = logging.getLogger(__name__)

RULES = SGD, MOMENTUM, ADAM = ("sgd", "momentum", "adam")


class SPSA(GradientFreeOptimizer):
    """Simultaneous perturbation (MeZO): one number per direction says how far all weights move along it.

    In a step, for each of `num_directions` directions `z` (standard normal, made anew from a seed wherever it is
    needed): `g = (L(theta + eps z) - L(theta - eps z)) / (2 eps)`; then `theta -= lr * u * z / num_directions`, where
    `u` is `g` itself (`sgd`), its running mean with factor `momentum` (`momentum`), or that divided by the root of the
    running mean of its square (`adam`). The running means are of numbers: no state of the weights' size exists.

    The perturbed weights are made where a forward uses them and dropped behind it, so the stored weights do not
    drift in any type, and no second copy of the model exists. The update of 16-bit weights is rounded up or down
    at random with the right mean: to the nearest, most updates would be lost.

    Args:
        params: parameters or groups (`lr` and `weight_decay` can be set per group).
        module: the model whose forward the closure runs, with all of `params` in its modules.
        lr: learning rate, 0 or more.
        eps: size of the perturbation, above 0.
        num_directions: directions per step, 1 or more; two evaluations each.
        block: consecutive entries of a tensor that move alike: `z` has one number for each block, so the search is in
            fewer numbers, such as one per attention head. Has to divide the size of every tensor.
        update: `"sgd"`, `"momentum"` or `"adam"`.
        momentum, betas, adam_eps: of the running means; each in [0, 1), `adam_eps` above 0.
        weight_decay: decoupled, 0 or more: `theta *= 1 - lr * weight_decay`.
        seed: of the private generator.
        max_evaluations: most evaluations that one step may need.

    Raises:
        InputError: a value out of range; a parameter that `module` does not hold; in `step`: the loss is not finite.

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
    ):
        _check(lr, eps, num_directions, update, momentum, betas, adam_eps, weight_decay)
        if 2 * num_directions > max_evaluations:
            raise InputError(
                f"a step would need {2 * num_directions:,} evaluations, more than max_evaluations_per_step="
                f"{max_evaluations:,}; take fewer directions, or raise it"
            )
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay}, seed)
        self.eps, self.num_directions, self.block, self.update = eps, num_directions, block, update
        self.momentum, self.betas, self.adam_eps = momentum, tuple(betas), adam_eps
        self.searched = [parameter for group in self.param_groups for parameter in group["params"]]
        check_block(block, self.searched)
        self.use = PerturbedUse(module, self.searched)
        if self.use.missing:
            shape = tuple(self.searched[self.use.missing[0]].shape)
            raise InputError(f"a parameter of shape {shape} belongs to no part of the module; pass the one it is in")
        self.first = torch.zeros(num_directions, dtype=torch.float64)
        self.second = torch.zeros(num_directions, dtype=torch.float64)

    def evaluations_per_step(self) -> int:
        """Losses that one step evaluates."""
        return 2 * self.num_directions

    @torch.no_grad()
    def step(self, closure: Closure | None = None, evaluate: Callable | None = None) -> float | None:
        """Perturb, compare, move; return the mean of all losses that were evaluated.

        Args:
            closure: returns the loss of the batch, by a forward of the module.
            evaluate: not used; there so that a trainer can hand over the same for every method.
        """
        if self._already_taken(closure):
            return None
        self.steps += 1
        seeds = [self._draw_seed() for _ in range(self.num_directions)]
        signed = [(seed, sign) for seed in seeds for sign in (1.0, -1.0)]
        losses = torch.zeros(len(signed), dtype=torch.float64)
        for i in self.exchange.mine(len(signed)):
            losses[i] = self.perturbed_loss(closure, *signed[i])
        losses = self.exchange.combine(losses)
        self.evaluations += len(signed)
        mean = self._checked_current(losses.mean())
        if self.steps == 1 and self.use.unseen:
            logger.warning(
                "%d searched tensors are read by no module's forward: they are not perturbed; leave them out",
                len(self.use.unseen),
            )
        slopes = (losses[0::2] - losses[1::2]) / (2 * self.eps)
        self._move(seeds, self._lengths(slopes))
        return mean

    def perturbed_loss(self, closure: Closure, seed: int, sign: float) -> float:
        """The closure's loss with all searched weights moved by `sign * eps * z(seed)` wherever they are used."""

        def moved(parameter: torch.Tensor, number: int) -> torch.Tensor:
            return direction(parameter, seed, number, self.block).mul_(sign * self.eps).add_(parameter)

        with self.use(moved):
            return float(closure())

    def _lengths(self, slopes: torch.Tensor) -> torch.Tensor:
        if self.update == SGD:
            return slopes
        if self.update == MOMENTUM:
            self.first.mul_(self.momentum).add_(slopes)
            return self.first.clone()
        beta1, beta2 = self.betas
        self.first.mul_(beta1).add_(slopes, alpha=1 - beta1)
        self.second.mul_(beta2).addcmul_(slopes, slopes, value=1 - beta2)
        mean, square = self.first / (1 - beta1**self.steps), self.second / (1 - beta2**self.steps)
        return mean / (square.sqrt() + self.adam_eps)

    def _move(self, seeds: Sequence[int], lengths: torch.Tensor) -> None:
        number = -1
        for group in self.param_groups:
            lr, decay = float(group["lr"]), float(group["weight_decay"])
            factors = [-lr * float(length) / self.num_directions for length in lengths]
            still = not any(factors) and not lr * decay
            for parameter in group["params"]:
                number += 1
                if still or number in self.use.unseen:
                    continue
                exact = parameter.detach().to(torch.float32) if parameter.element_size() == 2 else parameter.detach()
                exact.mul_(1 - lr * decay)
                for seed, factor in zip(seeds, factors, strict=True):
                    if factor:
                        exact.add_(direction(parameter, seed, number, self.block), alpha=factor)
                if parameter.element_size() == 2:
                    generator = torch.Generator(parameter.device).manual_seed(_mixed(seeds[0], number) ^ 1)
                    parameter.copy_(rounded_at_random(exact, parameter.dtype, generator))

    def _own_state(self) -> dict:
        return {**super()._own_state(), "first": self.first.clone(), "second": self.second.clone()}

    def _load_own_state(self, state: dict) -> None:
        if "first" not in state or state["first"].shape != self.first.shape:
            raise ValueError("the state is of another method or number of directions; pass the same arguments")
        super()._load_own_state(state)
        self.first, self.second = state["first"].cpu().clone(), state["second"].cpu().clone()


def direction(parameter: torch.Tensor, seed: int, number: int, block: int = 1) -> torch.Tensor:
    """The part of the direction `seed` that belongs to tensor `number`, in the parameter's shape and type."""
    generator = torch.Generator(parameter.device).manual_seed(_mixed(seed, number))
    kind = {"dtype": parameter.dtype, "device": parameter.device}
    if block == 1:
        return torch.randn(parameter.shape, generator=generator, **kind)
    numbers = torch.randn(parameter.numel() // block, generator=generator, **kind)
    return numbers.repeat_interleave(block).view(parameter.shape)


def rounded_at_random(exact: torch.Tensor, dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    """`exact` (float32) as a 16-bit type: up or down at random, so that the mean is `exact`."""
    nearest = exact.to(dtype)
    error = exact - nearest.float()
    # Neighbours of a float are its bits plus or minus one; away from zero is plus.
    away = (error > 0) == (nearest > 0)
    bits = nearest.view(torch.int16)
    other = torch.where(away, bits + 1, bits - 1).view(dtype)
    gap = (other.float() - nearest.float()).abs()
    chance = torch.where((nearest == 0) | (error == 0) | ~gap.isfinite(), torch.zeros_like(error), error.abs() / gap)
    draw = torch.rand(exact.shape, generator=generator, device=exact.device)
    return torch.where(draw < chance, other, nearest)


def _mixed(seed: int, number: int) -> int:
    return (seed + number * 0x9E3779B97F4A7C15) % 2**62


def _check(lr, eps, num_directions, update, momentum, betas, adam_eps, weight_decay) -> None:
    for name, value in (("lr", lr), ("weight_decay", weight_decay)):
        if not value >= 0:
            raise InputError(f"{name}={value} is below 0; pass 0 or more")
    if not (eps > 0 and math.isfinite(eps)):
        raise InputError(f"eps={eps} is no size of a perturbation; pass a number above 0, such as 1e-3")
    if num_directions < 1:
        raise InputError(f"num_directions={num_directions} leaves nothing to compare; pass 1 or more")
    if update not in RULES:
        raise InputError(f"update={update!r} is unknown; choose from: {', '.join(RULES)}")
    for name, value in (("momentum", momentum), ("betas[0]", betas[0]), ("betas[1]", betas[1])):
        if not 0 <= value < 1:
            raise InputError(f"{name}={value} is no factor in [0, 1); pass 0.9, say")
    if not adam_eps > 0:
        raise InputError(f"adam_eps={adam_eps} cannot keep a division finite; pass a number above 0")
