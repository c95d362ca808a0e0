"""Gradients of one batch and one parameter, packed: all scalars together, tokens without gradient left out."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeGuard

import torch

from hf_ft_ext.kernel.engines.stacks import Stacks
from hf_ft_ext.per_example.types import EmbeddingGradient, Gradient, LinearGradient, dense

_LOOKED_AT = 8  # columns


@dataclass
class PackedLinear:
    """`sum_t g_ts a_t^T` over an example's tokens: gradients of a weight that need not be multiplied out.

    Attributes:
        activations: `a`, `[tokens, in]`, of all examples one after the other; tokens without gradient are left out.
        output_gradients: `g`, `[tokens, c, out]`, for the c scalars.
        counts: tokens of each example.
        transposed: the weight is `[in, out]`; the kernel does not depend on it.
        squared_norms: of each row (example, scalar), `[n * c]`; `None` unless asked for.
    """

    activations: torch.Tensor
    output_gradients: torch.Tensor
    counts: list[int]
    transposed: bool = False
    squared_norms: torch.Tensor | None = None

    @property
    def scalars(self) -> int:
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
        return [self.activations, self.output_gradients]

    def of_scalar(self, scalar: int, c: int) -> "PackedLinear":
        """The rows of one of c scalars."""
        norms = None if self.squared_norms is None else self.squared_norms[scalar::c]
        grads = self.output_gradients[:, scalar : scalar + 1]
        return PackedLinear(self.activations, grads, self.counts, self.transposed, norms)

    def dense(self, shape: torch.Size, n: int) -> "PackedDense":
        """The gradients multiplied out; arguments as for embeddings."""
        rows = [torch.einsum("tco,ti->coi", grads, activations) for activations, grads in self.examples()]
        values = torch.cat(rows).mT if self.transposed else torch.cat(rows)
        return PackedDense(values.flatten(1))

    def examples(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Activations `[t, in]` and output gradients `[t, c, out]` of each example."""
        return zip(self.activations.split(self.counts), self.output_gradients.split(self.counts), strict=True)


@dataclass
class PackedEmbedding:
    """Rows of a table's gradient where they are not zero.

    Attributes:
        ids: `[e]`, row of the table, ascending.
        rows: `[e]`, which example and scalar: example * c + scalar.
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
        return [self.ids, self.rows, self.values]

    def dense(self, shape: torch.Size, n: int) -> "PackedDense":
        """The gradients of a table of this shape, zeros written out, for n rows (examples times scalars)."""
        values = self.values.new_zeros(n, *shape)
        values[self.rows, self.ids] = self.values  # each pair of row and id stands once
        return PackedDense(values.flatten(1))


@dataclass
class PackedDense:
    """Gradients in full: `[n * c, size]`."""

    values: torch.Tensor

    def of_scalar(self, scalar: int, c: int) -> "PackedDense":
        """The rows of one of c scalars."""
        return PackedDense(self.values[scalar::c])

    def tensors(self) -> list[torch.Tensor]:
        return [self.values]

    def dense(self, shape: torch.Size, n: int) -> "PackedDense":
        """Itself."""
        return self


Packed = PackedLinear | PackedEmbedding | PackedDense


class Packer:
    """Packs the gradients of one batch; activations that several layers read are kept once.

    Args:
        n: examples in the batch.
        norms: whether linear layers need their rows' norms.
        stacks: where linear layers' tokens are put.
    """

    def __init__(self, n: int, norms: bool, stacks: Stacks):
        self.n, self.norms, self.stacks = n, norms, stacks
        self._kept: dict[tuple, torch.Tensor] = {}

    def __call__(self, name: str, gradients: list[list[Gradient] | None]) -> Packed:
        """The packed gradients of one parameter.

        Args:
            name: the parameter's.
            gradients: for each scalar what the uses of the parameter give it, `None` for a scalar that does not
                depend on it.
        """
        if _of_linear_layers(gradients):
            return self._linear(name, gradients)
        if _of_a_table(gradients):
            return _embedding(gradients)
        values = [None if found is None else dense(found).flatten(1) for found in gradients]
        size = next(value for value in values if value is not None)
        stacked = torch.stack([torch.zeros_like(size) if value is None else value for value in values], 1)
        return PackedDense(stacked.flatten(0, 1))

    def _linear(self, name: str, gradients: list[list[LinearGradient] | None]) -> PackedLinear:
        """Uses of a weight are more tokens of it."""
        uses = _uses(gradients)
        activations = [use.expand(self.n, -1, -1) for use in uses.values()]
        key = tuple(uses)
        together = torch.cat(activations, 1) if len(activations) > 1 else activations[0]
        some = next(gradient for found in gradients for gradient in found or ())
        width, transposed = some.output_gradients.shape[2], some.transposed
        parts = []
        for found in gradients:
            of_use = {_address(gradient.activations): gradient.output_gradients for gradient in found or ()}
            each = [
                of_use[use] if use in of_use else tokens.new_zeros(self.n, tokens.shape[1], width)
                for use, tokens in zip(uses, activations, strict=True)
            ]
            parts.append(torch.cat(each, 1) if len(each) > 1 else each[0])
        grads = torch.stack(parts, 2) if len(parts) > 1 else parts[0][:, :, None]  # [n, tokens, c, out]
        used = _used(grads)
        places = used.flatten().nonzero()[:, 0]
        key = (*key, used.cpu().numpy().tobytes())
        if key not in self._kept:
            self._kept[key] = self.stacks.put(f"{name} activations", together.flatten(0, 1), places)
        kept, grads, norms = self._kept[key], self.stacks.put(name, grads.flatten(0, 1), places), None
        counts = used.sum(1).tolist()
        if self.norms and launches_cost(grads):
            norms = _all_squared_norms(padded(kept, counts), padded(grads, counts))
        elif self.norms:
            norms = torch.cat(
                [_squared_norms(a, g) for a, g in zip(kept.split(counts), grads.split(counts), strict=True)]
            )
        return PackedLinear(kept, grads, counts, transposed, norms)


def _uses(gradients: list[list[LinearGradient] | None]) -> dict[tuple, torch.Tensor]:
    """The activations of each use that some scalar depends on, by address; a scalar may depend on some alone."""
    return {_address(g.activations): g.activations for found in gradients for g in found or ()}


def _address(tensor: torch.Tensor) -> tuple:
    return tensor.data_ptr(), tuple(tensor.shape), tensor.stride()


def _used(grads: torch.Tensor) -> torch.Tensor:
    """Which tokens of `[n, tokens, c, out]` have a gradient, NaN included: `[n, tokens]`.

    Of padding, and in the last layer of all but the token that the head reads, gradients are exactly zero.
    """
    rows = grads.flatten(0, 1).flatten(1)
    used = (rows[:, :: max(rows.shape[1] // _LOOKED_AT, 1)] != 0).any(1)  # says yes to most
    rest = (~used).nonzero()[:, 0]
    used[rest] = rows.index_select(0, rest).abs_().amax(1) != 0  # several times as fast as `any`
    return used.view(grads.shape[:2])


def _squared_norms(activations: torch.Tensor, grads: torch.Tensor) -> torch.Tensor:
    """Of one example's rows `[c]`: `sum over tokens t, s of <a_t, a_s> <g_t, g_s>`, or the rows in full if cheaper."""
    grads = grads.transpose(0, 1)
    if len(activations) > min(activations.shape[1], grads.shape[2]):
        # |G|^2 with G = sum_t g_t a_t^T
        return (grads.mT @ activations).square().sum((1, 2))
    return ((grads @ grads.mT) * (activations @ activations.T)).sum((1, 2))


