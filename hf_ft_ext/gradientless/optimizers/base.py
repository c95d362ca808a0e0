"""Base class of the gradient-free optimizers: private generator, step before the training loop's own, counts."""

import inspect
import itertools
import math
import warnings
import zlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeGuard

import torch

from hf_ft_ext.errors import DivergedError, InputError
from hf_ft_ext.gradientless.optimizers.exchange import SingleProcess
from hf_ft_ext.offload import StoredTensor
from hf_ft_ext.training.copying import CopyableOptimizer

Closure = Callable[[], float | torch.Tensor]
_OWN_STATE = "search"
_FREED_BLOCK_BYTES = 2**25 - 2**16  # bytes, just below glibc's DEFAULT_MMAP_THRESHOLD_MAX (32 MiB)


class GradientFreeOptimizer(CopyableOptimizer):
    """An optimizer that uses losses only.

    `step(closure)` evaluates `closure()`, the loss at the current weights, as often as the method needs. Some training
    loops (that of transformers) call `step()` without a closure. There, call `step_ahead(closure)` before: the next
    `step()` then does nothing.

    Args:
        offloaded: where accelerate keeps offloaded parameters, by `id`, if the method can search these.

    Attributes:
        steps: number of steps taken.
        evaluations: number of losses evaluated so far, each candidate counted.
        rejected: number of candidates with a NaN or infinite loss; such a candidate is never accepted.
        exchange: how several processes share the work (see `exchange`).
    """

    _has_groups = False

    def __init__(self, params, defaults: dict, seed: int = 0, offloaded: Mapping[int, StoredTensor] | None = None):
        super().__init__(params, defaults)
        self._has_groups = True
        self.generator = torch.Generator().manual_seed(seed)
        self.steps = self.evaluations = self.rejected = 0
        self.exchange = SingleProcess()
        self._ahead = False
        _drop_tied_copies(self.param_groups, offloaded or {})
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.is_meta and offloaded is None:
                    raise InputError(
                        f"a tensor of shape {tuple(parameter.shape)} is offloaded (on the meta device), and "
                        f"{type(self).__name__} changes tensors in place; keep its module loaded, by a device in "
                        "device_map or accelerate's remove_hook_from_module, or use SPSA"
                    )
                if offloaded is not None and parameter.is_meta and id(parameter) not in offloaded:
                    raise InputError(
                        f"a tensor of shape {tuple(parameter.shape)} is on the meta device, and no module of the "
                        "model has it with a place that accelerate loads it from; pass model.parameters() as they "
                        "are now, and add adapters before you offload the model (or by search_peft)"
                    )
                if not (parameter.is_floating_point() and parameter.is_contiguous()):
                    raise InputError(
                        f"a tensor of shape {tuple(parameter.shape)} and type {parameter.dtype} cannot be searched; "
                        "pass contiguous floating-point parameters"
                    )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in torch, while the optimizer is made; a search is set up for the tensors that it has then.

        Raises:
            InputError: a call after that, or a group with a setting of the whole search.
        """
        if self._has_groups:
            raise InputError(
                f"{type(self).__name__} searches the parameters that it was made with; pass all groups to its "
                "constructor instead of add_param_group"
            )
        of_all = inspect.signature(type(self).__init__).parameters.keys() - self.defaults.keys() - {"params"}
        if isinstance(param_group, dict) and (wrong := sorted(of_all & param_group.keys())):
            raise InputError(
                f"{wrong[0]}={param_group[wrong[0]]!r} of a group of parameters has no effect; pass it to "
                f"{type(self).__name__} for all of them (a group may have {', '.join(self.defaults)})"
            )
        super().add_param_group(param_group)

    def step_ahead(self, closure: Closure, evaluate: Callable | None = None) -> float:
        """Take the step now, so that the next `step()` without a closure does nothing; return the step's result.

        A step that an error ends, such as one of memory, does not count: `Trainer` may go on with smaller batches.
        """
        steps, state = self.steps, self.generator.get_state()
        try:
            loss = self.step(closure, evaluate)
        except BaseException:
            self.steps = steps
            self.generator.set_state(state)
            raise
        self._ahead = True
        return loss

    def _takes_step(self, closure: Closure | None) -> TypeGuard[Closure]:
        """Whether to take a step: not if `step_ahead` has; raises `InputError` without a closure and `step_ahead`."""
        if closure is not None:
            return True
        if not self._ahead:
            raise InputError(
                f"{type(self).__name__} compares losses: call step(closure) with a function that returns the loss of "
                "the batch at the current weights"
            )
        self._ahead = False
        return False

    def _current_loss(self, closure: Closure) -> float:
        mine = self.exchange.mine(1)
        losses = torch.tensor([loss_of(closure) if len(mine) else 0.0], dtype=torch.float64)
        self.evaluations += 1
        return self._checked_current(self.exchange.combine(losses)[0])

    def _checked_current(self, loss: float | torch.Tensor) -> float:
        loss = float(loss)
        if not math.isfinite(loss):
            raise DivergedError(
                f"the loss at the current weights is {loss} in step {self.steps}; look for bad rows or labels, lower "
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
        """torch's state dict plus the entry `search`: everything else that the next step depends on."""
        return {**super().state_dict(), _OWN_STATE: self._own_state()}

    def load_state_dict(self, state_dict: dict) -> None:
        """Load a saved state; the next step equals the one that the saved optimizer would have taken.

        Raises:
            ValueError: the state is of other parameters or of another optimizer.
        """
        if _OWN_STATE not in state_dict:
            raise ValueError(f"this is not a state of {type(self).__name__}: it has no entry {_OWN_STATE!r}")
        super().load_state_dict({key: value for key, value in state_dict.items() if key != _OWN_STATE})
        self._load_own_state(state_dict[_OWN_STATE])


