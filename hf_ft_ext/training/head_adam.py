"""`HeadAdam`: Adam with gradients behind the interface of a search; the baseline for searches of a head."""

import math
from collections.abc import Callable
from typing import Any, overload

import torch

from hf_ft_ext.errors import DivergedError, InputError
from hf_ft_ext.training.copying import CopyableOptimizer


class HeadAdam(CopyableOptimizer):
    """AdamW behind the interface of a search: `step(closure)` computes the gradient of the closure's loss itself.

    The closure has to return a tensor that depends on the parameters. A baseline for comparisons, not for production.

    Args:
        params: parameters or groups.
        lr, betas, eps, weight_decay: as for `torch.optim.AdamW`.

    Attributes:
        steps, evaluations: steps taken, one evaluation each.
        rejected: always 0 (a search counts rejected candidates).

    Raises:
        InputError: in `step`: the loss is not finite, or there is no closure.
    """

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})
        self.adam = torch.optim.AdamW(
            [dict(group) for group in self.param_groups], lr=lr, betas=betas, eps=eps, weight_decay=weight_decay
        )
        self.steps = self.evaluations = self.rejected = 0
        self._ahead = False

    def evaluations_per_step(self) -> int:
        """Losses that one step evaluates."""
        return 1

    def step_ahead(self, closure: Callable, evaluate: Any = None) -> float:
        """Take the step now; the next `step()` without arguments does nothing. Returns the loss before the step."""
        loss = self.step(closure, evaluate)
        self._ahead = True
        return loss

    @overload
    def step(self, closure: Callable, evaluate: Any = None) -> float: ...

    @overload
    def step(self, closure: None = None, evaluate: Any = None) -> float | None: ...

    def step(self, closure: Callable | None = None, evaluate: Any = None) -> float | None:
        """Take one AdamW step; return the loss before it.

        Args:
            closure: returns the loss of the batch.
            evaluate: if it has a method `differentiable()`, that is called instead of `closure`.
        """
        if closure is None and self._ahead:
            self._ahead = False
            return None
        if closure is None:
            raise InputError(
                "HeadAdam computes gradients itself: call step(closure) with a function that returns the loss"
            )
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
                value = float(loss.detach())
                if not math.isfinite(value):
                    raise DivergedError(
                        f"the loss at the current weights is {value} in step {self.steps}; look for bad rows or "
                        "labels, lower the learning rate, or load the model in float32"
                    )
                gradients = torch.autograd.grad(loss, parameters)
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = gradient
            self.adam.step()
        finally:
            for parameter in parameters:
                parameter.grad = None
                parameter.requires_grad_(False)
        return value

    def state_dict(self) -> dict:
        """torch's state dict plus the state of AdamW and the counts."""
        counts = {"steps": self.steps, "evaluations": self.evaluations}
        return {**super().state_dict(), "adam": self.adam.state_dict(), "counts": counts}

    def load_state_dict(self, state_dict: dict) -> None:
        """Load it; the next step is the one that the saved optimizer would have taken."""
        own = {key: value for key, value in state_dict.items() if key not in ("adam", "counts")}
        super().load_state_dict(own)
        self.adam.load_state_dict(state_dict["adam"])
        self.steps, self.evaluations = state_dict["counts"]["steps"], state_dict["counts"]["evaluations"]
