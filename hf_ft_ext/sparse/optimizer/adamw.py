"""AdamW with moments only for the entries of a SparseGrad weight that it updates."""

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields
from typing import Any

import torch
from torch.optim.optimizer import ParamsT

from hf_ft_ext.sparse.arguments import DEFAULT_BASIS_STEPS
from hf_ft_ext.sparse.fixed import FixedSupport
from hf_ft_ext.sparse.layer import SparseGradLinear
from hf_ft_ext.sparse.optimizer.moments import corrected, rotate_dynamic_moments
from hf_ft_ext.sparse.optimizer.refresh import RunningSums
from hf_ft_ext.sparse.optimizer.support import above_threshold, broadcast_support, carry_over, top_k
from hf_ft_ext.training.copying import CopyableOptimizer

_NOT_READY = "the {part} of {kind} has not been computed; run `prepare_layers` or load a state"


class SparseAdamW(CopyableOptimizer, torch.optim.AdamW):
    """AdamW for models with `SparseGradLinear` layers, usable in any training loop.

    Dynamic support: each step chooses, for each converted weight, the `n_params` entries of the rotated gradient
    `V^T G U` with the largest magnitude (or all that reach the layer's `threshold`). The gradient is the one
    accumulated over micro-batches and averaged over processes. AdamW's rule updates the chosen entries in the rotated
    coordinates: `W += V dS U^T`. Moments and step counts exist for the chosen entries only: an entry that leaves the
    support loses them, and an entry that returns starts from zero. With `dense_moments` all entries have moments, as
    in the published code (`torch.optim.SparseAdam`); a step updates only the moments of the support.

    With `refresh_steps`, the basis of a dynamic support is recomputed every `refresh_steps` steps, from running Gram
    sums of the gradients since the last refresh. The weight does not change. The moments are rotated into the new
    basis (`rotate_moments`). The number of entries with moments stays the same: those with the largest second moments.
    The step count of an entry is the mean over the old entries that contribute to it.

    Fixed support: the layer's `values` are an ordinary parameter of AdamW, and their changes are added to the weight.
    Decoupled weight decay applies to the chosen entries of the rotated weight only. All other parameters are updated
    by `torch.optim.AdamW`.

    `state_dict()` also holds the bases, supports and values, so a loaded optimizer continues without a new pre-pass.

    Args:
        params: parameters or groups, as for `torch.optim.AdamW`.
        layers: the converted layers, or the mapping that `convert_to_sparse` returns; those that train (fixed support:
            their values) must be among `params`.
        lr, betas, eps, weight_decay, foreach, fused: as for `torch.optim.AdamW`.
        refresh_steps: with dynamic support, recompute the bases every this many steps; 0 = never.
        refresh_gradients: the most gradients (one per step) that a new basis is computed from.
        dense_moments: with dynamic support, keep moments of all entries, as published.

    Raises:
        ValueError: `refresh_steps` is given, but the layers have no basis; a layer that trains is not among `params`;
            a group sets `amsgrad` or `maximize`, which have no sparse form.
        RuntimeError: in `step`, if a layer's basis has not been computed or loaded.

    Source: arXiv 2410.07383, section 3. Moments of the chosen entries only are this package's own; the published code
    keeps dense moments.
    """

    def __init__(
        self,
        params: ParamsT,
        layers: Iterable[SparseGradLinear] | Mapping[str, SparseGradLinear],
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
        # A fused AdamW divides by the loss scale in its kernel; the sparse update needs unscaled gradients.
        self._step_supports_amp_scaling = False
        converted = list(layers.values() if isinstance(layers, Mapping) else layers)
        self._layers = {id(layer.weight): layer for layer in converted if layer.values is None}
        self._fixed = [layer for layer in converted if layer.values is not None]
        self._running = RunningSums(refresh_steps, refresh_gradients)
        self._dense_moments = dense_moments
        if refresh_steps and any(layer.basis.identity for layer in self._layers.values()):
            raise ValueError(f"refresh_steps={refresh_steps}, but layers converted with basis='none' have none")
        self._check_groups(converted)

    def _check_groups(self, layers: list[SparseGradLinear]) -> None:
        known = {id(parameter) for group in self.param_groups for parameter in group["params"]}
        for layer in layers:
            trained = layer.weight if layer.values is None else layer.values
            if trained.requires_grad and id(trained) not in known:
                raise ValueError(
                    f"a layer of kind {layer.kind} trains, but it is not among `params`, so no step would change it; "
                    "add its parameters, or freeze them"
                )
        for group in self.param_groups:
            sparse = any(self._sparse(parameter) is not None for parameter in group["params"])
            for option in ("amsgrad", "maximize"):
                if sparse and group[option]:
                    raise ValueError(
                        f"{option}={group[option]} has no sparse form, and its group has converted layers; put their "
                        "weights into a group without it"
                    )

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        # The keys are `id`s of weights, which differ in a copy.
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
            if layer.support is None or layer.values is None:
                raise RuntimeError(_NOT_READY.format(part="support", kind=layer.kind))
        done = []
        self._running.begin_step()
        for group in self.param_groups:
            for parameter in group["params"]:
                sparse = self._sparse(parameter)
                if sparse is not None and parameter.grad is not None:
                    self._sparse_step(sparse, group)
                    done.append((parameter, parameter.grad))
                    parameter.grad = None  # AdamW skips parameters without a gradient
        try:
            # Call the unwrapped function: torch wraps `step` of every optimizer class, and hooks would run twice.
            inspect.unwrap(torch.optim.AdamW.step)(self)
        finally:
            for parameter, gradient in done:
                parameter.grad = gradient
        for layer in self._fixed:
            layer.fold(compare=layer.values.grad is None)  # a gradient changes the values
        if self._running.due:
            self._refresh()
        return loss

    def _sparse_step(self, layer: SparseGradLinear, group: dict) -> None:
        if not layer.basis.ready:
            raise RuntimeError(_NOT_READY.format(part="basis", kind=layer.kind))
        beta1, beta2 = group["betas"]
        weight, state = layer.weight, self.state[layer.weight]
        rotated = layer.value_gradient()
        self._running.observe(layer.kind, rotated)
        chosen = (
            top_k(rotated, layer.n_params) if layer.threshold is None else above_threshold(rotated, layer.threshold)
        )
        support = broadcast_support(chosen)
        gradient = rotated.flatten()[support.long()].to(weight.dtype)
        step, exp_avg, exp_avg_sq = self._moments_at(support, state, weight)
        step += 1
        exp_avg.lerp_(gradient, 1 - beta1)  # m = beta1 m + (1 - beta1) g
        exp_avg_sq.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)  # v = beta2 v + (1 - beta2) g^2
        mean, square = corrected(step, exp_avg, exp_avg_sq, group["betas"])
        change = mean / (square.sqrt_() + group["eps"])  # m_hat / (sqrt(v_hat) + eps)
        if group["weight_decay"]:  # decoupled: + lambda (V^T W U) at the chosen entries
            change += group["weight_decay"] * layer.basis.rotate(weight).flatten()[support.long()]
        layer.basis.add_rotated_back(weight, support, change.mul_(-float(group["lr"])))  # W -= lr V dS U^T
        if self._dense_moments:
            state["exp_avg"].view(-1)[support.long()] = exp_avg
            state["exp_avg_sq"].view(-1)[support.long()] = exp_avg_sq
        else:
            state.update(step=step, indices=support, exp_avg=exp_avg, exp_avg_sq=exp_avg_sq)

    def _moments_at(self, support: torch.Tensor, state: dict, weight: torch.Tensor) -> list[torch.Tensor]:
        """Return step counts and moments of the entries of `support`; dense moments share one step count."""
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
        """Compute new bases from the running sums, and rotate the moments into them."""
        bases = {layer.kind: layer.basis for layer in self._layers.values() if layer.kind in self._running.sums}
        rotations = {kind: self._running.update_basis(kind, basis) for kind, basis in bases.items()}
        for group in self.param_groups:
            for parameter in group["params"]:
                layer = self._sparse(parameter)
                if layer is not None and layer.kind in rotations and self.state[parameter]:
                    rotate_dynamic_moments(self.state[parameter], parameter, group["betas"], *rotations[layer.kind])
        self._running.restart()

    def state_dict(self) -> dict:
        """Return torch's state dict plus `bases` (by kind of layer), `supports` (fixed layers) and `running` sums."""
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
            if layer.support is not None and layer.values is not None
        ]
        return {
            **super().state_dict(),
            "bases": {kind: vars(basis).copy() for kind, basis in bases.items()},
            "supports": supports,
            "running": self._running.state_dict(),
        }

    def _check_bases(self, bases: dict[str, dict], supports: list[dict]) -> None:
        """Refuse a state with a basis for layers without one, or the other way round."""
        saved = [(layer, bases[layer.kind]["identity"]) for layer in self._layers.values()]
        saved += [(layer, s["out_columns"] is None) for layer, s in zip(self._fixed, supports, strict=True)]
        for layer, identity in saved:
            if identity != layer.basis.identity:
                has, uses = ("no", "a") if identity else ("a", "no")
                raise ValueError(
                    f"the optimizer state has {has} basis for {layer.kind}, which was converted to use {uses} basis; "
                    "it is of another sparse_basis"
                )

    def load_state_dict(self, state_dict: dict) -> None:
        """Load moments, supports, values and bases, also into the layers.

        Raises:
            ValueError: the state belongs to other parameters, or lacks the basis or support of a layer.
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
            self._check_bases(bases, supports)
        own_keys = ("bases", "supports", "running")
        super().load_state_dict({key: value for key, value in state_dict.items() if key not in own_keys})
        # torch casts every state to the parameter's dtype, which corrupts indices and counts: restore them.
        saved = [index for group in state_dict["param_groups"] for index in group["params"]]
        own = [parameter for group in self.param_groups for parameter in group["params"]]
        for index, parameter in zip(saved, own, strict=True):
            if self._sparse(parameter) is not None and index in state_dict["state"]:
                self.state[parameter] = {
                    key: _like(parameter, value) for key, value in state_dict["state"][index].items()
                }
                if ("indices" not in self.state[parameter]) != self._dense_moments:
                    raise ValueError("the optimizer state has other moments; load it with the same dense_moments")
        for layer in self._layers.values():
            if layer.kind in bases:
                _fill_basis(layer, bases[layer.kind])
        if self._running and "running" in state_dict:
            self._running.load_state_dict(
                state_dict["running"], {layer.kind: layer.weight for layer in self._layers.values()}
            )
        restore_supports(self._fixed, supports)


def restore_supports(layers: Iterable[SparseGradLinear], saved: list[dict[str, Any]]) -> None:
    """Set the fixed supports of layers from `supports` of an optimizer's state; shared supports are shared again."""
    shared: dict[tuple, FixedSupport] = {}
    for layer, support in zip(layers, saved, strict=False):
        _fill_support(layer, support, shared)


