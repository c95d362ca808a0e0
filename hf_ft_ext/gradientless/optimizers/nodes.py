"""`NodePerturbation`: a search of a head that perturbs the outputs of its linear layers row by row."""

from collections.abc import Callable
from typing import Any

import torch
from torch.optim.optimizer import ParamsT

from hf_ft_ext.errors import InputError
from hf_ft_ext.gradientless.optimizers.base import Closure, GradientFreeOptimizer
from hf_ft_ext.gradientless.optimizers.perturbation.directions import compute_type
from hf_ft_ext.gradientless.optimizers.perturbation.updates import ADAM, MOMENTUM, RULES, SGD, SIGN, Update

NODE_RULES = SGD, SIGN, MOMENTUM, ADAM
NODE_DIRECTIONS = NEXT_LAYER, SIGNS = ("next-layer", "signs")


class NodePerturbation(GradientFreeOptimizer):
    """Node perturbation: every row of a batch has a slope of its own, and its features say where it belongs.

    A linear layer's gradient is a sum over the rows, `G = sum_b d_b x_b^T / rows`: its right factors are the layer's
    inputs, and only the `d_b`, as long as the layer has outputs, are unknown. In a step, for each linear layer by
    itself, for each of `num_directions` directions `z_b`: `s_b = (loss_b(y_b + eps z_b) - loss_b(y_b)) / eps`. Losses
    only, no derivative; but the objective has to be a mean over the rows.

    | directions of a layer | `d_b` |
    | --- | --- |
    | `signs`: entries +1 and -1, drawn for each row | the mean of `s_b z_b` |
    | `next-layer`: orthonormal, in the span of the rows of the next linear layer | `sum of s_b z_b`: the part in it |
    | no more outputs than directions: unit vectors | `sum of s_b z_b`: exact to order eps |

    What a layer's output does to the loss it does through the next layer, so but for the activation in between `d_b`
    lies in the span of its rows: two for two classes, of hundreds of outputs. `next-layer` therefore has hardly any
    noise, but a bias where the activation is not linear. The last layer, and one without such a successor, takes
    `signs`.

    Args:
        params: weights and biases of linear layers, or groups of them (`lr` and `weight_decay` can be set per group).
        lr: learning rate, 0 or more.
        eps: size of the perturbation of a layer's outputs, above 0.
        num_directions: per layer and step, 1 or more.
        directions: `"next-layer"` or `"signs"`.
        update: `"sgd"`, `"sign"`, `"momentum"` or `"adam"`, on the estimate of the gradient.
        momentum, betas, adam_eps: of the rule.
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
        for name, value in (("lr", lr), ("weight_decay", weight_decay)):
            if not value >= 0:
                raise InputError(f"{name}={value} is below 0; pass 0 or more")
        if not eps > 0:
            raise InputError(f"eps={eps} is no size of a perturbation; pass a number above 0, such as 1e-2")
        if num_directions < 1:
            raise InputError(f"num_directions={num_directions} leaves nothing to compare; pass 1 or more")
        if directions not in NODE_DIRECTIONS:
            raise InputError(f"directions={directions!r} is unknown; choose from: {', '.join(NODE_DIRECTIONS)}")
        if update in RULES and update not in NODE_RULES:
            raise InputError(f"update={update} is not for node perturbation; choose from: {', '.join(NODE_RULES)}")
        self.rule = Update(update, momentum, betas, adam_eps, "buffer" if update in (MOMENTUM, ADAM) else None)
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay}, seed)
        self.eps, self.num_directions, self.kind = eps, num_directions, directions
        self.searched = [parameter for group in self.param_groups for parameter in group["params"]]
        self.numbers = {id(parameter): i for i, parameter in enumerate(self.searched)}
        self.buffers: dict[int, tuple[torch.Tensor, ...]] = {}

    def evaluations_per_step(self) -> int:
        """Losses of the batch that one step evaluates at most: some for each layer, one at the present weights."""
        layers = sum(parameter.ndim > 1 for parameter in self.searched)
        return 1 + self.num_directions * max(1, layers)

    @torch.no_grad()
    def step(self, closure: Closure | None = None, evaluate: Any = None) -> float | None:
        """Perturb each layer's outputs, compare, move all layers; return the loss before.

        Args:
            closure: returns the loss of the batch at the present weights.
            evaluate: has `nodes()`, which gives for each linear layer `(module, inputs [rows, in], outputs [rows,
                out])`, and `node_losses(module, outputs [n, rows, out])` -> losses `[n, rows]`, as `HeadEvaluation`
                does.
        """
        if self._already_taken(closure):
            return None
        if not hasattr(evaluate, "node_losses"):
            raise InputError(
                "node perturbation needs the losses of single rows behind each layer; pass an `evaluate` with `nodes` "
                "and `node_losses`, such as HeadEvaluation, or use SPSA"
            )
        self.steps += 1
        loss = self._checked_current(float(closure()))
        self.evaluations += 1
        estimates: dict[int, torch.Tensor] = {}
        nodes = list(evaluate.nodes())
        following = [module for module, _, _ in nodes[1:]] + [None]
        for (module, x, out), successor in zip(nodes, following, strict=True):
            weight, bias = self.numbers.get(id(module.weight)), self.numbers.get(id(module.bias))
            if weight is None and bias is None:
                continue
            span = self._span(successor, out)
            d = self._output_gradients(lambda outs, module=module: evaluate.node_losses(module, outs), out, span)
            if weight is not None:
                estimates[weight] = d.t() @ x.to(d.dtype) / len(d)  # G = sum_b d_b x_b^T / rows
            if bias is not None:
                estimates[bias] = d.mean(0)
        self._check_found(estimates)
        self._move(estimates)
        if hasattr(evaluate, "moved"):
            evaluate.moved(None)
        return loss

    def _span(self, successor: torch.nn.Linear | None, out: torch.Tensor) -> torch.Tensor | None:
        """Orthonormal rows `[n, out]` in the span of the next layer's weight; `None` where signs are drawn instead."""
        width = out.shape[1]
        if self.kind != NEXT_LAYER or successor is None or successor.weight.shape[1] != width:
            return None
        rows = successor.weight.detach().to(compute_type(out.dtype))
        if len(rows) >= width:
            return None
        if len(rows) > self.num_directions:  # some of the span, at random
            mix = torch.randn(self.num_directions, len(rows), generator=self.generator, dtype=rows.dtype)
            rows = mix.to(rows.device) @ rows
        return torch.linalg.qr(rows.t()).Q.t()

    def _output_gradients(
        self, losses_of: Callable[[torch.Tensor], torch.Tensor], out: torch.Tensor, span: torch.Tensor | None
    ) -> torch.Tensor:
        """The estimate of `d loss_b / d y_b` for each row: `[rows, out]`."""
        rows, width = out.shape
        dtype = compute_type(out.dtype)
        here = losses_of(out[None])[0]
        scale = 1.0
        if width <= self.num_directions:
            z = torch.eye(width, dtype=dtype, device=out.device)[:, None].expand(width, rows, width)
        elif span is not None:
            z = span[:, None].expand(len(span), rows, width)
        else:
            bits = torch.randint(0, 2, (self.num_directions, rows, width), generator=self.generator, dtype=torch.int8)
            z = bits.to(out.device, dtype).mul_(2).sub_(1)
            scale = 1 / self.num_directions
        slopes = (losses_of((out + self.eps * z).to(out.dtype)) - here) / self.eps
        self.evaluations += len(z)
        bad = ~slopes.isfinite()
        self.rejected += int(bad.any(1).sum())
        slopes = torch.where(bad, torch.zeros_like(slopes), slopes).to(dtype)
        return torch.einsum("qb,qbo->bo", slopes, z) * scale

    def _check_found(self, estimates: dict[int, torch.Tensor]) -> None:
        missing = [self.searched[i] for i in range(len(self.searched)) if i not in estimates]
        if missing:
            raise InputError(
                f"a searched tensor of shape {tuple(missing[0].shape)} is in no linear layer of the head, whose "
                "outputs could be perturbed; search other tensors (search_target), or use SPSA"
            )

    def _move(self, estimates: dict[int, torch.Tensor]) -> None:
        number = -1
        for group in self.param_groups:
            lr, decay = float(group["lr"]), float(group["weight_decay"])
            for parameter in group["params"]:
                number += 1
                estimate = estimates[number].flatten()
                if number not in self.buffers:
                    self.buffers[number] = tuple(torch.zeros_like(estimate) for _ in self.rule.buffers())
                flat = parameter.detach().view(-1)
                exact = flat.to(estimate.dtype) if flat.dtype != estimate.dtype else flat
                if lr * decay:
                    exact.mul_(1 - lr * decay)
                self.rule.apply(exact, estimate, lr, self.steps, self.buffers[number])
                if exact is not flat:
                    flat.copy_(exact)

    def _own_state(self) -> dict:
        return {**super()._own_state(), "buffers": {i: list(found) for i, found in self.buffers.items()}}

    def _load_own_state(self, state: dict) -> None:
        super()._load_own_state(state)
        devices = [parameter.device for parameter in self.searched]
        self.buffers = {i: tuple(b.to(devices[i]).clone() for b in found) for i, found in state["buffers"].items()}
