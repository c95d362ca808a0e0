"""The sketches of the pre-pass: products of each layer's gradient with test matrices, summed over batches."""

from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

import torch

from hf_ft_ext.adapters.layers import shown_name
from hf_ft_ext.adapters.sparse_grad.functions import project
from hf_ft_ext.adapters.sparse_grad.layer import SparseGradColumns, SparseGradLayer
from hf_ft_ext.adapters.sparse_grad.subspace import Sketch
from hf_ft_ext.errors import InputError


def _product(rows: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    """`rows matrix` in the format of `rows`."""
    return project(rows, matrix.to(rows.dtype))


class _DenseGradient(NamedTuple):
    """A gradient (out, in); its products are in its format."""

    gradient: torch.Tensor

    def times(self, matrix: torch.Tensor) -> torch.Tensor:
        return _product(self.gradient, matrix)

    def transposed_times(self, matrix: torch.Tensor) -> torch.Tensor:
        return _product(self.gradient.T, matrix)

    def gram_times(self, matrix: torch.Tensor) -> torch.Tensor:
        """`G G^T matrix`."""
        return self.times(self.transposed_times(matrix))

    def transposed_gram_times(self, matrix: torch.Tensor) -> torch.Tensor:
        """`G^T G matrix`."""
        return self.transposed_times(self.times(matrix))


class _FactoredGradient(NamedTuple):
    """A gradient `g^T x` kept as its factors: inputs (tokens, in) and output gradients (tokens, out).

    Its products are in the format of the factors.
    """

    x: torch.Tensor
    g: torch.Tensor

    def times(self, matrix: torch.Tensor) -> torch.Tensor:
        return _product(self.g.T, _product(self.x, matrix))

    def transposed_times(self, matrix: torch.Tensor) -> torch.Tensor:
        return _product(self.x.T, _product(self.g, matrix))

    def gram_times(self, matrix: torch.Tensor) -> torch.Tensor:
        """`G G^T matrix = g^T (x x^T) g matrix`."""
        rows = _product(self.g, matrix)
        tokens, width = rows.shape
        if _through_other_side(tokens, self.x.shape[1], width) < 2 * tokens * self.x.shape[1] * width:
            rows = (self.x @ self.x.T) @ rows  # few tokens: x x^T is small
        else:
            rows = project(self.x, project(self.x.T, rows))
        return project(self.g.T, rows)

    def transposed_gram_times(self, matrix: torch.Tensor) -> torch.Tensor:
        """`G^T G matrix`: that of `G^T = x^T g`."""
        return _FactoredGradient(self.g, self.x).gram_times(matrix)


def _through_other_side(tokens: int, n: int, width: int) -> int:
    """Multiplications of `x x^T Y`, for `x` (tokens, n) and `Y` (tokens, width): `(x x^T) Y` or `x (x^T Y)`."""
    return min(tokens * tokens * (n + width), 2 * tokens * n * width)


Pair = tuple[torch.Tensor, torch.Tensor]


class Sketches:
    """The two sketches of a set of columns, over the gradients of all layers that share it."""

    def __init__(
        self, columns: SparseGradColumns, layers: list[tuple[str, SparseGradLayer]], out: Sketch, inp: Sketch
    ):
        self.columns, self.layers, self.out, self.inp = columns, layers, out, inp
        self.step = -1
        self.runs: Counter[str] = Counter()  # of each layer in the forward pass of this batch
        self._pending: dict[str, torch.Tensor] = {}
        self._accumulated = False
        self._dtype: torch.dtype | None = None  # of the products
        self._sums: dict[str, Pair] = {}  # of products, over the micro-batches of a pass
        self._projected: dict[str, Pair] | None = None  # G^T Omega_out and G Omega_in, in a second pass

    def begin_step(self, accumulated: bool) -> None:
        self.step += 1
        self._accumulated, self._sums, self._projected = accumulated, {}, None

    def begin_second_pass(self) -> None:
        self._projected, self._sums = self._means_by_layer(), {}

    def end_step(self) -> None:
        for name in list(self._pending):
            self._add(name, _DenseGradient(self._pending.pop(name).to(self._dtype)))
        self.runs.clear()
        if self._accumulated:
            for name, (out, inp) in self._means_by_layer().items():
                self._add_product(name, self.out, out)
                self._add_product(name, self.inp, inp)

    def observer(self, name: str) -> Callable[[torch.Tensor, torch.Tensor], None]:
        """Return a function that adds the gradient of the layer `name` from its inputs and output gradients.

        They have shapes (tokens, in) and (tokens, out).
        """

        def observe(x: torch.Tensor, g: torch.Tensor) -> None:
            # bfloat16 gradients have its rounding already; float16 has too small a range for their products.
            dtype = torch.bfloat16 if g.dtype == torch.bfloat16 else self.out.sum.dtype
            self._dtype = dtype
            # A layer that runs several times has one gradient, the sum of its runs'; sums of products take any number.
            if self.runs[name] > 1 and not self._accumulated:
                formed = (g.to(dtype).T @ x.to(dtype)).to(self.out.sum.dtype)
                self._pending[name] = self._pending[name] + formed if name in self._pending else formed
                return
            gradient: _DenseGradient | _FactoredGradient
            if self.rows_are_cheaper(len(x)):
                gradient = _FactoredGradient(x.to(dtype), g.to(dtype))
            else:
                gradient = _DenseGradient(g.to(dtype).T @ x.to(dtype))
            if self._accumulated:
                self._accumulate(name, gradient)
            else:
                self._add(name, gradient)

        return observe

    def rows_are_cheaper(self, tokens: int) -> bool:
        """Whether multiplying all rows by the test matrices costs less than forming `G = g^T x` first."""
        (n_out, width_out), (n_in, width_in) = self.out.omega.shape, self.inp.omega.shape
        rows = _through_other_side(tokens, n_in, width_out) + _through_other_side(tokens, n_out, width_in)
        if self._accumulated or processes() > 1:  # G^T Omega is needed by itself
            rows = 2 * tokens * (n_in * width_out + n_out * width_in)
        rows += 2 * tokens * (n_out * width_out + n_in * width_in)
        return rows < tokens * n_out * n_in + 2 * n_out * n_in * (width_out + width_in)

    def _add(self, name: str, gradient: _DenseGradient | _FactoredGradient) -> None:
        if processes() == 1:
            self._add_product(name, self.out, gradient.gram_times(self.out.omega))
            self._add_product(name, self.inp, gradient.transposed_gram_times(self.inp.omega))
            return
        # G G^T Omega and G^T G Omega, G the mean over processes, in the same order on all of them
        out = mean_over_processes(gradient.transposed_times(self.out.omega))
        inp = mean_over_processes(gradient.times(self.inp.omega))
        for sketch, product in ((self.out, gradient.times(out)), (self.inp, gradient.transposed_times(inp))):
            self._add_product(name, sketch, mean_over_processes(product))

    def _accumulate(self, name: str, gradient: _DenseGradient | _FactoredGradient) -> None:
        if self._projected is None:  # first pass: G_i^T Omega_out and G_i Omega_in
            products = gradient.transposed_times(self.out.omega), gradient.times(self.inp.omega)
        else:  # second pass: G_i P and G_i^T P, with the sums P of the first pass
            out, inp = self._projected[name]
            products = gradient.times(out), gradient.transposed_times(inp)
        out, inp = (product.to(self.out.sum.dtype) for product in products)
        before = self._sums.get(name)
        self._sums[name] = (out, inp) if before is None else (before[0] + out, before[1] + inp)

    def _means_by_layer(self) -> dict[str, Pair]:
        """The sums of a pass, 0 for a layer that no token of this process went through."""
        n_out, n_in = len(self.out.omega), len(self.inp.omega)
        rows_out, rows_in = (n_in, n_out) if self._projected is None else (n_out, n_in)
        found = {}
        for name, _ in self.layers:
            if name not in self._sums:
                out = self.out.sum.new_zeros(rows_out, self.out.omega.shape[1])
                self._sums[name] = out, self.inp.sum.new_zeros(rows_in, self.inp.omega.shape[1])
            out, inp = self._sums[name]
            found[name] = mean_over_processes(out), mean_over_processes(inp)
        return found

    def _add_product(self, name: str, sketch: Sketch, product: torch.Tensor) -> None:
        # A finite sum has finite parts only, and one pass computes it; if it overflows, each part is looked at.
        if not product.sum(dtype=sketch.sum.dtype).isfinite() and not product.isfinite().all():
            raise InputError(
                f"the gradient of {shown_name(name)} is not finite in batch {self.step} of the pre-pass; look for "
                "bad rows or labels in the training data, or load the model in float32"
            )
        sketch.add(product, self._dtype)


def processes() -> int:
    here = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_world_size() if here else 1


def mean_over_processes(part: torch.Tensor) -> torch.Tensor:
    """The mean over the processes: a product with the mean gradient is the mean of the products."""
    if processes() == 1:
        return part
    part = part.to(torch.promote_types(part.dtype, torch.float32)).contiguous()
    torch.distributed.all_reduce(part)
    return part / processes()
