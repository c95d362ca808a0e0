"""AdamW that keeps moments only for the entries of a SparseGrad weight that it updates."""

import inspect
from collections.abc import Callable, Iterable
from dataclasses import fields
from typing import Any

import torch
from torch.optim.optimizer import ParamsT

from hf_ft_ext.sparse.arguments import DEFAULT_BASIS_STEPS
from hf_ft_ext.sparse.fixed import FixedSupport
from hf_ft_ext.sparse.layer import SparseGradLinear
from hf_ft_ext.sparse.optimizer.moments import corrected, turn_moments
from hf_ft_ext.sparse.optimizer.refresh import RunningSums
from hf_ft_ext.sparse.optimizer.support import above, agreed, carry_over, top_k
from hf_ft_ext.training.copying import CopiedInFull

_NOT_READY = "the {part} of {kind} has not been computed; run `prepare_layers` or load a state"


class SparseAdamW(CopiedInFull, torch.optim.AdamW):
    """AdamW for models with `SparseGradLinear` layers, usable in any training loop.

    Dynamic support: at each step, for each converted weight, the `n_params` entries of the rotated gradient
    `V^T G U` of largest magnitude (or all that reach the layer's `threshold`) are chosen, from the gradient
    accumulated over micro-batches and averaged over processes, and updated by AdamW's rule in the rotated
    coordinates: `W += V dS U^T`. Moments and step counts exist for the chosen entries only; an entry that leaves
    the support drops them, an entry that comes back starts anew. With `dense_moments` all entries have moments, as
    in the published code (`torch.optim.SparseAdam`): those of the support are updated, the others wait.

    With `refresh_steps`, a dynamic support's basis is computed anew after so many steps, from running Gram sums of
    the gradients since. The weight is not touched by that; moments turn into the new basis (`rotate_moments`), and as
    many entries as before, those of the largest squares, keep theirs. How many steps an entry has seen is the mean
    over what it is made of.

    Fixed support: the layer's `values` are an ordinary parameter of AdamW, and their changes are folded into the
    weight. Decoupled weight decay shrinks the chosen entries of the rotated weight alone. All other parameters:
    `torch.optim.AdamW`.

    `state_dict()` holds the bases, supports and values too, so a loaded optimizer continues without a new pre-pass.

    Args:
        params: parameters or groups, as for `torch.optim.AdamW`.
        layers: the converted layers; their weights (fixed support: their values) have to be among `params`.
        lr, betas, eps, weight_decay, foreach, fused: as for `torch.optim.AdamW`.
        refresh_steps: with dynamic support, compute the bases anew after every so many steps; 0 = never.
        refresh_gradients: how many steps' gradients go into a new basis, at most.
        dense_moments: with dynamic support, keep moments of all entries, as published.

    Raises:
        ValueError: a basis that cannot be refreshed (there is none).
        RuntimeError: at the step, if a layer's basis has not been computed or loaded.

    Source: arXiv 2410.07383, section 3; the moments on the chosen entries are ours (the published code keeps
    dense ones).
    """

    def __init__(
        self,
        params: ParamsT,
        layers: Iterable[SparseGradLinear],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        foreach: bool | None = None,
        fused: bool | None = None,
        refresh_steps: int = 0,
        refresh_gradients: int = DEFAULT_BASIS_STEPS,
        dense_moments: bool = False,
    ):
        super().__init__(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, foreach=foreach, fused=fused)
        # A fused AdamW leaves the division by the loss scale to its own kernel; the sparse part needs it done.
        self._step_supports_amp_scaling = False
        layers = list(layers)
        self._layers = {id(layer.weight): layer for layer in layers if layer.values is None}
        self._fixed = [layer for layer in layers if layer.values is not None]
        self._running = RunningSums(refresh_steps, refresh_gradients)
        self._dense_moments = dense_moments
        if refresh_steps and any(layer.basis.identity for layer in self._layers.values()):
            raise ValueError(f"refresh_steps={refresh_steps}, but layers converted with basis='none' have none")

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        # found by the weight's `id`, which a copy's weight does not share
        self._layers = {id(layer.weight): layer for layer in self._layers.values()}

    def _sparse(self, parameter: torch.Tensor) -> SparseGradLinear | None:
        return self._layers.get(id(parameter))

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update; `closure` as in torch."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for layer in self._fixed:
            if layer.support is None:
                raise RuntimeError(_NOT_READY.format(part="support", kind=layer.kind))
        before = [layer.values.clone() for layer in self._fixed]
        done = []
        self._running.begin_step()
        for group in self.param_groups:
            for parameter in group["params"]:
                layer = self._sparse(parameter)
                if layer is not None and parameter.grad is not None:
                    self._sparse_step(layer, group)
                    done.append((parameter, parameter.grad))
                    parameter.grad = None  # AdamW passes over parameters without gradient
        try:
            # The bare function: torch wraps `step` of every optimizer class, and hooks would run twice.
            inspect.unwrap(torch.optim.AdamW.step)(self)
        finally:
            for parameter, gradient in done:
                parameter.grad = gradient
        for layer, values in zip(self._fixed, before, strict=True):
            layer.fold(layer.values - values)
        if self._running.due:
            self._refresh()
        return loss

    def _sparse_step(self, layer: SparseGradLinear, group: dict) -> None:
        if not layer.basis.ready:
            raise RuntimeError(_NOT_READY.format(part="basis", kind=layer.kind))
        beta1, beta2 = group["betas"]
        weight, state = layer.weight, self.state[layer.weight]
        rotated = layer.value_gradient()
        self._running.see(layer.kind, rotated)
        chosen = top_k(rotated, layer.n_params) if layer.threshold is None else above(rotated, layer.threshold)
        support = agreed(chosen)
        gradient = rotated.flatten()[support.long()].to(weight.dtype)
        step, exp_avg, exp_avg_sq = self._moments_at(support, state, weight)
        step += 1
        exp_avg.lerp_(gradient, 1 - beta1)
        exp_avg_sq.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        mean, square = corrected(step, exp_avg, exp_avg_sq, group["betas"])
        change = mean / (square.sqrt_() + group["eps"])
        if group["weight_decay"]:
            change += group["weight_decay"] * layer.basis.rotate(weight).flatten()[support.long()]
        layer.basis.add_rotated_back(weight, support, change.mul_(-float(group["lr"])))
        if self._dense_moments:
            state["exp_avg"].view(-1)[support.long()] = exp_avg
            state["exp_avg_sq"].view(-1)[support.long()] = exp_avg_sq
        else:
            state.update(step=step, indices=support, exp_avg=exp_avg, exp_avg_sq=exp_avg_sq)

    def _moments_at(self, support: torch.Tensor, state: dict, weight: torch.Tensor) -> list[torch.Tensor]:
        """Counts and moments of the entries of `support`; with dense moments the count is one for all."""
        empty = weight.new_zeros(0)
        if not state and self._dense_moments:
            state.update(step=empty.new_zeros(1).int(), exp_avg=torch.zeros_like(weight))
            state["exp_avg_sq"] = torch.zeros_like(weight)
        elif not state:
            state.update(step=empty.int(), indices=None, exp_avg=empty, exp_avg_sq=empty)
        moments = [state[key] for key in ("exp_avg", "exp_avg_sq")]
        if self._dense_moments:
            return [state["step"], *(moment.flatten()[support.long()] for moment in moments)]
        return carry_over(state["indices"], support, state["step"], *moments)

    def _refresh(self) -> None:
        """New bases from the running sums; moments turn with them."""
        bases = {layer.kind: layer.basis for layer in self._layers.values() if layer.kind in self._running.sums}
        turns = {kind: self._running.turn(kind, basis) for kind, basis in bases.items()}
        for group in self.param_groups:
            for parameter in group["params"]:
                layer = self._sparse(parameter)
                if layer is not None and layer.kind in turns and self.state[parameter]:
                    turn_moments(self.state[parameter], parameter, group["betas"], *turns[layer.kind])
        self._running.restart()

    def state_dict(self) -> dict:
        """torch's state dict plus `bases` (factors by kind of layer) and `supports` (of fixed layers, in order)."""
        bases = {layer.kind: layer.basis for layer in self._layers.values() if layer.basis.ready}
        supports = [
            {
                **vars(layer.support),
                "values": layer.values.detach().clone(),
                "initial": layer.initial,
                "base_hash": layer.base_hash,
                "earlier": [(vars(support).copy(), change) for support, change in layer.earlier],
            }
            for layer in self._fixed
            if layer.support is not None
        ]
        return {
            **super().state_dict(),
            "bases": {kind: vars(basis).copy() for kind, basis in bases.items()},
            "supports": supports,
            "running": self._running.state_dict(),
        }

    def load_state_dict(self, state_dict: dict) -> None:
        """Load moments, supports, values and bases; the layers see the loaded ones at once.

        Raises:
            ValueError: the state is of other parameters, or lacks the basis or support of a layer.
        """
        bases, supports = state_dict.get("bases", {}), state_dict.get("supports", [])
        if state_dict["state"]:
            if missing := {layer.kind for layer in self._layers.values()} - bases.keys():
                raise ValueError(f"the optimizer state has no basis for {sorted(missing)}; it is of another model")
            if len(supports) != len(self._fixed):
                raise ValueError(
                    f"the optimizer state has {len(supports)} fixed supports, the model {len(self._fixed)}; it is of "
                    "another model or another sparse_support"
                )
        own_keys = ("bases", "supports", "running")
        super().load_state_dict({key: value for key, value in state_dict.items() if key not in own_keys})
        # torch casts every state to the parameter's dtype, which spoils indices and counts: put them back.
        saved = [index for group in state_dict["param_groups"] for index in group["params"]]
        own = [parameter for group in self.param_groups for parameter in group["params"]]
        for index, parameter in zip(saved, own, strict=True):
            if self._sparse(parameter) is not None and index in state_dict["state"]:
                self.state[parameter] = {
                    key: value.to(parameter.device) for key, value in state_dict["state"][index].items()
                }
                if ("indices" not in self.state[parameter]) != self._dense_moments:
                    raise ValueError("the optimizer state has other moments; load it with the same dense_moments")
        for layer in self._layers.values():
            if layer.kind in bases:
                _fill_basis(layer, bases[layer.kind])
        if self._running and "running" in state_dict:
            self._running.load_state_dict(state_dict["running"], self.param_groups[0]["params"][0].device)
        restore_supports(self._fixed, supports)


