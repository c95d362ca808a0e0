"""`ActivityPerturbation`: search of any layers by random noise on their outputs, with a slope for each row."""

import logging
from collections import deque
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
from hf_ft_ext.gradientless.optimizers.perturbation.watch import watched_reads

logger = logging.getLogger(__name__)

_SEED_OF_CHECK = 0  # not drawn: the checks do not change the directions of the steps
_MOST_CHECKS = 32
_TOLERANCE = 1e-6  # relative, between losses of rows without noise: rounding only
# One micro-batch: a function that runs the model and returns the loss of each row `[rows]`, and the micro-batch's
# weight in the mean over the step.
RowPass = tuple[Callable[[], torch.Tensor], float]


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
        passes: Sequence[RowPass] = evaluate.row_passes() if hasattr(evaluate, "row_passes") else [(closure, 1.0)]
        self.steps += 1
        total = sum(weight for _, weight in passes)
        seeds = [self._draw_seed() for _ in range(self.num_directions)]
        estimates, mean = Estimates(), 0.0
        self.noise.first_row = 0
        for losses_of, weight in passes:
            mean += weight / total * self._estimate(losses_of, seeds, weight / total, estimates)
        found = estimates.centred()
        if self.steps == 1 and passes:
            self._report_left_out(found)
        self._update(found)
        return mean

    def _estimate(
        self, losses_of: Callable[[], torch.Tensor], seeds: Sequence[int], weight: float, into: Estimates
    ) -> float:
        """Add the estimates of one micro-batch to `into`; return its mean loss."""
        if not self.examined and weight:  # with weight 0, losses without labels would show nothing
            self._examine(losses_of)
        differences, mean = [], 0.0
        for seed in seeds:
            with self.noise.added(seed, 1.0):
                plus = self._row_losses(losses_of)
            first_rows = len(plus) > 1 and self.noise.by_rows is None
            first_padding = self.noise.hides and self.noise.masked is None
            if weight and (first_rows or first_padding):
                self._examine(losses_of)
                with self.noise.added(seed, 1.0):
                    plus = self._row_losses(losses_of)
                self.evaluations += 1
            with self.noise.added(seed, -1.0):
                minus = self._row_losses(losses_of)
            differences.append((plus - minus) / 2)
            mean += self._checked_current((plus + minus).mean() / 2) / len(seeds)
        with self.noise.estimating(seeds, torch.stack(differences), weight, into):
            losses_of()
        self.noise.first_row += len(differences[0])
        self.evaluations += self.evaluations_per_step()
        return mean

    def _row_losses(self, losses_of: Callable[[], torch.Tensor]) -> torch.Tensor:
        losses = losses_of()
        if not isinstance(losses, torch.Tensor) or losses.ndim != 1:
            shape = tuple(losses.shape) if isinstance(losses, torch.Tensor) else type(losses).__name__
            raise InputError(
                f"activity perturbation needs the loss of each row [rows], got {shape}; return them from the closure "
                '(reduction="none"), or use SPSA'
            )
        return losses.double()

    def _examine(self, losses_of: Callable[[], torch.Tensor]) -> None:
        """Find out with a first micro-batch of several rows, or with padding, what affects the loss of a row.

        Sets `row_modules`, `by_rows` and `masked` of `noise`.
        """
        noise = self.noise
        users = {id(module): module for module, _ in noise.holders}
        with noise.observed() as sizes, watched_reads(self.module, users, self.numbers) as reads:
            plain = self._row_losses(losses_of)
        self.evaluations += 1
        elsewhere = reads.inside | reads.outside
        if elsewhere and not self.examined:
            logger.warning(
                "%d searched tensors (the first of shape %s) are also read by other code than their module's forward; "
                "the search ignores this part of their gradient",
                len(elsewhere),
                tuple(self.searched[min(elsewhere)].shape),
            )
        self.examined = True
        if noise.by_rows is None:
            noise.row_modules = {position for position, found in sizes.items() if found == {len(plain)}}
            if len(plain) > 1:  # with one row, found out later; until then the mean slope is that of the row
                self._find_rows(losses_of, plain)
        if noise.hides and noise.masked is None:
            with noise.added_to_hidden(_SEED_OF_CHECK) as hidden:
                perturbed = self._row_losses(losses_of)
            self.evaluations += 1
            noise.masked = hidden if torch.equal(perturbed, plain) else set()

    def _find_rows(self, losses_of: Callable[[], torch.Tensor], plain: torch.Tensor) -> None:
        """Find the modules whose rows affect the loss of their own row only, among those with the batch's rows.

        Noise of size 1 on the first half of the rows has to leave the losses of the other rows as they are. If it does
        not, the modules are split until those that mix rows are found, or `_MOST_CHECKS` forward passes are used up.
        """
        noise, half, mixing, checks = self.noise, len(plain) // 2, set(), 0
        groups = deque([sorted(noise.row_modules)])
        while groups:
            group = groups.popleft()
            if checks == _MOST_CHECKS:
                mixing.update(group)
                continue
            with noise.added_to_rows(_SEED_OF_CHECK, half, group):
                change = (self._row_losses(losses_of) - plain).abs()
            checks += 1
            if bool((change <= _TOLERANCE * plain.abs())[half:].all()):
                continue
            if len(group) == 1:
                mixing.update(group)
            else:
                groups.extend((group[: len(group) // 2], group[len(group) // 2 :]))
        self.evaluations += checks
        noise.by_rows = mixing != noise.row_modules or not mixing
        if not noise.by_rows:
            logger.warning(
                "the loss of a row depends on the other rows of the batch, so all rows share one slope; the estimates "
                "have more variance"
            )
        elif mixing:
            noise.row_modules -= mixing
            logger.warning(
                "the outputs of %d of %d searched modules affect the losses of several rows, so all rows share one "
                "slope there; these estimates have more variance",
                len(mixing),
                len(noise.holders),
            )

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
            "masked": None if self.noise.masked is None else sorted(self.noise.masked),
            "examined": self.examined,
        }

    def _load_own_state(self, state: dict) -> None:
        super()._load_own_state(state)
        self.noise.by_rows, self.noise.row_modules = state["by_rows"], set(state["row_modules"])
        self.noise.without_noise, self.examined = set(state["without_noise"]), state["examined"]
        self.noise.masked = None if state["masked"] is None else set(state["masked"])
