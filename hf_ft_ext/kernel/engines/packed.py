"""Packed gradients of one batch and one parameter: all scalars together, without tokens whose gradient is zero."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeGuard

import torch

from hf_ft_ext.kernel.engines.buffers import TokenBuffers
from hf_ft_ext.per_example.types import EmbeddingGradient, Gradient, LinearGradient, as_rows, dense

_CHECKED_COLUMNS = 8


@dataclass
class PackedLinear:
    """Gradients of a linear layer's weight as factors: `dL_nc/dW = sum_t g_tc a_t^T` over the tokens of example n.

    Attributes:
        activations: `a`, `[tokens, in]`, of all examples one after the other, without tokens whose gradient is zero.
        output_gradients: `g`, `[tokens, c, out]`, for the c scalars.
        counts: number of tokens of each example.
        transposed: the weight is `[in, out]`; this does not change the kernel.
        squared_norms: squared norm of each row (example, scalar), `[n * c]`; `None` unless requested.
    """

    activations: torch.Tensor
    output_gradients: torch.Tensor
    counts: list[int]
    transposed: bool = False
    squared_norms: torch.Tensor | None = None

    @property
    def scalars(self) -> int:
        """c, the scalars of an example."""
        return self.output_gradients.shape[1]

    @property
    def size(self) -> int:
        """Entries of the weight."""
        return self.activations.shape[1] * self.output_gradients.shape[2]

    @property
    def tokens(self) -> int:
        """Tokens of all examples together."""
        return len(self.activations)

    def tensors(self) -> list[torch.Tensor]:
        """The stored tensors."""
        return [self.activations, self.output_gradients]

    def of_scalar(self, scalar: int, c: int) -> "PackedLinear":
        """The rows of one of c scalars."""
        norms = None if self.squared_norms is None else self.squared_norms[scalar::c]
        grads = self.output_gradients[:, scalar : scalar + 1]
        return PackedLinear(self.activations, grads, self.counts, self.transposed, norms)

    def dense(self, shape: torch.Size, n: int) -> "PackedDense":
        """The full gradients; arguments as for embeddings."""
        # G_c = sum_t g_tc a_t^T for each example
        rows = [torch.einsum("tco,ti->coi", grads, activations) for activations, grads in self.examples()]
        values = torch.cat(rows).mT if self.transposed else torch.cat(rows)
        return PackedDense(values.flatten(1))

    def examples(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Activations `[t, in]` and output gradients `[t, c, out]` of each example."""
        return zip(self.activations.split(self.counts), self.output_gradients.split(self.counts), strict=True)


