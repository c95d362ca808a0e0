"""What the gradient-free optimizers share: a private generator, a step that can be handed over, counts."""

import math
from collections.abc import Callable

import torch

from hf_ft_ext.errors import InputError
from hf_ft_ext.gradientless.optimizers.exchange import SingleProcess
from hf_ft_ext.training.copying import CopiedInFull

Closure = Callable[[], float | torch.Tensor]
_OWN_STATE = "search"
_FREED_ONCE = 2**25 - 2**16  # bytes, just below the largest block that glibc's allocator learns from


class GradientFreeOptimizer(CopiedInFull):
    """An optimizer that looks at losses only.

    `step(closure)` evaluates `closure()`, the loss at the present weights, as often as the method needs. For training
    loops that call `step()` without arguments (transformers' does), `step_ahead` takes the step before, and the
    loop's call does nothing.

    Attributes:
        steps: steps taken.
        evaluations: losses evaluated so far, candidates one by one.
        rejected: candidates whose loss was NaN or infinite; such a candidate is never taken.
        exchange: how several processes share the work (see `parallel`).
    """

    def __init__(self, params, defaults: dict, seed: int = 0):
        super().__init__(params, defaults)
        self.generator = torch.Generator().manual_seed(seed)
        self.steps = self.evaluations = self.rejected = 0
        self.exchange = SingleProcess()
        self._ahead = False
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.device.type == "meta":
                    raise InputError(
                        f"a tensor of shape {tuple(parameter.shape)} is offloaded: it is on no device but while its "
                        "module runs, and cannot be searched; load the model onto one device, or in 16 bits"
                    )
                if not (parameter.is_floating_point() and parameter.is_contiguous()):
                    raise InputError(
                        f"a tensor of shape {tuple(parameter.shape)} and type {parameter.dtype} cannot be searched; "
                        "pass contiguous floating-point parameters"
                    )

    def step_ahead(self, closure: Closure, evaluate: Callable | None = None) -> float:
        """Take the step now; the next `step()` without arguments does nothing. Returns what the step returns."""
        loss = self.step(closure, evaluate)
        self._ahead = True
        return loss

    def _already_taken(self, closure: Closure | None) -> bool:
        """Whether this is the call that follows `step_ahead`; without a closure and without that, an error."""
        if closure is not None:
            return False
        if not self._ahead:
            raise InputError(
                f"{type(self).__name__} compares losses: call step(closure) with a function that returns the loss of "
                "the batch at the present weights"
            )
        self._ahead = False
        return True

    def _current_loss(self, closure: Closure) -> float:
        mine = self.exchange.mine(1)
        losses = torch.tensor([float(closure()) if len(mine) else 0.0], dtype=torch.float64)
        self.evaluations += 1
        return self._checked_current(self.exchange.combine(losses)[0])

    def _checked_current(self, loss: float | torch.Tensor) -> float:
        loss = float(loss)
        if not math.isfinite(loss):
            raise InputError(
                f"the loss at the present weights is {loss} in step {self.steps}; look for bad rows or labels, lower "
                "the learning rate, or load the model in float32"
            )
        return loss

    def _draw_seed(self) -> int:
        return int(torch.randint(2**62, (), generator=self.generator))

    # --- state -------------------------------------------------------------------------------------

    def _own_state(self) -> dict:
        return {
            "generator": self.generator.get_state(),
            "steps": self.steps,
            "evaluations": self.evaluations,
            "rejected": self.rejected,
        }

    def _load_own_state(self, state: dict) -> None:
        self.generator.set_state(state["generator"].cpu())
        self.steps, self.evaluations, self.rejected = state["steps"], state["evaluations"], state["rejected"]

    def state_dict(self) -> dict:
        """torch's state dict plus `search`: all that the next step depends on."""
        return {**super().state_dict(), _OWN_STATE: self._own_state()}

    def load_state_dict(self, state_dict: dict) -> None:
        """Load it; the next step is the one that the saved optimizer would have taken.

        Raises:
            ValueError: the state is of other parameters or of another optimizer.
        """
        if _OWN_STATE not in state_dict:
            raise ValueError(f"this is no state of {type(self).__name__}: it has no {_OWN_STATE!r} part")
        super().load_state_dict({key: value for key, value in state_dict.items() if key != _OWN_STATE})
        self._load_own_state(state_dict[_OWN_STATE])


def keep_freed_memory() -> None:
    """Let glibc keep freed blocks of up to 32 MiB for the next step instead of giving them back to the system.

    Its threshold for giving memory back is twice the largest block that it has seen freed. Without this, each step of
    a head on cached features gets its few MiB anew, page by page: a quarter of its time (`benchmarks/gradientless.py`,
    variant `none`); and so does each chunk of weights that `SPSA` makes. The block is never written to, so it costs
    no memory. Other allocators do not notice.
    """
    torch.empty(_FREED_ONCE, dtype=torch.uint8)
