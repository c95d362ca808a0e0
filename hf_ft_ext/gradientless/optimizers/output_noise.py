"""Noise on the outputs of a model's modules, and the gradients of their parameters that follow from the losses."""

import contextlib
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from hf_ft_ext.gradientless.optimizers.exchange import SingleProcess
from hf_ft_ext.gradientless.optimizers.perturbation.directions import compute_type, without_autocast
from hf_ft_ext.offload import runs_own_forward

# Size of the noise; on 16-bit outputs, which round to 3 digits, larger, so that it is not lost.
EPS, EPS_16_BITS = 1e-3, 2**-5
_WORD = 2**64 - 1


class OutputNoise:
    """Adds noise to the outputs of all modules that hold searched parameters, in forward passes of the model.

    The noise is uniform, with mean 0 and variance 1, and recomputed from seeds: for each module, each of its runs in
    the forward pass, and each row of the step. Positions that a 2-dimensional `attention_mask` hides get none if they
    do not affect the losses (see `masked`), so the noise of a row depends neither on its padding nor on its
    micro-batch.

    Args:
        model: the model whose forward pass is perturbed.
        number_of: number of each searched parameter, by its `id`.
        eps: see `ActivityPerturbation`.
        centred: see `ActivityPerturbation`.

    Attributes:
        holders: modules that hold searched parameters, and the numbers of these by name.
        by_rows: whether there are outputs whose row `b` affects the loss of row `b` only; `None` = not known yet.
        row_modules: positions in `holders` of the modules whose outputs have one row, or several in succession, for
            each row of the batch.
        counted: whether the first tensor that the model gets has one row for each row of the batch. Otherwise outputs
            with several rows for each row of the batch are unknown.
        rows: number of these rows in the last forward pass of the model; `None` = not known.
        without_noise: positions of the modules whose output is not one floating-point tensor.
        masked: positions of the modules whose hidden positions get no noise; `None` = not known yet, and none do.
        hides: whether the `attention_mask` of the last forward pass hides positions.
        first_row: index, in the step, of the first row of the micro-batch.
    """

    def __init__(self, model: nn.Module, number_of: dict[int, int], eps: float | None, centred: bool):
        self.model, self.eps, self.centred = model, eps, centred
        self._encoder_decoder = bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))
        self.holders: list[tuple[nn.Module, dict[str, int]]] = []
        for module in model.modules():
            names = {name: number_of[id(p)] for name, p in module._parameters.items() if id(p) in number_of}
            if names:
                self.holders.append((module, names))
        self.by_rows: bool | None = None
        self.counted = True
        self.rows: int | None = None
        self.row_modules: set[int] = set()
        self.without_noise: set[int] = set()
        self.masked: set[int] | None = None
        self.mask: torch.Tensor | None = None
        self.hides = False
        self.first_row = 0
        self._inside = False  # of a module's second forward, which has no noise
        self._given: dict[int, tuple[tuple, dict]] = {}  # inputs of modules with hooks, before these

    @contextlib.contextmanager
    def observed(self) -> Iterator[dict[int, set[int]]]:
        """Within this context, collect the numbers of rows of each module's outputs; 0 = not a tensor with rows."""
        sizes: dict[int, set[int]] = {}

        def note(position: int, module: nn.Module, args: tuple, kwargs: dict, y: Any, run: int) -> None:
            sizes.setdefault(position, set()).add(len(y) if isinstance(y, torch.Tensor) and y.ndim else 0)

        with self._hooked(note):
            yield sizes

    @contextlib.contextmanager
    def added(self, seed: int, sign: float) -> Iterator[None]:
        """Within this context, outputs are `y + sign eps z`, with the noise `z` of this seed."""

        def add(position: int, module: nn.Module, args: tuple, kwargs: dict, y: Any, run: int) -> Any:
            if not _is_noisy(y):
                self.without_noise.add(position)
                return None
            z = self._draws(seed, position, run, y)
            return (y + sign * self._eps_of(y) * z).to(y.dtype)

        with self._hooked(add):
            yield

    @contextlib.contextmanager
    def added_to_rows(self, seed: int, rows: Sequence[int], positions: Collection[int]) -> Iterator[None]:
        """Within this context, the outputs of these modules for these rows of the batch have noise of size 1."""

        def add(position: int, module: nn.Module, args: tuple, kwargs: dict, y: Any, run: int) -> Any:
            if position not in positions or not _is_noisy(y):
                return None
            z, chosen = self._draws(seed, position, run, y), torch.zeros(self._rows_of(y), dtype=torch.bool)
            chosen[list(rows)] = True
            z[~chosen.repeat_interleave(len(y) // len(chosen)).to(y.device)] = 0
            return y + z

        with self._hooked(add):
            yield

    @contextlib.contextmanager
    def added_to_hidden(self, seed: int) -> Iterator[set[int]]:
        """Within this context, only positions that the mask hides have noise, of size 1; return modules with some."""
        found: set[int] = set()

        def add(position: int, module: nn.Module, args: tuple, kwargs: dict, y: Any, run: int) -> Any:
            real = self._real_positions(y) if _is_noisy(y) and position in self.row_modules else None
            if real is None:
                return None
            found.add(position)
            generator = torch.Generator(y.device).manual_seed(_mixed(seed, position, run))
            z = _uniform(y.shape, generator, y).masked_fill_(real[..., None], 0)
            return y + z

        with self._hooked(add):
            yield found

    @contextlib.contextmanager
    def estimating(
        self, seeds: Sequence[int], differences: torch.Tensor, weight: float, into: "Estimates"
    ) -> Iterator[None]:
        """Within this context, a forward pass adds estimates of the parameters' gradients to `into`.

        The gradient of the mean loss with respect to an output is estimated by `d = mean_i w_i z_i / eps`. For outputs
        with one row for each row of the batch, `w_i = h_ib / rows` in row `b`: noise on the other rows does not affect
        its loss. For other outputs `w_i` is the mean of `h_ib` over the rows.

        Args:
            seeds: of each direction.
            differences: half the differences `h_ib` between the losses of opposite noise, `[directions, rows]`.
            weight: factor of the gradients: the micro-batch's share of the step.
        """
        rows = differences.shape[1]
        others: set[int] = set()  # modules whose number of rows was a multiple of the batch's by chance

        def estimate(position: int, module: nn.Module, args: tuple, kwargs: dict, y: Any, run: int) -> None:
            if position in self.without_noise:
                return
            separate = position in self.row_modules and self._rows_of(y) == rows
            if position in self.row_modules and not separate:
                others.add(position)
            d = torch.zeros(y.shape, dtype=compute_type(y.dtype), device=y.device)
            for seed, half in zip(seeds, differences.to(d), strict=True):
                w = half.mean()
                if separate:
                    w = half.repeat_interleave(len(y) // rows).view(-1, *[1] * (y.ndim - 1)) / rows
                # d = mean_i w_i z_i / eps, times the micro-batch's share of the step
                d += w * (weight / len(seeds) / self._eps_of(y)) * self._draws(seed, position, run, y).to(d.dtype)
            self._add_gradients(position, module, args, kwargs, d, into)

        with self._hooked(estimate):
            yield
        into.others |= others  # they leave `row_modules` later: the noise of this step was drawn by rows

    @contextlib.contextmanager
    def _hooked(self, hook: Callable) -> Iterator[None]:
        runs: Counter[int] = Counter()

        def begin(model: nn.Module, args: tuple, kwargs: dict) -> None:
            if self._inside:
                return
            values = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor) and value.ndim]
            self.rows = len(values[0]) if values else None
            mask = kwargs.get("attention_mask")
            # of an encoder-decoder, it is the mask of the encoder only
            self.mask = None
            if isinstance(mask, torch.Tensor) and mask.ndim in (2, 3) and not self._encoder_decoder:
                # prompts with several contexts: [rows, contexts, length], which run as rows of a larger batch
                self.mask = mask if mask.ndim == 2 else mask.flatten(0, 1)
            self.hides = self.mask is not None and not bool((self.mask != 0).all())

        def before(position: int) -> Callable:
            def keep(module: nn.Module, args: tuple, kwargs: dict) -> None:
                if not self._inside:
                    self._given[position] = args, kwargs

            return keep

        def after(position: int) -> Callable:
            def run_hook(module: nn.Module, args: tuple, kwargs: dict, y: Any) -> Any:
                if self._inside:
                    return None
                runs[position] += 1
                return hook(position, module, args, kwargs, y, runs[position])

            return run_hook

        handles = [self.model.register_forward_pre_hook(begin, with_kwargs=True)]
        for position, (module, _) in enumerate(self.holders):
            if module._forward_pre_hooks or module._forward_hooks:
                handles.append(module.register_forward_pre_hook(before(position), prepend=True, with_kwargs=True))
            handles.append(module.register_forward_hook(after(position), with_kwargs=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            self._given.clear()
            self.mask = self.rows = None

    def _rows_of(self, y: torch.Tensor) -> int:
        """Number of the batch's rows, each of which has one row of `y` or several in succession."""
        return self.rows if self.counted and self.rows and len(y) % self.rows == 0 else len(y)

    def _draws(self, seed: int, position: int, run: int, y: torch.Tensor) -> torch.Tensor:
        """The noise of an output, of its shape and type."""
        own = _mixed(seed, position, run)
        generator = torch.Generator(y.device)
        if position not in self.row_modules:  # one draw for all rows of the step
            return _uniform(y.shape, generator.manual_seed(own), y)
        z, rows = torch.zeros_like(y), self._rows_of(y)
        real = self._real_positions(y) if position in (self.masked or ()) else None
        size = len(y) // max(1, rows)
        for b in range(rows):
            part = slice(b * size, (b + 1) * size)
            generator.manual_seed(_mixed(own, self.first_row + b))
            if real is None:
                z[part] = _uniform(z[part].shape, generator, y)
            else:
                z[part][real[part]] = _uniform((int(real[part].sum()), y.shape[-1]), generator, y)
        return z

    def _eps_of(self, y: torch.Tensor) -> float:
        if self.eps is not None:
            return self.eps
        return EPS_16_BITS if y.element_size() == 2 else EPS

    def _real_positions(self, y: torch.Tensor) -> torch.Tensor | None:
        """The mask of the positions that are not padding, of the shape of `y` without its last dimension.

        `None` if `y` has no such positions: `[rows, tokens, width]` or `[rows tokens, width]`.
        """
        if self.mask is None or y.ndim not in (2, 3):
            return None
        mask = self.mask.to(y.device) != 0
        mask = mask if y.ndim == 3 else mask.flatten()
        return mask if y.shape[:-1] == mask.shape else None

    def _add_gradients(
        self, position: int, module: nn.Module, args: tuple, kwargs: dict, d: torch.Tensor, into: "Estimates"
    ) -> None:
        """Add the gradients of the module's searched parameters, for the gradient `d` of its output."""
        names = self.holders[position][1]
        changed = position in self._given or not runs_own_forward(module) or not {"weight", "bias"} >= names.keys()
        linear = isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward
        transposed = isinstance(module, Conv1D) and type(module).forward is Conv1D.forward  # weight [in, out]
        if changed or not (linear or transposed):
            args, kwargs = self._given.get(position, (args, kwargs))  # the module's hooks run again
            for name, found in self._by_autograd(module, names, args, kwargs, d).items():
                into.add(names[name], found)
            return
        x = (args[0] if args else next(iter(kwargs.values()))).to(d)
        flat_d, flat_x = d.reshape(-1, d.shape[-1]), x.reshape(-1, x.shape[-1])
        if "bias" in names:
            into.add(names["bias"], flat_d.sum(0))  # sum_t d_t
        if "weight" in names:  # sum_t d_t x_t^T
            with without_autocast(d.device):
                into.add(names["weight"], flat_x.t() @ flat_d if transposed else flat_d.t() @ flat_x)
            if self.centred and "bias" in names and x.ndim > 2:
                real = self._real_positions(x) if position in (self.masked or ()) else None
                seen = flat_x if real is None else x[real]
                into.add_means(position, flat_d.sum(0), seen)

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
        gradients = {name: one for name, one in zip(own, found, strict=True) if one is not None}
        return {name: (one.to_dense() if one.is_sparse else one).to(d.dtype) for name, one in gradients.items()}


class Estimates:
    """Estimated gradients of a step, by number of the parameter, summed over runs of a module and micro-batches.

    Args:
        noise: the noise that they belong to.

    Attributes:
        others: modules whose outputs had another number of rows than before.
    """

    def __init__(self, noise: OutputNoise) -> None:
        self.noise = noise
        self.found: dict[int, torch.Tensor] = {}
        self.others: set[int] = set()
        self._means: dict[int, torch.Tensor] = {}  # by module: sum of d, sum of x, number of positions

    def add(self, number: int, gradient: torch.Tensor) -> None:
        """Add a gradient estimate of parameter `number`, of its shape."""
        self.found[number] = gradient if number not in self.found else self.found[number].add_(gradient)

    def add_means(self, position: int, d: torch.Tensor, x: torch.Tensor) -> None:
        """Note sums over positions of a linear layer, for `centred`.

        Args:
            d: the sum of the outputs' gradients.
            x: the inputs, `[positions, in]`.
        """
        sums = torch.cat([d, x.sum(0), x.new_tensor([len(x)])])
        self._means[position] = sums if position not in self._means else self._means[position].add_(sums)

    def add_processes(self, exchange: SingleProcess, searched: Sequence[torch.Tensor]) -> None:
        """Add the estimates of all processes: each has those of its share of the work."""
        holders = self.noise.holders
        self.others = exchange.union(self.others, len(holders))
        for number in sorted(exchange.union(set(self.found), len(searched))):
            own, like = self.found.get(number), searched[number]
            if own is None:  # no forward pass of this process read the tensor
                own = torch.zeros(like.shape, dtype=compute_type(like.dtype), device=like.device)
            self.found[number] = exchange.added(own)
        for position in sorted(exchange.union(set(self._means), len(holders))):
            own, weight = self._means.get(position), holders[position][0].weight
            if own is None:
                own = torch.zeros(sum(weight.shape) + 1, dtype=compute_type(weight.dtype), device=weight.device)
            self._means[position] = exchange.added(own)

    def centred(self) -> dict[int, torch.Tensor]:
        """The gradients; of centred layers `sum_t d_t (x_t - mean)^T = sum_t d_t x_t^T - (sum_t d_t) mean^T`."""
        for position, sums in self._means.items():
            module, names = self.noise.holders[position]
            width = len(module.bias)
            d, x = sums[:width], sums[width:-1]
            mean = x / sums[-1].clamp(min=1)
            number = names["weight"]
            self.found[number] -= torch.outer(mean, d) if isinstance(module, Conv1D) else torch.outer(d, mean)
        self._means = {}
        return self.found


def _uniform(shape: Sequence[int], generator: torch.Generator, like: torch.Tensor) -> torch.Tensor:
    """Uniform in [-sqrt(3), sqrt(3)]: variance 1. The first numbers do not depend on how many are drawn."""
    dtype = compute_type(like.dtype)
    return ((torch.rand(shape, generator=generator, dtype=dtype, device=like.device) - 0.5) * 12**0.5).to(like.dtype)


def _is_noisy(y: Any) -> bool:
    return isinstance(y, torch.Tensor) and y.is_floating_point()


def _mixed(*numbers: int) -> int:
    """A seed of these numbers, in their order (SplitMix64).

    A sum of multiples (`derived_seed`) would give row 1 of a module the seed of row 0 of the next one.
    """
    state = 0
    for number in numbers:
        state = (state ^ number) + 0x9E3779B97F4A7C15 & _WORD
        state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 & _WORD
        state = (state ^ state >> 27) * 0x94D049BB133111EB & _WORD
        state ^= state >> 31
    return state >> 2
