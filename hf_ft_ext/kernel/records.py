"""What one batch says about one parameter's gradients, in as little memory as its kernel needs."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from hf_ft_ext.per_example.forms import Form, Outer, Rows, dense


@dataclass
class Matrix:
    """`sum_t grads[r, t] inputs[r // c, t]^T`: rows of a weight's gradient that need not be multiplied out.

    Attributes:
        inputs: `[n, tokens, in]`.
        grads: `[n * c, tokens, out]`, the c scalars of an example one after the other.
    """

    inputs: torch.Tensor
    grads: torch.Tensor

    @property
    def scalars(self) -> int:
        return len(self.grads) // len(self.inputs)

    @property
    def size(self) -> int:
        """Entries of the weight."""
        return self.inputs.shape[2] * self.grads.shape[2]

    @property
    def tokens(self) -> int:
        """Tokens of all examples together."""
        return self.inputs.shape[0] * self.inputs.shape[1]

    def tensors(self) -> list[torch.Tensor]:
        return [self.inputs, self.grads]

    def squared_norms(self) -> torch.Tensor:
        """Of each row: `[n * c]`."""
        inputs = torch.bmm(self.inputs, self.inputs.mT).repeat_interleave(self.scalars, 0)
        return (torch.bmm(self.grads, self.grads.mT) * inputs).sum((1, 2))

    def write(self, first: int, last: int, out: torch.Tensor) -> None:
        """Multiply out the rows of the examples `first` to `last` (exclusive) into `out` `[rows, size]`."""
        c = self.scalars
        inputs = self.inputs[first:last]
        inputs = inputs if c == 1 else inputs.repeat_interleave(c, 0)
        shape = (len(out), self.grads.shape[2], self.inputs.shape[2])
        torch.bmm(self.grads[first * c : last * c].mT, inputs, out=out.view(shape))


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

    def tensors(self) -> list[torch.Tensor]:
        return [self.ids, self.rows, self.values]


@dataclass
class Vector:
    """Gradients in full: `[n * c, size]`."""

    values: torch.Tensor

    def tensors(self) -> list[torch.Tensor]:
        return [self.values]


Record = Matrix | Table | Vector


def make_record(forms: list[list[Form] | None], n: int) -> Record:
    """The record of one parameter.

    Args:
        forms: for each scalar what the uses of the parameter give it, `None` for a scalar that does not depend on it.
        n: examples.
    """
    some = next(found for found in forms if found is not None)
    if all(isinstance(form, Outer) for form in some):
        return _matrix(forms, some)
    if any(isinstance(form, Rows) for form in some) and all(
        isinstance(form, Rows) or (isinstance(form, Outer) and not form.transposed) for form in some
    ):
        return _table(forms)
    values = [None if found is None else dense(found).flatten(1) for found in forms]
    size = next(value for value in values if value is not None)
    stacked = torch.stack([torch.zeros_like(size) if value is None else value for value in values], 1)
    return Vector(stacked.flatten(0, 1))


def _matrix(forms: list[list[Outer] | None], some: list[Outer]) -> Matrix:
    """Uses of a weight are more tokens of it; tokens without gradient are left out where that saves much."""
    inputs = torch.cat([form.inputs for form in some], 1) if len(some) > 1 else some[0].inputs
    parts = []
    for found in forms:
        if found is None:
            parts.append(inputs.new_zeros(*inputs.shape[:2], some[0].grads.shape[2]))
        else:
            parts.append(torch.cat([form.grads for form in found], 1) if len(found) > 1 else found[0].grads)
    grads = torch.stack(parts, 1) if len(parts) > 1 else parts[0][:, None]  # [n, c, tokens, out]
    used = (grads != 0).any(-1).any(1)  # [n, tokens]
    most = max(int(used.sum(1).max()), 1)
    if most <= used.shape[1] // 2:
        keep = used.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :most]
        inputs = inputs.gather(1, keep[..., None].expand(-1, -1, inputs.shape[2]))
        grads = grads.gather(2, keep[:, None, :, None].expand(-1, grads.shape[1], -1, grads.shape[3]))
    return Matrix(inputs, grads.flatten(0, 1))


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


def joined(tables: Sequence[Table], offsets: Sequence[int]) -> Table:
    """Several batches' tables as one; `offsets` are added to their rows."""
    ids = torch.cat([table.ids for table in tables])
    order = ids.argsort(stable=True)
    rows = torch.cat([table.rows + offset for table, offset in zip(tables, offsets, strict=True)])
    return Table(ids[order], rows[order], torch.cat([table.values for table in tables])[order])