def _like(weight: torch.Tensor, saved: torch.Tensor) -> torch.Tensor:
    """`saved` on the device of `weight` and, unless it holds indices or counts, in its dtype."""
    return saved.to(weight.device, weight.dtype if saved.is_floating_point() else None)


def _fill_basis(layer: SparseGradLinear, saved: dict) -> None:
    basis, expected = layer.basis, (layer.out_features, layer.in_features)
    if not saved["identity"]:
        sides = (saved["out_factor"].shape[0], saved["in_factor"].shape[0])
        if sides != expected:
            raise ValueError(f"the loaded basis of {layer.kind} has sizes {sides}, the layer {expected}")
        basis.out_factor, basis.in_factor = (_like(layer.weight, saved[side]) for side in ("out_factor", "in_factor"))
    basis.rotates, basis.identity = saved["rotates"], saved["identity"]
    basis.in_transposed = saved["in_transposed"]


def _fill_support(layer: SparseGradLinear, saved: dict, shared: dict[tuple, FixedSupport]) -> None:
    weight = layer.weight
    values, initial = _like(weight, saved["values"]), _like(weight, saved["initial"])
    layer.set_support(_shared_support(saved, weight, shared), values, initial, saved["base_hash"])
    layer.earlier = [
        (_shared_support(parts, weight, shared), _like(weight, change)) for parts, change in saved["earlier"]
    ]


def _shared_support(saved: dict, weight: torch.Tensor, shared: dict[tuple, FixedSupport]) -> FixedSupport:
    """Return the support in `saved`; layers that shared one share it again."""
    parts = {field.name: saved[field.name] for field in fields(FixedSupport)}
    key = tuple(None if part is None else part.data_ptr() for part in parts.values())
    if key not in shared:
        shared[key] = FixedSupport(**{name: None if v is None else _like(weight, v) for name, v in parts.items()})
    return shared[key]