@dataclass
class PackedEmbedding:
    """The non-zero rows of an embedding table's gradients.

    Attributes:
        ids: `[e]`, rows of the table, ascending.
        rows: `[e]`, index of example and scalar: example * c + scalar.
        values: `[e, width]`.
    """

    ids: torch.Tensor
    rows: torch.Tensor
    values: torch.Tensor

    def of_scalar(self, scalar: int, c: int) -> "PackedEmbedding":
        """The rows of one of c scalars."""
        mine = self.rows % c == scalar
        return PackedEmbedding(self.ids[mine], self.rows[mine] // c, self.values[mine])

    def tensors(self) -> list[torch.Tensor]:
        """The stored tensors."""
        return [self.ids, self.rows, self.values]

    def dense(self, shape: torch.Size, n: int) -> "PackedDense":
        """The full gradients of a table of this shape, for n rows (examples times scalars)."""
        values = self.values.new_zeros(n, *shape)
        values[self.rows, self.ids] = self.values  # each pair of row and id occurs once
        return PackedDense(values.flatten(1))


@dataclass
class PackedDense:
    """Full gradients: `[n * c, size]`."""

    values: torch.Tensor

    def of_scalar(self, scalar: int, c: int) -> "PackedDense":
        """The rows of one of c scalars."""
        return PackedDense(self.values[scalar::c])

    def tensors(self) -> list[torch.Tensor]:
        """The stored tensors."""
        return [self.values]

    def dense(self, shape: torch.Size, n: int) -> "PackedDense":
        """Itself."""
        return self


Packed = PackedLinear | PackedEmbedding | PackedDense


class Packer:
    """Packs the gradients of one batch; activations that several layers share are stored once.

    Args:
        n: examples in the batch.
        norms: whether to compute the squared norms of linear layers' rows.
        buffers: buffers for the tokens of linear layers.
    """

    def __init__(self, n: int, norms: bool, buffers: TokenBuffers):
        self.n, self.norms, self.buffers = n, norms, buffers
        self._kept: dict[tuple, torch.Tensor] = {}

    def __call__(self, name: str, gradients: list[list[Gradient] | None]) -> Packed:
        """The packed gradients of one parameter.

        Args:
            name: the parameter's.
            gradients: for each scalar, one gradient per use of the parameter; `None` for a scalar that does not
                depend on it.
        """
        if _all_linear(gradients):
            return self._linear(name, gradients)
        if _all_table_rows(gradients):
            return _embedding(gradients)
        values = [None if found is None else as_rows(dense(found)) for found in gradients]
        size = next(value for value in values if value is not None)
        stacked = torch.stack([torch.zeros_like(size) if value is None else value for value in values], 1)
        return PackedDense(stacked.flatten(0, 1))

    def _linear(self, name: str, gradients: list[list[LinearGradient] | None]) -> PackedLinear:
        """Pack a linear layer's weight; several uses of it are joined along the token axis."""
        uses = _uses(gradients)
        activations = [use.expand(self.n, -1, -1) for use in uses.values()]
        key = tuple(uses)
        together = torch.cat(activations, 1) if len(activations) > 1 else activations[0]
        some = next(gradient for found in gradients for gradient in found or ())
        width, transposed = some.output_gradients.shape[2], some.transposed
        parts = []
        for found in gradients:
            of_use: dict[tuple, torch.Tensor] = {}
            for gradient in found or ():  # uses with the same activations are one: (g + h) x^T = g x^T + h x^T
                use, own = _address(gradient.activations), gradient.output_gradients
                of_use[use] = of_use[use] + own if use in of_use else own
            each = [
                of_use[use] if use in of_use else tokens.new_zeros(self.n, tokens.shape[1], width)
                for use, tokens in zip(uses, activations, strict=True)
            ]
            parts.append(torch.cat(each, 1) if len(each) > 1 else each[0])
        grads = torch.stack(parts, 2) if len(parts) > 1 else parts[0][:, :, None]  # [n, tokens, c, out]
        used = _used(grads)
        positions = used.flatten().nonzero()[:, 0]
        key = (*key, used.cpu().numpy().tobytes())
        if key not in self._kept:
            self._kept[key] = self.buffers.put(f"{name} activations", together.flatten(0, 1), positions)
        kept, grads, norms = self._kept[key], self.buffers.put(name, grads.flatten(0, 1), positions), None
        counts = used.sum(1).tolist()
        if self.norms and batching_pays(grads):
            norms = _all_squared_norms(padded(kept, counts), padded(grads, counts))
        elif self.norms:
            norms = torch.cat(
                [_squared_norms(a, g) for a, g in zip(kept.split(counts), grads.split(counts), strict=True)]
            )
        return PackedLinear(kept, grads, counts, transposed, norms)


def batching_pays(tensor: torch.Tensor) -> bool:
    """Whether one padded, batched product is faster than many small products (on accelerators)."""
    return tensor.device.type != "cpu"


def padded(values: torch.Tensor, counts: list[int]) -> torch.Tensor:
    """Pad the tokens `[tokens, ...]` of consecutive examples to `[n, longest, ...]` with zeros."""
    n, longest = len(counts), max(counts, default=0)
    lengths = torch.tensor(counts)
    # Token k of example i moves to i * longest + k.
    shifts = longest * torch.arange(n) - (lengths.cumsum(0) - lengths)
    positions = torch.arange(len(values)) + shifts.repeat_interleave(lengths)
    rows = values.new_zeros(n * longest, *values.shape[1:])
    return rows.index_copy_(0, positions.to(values.device), values).view(n, longest, *values.shape[1:])


def join_embeddings(tables: Sequence[PackedEmbedding], offsets: Sequence[int]) -> PackedEmbedding:
    """Join the gradients of several batches; `offsets` are added to their row indices."""
    ids = torch.cat([table.ids for table in tables])
    order = ids.argsort(stable=True)
    rows = torch.cat([table.rows + offset for table, offset in zip(tables, offsets, strict=True)])
    return PackedEmbedding(ids[order], rows[order], torch.cat([table.values for table in tables])[order])


def _uses(gradients: list[list[LinearGradient] | None]) -> dict[tuple, torch.Tensor]:
    """The activations of all uses that any scalar depends on, by address; a scalar may depend on only some of them."""
    return {_address(g.activations): g.activations for found in gradients for g in found or ()}


def _address(tensor: torch.Tensor) -> tuple:
    return tensor.data_ptr(), tuple(tensor.shape), tensor.stride()


def _used(grads: torch.Tensor) -> torch.Tensor:
    """Which tokens of `[n, tokens, c, out]` have a non-zero gradient (or NaN): `[n, tokens]`.

    Gradients are exactly zero for padding, and in the last layer for all tokens that the head does not read.
    """
    rows = grads.flatten(0, 1).flatten(1)
    # A few columns identify most of the used tokens; only the remaining tokens are checked in full.
    used = (rows[:, :: max(rows.shape[1] // _CHECKED_COLUMNS, 1)] != 0).any(1)
    rest = (~used).nonzero()[:, 0]
    used[rest] = rows.index_select(0, rest).abs_().amax(1) != 0  # several times as fast as `any`
    return used.view(grads.shape[:2])


def _squared_norms(activations: torch.Tensor, grads: torch.Tensor) -> torch.Tensor:
    """Squared norms `[c]` of one example's rows: `sum_ts <a_t, a_s> <g_t, g_s>`, or from full rows if cheaper."""
    grads = grads.transpose(0, 1)  # [c, tokens, out]
    if len(activations) > min(activations.shape[1], grads.shape[2]):
        # |G|^2 with G = sum_t g_t a_t^T
        return (grads.mT @ activations).square().sum((1, 2))
    return ((grads @ grads.mT) * (activations @ activations.T)).sum((1, 2))


def _all_squared_norms(activations: torch.Tensor, grads: torch.Tensor) -> torch.Tensor:
    """`sum_ts <a_t, a_s> <g_t, g_s>` for all examples, `[n, tokens, in]` and `[n, tokens, c, out]`: `[n * c]`."""
    grads = grads.transpose(1, 2)
    return ((grads @ grads.mT) * (activations @ activations.mT)[:, None]).sum((2, 3)).flatten()


def _all_linear(gradients: list[list[Gradient] | None]) -> TypeGuard[list[list[LinearGradient] | None]]:
    """Whether all uses are linear layers with the weight in the same orientation."""
    uses = [gradient for found in gradients for gradient in found or ()]
    linear = [gradient for gradient in uses if isinstance(gradient, LinearGradient)]
    return len(linear) == len(uses) and len({gradient.transposed for gradient in linear}) <= 1


def _all_table_rows(
    gradients: list[list[Gradient] | None],
) -> TypeGuard[list[list[EmbeddingGradient | LinearGradient] | None]]:
    """Whether the weight is an embedding table, possibly tied to linear layers with one row per output."""
    uses = [gradient for found in gradients for gradient in found or ()]
    return any(isinstance(gradient, EmbeddingGradient) for gradient in uses) and all(
        isinstance(gradient, EmbeddingGradient) or (isinstance(gradient, LinearGradient) and not gradient.transposed)
        for gradient in uses
    )


def _embedding(gradients: list[list[EmbeddingGradient | LinearGradient] | None]) -> PackedEmbedding:
    c = len(gradients)
    keys, values = [], []
    for scalar, found in enumerate(gradients):
        for gradient in found or ():
            ids, grads, examples = _entries(gradient)
            keys.append(ids * (len(gradient) * c) + examples * c + scalar)
            values.append(grads)
            total = len(gradient) * c
    # Entries with the same table row, example and scalar have the same key and are summed.
    unique, inverse = torch.unique(torch.cat(keys), return_inverse=True)
    summed = values[0].new_zeros(len(unique), values[0].shape[1]).index_add_(0, inverse, torch.cat(values))
    kept = summed.any(1)
    unique, summed = unique[kept], summed[kept]
    return PackedEmbedding(unique // total, unique % total, summed)


def _entries(gradient: EmbeddingGradient | LinearGradient) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows of the table `[e]`, their gradients `[e, width]`, and the indices of their examples `[e]`."""
    grads, n = gradient.output_gradients, len(gradient)
    if isinstance(gradient, EmbeddingGradient):
        examples = torch.arange(n, device=grads.device)[:, None].expand_as(gradient.ids)
        used = gradient.ids >= 0
        return gradient.ids[used], grads[used], examples[used]
    columns = (grads != 0).any(0).any(0).nonzero()[:, 0]  # outputs with a gradient: the label words of a prompt model
    # dL/dW[i] = sum_t g_ti a_t
    grads = torch.bmm(grads[..., columns].mT, gradient.activations.expand(n, -1, -1))  # [n, columns, width]
    examples = torch.arange(n, device=columns.device)[:, None].expand(-1, len(columns))
    return columns.expand(n, -1).reshape(-1), grads.flatten(0, 1), examples.reshape(-1)
