"""What one batch says about one parameter's gradients, in as little memory as its kernel needs."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from hf_ft_ext.kernel.engines.stacks import Stacks
from hf_ft_ext.per_example.forms import Form, Outer, Rows, dense

_LOOKED_AT = 8  # columns


@dataclass
class Matrix:
    """`sum_t grads[t, s] inputs[t]^T` over an example's tokens: gradients of a weight that need not be multiplied out.

    Attributes:
        inputs: `[tokens, in]`, of all examples one after the other; tokens without gradient are left out.
        grads: `[tokens, c, out]`, for the c scalars.
        counts: tokens of each example.
        squared_norms: of each row (example, scalar), `[n * c]`; `None` unless asked for.
    """

    inputs: torch.Tensor
    grads: torch.Tensor
    counts: list[int]
    squared_norms: torch.Tensor | None = None

    @property
    def scalars(self) -> int:
        return self.grads.shape[1]

    @property
    def size(self) -> int:
        """Entries of the weight."""
        return self.inputs.shape[1] * self.grads.shape[2]

    @property
    def tokens(self) -> int:
        """Tokens of all examples together."""
        return len(self.inputs)

    def tensors(self) -> list[torch.Tensor]:
        return [self.inputs, self.grads]

    def of_scalar(self, scalar: int, c: int) -> "Matrix":
        """The rows of one of c scalars."""
        norms = None if self.squared_norms is None else self.squared_norms[scalar::c]
        return Matrix(self.inputs, self.grads[:, scalar : scalar + 1], self.counts, norms)

    def examples(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Inputs `[t, in]` and gradients `[t, c, out]` of each example."""
        return zip(self.inputs.split(self.counts), self.grads.split(self.counts), strict=True)


