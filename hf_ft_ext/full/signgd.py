"""`SignGD`: gradient descent along the signs of the gradient."""

from collections.abc import Callable

import torch
from torch.optim.optimizer import ParamsT

from hf_ft_ext.errors import InputError


class SignGD(torch.optim.Optimizer):
    """`theta -= lr * sign(gradient)`, after `theta *= 1 - lr * weight_decay`; no state.

    Args:
        params: parameters or groups (`lr` and `weight_decay` can be set per group).
        lr: size of each entry's step, 0 or more.
        weight_decay: decoupled, 0 or more.

    Raises:
        InputError: a value out of range.

    Source: Malladi et al., ICML 2023 (arXiv 2210.05643), as a model of Adam early in training.
    """

    def __init__(self, params: ParamsT, lr: float = 1e-5, weight_decay: float = 0.0):
        for name, value in (("lr", lr), ("weight_decay", weight_decay)):
            if not value >= 0:
                raise InputError(f"{name} must be 0 or more, got {value}")
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Take a step by the current gradients; entries with gradient 0 do not change (except by weight decay)."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    # theta = theta (1 - lr * weight_decay) - lr sign(g)
                    parameter.mul_(1 - group["lr"] * group["weight_decay"])
                    parameter.add_(parameter.grad.sign(), alpha=-float(group["lr"]))
        return loss
