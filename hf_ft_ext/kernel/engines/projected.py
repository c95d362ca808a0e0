"""Engine `projected`: a kernel of random projections of the gradients, for many rows.

Every row runs once, forward and backward. Its gradient is projected to k values per scalar, its features (see
`hf_ft_ext.kernel.engines.projection`), and the kernel is one product of features. The features of a row do not depend
on other rows: those of the training rows are computed once and serve every later evaluation set.

When to use it: from several hundred rows on, where the exact engine takes too long (its cost grows with rows times
rows), and when new rows arrive in several sets. Formula `sgd` only: a projection does not keep the signs of gradient
entries. For few rows use `structured`, which is exact.

Cost, for N rows with T tokens in total and C scalars: N forward passes and C N backward passes without weight
gradients; `O(C T k log k)` for the projection of each linear layer; `O(N1 N2 C^2 k)` for the product.

Memory: the graph and output gradients of one batch, and the features of 128 rows. All features, `N C k` values in
the model's type, are stored in memory if they take less than a quarter of the memory limit, otherwise on disk.

Error: an entry of the kernel is unbiased. Its standard deviation is about `sqrt(2 / k) |g| |g'|` or less: 2.2 % of the
product of the norms at k = 4096, half of that at k = 16384. Where weights with more than k rows or columns, or layers
with a common input, have most of the gradient, it can be up to twice that. `projection` derives both bounds.
The kernel is a Gram matrix of rank at most `min(k, N C)`, so kernel regression on more than k rows needs
regularization.
"""

import contextlib
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import nn
from tqdm.auto import tqdm

from hf_ft_ext.errors import InputError
from hf_ft_ext.kernel.engines.projection import Projection, shared_activations
from hf_ft_ext.kernel.rows import ExampleRows
from hf_ft_ext.kernel.schedule import batch_overhead, longest_row, memory_bound, refuse_too_little
from hf_ft_ext.kernel.store import FeatureStore
from hf_ft_ext.per_example.capture import Function
from hf_ft_ext.per_example.gradients import ExampleGradients, Part
from hf_ft_ext.per_example.saved import saved_bytes
from hf_ft_ext.per_example.state import computing_in, evaluating
from hf_ft_ext.per_example.types import Gradient, dense

CHUNK_ROWS = 128  # rows whose features are stored together; an interrupted run loses at most one chunk
_SHARE_OF_FEATURES = 0.25  # largest share of the memory limit for features; larger ones are stored on disk


class Chunks(Protocol):
    """Storage for features: `[rows, c, k]` for the rows of each chunk."""

    edges: list[tuple[int, int]]

    def get(self, i: int) -> torch.Tensor | None:
        """Chunk i, `[rows, c, k]`, or `None`."""
        ...

    def put(self, i: int, features: torch.Tensor) -> None:
        """Store chunk i, `[rows, c, k]`."""
        ...


class MemoryChunks:
    """Features in memory."""

    def __init__(self, edges: list[tuple[int, int]]):
        self.edges = edges
        self._features: dict[int, torch.Tensor] = {}

    @classmethod
    def of(cls, features: torch.Tensor) -> "MemoryChunks":
        """Divide existing features `[N, c, k]` into chunks."""
        chunks = cls(divide_rows(len(features)))
        for i, (first, last) in enumerate(chunks.edges):
            chunks.put(i, features[first:last])
        return chunks

    def get(self, i: int) -> torch.Tensor | None:
        """Chunk i, or `None`."""
        return self._features.get(i)

    def put(self, i: int, features: torch.Tensor) -> None:
        """Store chunk i."""
        self._features[i] = features