def _all_squared_norms(activations: torch.Tensor, grads: torch.Tensor) -> torch.Tensor:
    """The same for all examples, `[n, tokens, in]` and `[n, tokens, c, out]`: `[n * c]`, over pairs of tokens."""
    grads = grads.transpose(1, 2)
    return ((grads @ grads.mT) * (activations @ activations.mT)[:, None]).sum((2, 3)).flatten()


def launches_cost(tensor: torch.Tensor) -> bool:
    """Whether many small products cost more than one product that is larger than it need be."""
    return tensor.device.type != "cpu"


def padded(values: torch.Tensor, counts: list[int]) -> torch.Tensor:
    """Tokens `[tokens, ...]` of examples, one after the other, as `[n, longest, ...]` with zeros at the ends."""
    n, longest = len(counts), max(counts, default=0)
    lengths = torch.tensor(counts)
    # token k of the examples' i-th: k counted from the example's start, behind i rows of `longest`
    shifts = longest * torch.arange(n) - (lengths.cumsum(0) - lengths)
    places = torch.arange(len(values)) + shifts.repeat_interleave(lengths)
    rows = values.new_zeros(n * longest, *values.shape[1:])
    return rows.index_copy_(0, places.to(values.device), values).view(n, longest, *values.shape[1:])


def _of_linear_layers(gradients: list[list[Gradient] | None]) -> TypeGuard[list[list[LinearGradient] | None]]:
    """Whether all uses are linear layers that hold the weight in one orientation."""
    uses = [gradient for found in gradients for gradient in found or ()]
    linear = [gradient for gradient in uses if isinstance(gradient, LinearGradient)]
    return len(linear) == len(uses) and len({gradient.transposed for gradient in linear}) <= 1


def _of_a_table(
    gradients: list[list[Gradient] | None],
) -> TypeGuard[list[list[EmbeddingGradient | LinearGradient] | None]]:
    """Whether the uses are look-ups, beside them at most linear layers with one row of the weight per output."""
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
    # entries of one table row, example and scalar have one key, and add up
    unique, inverse = torch.unique(torch.cat(keys), return_inverse=True)
    summed = values[0].new_zeros(len(unique), values[0].shape[1]).index_add_(0, inverse, torch.cat(values))
    kept = summed.any(1)
    unique, summed = unique[kept], summed[kept]
    return PackedEmbedding(unique // total, unique % total, summed)


def _entries(gradient: EmbeddingGradient | LinearGradient) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows of the table `[e]`, their gradients `[e, width]`, the examples they belong to `[e]`."""
    grads, n = gradient.output_gradients, len(gradient)
    if isinstance(gradient, EmbeddingGradient):
        examples = torch.arange(n, device=grads.device)[:, None].expand_as(gradient.ids)
        used = gradient.ids >= 0
        return gradient.ids[used], grads[used], examples[used]
    columns = (grads != 0).any(0).any(0).nonzero()[:, 0]  # of a tied decoder: the label words
    grads = torch.bmm(grads[..., columns].mT, gradient.activations.expand(n, -1, -1))  # [n, columns, width]
    examples = torch.arange(n, device=columns.device)[:, None].expand(-1, len(columns))
    return columns.expand(n, -1).reshape(-1), grads.flatten(0, 1), examples.reshape(-1)


def join_embeddings(tables: Sequence[PackedEmbedding], offsets: Sequence[int]) -> PackedEmbedding:
    """Several batches' tables as one; `offsets` are added to their rows."""
    ids = torch.cat([table.ids for table in tables])
    order = ids.argsort(stable=True)
    rows = torch.cat([table.rows + offset for table, offset in zip(tables, offsets, strict=True)])
    return PackedEmbedding(ids[order], rows[order], torch.cat([table.values for table in tables])[order])
