"""`Projection`: a seeded random projection of gradients over many parameters to k values, from their factors.

The gradient g of an example has one entry for each entry (r, c) of each parameter. (A parameter with more than two
axes is a matrix whose columns are its last axis; a vector is a matrix with one row.) Every entry has a random sign and
one of k buckets:

    (P g)[h] = sum of s_row(r) s_col(c) g[r, c] over all parameters and entries with (row(r) + col(c)) mod k = h

This is a count sketch; for one matrix it is the TensorSketch of Pham and Pagh (KDD 2013). `row` is a random injection
into the k buckets, or a balanced random map if there are more than k rows. `col(c) = c`, or a balanced random map if
there are more than k columns.

Unbiased: `E <P g, P g'> = <g, g'>`, because the product of the signs of two different entries has mean 0.

Variance: two entries share a bucket with probability about 1 / k, so

    Var <P g, P g'> <= (|g|^2 |g'|^2 + <g, g'>^2) / k,

as with a dense matrix of random signs: the standard deviation is at most `sqrt(2 / k) |g| |g'|`. Three cases add up
to `2 |G|^2 |G'|^2 / k` each, for the matrices G concerned: more than k rows (`2 |G G'^T|^2 / k`), more than k columns
(`2 |G^T G'|^2 / k`), and linear layers that read the same activations (they share `s_col`, so that query, key and
value need only one transform of their common input). So the standard deviation is at most twice that bound, and above
it only where most of the gradient lies in such matrices.

Separate projections of activations and output gradients to k_a and k_b values (k_a k_b = k, as in LoGra,
arXiv 2405.13954) have a variance of about `(2 / k_a + 2 / k_b) |G|^2 |G'|^2` for each layer. Their error falls like
k^(-1/4) where one layer's gradient dominates.

Cost: a linear layer's gradient is `G = sum_t g_t x_t^T`. Adding bucket indices mod k is a circular convolution, which
is a product in the Fourier domain: `F[P G] = sum_t F[P_row g_t] F[P_col x_t]`. That takes two transforms of length k
for each token instead of out x in products. The spectra of all layers are summed before a single inverse transform.
If a gradient has few entries compared with its tokens, the full gradient is computed and its entries are added to
their buckets, which gives the same result up to rounding.

Signs and buckets depend only on the seed, the parameter's name and its shape. They come from a counter-based generator
(Philox), which gives the same bits on every machine. So the projection is the same for every batch size, order of
rows, process, device and dtype.
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

_DENSE_LIMIT = 2  # with at most this many entries per token and bucket, the full gradient is faster
_TOKENS = 64  # tokens that are transformed at a time on a CPU, to stay in its cache
_ENTRIES = 2**20  # entries of full gradients that are computed at a time


@dataclass(frozen=True)
class _Buckets:
    """Signs and buckets of one parameter's rows and columns; `columns=None`: column c has bucket c."""

    rows: torch.Tensor
    row_signs: torch.Tensor
    columns: torch.Tensor | None
    column_signs: torch.Tensor

    def index(self, first: int, last: int, k: int) -> torch.Tensor:
        """Buckets of the entries in rows `first` to `last` (exclusive): `[rows, columns]`."""
        return self.at(self.rows[first:last], k)

    def at(self, rows: torch.Tensor, k: int) -> torch.Tensor:
        """Buckets of the entries in rows whose buckets are `rows`: `[*rows.shape, columns]`."""
        columns = self.columns
        if columns is None:
            columns = torch.arange(len(self.column_signs), device=rows.device)
        # h = (row(r) + col(c)) mod k
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
    """The projection of gradients over `parameters` to `dimension` values.

    Args:
        parameters: shapes by name.
        dimension: k.
        seed: seed of the signs and buckets.
        device, dtype: device and type of the gradients.
        activations_of: for weights of linear layers, a name of the input that they may share. Columns of weights with
            the same name have the same signs and buckets.
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
        self._buckets: dict[str, _Buckets] = {}

    def __call__(self, n: int, gradients: Sequence[Mapping[str, list[Gradient]]]) -> torch.Tensor:
        """The projections `[n, c, k]` of n examples' gradients.

        Args:
            gradients: for each of the c scalars, by parameter name, one gradient per use of the parameter. Their sum
                is projected.
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
                        self._add_full(total[:, scalar], name, use.dense())
        if groups:
            # rfft of length k keeps k // 2 + 1 frequencies: the others are their conjugates.
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
        """Add linear layers with the same input: in the Fourier domain, or as full gradients."""
        columns, group = _with_gradient(group)
        if columns is None:
            return
        n, t, _ = columns.shape
        transformed = []
        for tokens in group:
            rows, width = self.shapes[tokens.name]
            if rows * width <= _DENSE_LIMIT * self.dimension * t:
                self._add_dense(total[:, tokens.scalar], tokens.name, tokens.rows, columns)
            else:
                transformed.append(tokens)
        if not transformed:
            return
        buckets = self.buckets(transformed[0].name)
        scalars = sorted({tokens.scalar for tokens in transformed})
        step = self._token_step()
        for first in range(0, n, max(1, step // t)):
            some = slice(first, first + max(1, step // t))
            for start in range(0, t, step):
                span = slice(start, start + step)
                x = self._transform(columns[some, span], buckets.columns, buckets.column_signs)
                for scalar in scalars:
                    here = [tokens for tokens in transformed if tokens.scalar == scalar]
                    scattered = columns.new_zeros(*x.shape[:2], self.dimension)
                    for tokens in here:  # weights with the same input are summed before the transform
                        own = self.buckets(tokens.name)
                        self._scatter(scattered, tokens.rows[some, span], own.rows, own.row_signs)
                    # F[P G] = sum_t F[P_row g_t] F[P_col x_t]
                    spectrum[some, scalar] += torch.fft.rfft(scattered).mul_(x).sum(1)

    def _transform(self, values: torch.Tensor, buckets: torch.Tensor | None, signs: torch.Tensor) -> torch.Tensor:
        """`F[P values]` for vectors `[n, t, width]`: `[n, t, k // 2 + 1]`."""
        if buckets is None:
            return torch.fft.rfft(values * signs, n=self.dimension)  # padded with zeros to length k
        scattered = values.new_zeros(*values.shape[:2], self.dimension)
        self._scatter(scattered, values, buckets, signs)
        return torch.fft.rfft(scattered)

    def _scatter(self, out: torch.Tensor, values: torch.Tensor, buckets: torch.Tensor, signs: torch.Tensor) -> None:
        """Add the signed `values` to their buckets in `out` `[n, t, k]`."""
        with _deterministic_sums(self.device):
            out.scatter_add_(2, buckets.expand(*values.shape[:2], -1), values * signs)

    def _add_dense(self, out: torch.Tensor, name: str, rows: torch.Tensor, columns: torch.Tensor) -> None:
        step = max(1, _ENTRIES // math.prod(self.shapes[name]))
        for first in range(0, len(out), step):
            some = slice(first, first + step)
            # G = sum_t g_t x_t^T
            self._add_full(out[some], name, torch.bmm(rows[some].mT, columns[some]))

    # --- other gradients -------------------------------------------------------------------------------

    def _add_full(self, out: torch.Tensor, name: str, values: torch.Tensor) -> None:
        """Add the projection of full gradients `[n, *shape]` to `out` `[n, k]`."""
        rows, width = self.shapes[name]
        values, buckets = values.reshape(len(values), rows, width), self.buckets(name)
        step = max(1, _ENTRIES // (width * len(values)))
        for first in range(0, rows, step):
            last = min(first + step, rows)
            index = buckets.index(first, last, self.dimension).flatten()
            # s_row(r) s_col(c) G[r, c]
            signed = values[:, first:last] * buckets.row_signs[first:last, None] * buckets.column_signs
            with _deterministic_sums(self.device):
                out.scatter_add_(1, index.expand(len(out), -1), signed.flatten(1))

    def _add_table(self, out: torch.Tensor, name: str, gradient: EmbeddingGradient) -> None:
        """Add the projection of an embedding's gradient: `output_gradients[n, t]` in row `ids[n, t]`."""
        buckets, width = self.buckets(name), gradient.output_gradients.shape[2]
        step = max(1, _ENTRIES // (width * gradient.ids.shape[1]))
        for first in range(0, len(out), step):
            some = slice(first, first + step)
            ids = gradient.ids[some].clamp_min(0)
            signs = buckets.row_signs[ids] * (gradient.ids[some] >= 0)
            signed = gradient.output_gradients[some] * signs[..., None] * buckets.column_signs
            index = buckets.at(buckets.rows[ids], self.dimension)
            with _deterministic_sums(self.device):
                out[some].scatter_add_(1, index.flatten(1), signed.flatten(1))

    # --- signs and buckets ------------------------------------------------------------------------------

    def buckets(self, name: str) -> _Buckets:
        """Signs and buckets of one parameter."""
        if name not in self._buckets:
            rows, width = self.shapes[name]
            read, k = self._shared.get(name, name), self.dimension
            columns = self._random_buckets(f"columns of {read}", width) if width > k else None
            self._buckets[name] = _Buckets(
                self._random_buckets(f"rows of {name}", rows),
                self._random_signs(f"row signs of {name}", rows),
                columns,
                self._random_signs(f"column signs of {read}", width),
            )
        return self._buckets[name]

    def _bits(self, what: str, count: int) -> np.ndarray:
        """`[count]` random integers below 2^64 that depend only on the seed and on `what`."""
        digest = hashlib.sha256(f"{self.seed} {what}".encode()).digest()
        return np.random.Philox(key=int.from_bytes(digest[:16], "little")).random_raw(count)

    def _random_signs(self, what: str, count: int) -> torch.Tensor:
        signs = 1.0 - 2.0 * (self._bits(what, count) >> np.uint64(63)).astype(np.float64)
        return torch.from_numpy(signs).to(self.device, self.dtype)

    def _random_buckets(self, what: str, count: int) -> torch.Tensor:
        """Random buckets, balanced: consecutive random permutations of all k buckets."""
        k = self.dimension
        bits = self._bits(what, -(-count // k) * k).reshape(-1, k)
        order = [_smallest(row, min(k, count - i * k)) for i, row in enumerate(bits)]
        return torch.from_numpy(np.concatenate(order)).to(self.device)


def matrix_shape(shape: Sequence[int]) -> tuple[int, int]:
    """A parameter's shape as (rows, columns), where the last axis is the columns."""
    return (math.prod(shape[:-1]), shape[-1]) if len(shape) else (1, 1)


def shared_activations(model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> dict[str, str]:
    """Name the input of each linear layer's weight: sibling layers with the same input width get the same name.

    Query, key and value, or gate and up projection, read the same activations and share one transform of them. The
    projection is valid whether or not sibling layers do.
    """
    names = {id(parameter): name for name, parameter in parameters.items()}
    common = {}
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear) and id(module.weight) in names:
            beside = path.rpartition(".")[0]
            common.setdefault(names[id(module.weight)], f"{module.in_features} activations in {beside}")
    return common


def _smallest(values: np.ndarray, count: int) -> np.ndarray:
    """Positions of the `count` smallest values in ascending order; of equal ones the first comes first."""
    if 2 * count < len(values):  # a part need not sort the whole
        found = np.flatnonzero(values <= np.partition(values, count - 1)[count - 1])
        return found[values[found].argsort(kind="stable")][:count]
    return values.argsort(kind="stable")[:count]


def _tokens(name: str, scalar: int, gradient: LinearGradient) -> _Tokens:
    """The factors of a linear layer's gradient, ordered by the axes of the weight."""
    rows, columns = (
        (gradient.activations, gradient.output_gradients)
        if gradient.transposed
        else (gradient.output_gradients, gradient.activations)
    )
    n, used = len(gradient), (gradient.output_gradients != 0).any(-1)
    return _Tokens(name, scalar, rows.expand(n, -1, -1), columns.expand(n, -1, -1), used)


def _with_gradient(group: list[_Tokens]) -> tuple[torch.Tensor | None, list[_Tokens]]:
    """Keep the tokens with a non-zero gradient (or NaN) in any layer; return their shared columns and the layers.

    Gradients are exactly zero for padding, and in the last layer for all tokens that the head does not read. The
    activations of such tokens may hold anything.
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
    """Return a function from vectors `[n, t, width]` to those of the used tokens, padded with zeros to `most`."""
    n, t = used.shape
    complete = bool(used.all())
    order = (~used).to(torch.uint8).argsort(dim=1, stable=True)[:, :most]  # used tokens first, in their order
    positions = (order + t * torch.arange(n, device=used.device)[:, None]).flatten()
    unused = ~used if most == t else ~used.flatten()[positions].view(n, most)

    def kept(values: torch.Tensor) -> torch.Tensor:
        if most < t:
            values = values.flatten(0, 1).index_select(0, positions).view(n, most, -1)
        if complete or values.sum().isfinite():  # 0 times a finite value is 0, so only NaN and infinity need masking
            return values
        return values.masked_fill(unused[:, :, None], 0)

    return kept


@contextlib.contextmanager
def _deterministic_sums(device: torch.device) -> Iterator[None]:
    """Sum in a fixed order on accelerators, so that the same gradients give the same bits (a CPU always does)."""
    if device.type == "cpu" or torch.are_deterministic_algorithms_enabled():
        yield
        return
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