@dataclass
class Table:
    """Rows of a table's gradient where they are not zero.

    Attributes:
        ids: `[e]`, row of the table, ascending.
        rows: `[e]`, which example and scalar: example * c + scalar.
        values: `[e, width]`.
    """

    ids: torch.Tensor
    rows: torch.Tensor
    values: torch.Tensor

    def of_scalar(self, scalar: int, c: int) -> "Table":
        """The rows of one of c scalars."""
        mine = self.rows % c == scalar
        return Table(self.ids[mine], self.rows[mine] // c, self.values[mine])

    def tensors(self) -> list[torch.Tensor]:
        return [self.ids, self.rows, self.values]


@dataclass
class Vector:
    """Gradients in full: `[n * c, size]`."""

    values: torch.Tensor

    def of_scalar(self, scalar: int, c: int) -> "Vector":
        """The rows of one of c scalars."""
        return Vector(self.values[scalar::c])

    def tensors(self) -> list[torch.Tensor]:
        return [self.values]


Record = Matrix | Table | Vector


class RecordMaker:
    """Makes the records of one batch; inputs that several layers read are kept once.

    Args:
        n: examples in the batch.
        norms: whether matrices need their rows' norms.
        stacks: where matrices' tokens are put.
    """

    def __init__(self, n: int, norms: bool, stacks: Stacks):
        self.n, self.norms, self.stacks = n, norms, stacks
        self._kept: dict[tuple, torch.Tensor] = {}

    def __call__(self, name: str, forms: list[list[Form] | None]) -> Record:
        """The record of one parameter.

        Args:
            name: the parameter's.
            forms: for each scalar what the uses of the parameter give it, `None` for a scalar that does not depend on
                it.
        """
        some = next(found for found in forms if found is not None)
        if all(isinstance(form, Outer) for form in some):
            return self._matrix(name, forms, some)
        if any(isinstance(form, Rows) for form in some) and all(
            isinstance(form, Rows) or (isinstance(form, Outer) and not form.transposed) for form in some
        ):
            return _table(forms)
        values = [None if found is None else dense(found).flatten(1) for found in forms]
        size = next(value for value in values if value is not None)
        stacked = torch.stack([torch.zeros_like(size) if value is None else value for value in values], 1)
        return Vector(stacked.flatten(0, 1))

    def _matrix(self, name: str, forms: list[list[Outer] | None], some: list[Outer]) -> Matrix:
        """Uses of a weight are more tokens of it."""
        inputs = [form.inputs for form in some]
        key = tuple(tensor.data_ptr() for tensor in inputs)
        inputs = torch.cat(inputs, 1) if len(some) > 1 else inputs[0]
        parts = []
        for found in forms:
            if found is None:
                parts.append(inputs.new_zeros(*inputs.shape[:2], some[0].grads.shape[2]))
            else:
                parts.append(torch.cat([form.grads for form in found], 1) if len(found) > 1 else found[0].grads)
        grads = torch.stack(parts, 2) if len(parts) > 1 else parts[0][:, :, None]  # [n, tokens, c, out]
        used = _used(grads)
        places = used.flatten().nonzero()[:, 0]
        key = (*key, used.cpu().numpy().tobytes())
        if key not in self._kept:
            self._kept[key] = self.stacks.put(f"{name} inputs", inputs.flatten(0, 1), places)
        kept, grads, norms = self._kept[key], self.stacks.put(name, grads.flatten(0, 1), places), None
        counts = used.sum(1).tolist()
        if self.norms:
            norms = torch.cat(
                [_squared_norms(x, g) for x, g in zip(kept.split(counts), grads.split(counts), strict=True)]
            )
        return Matrix(kept, grads, counts, norms)


def _used(grads: torch.Tensor) -> torch.Tensor:
    """Which tokens of `[n, tokens, c, out]` have a gradient, NaN included: `[n, tokens]`.

    Of padding, and in the last layer of all but the token that the head reads, gradients are exactly zero.
    """
    rows = grads.flatten(0, 1).flatten(1)
    used = (rows[:, :: max(rows.shape[1] // _LOOKED_AT, 1)] != 0).any(1)  # says yes to most
    rest = (~used).nonzero()[:, 0]
    used[rest] = rows.index_select(0, rest).abs_().amax(1) != 0  # several times as fast as `any`
    return used.view(grads.shape[:2])


def _squared_norms(inputs: torch.Tensor, grads: torch.Tensor) -> torch.Tensor:
    """Of one example's rows `[c]`: `sum over tokens t, s of <x_t, x_s> <g_t, g_s>`, or the rows in full if cheaper."""
    grads = grads.transpose(0, 1)
    if len(inputs) > min(inputs.shape[1], grads.shape[2]):
        return (grads.mT @ inputs).square().sum((1, 2))
    return ((grads @ grads.mT) * (inputs @ inputs.T)).sum((1, 2))


def _table(forms: list[list[Rows | Outer] | None]) -> Table:
    c = len(forms)
    keys, values = [], []
    for scalar, found in enumerate(forms):
        for form in found or ():
            ids, grads, rows = _entries(form)
            keys.append(ids * (len(form) * c) + rows * c + scalar)
            values.append(grads)
            total = len(form) * c
    unique, inverse = torch.unique(torch.cat(keys), return_inverse=True)
    summed = values[0].new_zeros(len(unique), values[0].shape[1]).index_add_(0, inverse, torch.cat(values))
    kept = summed.any(1)
    unique, summed = unique[kept], summed[kept]
    return Table(unique // total, unique % total, summed)


def _entries(form: Rows | Outer) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows of the table `[e]`, their gradients `[e, width]`, the examples they belong to `[e]`."""
    if isinstance(form, Rows):
        examples = torch.arange(len(form), device=form.ids.device)[:, None].expand_as(form.ids)
        used = form.ids >= 0
        return form.ids[used], form.grads[used], examples[used]
    columns = (form.grads != 0).any(0).any(0).nonzero()[:, 0]  # of a tied decoder: the label words
    grads = torch.bmm(form.grads[..., columns].mT, form.inputs)  # [n, columns, width]
    examples = torch.arange(len(form), device=columns.device)[:, None].expand(-1, len(columns))
    return columns.expand(len(form), -1).reshape(-1), grads.flatten(0, 1), examples.reshape(-1)


def joined_tables(tables: Sequence[Table], offsets: Sequence[int]) -> Table:
    """Several batches' tables as one; `offsets` are added to their rows."""
    ids = torch.cat([table.ids for table in tables])
    order = ids.argsort(stable=True)
    rows = torch.cat([table.rows + offset for table, offset in zip(tables, offsets, strict=True)])
    return Table(ids[order], rows[order], torch.cat([table.values for table in tables])[order])
