"""`Projection`: a seeded random projection of gradients over many parameters to k numbers, from their factors.

The gradient g of an example has one entry for each entry (r, c) of each parameter. (A parameter of more than two axes
is a matrix whose columns are its last axis, a vector a matrix of one row.) Every entry has a random sign and one of k
places:

    (P g)[h] = sum of s_row(r) s_col(c) g[r, c] over all parameters and entries with (row(r) + col(c)) mod k = h

This is a count sketch; for one matrix it is the TensorSketch of Pham and Pagh (KDD 2013). `row` is a random injection
into the k places, or a balanced random map where there are more than k rows. `col(c) = c`, or a balanced random map
where there are more than k columns.

Unbiased: `E <P g, P g'> = <g, g'>`, because the signs' product of two different entries has mean 0.

Variance: two entries share a place with probability about 1 / k, so

    Var <P g, P g'> <= (|g|^2 |g'|^2 + <g, g'>^2) / k,

as with a dense matrix of random signs: the standard deviation is at most `sqrt(2 / k) |g| |g'|`. Three cases add up
to `2 |G|^2 |G'|^2 / k` each, for the matrices G concerned: more than k rows (`2 |G G'^T|^2 / k`), more than k columns
(`2 |G^T G'|^2 / k`), and linear layers that read the same activations (they share `s_col`, so that query, key and
value need one transform of what they read). Separate projections of activations and output gradients to k_a and k_b
numbers (k_a k_b = k, as in LoGra, arXiv 2405.13954) have about `(2 / k_a + 2 / k_b) |G|^2 |G'|^2` for each layer, an
error that falls like k^(-1/4) where one layer's gradient dominates.

Cost: a linear layer's gradient is `G = sum_t g_t x_t^T`. Adding places mod k is a circular convolution, in the
Fourier domain a product: `F[P G] = sum_t F[P_row g_t] F[P_col x_t]`. That is two transforms of length k for each
token, in place of the product of out x in entries; all layers add up before one transform back. Where a gradient has
few entries for its tokens, it is written out and its entries are added to their places, which gives the same up to
rounding.

Signs and places depend on the seed, the parameter's name and its shape alone, and come from a counter-based generator
(Philox), whose bits are the same on every machine. So the projection is the same for every batch size, order of rows,
process, device and dtype.
"""

import contextlib
import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from hf_ft_ext.per_example.types import EmbeddingGradient, Gradient, LinearGradient

_WRITTEN_OUT = 2  # a gradient is written out if it has at most so many entries for each token and place: it is quicker
_TOKENS = 64  # transforms at a time on a CPU: what stays in its cache
_ENTRIES = 2**20  # written out at a time


@dataclass(frozen=True)
class _Places:
    """Signs and places of one parameter's rows and columns; `columns=None`: column c is at place c."""

    rows: torch.Tensor
    row_signs: torch.Tensor
    columns: torch.Tensor | None
    column_signs: torch.Tensor

    def index(self, first: int, last: int, k: int) -> torch.Tensor:
        """Places of the entries of rows `first` to `last` (exclusive): `[rows, columns]`."""
        return self.at(self.rows[first:last], k)

    def at(self, rows: torch.Tensor, k: int) -> torch.Tensor:
        """Places of the entries of rows at the places `rows`: `[*rows.shape, columns]`."""
        columns = self.columns
        if columns is None:
            columns = torch.arange(len(self.column_signs), device=rows.device)
        return (rows[..., None] + columns) % k


@dataclass
class _Tokens:
    """A linear layer's gradient of one scalar: `sum_t rows[n, t] columns[n, t]^T`."""

    name: str
    scalar: int
    rows: torch.Tensor
    columns: torch.Tensor
    used: torch.Tensor  # [n, t]: whether the token has an output gradient