class ProjectedEngine:
    """Computes features, the projected gradients of examples.

    Args:
        model, function, parameters: as for `ExampleGradients`.
        dimension, seed: dimension and seed of the projection.
        dtype: type to compute gradients and features in.
        memory_gb: memory limit, in 10^9 bytes; `None` = half of the free memory.
        batch_size: largest number of rows in a forward pass.
        fixed_bytes: the part of `memory_gb` that is used regardless of the rows.
    """

    def __init__(
        self,
        model: nn.Module,
        function: Function,
        parameters: dict[str, nn.Parameter],
        dimension: int,
        seed: int,
        dtype: torch.dtype,
        memory_gb: float | None = None,
        batch_size: int = 16,
        fixed_bytes: int = 0,
    ):
        self.model, self.parameters, self.dtype = model, parameters, dtype
        self.memory_gb, self.batch_size, self._fixed_bytes = memory_gb, batch_size, fixed_bytes
        self.scalars, self._memory = 0, 0.0
        self.examples = ExampleGradients(model, function, parameters, dtype)
        self.device = next(iter(parameters.values())).device
        shapes = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
        common = shared_activations(model, parameters)
        self.projection = Projection(shapes, dimension, seed, self.device, dtype, common)

    def kernel(
        self, rows1: ExampleRows, rows2: ExampleRows | None, class_diagonal: bool, disable_tqdm: bool = True
    ) -> torch.Tensor:
        """Compute the kernel `[N1, C, N2, C]` with temporary features; see `features_product`."""
        with tempfile.TemporaryDirectory(prefix="projected-gradients-") as folder:
            kept = []
            for number, rows in enumerate((rows1, rows2)):
                if rows is not None:
                    kept.append(self._chunks(rows, Path(folder) / str(number)))
                    self.project(rows, kept[-1], disable_tqdm=disable_tqdm)
            return features_product(kept[0], kept[1] if rows2 is not None else None, class_diagonal)

    def _chunks(self, rows: ExampleRows, folder: Path) -> Chunks:
        """Storage for features: in memory, or in `folder` if they exceed their share of the memory limit."""
        edges = divide_rows(len(rows))
        with self._computing(rows):
            size = len(rows) * self.scalars * self.projection.dimension * self.dtype.itemsize
        if size <= _SHARE_OF_FEATURES * self._bound(1) * 1e9:
            return MemoryChunks(edges)
        store = FeatureStore(folder, {"dimension": self.projection.dimension})
        store.cut(edges)
        return store

    def project(
        self, rows: ExampleRows, chunks: Chunks, process: int = 0, processes: int = 1, disable_tqdm: bool = True
    ) -> None:
        """Compute and store the features of the missing chunks in this process's share.

        Raises:
            InputError: too little memory, or a gradient that is not finite.
        """
        mine = [i for i in range(len(chunks.edges))[process::processes] if chunks.get(i) is None]
        if not mine:
            return
        with self._computing(rows):
            size = self._batch_size(rows, self._bound(processes))
            overhead = batch_overhead(self.device)
            for i in tqdm(mine, desc="projected gradients", disable=disable_tqdm):
                first, last = chunks.edges[i]
                chunks.put(i, self.features(rows, first, rows.by_length(first, last, size, overhead)))

    @contextlib.contextmanager
    def _computing(self, rows: ExampleRows) -> Iterator[None]:
        """Put the model into the state for gradients, and verify the rules once."""
        with evaluating(self.model), computing_in(self.model, self.dtype, only_weights=True):
            if not self.scalars:
                middle = len(rows) // 2
                order = sorted(range(len(rows)), key=lambda i: rows.lengths[i])
                few = rows.batch(order[middle : middle + 2] or order, self.device)
                self.examples.prepare(few)
                self.scalars = next(self.examples(few)).scalars.shape[1]
            yield

    def _bound(self, processes: int) -> float:
        self._memory = self._memory or memory_bound(self.memory_gb, self.device, processes)
        return self._memory

    def _batch_size(self, rows: ExampleRows, bound: float) -> int:
        """Rows of a forward pass that fit into `bound`, measured on the longest row."""
        longest = longest_row(rows)
        with saved_bytes(self.model) as saved:
            (part,) = self.examples(rows.batch([longest], self.device))
        features = 3 * self.scalars * self.projection.dimension * self.dtype.itemsize  # spectrum and sums
        factors = {t.data_ptr(): t.nbytes for by_name in part.gradients for t in _tensors(by_name.values())}
        # The graph, the output gradients during the backward pass, the factors, and the features.
        example = 2 * sum(saved.values()) + sum(factors.values()) + features
        chunk = min(CHUNK_ROWS, len(rows)) * features

        def needed(size: int) -> int:
            scratch = self.projection.scratch_bytes(size * rows.lengths[longest])
            return self._fixed_bytes + chunk + scratch + size * example

        refuse_too_little(bound, needed(1), "one example")
        most = min(self.batch_size, len(rows))
        return max(size for size in range(1, most + 1) if size == 1 or needed(size) <= 1e9 * bound)

    def features(self, rows: ExampleRows, first: int, batches: Sequence[Sequence[int]]) -> torch.Tensor:
        """Compute features `[rows, c, k]` on the CPU for the rows in `batches`, which start at row `first`.

        Raises:
            InputError: a gradient is not finite.
        """
        found: torch.Tensor | None = None
        for indices in batches:
            for part in self.examples(rows.batch(indices, self.device)):
                here = torch.tensor(indices[part.first : part.first + len(part.scalars)]) - first
                values = self.projection(len(here), part.gradients)
                if not values.isfinite().all():
                    raise InputError(_not_finite_message(part, (here + first).tolist()))
                if found is None:
                    found = torch.empty(sum(map(len, batches)), *values.shape[1:], dtype=values.dtype)
                found[here] = values.cpu()
                del part, values  # free them before the next batch runs
        assert found is not None
        return found


