"""Noise on the outputs of a model's modules, and the gradients of their parameters that follow from the losses."""

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from hf_ft_ext.gradientless.optimizers.perturbation.directions import compute_type, derived_seed, random_signs


class OutputNoise:
    """Adds random signs to the outputs of all modules that hold searched parameters, in forward passes of the model.

    Signs are recomputed from seeds. A module that runs several times in a forward pass has signs of its own in each
    run. Positions that a 2-dimensional `attention_mask` hides get none.

    Args:
        model: the model whose forward pass is perturbed.
        number_of: number of each searched parameter, by its `id`.
        centred: see `ActivityPerturbation`.

    Attributes:
        holders: modules that hold searched parameters, and the numbers of these by name.
        by_rows: whether row `b` of each output affects the loss of row `b` of the batch only; `None` = not known yet.
        row_modules: positions in `holders` of the modules whose outputs have one row for each row of the batch.
        without_noise: positions of the modules whose output is not one floating-point tensor.
    """

    def __init__(self, model: nn.Module, number_of: dict[int, int], centred: bool):
        self.model, self.centred = model, centred
        self.holders: list[tuple[nn.Module, dict[str, int]]] = []
        for module in model.modules():
            names = {name: number_of[id(p)] for name, p in module._parameters.items() if id(p) in number_of}
            if names:
                self.holders.append((module, names))
        self.by_rows: bool | None = None
        self.row_modules: set[int] = set()
        self.without_noise: set[int] = set()
        self._inside = False  # of a module's second forward, which has no noise

    @contextlib.contextmanager
    def added(self, seed: int, factor: float, rows: slice | None = None) -> Iterator[None]:
        """Within this context, outputs are `y + factor z`, with signs `z` of this seed.

        Args:
            rows: rows of each output that get noise; `None` = all.
        """

        def add(position: int, module: nn.Module, args: tuple, kwargs: dict, y: Any, run: int) -> Any:
            if not isinstance(y, torch.Tensor) or not y.is_floating_point():
                self.without_noise.add(position)
                return None
            z = self._signs(seed, position, run, y)
            if rows is not None:
                kept = torch.zeros(len(z), *[1] * (z.ndim - 1), dtype=z.dtype, device=z.device)
                kept[rows] = 1
                z = z * kept
            return (y + factor * z).to(y.dtype)

        with self._hooked(add):
            yield

    @contextlib.contextmanager
    def estimating(self, seeds: Sequence[int], slopes: torch.Tensor, into: dict[int, torch.Tensor]) -> Iterator[None]:
        """Within this context, a forward pass adds the estimates of the parameters' gradients to `into`, by number.

        The gradient of the mean loss with respect to an output is estimated by `d = mean_i w_i z_i`. For outputs with
        one row for each row of the batch, `w_i = s_ib / rows` in row `b`: noise on the other rows does not affect its
        loss. For other outputs `w_i` is the mean slope of the rows.

        Args:
            seeds: of each direction.
            slopes: `[directions, rows]`.
        """
        rows = slopes.shape[1]

        def estimate(position: int, module: nn.Module, args: tuple, kwargs: dict, y: Any, run: int) -> None:
            if position in self.without_noise:
                return
            if position in self.row_modules and len(y) != rows:
                self.row_modules.discard(position)  # it had as many rows as the batch by chance
            d = torch.zeros(y.shape, dtype=compute_type(y.dtype), device=y.device)
            for seed, slope in zip(seeds, slopes.to(d), strict=True):
                separate = self.by_rows and position in self.row_modules
                weight = slope.view(-1, *[1] * (y.ndim - 1)) / rows if separate else slope.mean()
                d += weight / len(seeds) * self._signs(seed, position, run, y).to(d.dtype)
            for name, found in self._gradients(module, self.holders[position][1], args, kwargs, d).items():
                number = self.holders[position][1][name]
                into[number] = found if number not in into else into[number] + found

        with self._hooked(estimate):
            yield

    @contextlib.contextmanager
    def _hooked(self, hook: Callable) -> Iterator[None]:
        runs: Counter[int] = Counter()
        self.mask: torch.Tensor | None = None

        def begin(model: nn.Module, args: tuple, kwargs: dict) -> None:
            mask = kwargs.get("attention_mask")
            self.mask = mask if isinstance(mask, torch.Tensor) and mask.ndim == 2 else None

        def after(position: int) -> Callable:
            def run_hook(module: nn.Module, args: tuple, kwargs: dict, y: Any) -> Any:
                if self._inside:
                    return None
                runs[position] += 1
                return hook(position, module, args, kwargs, y, runs[position])

            return run_hook

        handles = [self.model.register_forward_pre_hook(begin, with_kwargs=True)]
        for position, (module, _) in enumerate(self.holders):
            handles.append(module.register_forward_hook(after(position), with_kwargs=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _signs(self, seed: int, position: int, run: int, y: torch.Tensor) -> torch.Tensor:
        generator = torch.Generator(y.device).manual_seed(derived_seed(seed, position, run))
        z = random_signs(y.numel(), generator, y.dtype).view(y.shape)
        real = self._real_positions(y)
        return z if real is None else z * real.to(z.dtype)[..., None]

    def _real_positions(self, y: torch.Tensor) -> torch.Tensor | None:
        """The mask of the positions that are not padding `[rows, tokens]`, if `y` has these positions."""
        if self.mask is None or y.ndim != 3 or y.shape[:2] != self.mask.shape:
            return None
        return self.mask.to(y.device) != 0

    def _gradients(
        self, module: nn.Module, names: dict[str, int], args: tuple, kwargs: dict, d: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """Gradients of the module's searched parameters, for the gradient `d` of its output."""
        linear = isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward
        turned = isinstance(module, Conv1D) and type(module).forward is Conv1D.forward  # weight [in, out]
        if not linear and not turned:
            return self._by_autograd(module, names, args, kwargs, d)
        x = (args[0] if args else next(iter(kwargs.values()))).to(d.dtype)
        found, flat = {}, d.reshape(-1, d.shape[-1])
        if "bias" in names:
            found["bias"] = flat.sum(0)  # sum_t d_t
        if "weight" in names:
            if self.centred and module.bias is not None and x.ndim > 2:
                x = x - self._mean(x)
            # sum_t d_t (x_t - mean)^T
            sides = (x.reshape(-1, x.shape[-1]), flat) if turned else (flat, x.reshape(-1, x.shape[-1]))
            found["weight"] = sides[0].t() @ sides[1]
        return found

    def _mean(self, x: torch.Tensor) -> torch.Tensor:
        """Mean over all positions that are not padding."""
        real = self._real_positions(x)
        return (x.flatten(0, -2) if real is None else x[real]).mean(0)

    def _by_autograd(
        self, module: nn.Module, names: dict[str, int], args: tuple, kwargs: dict, d: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """The same for any module, by the derivatives of this module alone."""
        own = {name: module._parameters[name].detach().requires_grad_() for name in names}
        self._inside = True
        try:
            with torch.enable_grad():
                y = torch.func.functional_call(module, own, args, kwargs)
                found = torch.autograd.grad(y, list(own.values()), d.to(y.dtype), allow_unused=True)
        finally:
            self._inside = False
        return {name: one.to(d.dtype) for name, one in zip(own, found, strict=True) if one is not None}