class Projection:
    """The projection of gradients over `parameters` to `dimension` numbers.

    Args:
        parameters: shapes by name.
        dimension: k.
        seed: of signs and places.
        device, dtype: of the gradients.
        activations_of: for linear layers' weights, a name of what they may read in common; signs of columns
            are drawn by this name.
    """

    def __init__(
        self,
        parameters: Mapping[str, Sequence[int]],
        dimension: int,
        seed: int,
        device: torch.device,
        dtype: torch.dtype,
        activations_of: Mapping[str, str] | None = None,
    ):
        self.shapes = {name: matrix_shape(shape) for name, shape in parameters.items()}
        self.dimension, self.seed, self.device, self.dtype = dimension, seed, device, dtype
        self._shared = dict(activations_of or {})
        self._places: dict[str, _Places] = {}

    def __call__(self, n: int, gradients: Sequence[Mapping[str, list[Gradient]]]) -> torch.Tensor:
        """The projections `[n, c, k]` of n examples' gradients.

        Args:
            gradients: for each of the c scalars what the uses of each parameter give it, to be summed.
        """
        total = torch.zeros(n, len(gradients), self.dimension, dtype=self.dtype, device=self.device)
        groups: dict[tuple, list[_Tokens]] = {}
        for scalar, by_name in enumerate(gradients):
            for name, uses in by_name.items():
                for use in uses:
                    if isinstance(use, LinearGradient):
                        tokens = _tokens(name, scalar, use)
                        read = tokens.columns
                        key = (read.data_ptr(), read.shape, read.stride(), self._shared.get(name, name))
                        groups.setdefault(key, []).append(tokens)
                    elif isinstance(use, EmbeddingGradient):
                        self._add_table(total[:, scalar], name, use)
                    else:
                        self._add_entries(total[:, scalar], name, use.dense())
        if groups:
            # rfft of length k keeps k // 2 + 1 of the frequencies: the others are their conjugates.
            kind = torch.complex128 if self.dtype == torch.float64 else torch.complex64
            spectrum = total.new_zeros(*total.shape[:2], self.dimension // 2 + 1, dtype=kind)
            for group in groups.values():
                self._add_tokens(total, spectrum, group)
            total += torch.fft.irfft(spectrum, n=self.dimension)
        return total

    def scratch_bytes(self, tokens: int) -> int:
        """About what a call with so many tokens takes beside its arguments and its result."""
        wide = 2 * self.dtype.itemsize
        return 3 * min(self._token_step(), tokens) * self.dimension * wide + 3 * _ENTRIES * 8

    # --- linear layers ---------------------------------------------------------------------------------

    def _token_step(self) -> int:
        return _TOKENS if self.device.type == "cpu" else max(_TOKENS, 2**26 // self.dimension)

    def _add_tokens(self, total: torch.Tensor, spectrum: torch.Tensor, group: list[_Tokens]) -> None:
        """Add linear layers that read the same, in the Fourier domain or written out."""
        columns, group = _with_gradient(group)
        if columns is None:
            return
        n, t, _ = columns.shape
        transformed = []
        for tokens in group:
            rows, width = self.shapes[tokens.name]
            if rows * width <= _WRITTEN_OUT * self.dimension * t:
                self._add_written_out(total[:, tokens.scalar], tokens.name, tokens.rows, columns)
            else:
                transformed.append(tokens)
        if not transformed:
            return
        places = self.places(transformed[0].name)
        scalars = sorted({tokens.scalar for tokens in transformed})
        step = self._token_step()
        for first in range(0, n, max(1, step // t)):
            some = slice(first, first + max(1, step // t))
            for start in range(0, t, step):
                span = slice(start, start + step)
                x = self._transform(columns[some, span], places.columns, places.column_signs)
                for scalar in scalars:
                    here = [tokens for tokens in transformed if tokens.scalar == scalar]
                    spread = columns.new_zeros(*x.shape[:2], self.dimension)
                    for tokens in here:  # weights of the same activations add up before the transform
                        own = self.places(tokens.name)
                        self._spread(spread, tokens.rows[some, span], own.rows, own.row_signs)
                    # F[P G] = sum_t F[P_row g_t] F[P_col x_t]
                    spectrum[some, scalar] += torch.fft.rfft(spread).mul_(x).sum(1)

    def _transform(self, values: torch.Tensor, places: torch.Tensor | None, signs: torch.Tensor) -> torch.Tensor:
        """`F[P values]` for vectors `[n, t, width]`: `[n, t, k // 2 + 1]`."""
        if places is None:
            return torch.fft.rfft(values * signs, n=self.dimension)  # zeros fill up to k
        spread = values.new_zeros(*values.shape[:2], self.dimension)
        self._spread(spread, values, places, signs)
        return torch.fft.rfft(spread)

    def _spread(self, out: torch.Tensor, values: torch.Tensor, places: torch.Tensor, signs: torch.Tensor) -> None:
        """Add `values` with their signs to their places in `out` `[n, t, k]`."""
        with _in_order(self.device):
            out.scatter_add_(2, places.expand(*values.shape[:2], -1), values * signs)

    def _add_written_out(self, out: torch.Tensor, name: str, rows: torch.Tensor, columns: torch.Tensor) -> None:
        step = max(1, _ENTRIES // math.prod(self.shapes[name]))
        for first in range(0, len(out), step):
            some = slice(first, first + step)
            # G = sum_t g_t x_t^T
            self._add_entries(out[some], name, torch.bmm(rows[some].mT, columns[some]))

    # --- other gradients -------------------------------------------------------------------------------

    def _add_entries(self, out: torch.Tensor, name: str, values: torch.Tensor) -> None:
        """Add gradients in full, `[n, *shape]`, to `out` `[n, k]`."""
        rows, width = self.shapes[name]
        values, places = values.reshape(len(values), rows, width), self.places(name)
        step = max(1, _ENTRIES // (width * len(values)))
        for first in range(0, rows, step):
            last = min(first + step, rows)
            index = places.index(first, last, self.dimension).flatten()
            signed = values[:, first:last] * places.row_signs[first:last, None] * places.column_signs
            with _in_order(self.device):
                out.scatter_add_(1, index.expand(len(out), -1), signed.flatten(1))

    def _add_table(self, out: torch.Tensor, name: str, gradient: EmbeddingGradient) -> None:
        """Add rows of a table: `output_gradients[n, t]` in row `ids[n, t]`."""
        places, width = self.places(name), gradient.output_gradients.shape[2]
        step = max(1, _ENTRIES // (width * gradient.ids.shape[1]))
        for first in range(0, len(out), step):
            some = slice(first, first + step)
            ids = gradient.ids[some].clamp_min(0)
            signs = places.row_signs[ids] * (gradient.ids[some] >= 0)
            signed = gradient.output_gradients[some] * signs[..., None] * places.column_signs
            index = places.at(places.rows[ids], self.dimension)
            with _in_order(self.device):
                out[some].scatter_add_(1, index.flatten(1), signed.flatten(1))

    # --- signs and places ------------------------------------------------------------------------------

    def places(self, name: str) -> _Places:
        """Signs and places of one parameter."""
        if name not in self._places:
            rows, width = self.shapes[name]
            read, k = self._shared.get(name, name), self.dimension
            columns = self._random_places(f"columns of {read}", width) if width > k else None
            self._places[name] = _Places(
                self._random_places(f"rows of {name}", rows),
                self._random_signs(f"row signs of {name}", rows),
                columns,
                self._random_signs(f"column signs of {read}", width),
            )
        return self._places[name]

    def _bits(self, what: str, count: int) -> np.ndarray:
        """`[count]` random whole numbers below 2^64 that depend on the seed and on `what` alone."""
        digest = hashlib.sha256(f"{self.seed} {what}".encode()).digest()
        return np.random.Philox(key=int.from_bytes(digest[:16], "little")).random_raw(count)

    def _random_signs(self, what: str, count: int) -> torch.Tensor:
        signs = 1.0 - 2.0 * (self._bits(what, count) >> np.uint64(63)).astype(np.float64)
        return torch.from_numpy(signs).to(self.device, self.dtype)

    def _random_places(self, what: str, count: int) -> torch.Tensor:
        """Random places, each taken once before any is taken again."""
        k = self.dimension
        turns = -(-count // k)
        order = self._bits(what, turns * k).reshape(turns, k).argsort(axis=1, kind="stable")
        return torch.from_numpy(order.reshape(-1)[:count].copy()).to(self.device)


def matrix_shape(shape: Sequence[int]) -> tuple[int, int]:
    """A parameter's shape as rows and columns: the last axis is the columns."""
    return (math.prod(shape[:-1]), shape[-1]) if len(shape) else (1, 1)


def read_in_common(model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> dict[str, str]:
    """For each linear layer's weight a name that is the same for layers beside each other of the same input width.

    Query, key and value, or gate and up projection, read the same activations and share their transform. Nothing
    depends on it that they do.
    """
    names = {id(parameter): name for name, parameter in parameters.items()}
    common = {}
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear) and id(module.weight) in names:
            beside = path.rpartition(".")[0]
            common.setdefault(names[id(module.weight)], f"{module.in_features} activations in {beside}")
    return common


def _tokens(name: str, scalar: int, gradient: LinearGradient) -> _Tokens:
    """The factors of a linear layer's gradient by the weight's own axes."""
    rows, columns = (
        (gradient.activations, gradient.output_gradients)
        if gradient.transposed
        else (gradient.output_gradients, gradient.activations)
    )
    n, used = len(gradient), (gradient.output_gradients != 0).any(-1)
    return _Tokens(name, scalar, rows.expand(n, -1, -1), columns.expand(n, -1, -1), used)


def _with_gradient(group: list[_Tokens]) -> tuple[torch.Tensor | None, list[_Tokens]]:
    """The tokens of which some gradient is not zero, NaN included, and the columns that they share.

    Of padding, and in the last layer of all but the token that the head reads, gradients are exactly zero; what was
    read there may be anything.
    """
    columns = group[0].columns
    used = torch.stack([tokens.used for tokens in group]).any(0)
    most = int(used.sum(1).max())
    if most == 0:
        return None, []
    kept = _kept_tokens(used, most)
    columns = kept(columns)
    return columns, [_Tokens(t.name, t.scalar, kept(t.rows), columns, used) for t in group]


def _kept_tokens(used: torch.Tensor, most: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """From vectors `[n, t, width]` to those of the used tokens, zero where an example has fewer than `most`."""
    n, t = used.shape
    complete = bool(used.all())
    order = (~used).to(torch.uint8).argsort(dim=1, stable=True)[:, :most]  # used tokens first, in their order
    places = (order + t * torch.arange(n, device=used.device)[:, None]).flatten()
    unused = ~used if most == t else ~used.flatten()[places].view(n, most)

    def kept(values: torch.Tensor) -> torch.Tensor:
        if most < t:
            values = values.flatten(0, 1).index_select(0, places).view(n, most, -1)
        if complete or values.sum().isfinite():  # a gradient of zero times any finite number is zero
            return values
        return values.masked_fill(unused[:, :, None], 0)

    return kept


@contextlib.contextmanager
def _in_order(device: torch.device) -> Iterator[None]:
    """Sums in a fixed order, so that the same gradients give the same bits; a CPU needs no asking."""
    if device.type == "cpu" or torch.are_deterministic_algorithms_enabled():
        yield
        return
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