def restore_supports(layers: Iterable[SparseGradLinear], saved: list[dict[str, Any]]) -> None:
    """Give layers with fixed support what an optimizer's state holds as `supports`; shared ones are shared again."""
    shared: dict[tuple, FixedSupport] = {}
    for layer, support in zip(layers, saved, strict=False):
        _fill_support(layer, support, shared)


def _fill_basis(layer: SparseGradLinear, saved: dict) -> None:
    basis, expected, device = layer.basis, (layer.out_features, layer.in_features), layer.weight.device
    if not saved["identity"]:
        sides = (saved["out_factor"].shape[0], saved["in_factor"].shape[0])
        if sides != expected:
            raise ValueError(f"the loaded basis of {layer.kind} has sides {sides}, the layer {expected}")
        basis.out_factor, basis.in_factor = saved["out_factor"].to(device), saved["in_factor"].to(device)
    basis.rotates, basis.identity = saved["rotates"], saved["identity"]
    basis.in_transposed = saved["in_transposed"]


def _fill_support(layer: SparseGradLinear, saved: dict, shared: dict[tuple, FixedSupport]) -> None:
    device = layer.weight.device
    values, initial = saved["values"].to(device), saved["initial"].to(device)
    layer.set_support(_shared_support(saved, device, shared), values, initial, saved["base_hash"])
    layer.earlier = [(_shared_support(parts, device, shared), change.to(device)) for parts, change in saved["earlier"]]


def _shared_support(saved: dict, device: torch.device, shared: dict[tuple, FixedSupport]) -> FixedSupport:
    """The support in `saved`; layers that shared one share it again."""
    parts = {field.name: saved[field.name] for field in fields(FixedSupport)}
    key = tuple(None if part is None else part.data_ptr() for part in parts.values())
    if key not in shared:
        shared[key] = FixedSupport(**{name: None if v is None else v.to(device) for name, v in parts.items()})
    return shared[key]
