"""`GradientEstimator`: base of the searches that estimate the gradient of each tensor and update it by a rule."""

import torch
from torch.optim.optimizer import ParamsT

from hf_ft_ext.errors import InputError
from hf_ft_ext.gradientless.optimizers.base import GradientFreeOptimizer, check_rates
from hf_ft_ext.gradientless.optimizers.perturbation.directions import derived_seed
from hf_ft_ext.gradientless.optimizers.perturbation.update_rules import (
    ADAM,
    MOMENTUM,
    RULES,
    SGD,
    SIGN,
    Rounding,
    UpdateRule,
)

ESTIMATE_RULES = SGD, SIGN, MOMENTUM, ADAM


class GradientEstimator(GradientFreeOptimizer):
    """Updates tensors by estimates of their gradients, with moments in buffers of the weights' size.

    Args:
        params: parameters or groups (`lr` and `weight_decay` can be set per group).
        lr: learning rate, 0 or more.
        update: one of `ESTIMATE_RULES`. 16-bit weights are rounded stochastically (see `Rounding`).
        momentum, betas, adam_eps: parameters of the update rule.
        weight_decay: decoupled, 0 or more: `theta *= 1 - lr * weight_decay`.
        seed: of the private generator.

    Raises:
        InputError: a value out of range.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float,
        update: str = ADAM,
        momentum: float = 0.9,
        betas: tuple[float, float] = (0.9, 0.999),
        adam_eps: float = 1e-8,
        weight_decay: float = 0.0,
        seed: int = 0,
    ):
        check_rates(lr, weight_decay)
        if update in RULES and update not in ESTIMATE_RULES:
            raise InputError(
                f"update={update} is not available for node and activity perturbation; choose from: "
                f"{', '.join(ESTIMATE_RULES)}"
            )
        self.rule = UpdateRule(update, momentum, betas, adam_eps, "buffer" if update in (MOMENTUM, ADAM) else None)
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay}, seed)
        self.searched = [parameter for group in self.param_groups for parameter in group["params"]]
        self.buffers: dict[int, tuple[torch.Tensor, ...]] = {}
        self.updates: dict[int, int] = {}  # number of updates of each tensor
        self.rounding = Rounding(carry=False)

    @property
    def numbers(self) -> dict[int, int]:
        """Number of each searched tensor, by its `id` (which is another one in a copy of the optimizer)."""
        return {id(parameter): i for i, parameter in enumerate(self.searched)}

    def _update(self, estimates: dict[int, torch.Tensor]) -> None:
        """Update the tensors that have an estimate (by number; of the tensor's shape), in this step."""
        narrow = any(parameter.element_size() == 2 for parameter in self.searched)
        seed = self._draw_seed() if narrow else 0  # of the stochastic rounding
        number = -1
        for group in self.param_groups:
            lr, decay = float(group["lr"]), float(group["weight_decay"])
            for parameter in group["params"]:
                number += 1
                if number not in estimates:
                    continue
                estimate = estimates[number].flatten()
                if number not in self.buffers:
                    self.buffers[number] = tuple(torch.zeros_like(estimate) for _ in self.rule.buffers())
                everything = slice(0, parameter.numel())
                exact = self.rounding.exact(parameter, number, everything)
                if lr * decay:
                    exact.mul_(1 - lr * decay)
                self.updates[number] = self.updates.get(number, 0) + 1
                self.rule.apply(exact, estimate, lr, self.updates[number], self.buffers[number])
                self.rounding.store(parameter, number, everything, exact, derived_seed(seed, number))

    def _own_state(self) -> dict:
        buffers = {i: list(found) for i, found in self.buffers.items()}
        return {**super()._own_state(), "buffers": buffers, "carried": dict(self.rounding.kept),
                "updates": dict(self.updates)}  # fmt: skip

    def _load_own_state(self, state: dict) -> None:
        super()._load_own_state(state)
        devices = [parameter.device for parameter in self.searched]
        self.buffers = {i: tuple(b.to(devices[i]).clone() for b in found) for i, found in state["buffers"].items()}
        carried = state.get("carried", {})  # not in older checkpoints, and there all tensors had all updates
        self.updates = dict(state.get("updates", dict.fromkeys(self.buffers, self.steps)))
        self.rounding.kept = {i: kept.to(devices[i]).clone() for i, kept in carried.items()}
