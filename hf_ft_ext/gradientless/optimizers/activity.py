"""`ActivityPerturbation`: search of any layers by random noise on their outputs, with a slope for each row."""

import functools
import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import ParamsT

from hf_ft_ext.errors import InputError
from hf_ft_ext.gradientless.optimizers.base import check_perturbation, keep_freed_memory
from hf_ft_ext.gradientless.optimizers.estimated import GradientEstimator
from hf_ft_ext.gradientless.optimizers.output_noise import Estimates, OutputNoise
from hf_ft_ext.gradientless.optimizers.perturbation.update_rules import ADAM
from hf_ft_ext.gradientless.optimizers.row_influence import RowInfluence, RowLosses

logger = logging.getLogger(__name__)

# One micro-batch: a function that runs the model and returns the loss of each row `[rows]`, and the micro-batch's
# weight in the mean over the step.
RowPass = tuple[RowLosses, float]


class ActivityPerturbation(GradientEstimator):
    """Activity perturbation: estimate the gradients of all layers from losses under noise on their outputs.

    The gradient of a linear layer is a sum over positions, `G = sum_t d_t x_t^T`. The inputs `x_t` are known; only the
    output gradients `d_t` have to be estimated. A step adds noise `z` of variance 1, times eps, to the outputs of all
    modules that hold searched parameters, at once. The slope of row `b` is
    `s_b = (loss_b(y + eps z) - loss_b(y - eps z)) / (2 eps)`, and the mean of `s_b z_bt` over the directions estimates
    `d_bt` without bias, to order eps^2: noise on other layers, positions and rows is independent of `z_bt`. A third
    forward pass computes `G` from the inputs.

    In comparison with perturbed weights (SPSA), there are as many slopes as rows in a batch, and a layer has as many
    unknowns as output entries, not as weights. Where a row's output has no row of its own (experts that read some
    tokens), the mean slope of the rows is used.

    `centred`: for linear layers with a searched bias and several positions per row, `G` is computed from
    `x_t - mean`. The inputs of a layer have a large common part. It turns noise in `d` into a common shift of all
    outputs, which the bias can learn as well. The mean part of `G` is left out.

    Layers other than linear ones are differentiated by themselves: `G` is the derivative of one module's output,
    times the estimate of `d`. Gradients of the whole model are never computed, and no activations are stored; the
    estimates and the moments of `update` take memory of the size of the searched weights.

    Args:
        params: parameters of modules of `module`, or groups of them (`lr` and `weight_decay` can be set per group).
        module: the model whose forward pass the closure runs.
        lr: learning rate, 0 or more.
        eps: size of the perturbation of outputs, above 0; `None` = 0.001, for outputs of 16 bits 1/32 (smaller changes
            are lost by rounding).
        num_directions: number of directions per step, 1 or more. A step has `2 num_directions + 1` forward passes.
        update: `"sgd"`, `"sign"`, `"momentum"` or `"adam"`, on the estimate of the gradient. 16-bit weights are
            rounded stochastically (see `Rounding`).
        momentum, betas, adam_eps: parameters of the update rule.
        weight_decay: decoupled, 0 or more.
        centred: leave out the mean part of linear layers' gradients, as above.
        seed: of the private generator.

    Raises:
        InputError: a value out of range; a parameter that `module` does not hold; in `step`: no loss for each row,
            a loss that is not finite, or no searched tensor that noise on outputs can search.

    Source: node perturbation (Werfel, Xie and Seung, NIPS 2003); activity perturbation (Ren et al., arXiv 2210.03310),
    there with forward gradients instead of losses.
    """

    def __init__(
        self,
        params: ParamsT,
        module: nn.Module,
        lr: float = 1e-4,
        eps: float | None = None,
        num_directions: int = 1,
        update: str = ADAM,
        momentum: float = 0.9,
        betas: tuple[float, float] = (0.9, 0.999),
        adam_eps: float = 1e-8,
        weight_decay: float = 0.0,
        centred: bool = True,
        seed: int = 0,
    ):
        check_perturbation(eps, num_directions)
        super().__init__(params, lr, update, momentum, betas, adam_eps, weight_decay, seed)
        self.num_directions, self.module = num_directions, module
        self.examined = False
        self.noise = OutputNoise(module, self.numbers, eps, centred)
        held = {number for _, names in self.noise.holders for number in names.values()}
        if missing := sorted(set(range(len(self.searched))) - held):
            raise InputError(
                f"a parameter of shape {tuple(self.searched[missing[0]].shape)} is in no part of the module; pass the "
                "module that contains it"
            )
        keep_freed_memory()

    def evaluations_per_step(self) -> int:
        """Number of forward passes of a step."""
        return 2 * self.num_directions + 1

    @torch.no_grad()
    def step(self, closure: Callable[[], torch.Tensor] | None = None, evaluate: Any = None) -> float | None:
        """Estimate the gradients of all layers and update them; return the mean of the losses of the estimate.

        Args:
            closure: runs the module on the batch and returns the loss of each row `[rows]`.
            evaluate: an object with `row_passes()` for several micro-batches: pairs of such a function and the
                micro-batch's weight in the mean over the step. `closure` is not called then.
        """
        if not self._takes_step(closure):
            return None
        alone = [(closure, getattr(self.exchange, "weight", 1.0))]
        passes: Sequence[RowPass] = evaluate.row_passes() if hasattr(evaluate, "row_passes") else alone
        self.steps += 1
        seeds = [self._draw_seed() for _ in range(self.num_directions)]
        estimates, losses = Estimates(self.noise), torch.zeros(self.num_directions, dtype=torch.float64)
        own = sum(weight for _, weight in passes)
        total = self.exchange.weight_of_all(own)
        if total:  # 0 without a label token in this step
            if not self.examined:
                self._examine(next(([losses_of] for losses_of, weight in passes if weight), []))
            mine = list(self.exchange.mine(self.num_directions))
            first_rows = self.exchange.first_rows()
            found, unknown = self._differences(passes, seeds, mine, first_rows)
            if self.exchange.union({0} if unknown else set(), 1):
                self._examine(unknown)
                found, _ = self._differences(passes, seeds, mine, first_rows)
            for (losses_of, weight), (first_row, plus, minus) in zip(passes if mine else [], found, strict=True):
                losses[mine] += (plus + minus).mean(1).cpu() / 2 * (weight / own if own else 0.0)
                self.noise.first_row, share = first_row, weight / total * len(mine) / self.num_directions
                with self.noise.estimating([seeds[i] for i in mine], (plus - minus) / 2, share, estimates):
                    losses_of()
            self.evaluations += len(passes)
            estimates.add_processes(self.exchange, self.searched)
            self.noise.row_modules -= estimates.others
        mean = self._checked_current(self.exchange.combine(losses).mean())
        gradients = estimates.centred()
        if self.steps == 1 and total:
            self._report_left_out(gradients)
        self._update(gradients)
        return mean

    def _differences(
        self, passes: Sequence[RowPass], seeds: Sequence[int], mine: Sequence[int], first_rows: Sequence[int] | None
    ) -> tuple[list[tuple[int, torch.Tensor, torch.Tensor]], list[RowLosses]]:
        """Losses of opposite noise for each micro-batch, and micro-batches that have to be examined first.

        Returns:
            For each micro-batch the index of its first row in the step, and the losses with the noise added and
            subtracted, `[directions, rows]`; the micro-batches that show what is not known yet: several rows, padding.
        """
        noise, found, unknown = self.noise, [], {}
        noise.first_row = 0
        for i, (losses_of, weight) in enumerate(passes):
            noise.first_row = noise.first_row if first_rows is None else first_rows[i]
            both: list[list[torch.Tensor]] = [[], []]
            for seed in (seeds[number] for number in mine):
                for sign, losses in zip((1.0, -1.0), both, strict=True):
                    with noise.added(seed, sign):
                        losses.append(self._row_losses(losses_of))
                    self.evaluations += 1
            if not mine:
                continue
            plus, minus = map(torch.stack, both)
            found.append((noise.first_row, plus, minus))
            noise.first_row += plus.shape[1]
            if weight and plus.shape[1] > 1 and noise.by_rows is None:
                unknown.setdefault("rows", losses_of)
            if weight and noise.hides and noise.masked is None:
                unknown.setdefault("padding", losses_of)
        return found, list(dict.fromkeys(unknown.values()))

    def _row_losses(self, losses_of: RowLosses) -> torch.Tensor:
        losses = losses_of()
        if not isinstance(losses, torch.Tensor) or losses.ndim != 1:
            shape = tuple(losses.shape) if isinstance(losses, torch.Tensor) else type(losses).__name__
            raise InputError(
                f"activity perturbation needs the loss of each row [rows], got {shape}; return them from the closure "
                '(reduction="none"), or use SPSA'
            )
        return losses.double()

    def _examine(self, passes: Sequence[RowLosses]) -> None:
        """Find out what affects the loss of a row, with micro-batches of this process (see `RowInfluence`)."""
        influence = RowInfluence(self.module, self.noise, self.searched, self.exchange)
        influence.examine([functools.partial(self._row_losses, losses_of) for losses_of in passes], not self.examined)
        self.evaluations += influence.evaluations
        self.examined = True

    def _report_left_out(self, estimates: dict[int, torch.Tensor]) -> None:
        left = [number for number in range(len(self.searched)) if number not in estimates]
        if len(left) == len(self.searched):
            raise InputError(
                f"noise on outputs can search none of {len(left)} tensors (the first of shape "
                f"{tuple(self.searched[0].shape)}): no forward pass reads them, or their module returns no single "
                "tensor; search other tensors, or use SPSA"
            )
        if left:
            logger.warning(
                "%d searched tensors (the first of shape %s) stay as they are: no forward pass reads them, or their "
                "module returns no single tensor; leave them out, or use SPSA",
                len(left),
                tuple(self.searched[left[0]].shape),
            )

    def _own_state(self) -> dict:
        return {
            **super()._own_state(),
            "by_rows": self.noise.by_rows,
            "row_modules": sorted(self.noise.row_modules),
            "without_noise": sorted(self.noise.without_noise),
            "counted": self.noise.counted,
            "masked": None if self.noise.masked is None else sorted(self.noise.masked),
            "examined": self.examined,
        }

    def _load_own_state(self, state: dict) -> None:
        super()._load_own_state(state)
        self.noise.by_rows = state["by_rows"]
        self.noise.row_modules = set() if state["by_rows"] is False else set(state["row_modules"])
        self.noise.counted = state.get("counted", True)  # not in older checkpoints
        self.noise.without_noise, self.examined = set(state["without_noise"]), state["examined"]
        self.noise.masked = None if state["masked"] is None else set(state["masked"])