def loss_of(closure: Closure) -> float:
    """The loss that the closure returns.

    Raises:
        InputError: it returns nothing, or several numbers.
    """
    loss = closure()
    if loss is None or (isinstance(loss, torch.Tensor) and loss.numel() != 1):
        found = "nothing" if loss is None else f"a tensor of shape {tuple(loss.shape)}"
        raise InputError(f"the closure returned {found}; return the loss of the batch, one number")
    return float(loss)


def check_rates(lr: float, weight_decay: float) -> None:
    """Raise an `InputError` if one of them is below 0 or NaN."""
    for name, value in (("lr", lr), ("weight_decay", weight_decay)):
        if not value >= 0:
            raise InputError(f"{name} must be 0 or more, got {value}")


def check_perturbation(eps: float | None, num_directions: int, usual: str = "1e-3") -> None:
    """Raise an `InputError` unless `eps` is finite, above 0 or `None` (a default), and there is a direction."""
    if eps is not None and not (eps > 0 and math.isfinite(eps)):
        raise InputError(f"eps must be a finite number above 0, such as {usual}, got {eps}")
    if num_directions < 1:
        raise InputError(f"num_directions must be 1 or more, got {num_directions}")


def report_accepted(evaluate: Any, row: int | None) -> None:
    """Call `evaluate.accepted(row)` if it exists: a tensor now equals candidate `row` (`None`: none of them)."""
    if hasattr(evaluate, "accepted"):
        evaluate.accepted(row)
    elif hasattr(evaluate, "moved"):
        warnings.warn("the method `moved` of an `evaluate` is now called `accepted`", FutureWarning, stacklevel=3)
        evaluate.moved(row)


def sample_sum(parameters: Iterable[torch.Tensor]) -> int:
    """Checksum of up to 64 entries of each tensor, to compare the initial weights of two models."""
    total = 0
    for parameter in parameters:
        flat = parameter.detach().view(-1)
        sample = flat[:: max(1, flat.numel() // 64)][:64].cpu().contiguous()
        total = zlib.crc32(sample.view(torch.uint8).numpy().tobytes(), total)
    return total


def keep_freed_memory() -> None:
    """Let glibc keep freed blocks of up to 32 MiB for the next step instead of returning them to the system.

    glibc returns memory above a dynamic threshold: twice the size of the largest block freed so far. Allocating and
    freeing one block of almost 32 MiB raises it. Otherwise each step of a head on cached features maps its few MiB
    again, page by page, which takes a quarter of its time (`benchmarks/gradientless.py`, variant `none`); the same
    holds for each chunk of weights that `SPSA` computes. The block is never written to, so it costs no memory. Other
    allocators are not affected.
    """
    torch.empty(_FREED_BLOCK_BYTES, dtype=torch.uint8)


def _drop_tied_copies(groups: list[dict[str, Any]], offloaded: Mapping[int, StoredTensor]) -> None:
    """Leave out parameters kept in the same place as an earlier one: accelerate gives tied weights several."""
    seen: set[int] = set()
    for group in groups:
        first = []
        for parameter in group["params"]:
            place = id(offloaded.get(id(parameter), parameter))
            first.append(place not in seen)
            seen.add(place)
        for name in group.keys() & {"params", "param_names"}:
            group[name] = list(itertools.compress(group[name], first))
