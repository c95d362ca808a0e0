"""Adam on the same head and features: what a search without gradients is compared with."""

import torch

from hf_ft_ext.errors import InputError
from hf_ft_ext.gradientless.base import Closure, GradientFreeOptimizer
from hf_ft_ext.gradientless.parallel import Alone


class HeadAdam(GradientFreeOptimizer):
    """Adam(W) behind the interface of the searches: `step(closure)` takes the gradient of the closure's loss.

    The closure has to return a tensor that depends on the parameters. Not for production: a baseline.

    Args:
        params: parameters or groups.
        lr, betas, eps, weight_decay: as for `torch.optim.AdamW`.
        seed: not used; there so that all methods are made alike.

    Raises:
        InputError: in `step`: the loss is not finite, or several processes share the work.
    """

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, seed: int = 0):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay}, seed)
        self.adam = torch.optim.AdamW(
            [dict(group) for group in self.param_groups], lr=lr, betas=betas, eps=eps, weight_decay=weight_decay
        )

    def evaluations_per_step(self) -> int:
        """Losses that one step evaluates."""
        return 1

    def step(self, closure: Closure | None = None, evaluate=None) -> float | None:
        """One update; return the loss before it."""
        if self._already_taken(closure):
            return None
        if type(self.exchange) is not Alone:
            raise InputError("search_method=adam is a baseline for one process; start it with one")
        self.steps += 1
        self.evaluations += 1
        parameters = [p for group in self.param_groups for p in group["params"]]
        for own, group in zip(self.adam.param_groups, self.param_groups, strict=True):
            own["lr"] = float(group["lr"])
        try:
            with torch.enable_grad():
                for parameter in parameters:
                    parameter.requires_grad_(True)
                loss = getattr(evaluate, "differentiable", closure)()
                value = self._checked_current(loss.detach())
                gradients = torch.autograd.grad(loss, parameters)
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = gradient
            self.adam.step()
        finally:
            for parameter in parameters:
                parameter.grad = None
                parameter.requires_grad_(False)
        return value

    def _own_state(self) -> dict:
        return {**super()._own_state(), "adam": self.adam.state_dict()}

    def _load_own_state(self, state: dict) -> None:
        super()._load_own_state(state)
        self.adam.load_state_dict(state["adam"])
