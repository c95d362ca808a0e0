"""`NodePerturbation`: search of a head by perturbing the outputs of its linear layers, row by row."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.optim.optimizer import ParamsT

from hf_ft_ext.errors import InputError
from hf_ft_ext.gradientless.optimizers.base import Closure, check_perturbation, loss_of, report_accepted
from hf_ft_ext.gradientless.optimizers.estimated import GradientEstimator
from hf_ft_ext.gradientless.optimizers.perturbation.directions import compute_type, without_autocast
from hf_ft_ext.gradientless.optimizers.perturbation.update_rules import ADAM

NODE_DIRECTIONS = NEXT_LAYER, SIGNS = ("next-layer", "signs")


class NodePerturbation(GradientEstimator):
    """Node perturbation: estimate the gradient of each row with respect to a layer's outputs from losses.

    The gradient of a linear layer is a sum over the rows, `G = sum_b d_b x_b^T / rows`. The inputs `x_b` are known;
    only the output gradients `d_b = d loss_b / d y_b` have to be estimated. In a step, for each linear layer by itself
    and each of `num_directions` directions `z_b`, the slope is `s_b = (loss_b(y_b + eps z_b) - loss_b(y_b)) / eps`.
    This needs no derivative, but an objective that is a mean over the rows.

    | directions of a layer | estimate of `d_b` |
    | --- | --- |
    | `signs`: entries +1 and -1, drawn for each row | the mean of `s_b z_b`: unbiased to order eps |
    | `next-layer`: orthonormal, in the row space of the next linear layer | `sum of s_b z_b`: projection of `d_b` |
    | no more outputs than directions: unit vectors | `sum of s_b z_b`: exact to order eps |

    A layer's output affects the loss only through the next layer. Without an activation in between, `d_b` lies in the
    row space of that layer: two dimensions of hundreds for two classes. `next-layer` therefore has little variance,
    but a bias if the activation is not linear. The last layer, and a layer without a matching next layer, uses
    `signs`.

    Args:
        params: weights and biases of linear layers, or groups of them (`lr` and `weight_decay` can be set per group).
        lr: learning rate, 0 or more.
        eps: size of the perturbation of a layer's outputs, above 0.
        num_directions: number of directions per layer and step, 1 or more.
        directions: `"next-layer"` or `"signs"`.
        update: `"sgd"`, `"sign"`, `"momentum"` or `"adam"`, on the estimate of the gradient. 16-bit weights are
            rounded stochastically (see `Rounding`).
        momentum, betas, adam_eps: parameters of the update rule.
        weight_decay: decoupled, 0 or more.
        seed: of the private generator.

    Raises:
        InputError: a value out of range; in `step`: no `evaluate` with `nodes` and `node_losses`, a parameter that is
            in no linear layer of the head, or a loss that is not finite.

    Source: node perturbation (Werfel, Xie and Seung, NIPS 2003); activity perturbation (Ren et al., arXiv 2210.03310),
    there with forward gradients instead of losses.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-4,
        eps: float = 1e-2,
        num_directions: int = 4,
        directions: str = NEXT_LAYER,
        update: str = ADAM,
        momentum: float = 0.9,
        betas: tuple[float, float] = (0.9, 0.999),
        adam_eps: float = 1e-8,
        weight_decay: float = 0.0,
        seed: int = 0,
    ):
        check_perturbation(eps, num_directions, usual="1e-2")
        if directions not in NODE_DIRECTIONS:
            raise InputError(f"directions={directions!r} is unknown; choose from: {', '.join(NODE_DIRECTIONS)}")
        super().__init__(params, lr, update, momentum, betas, adam_eps, weight_decay, seed)
        self.eps, self.num_directions, self.kind = eps, num_directions, directions

    def evaluations_per_step(self) -> int:
        """Largest number of losses of a step: `num_directions` for each layer, and one at the current weights."""
        layers = sum(parameter.ndim > 1 for parameter in self.searched)
        return 1 + self.num_directions * max(1, layers)

    @torch.no_grad()
    def step(self, closure: Closure | None = None, evaluate: Any = None) -> float | None:
        """Estimate the gradients of all layers and update them; return the loss before the step.

        Args:
            closure: returns the loss of the batch at the current weights.
            evaluate: an object like `HeadEvaluation`, with two methods. `nodes()` returns for each linear layer
                `(module, inputs [rows, in], outputs [rows, out])`; `node_losses(module, outputs [n, rows, out])`
                returns losses `[n, rows]`.
        """
        if not self._takes_step(closure):
            return None
        if not hasattr(evaluate, "node_losses"):
            raise InputError(
                "node perturbation needs the loss of each row for given layer outputs; pass an `evaluate` with "
                "`nodes` and `node_losses`, such as HeadEvaluation, or use SPSA"
            )
        self.steps += 1
        loss = self._checked_current(loss_of(closure))
        self.evaluations += 1
        estimates: dict[int, torch.Tensor] = {}
        nodes = list(evaluate.nodes())
        numbers = self.numbers
        following = [module for module, _, _ in nodes[1:]] + [None]
        for (module, x, out), successor in zip(nodes, following, strict=True):
            weight, bias = numbers.get(id(module.weight)), numbers.get(id(module.bias))
            if weight is None and bias is None:
                continue
            span = self._span(successor, out)
            d = self._output_gradients(functools.partial(evaluate.node_losses, module), out, span)
            if weight is not None:
                with without_autocast(d.device):
                    estimates[weight] = d.t() @ x.to(d.dtype) / len(d)  # G = sum_b d_b x_b^T / rows
            if bias is not None:
                estimates[bias] = d.mean(0)  # sum_b d_b / rows
        self._check_found(estimates)
        self._update(estimates)
        report_accepted(evaluate, None)
        return loss

    def _span(self, successor: torch.nn.Linear | None, out: torch.Tensor) -> torch.Tensor | None:
        """Orthonormal rows `[n, out]` in the row space of the next layer's weight; `None` to draw signs instead."""
        width = out.shape[1]
        if self.kind != NEXT_LAYER or successor is None or successor.weight.shape[1] != width:
            return None
        rows = successor.weight.detach().to(compute_type(out.dtype))
        if len(rows) >= width:
            return None
        if len(rows) > self.num_directions:  # a random subspace of the row space
            mix = torch.randn(self.num_directions, len(rows), generator=self.generator, dtype=rows.dtype)
            with without_autocast(rows.device):
                rows = mix.to(rows.device) @ rows
        return torch.linalg.qr(rows.t()).Q.t()

    def _output_gradients(
        self, losses_of: Callable[[torch.Tensor], torch.Tensor], out: torch.Tensor, span: torch.Tensor | None
    ) -> torch.Tensor:
        """The estimate of `d loss_b / d y_b` for each row: `[rows, out]`."""
        rows, width = out.shape
        dtype = compute_type(out.dtype)
        unperturbed = losses_of(out[None])[0]
        scale = 1.0
        if width <= self.num_directions:
            z = torch.eye(width, dtype=dtype, device=out.device)[:, None].expand(width, rows, width)
        elif span is not None:
            z = span[:, None].expand(len(span), rows, width)
        else:
            bits = torch.randint(0, 2, (self.num_directions, rows, width), generator=self.generator, dtype=torch.int8)
            z = bits.to(out.device, dtype).mul_(2).sub_(1)
            scale = 1 / self.num_directions
        # s_b = (loss_b(y_b + eps z_b) - loss_b(y_b)) / eps
        slopes = (losses_of((out + self.eps * z).to(out.dtype)) - unperturbed) / self.eps
        self.evaluations += len(z)
        bad = ~slopes.isfinite()
        self.rejected += int(bad.any(1).sum())
        slopes = torch.where(bad, torch.zeros_like(slopes), slopes).to(dtype)
        with without_autocast(out.device):
            return torch.einsum("qb,qbo->bo", slopes, z) * scale  # d_b = sum over directions of s_b z_b

    def _check_found(self, estimates: dict[int, torch.Tensor]) -> None:
        missing = [self.searched[i] for i in range(len(self.searched)) if i not in estimates]
        if missing:
            raise InputError(
                f"a searched tensor of shape {tuple(missing[0].shape)} is in no linear layer of the head, so node "
                "perturbation cannot search it; search other tensors (search_target), or use SPSA"
            )