def divide_rows(rows: int, processes: int = 1) -> list[tuple[int, int]]:
    """Divide `rows` rows into chunks (first, last exclusive): at least one per process if there are enough rows."""
    most = min(CHUNK_ROWS, -(-rows // processes))
    return [(first, min(first + most, rows)) for first in range(0, rows, most)]


def features_product(left: Chunks, right: Chunks | None, class_diagonal: bool) -> torch.Tensor:
    """Compute the kernel `[N1, C, N2, C]` in float64 from the features of both sides, two chunks at a time.

    Args:
        right: `None` = the kernel of `left` with itself.
        class_diagonal: only products of a scalar with itself: `[N1, C, N2]`.
    """
    other = left if right is None else right
    kernel: torch.Tensor | None = None
    for i, (a, b) in enumerate(left.edges):
        mine = read_chunk(left, i).double()
        if kernel is None:
            shape = (left.edges[-1][1], mine.shape[1], other.edges[-1][1], mine.shape[1])
            kernel = torch.empty(shape[:-1] if class_diagonal else shape, dtype=torch.float64)
        for j, (p, q) in enumerate(other.edges):
            if right is None and j < i:
                continue
            theirs = mine if right is None and i == j else read_chunk(other, j).double()
            # K = F F'^T
            if class_diagonal:
                block = torch.bmm(mine.transpose(0, 1), theirs.permute(1, 2, 0)).transpose(0, 1)
            else:
                block = (mine.flatten(0, 1) @ theirs.flatten(0, 1).T).view(*mine.shape[:2], *theirs.shape[:2])
            kernel[a:b, :, p:q] = block
            if right is None and i != j:
                kernel[p:q, :, a:b] = block.permute(2, 1, 0) if class_diagonal else block.permute(2, 3, 0, 1)
    assert kernel is not None
    return kernel


def read_chunk(chunks: Chunks, i: int) -> torch.Tensor:
    """Return the features of chunk i.

    Raises:
        InputError: the chunk is missing.
    """
    found = chunks.get(i)
    if found is None:
        raise InputError(f"chunk {i} of the projected gradients is missing; run again")
    return found


def _tensors(gradients: Iterable[list[Gradient]]) -> Iterator[torch.Tensor]:
    for uses in gradients:
        for use in uses:
            yield from (value for value in vars(use).values() if isinstance(value, torch.Tensor))


def _not_finite_message(part: Part, rows: list[int]) -> str:
    """An error message that names the example and the parameter that made a projection NaN or infinite."""
    for by_name in part.gradients:
        for name, uses in by_name.items():
            for at, row in enumerate(rows):
                if not dense([use[at : at + 1] for use in uses]).isfinite().all():
                    return (
                        f"the gradient of {name} for example {row} (from 0) is NaN or infinite; check this row and "
                        "this layer's weights, or load the model in float32"
                    )
    return "projected gradients are not finite although every gradient is: they overflow; scale the logits down"
