"""Several perturbed models in one forward pass: how many, whether the model allows it, and their losses."""

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch

from hf_ft_ext.errors import InputError
from hf_ft_ext.gradientless.optimizers.perturbation.module_patch import CannotBatch
from hf_ft_ext.gradientless.optimizers.perturbation.perturb import PerturbedForward
from hf_ft_ext.gradientless.optimizers.perturbation.weights import Combination

logger = logging.getLogger("hf_ft_ext.gradientless.optimizers.spsa")

# Relative and absolute tolerance between the losses of one batched forward pass and of separate ones.
_TOLERANCE, _TOLERANCE_16_BITS = 1e-4, 3e-2
# On a CPU, a forward pass of more tokens takes longer per token: its activations leave the cache.
TOKENS_PER_FORWARD = 256


class CandidateBatches:
    """Evaluates several perturbed models as one forward pass over the repeated batch.

    The first time, the losses are compared with those of separate forward passes. A model that fails this check, or
    that cannot process the repeated rows, is evaluated one by one from then on.

    Args:
        perturbed_forward: perturbs the weights of a forward pass.
        searched: the searched tensors.
        candidates: models per forward pass, 1 or more; `None` = as many as have at most `TOKENS_PER_FORWARD` tokens
            together, if directions are low-rank and on a CPU, else 1 (dense directions run one by one in each layer).

    Attributes:
        possible: whether candidates are, or may be, evaluated together.

    Raises:
        InputError: `candidates` below 1.
    """

    def __init__(self, perturbed_forward: PerturbedForward, searched: Sequence[torch.Tensor], candidates: int | None):
        if candidates is not None and candidates < 1:
            raise InputError(f"candidates_per_forward must be 1 or more, got {candidates}")
        self.perturbed_forward, self.searched, self.candidates = perturbed_forward, searched, candidates
        self.possible, self.checked = candidates != 1, False

    def size(self, evaluate: Any) -> int:
        """Number of candidates of the next forward passes, 1 or more.

        Args:
            evaluate: may have a method `repeated`, and `tokens`: the most tokens of one of its forward passes.
        """
        if not self.possible or getattr(evaluate, "repeated", None) is None:
            return 1
        if self.candidates is not None:
            return self.candidates
        tokens = getattr(evaluate, "tokens", None)
        fast = self.perturbed_forward.directions.low_rank and all(p.device.type == "cpu" for p in self.searched)
        return max(1, TOKENS_PER_FORWARD // tokens) if fast and tokens else 1

    def losses(
        self, combinations: Sequence[Combination], repeated: Callable[[int], torch.Tensor | None], alone: Callable
    ) -> torch.Tensor | None:
        """Losses of the combinations in one forward pass; `None` if that is not possible (not tried again).

        Args:
            repeated: returns the losses `[n]` of the batch repeated `n` times.
            alone: returns the loss of one combination by a forward pass of its own.
        """
        try:
            with self.perturbed_forward(*combinations):
                losses = repeated(len(combinations))
            if losses is None:
                raise CannotBatch("the objective is defined for whole batches only")
            losses = losses.double().cpu()
            if not self.checked:
                self._check(losses, torch.tensor([alone(one) for one in combinations], dtype=torch.float64))
            return losses
        except (CannotBatch, RuntimeError, ValueError, IndexError) as error:
            # Other errors are not specific to the batched pass: separate passes would raise them too.
            if self.checked and not isinstance(error, CannotBatch):
                raise
            logger.info("candidates are evaluated one by one: %s", error)
            self.possible = False
            return None

    def _check(self, losses: torch.Tensor, expected: torch.Tensor) -> None:
        small = any(parameter.element_size() == 2 for parameter in self.searched)
        small = small or torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda")
        tolerance = _TOLERANCE_16_BITS if small else _TOLERANCE
        if not torch.allclose(losses, expected, rtol=tolerance, atol=tolerance, equal_nan=True):
            raise CannotBatch(
                f"losses of the repeated batch differ by {float((losses - expected).abs().max()):.2g} from those of "
                "separate forward passes"
            )
        self.checked = True
