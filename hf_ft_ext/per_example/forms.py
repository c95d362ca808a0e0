"""Forms in which the gradient of a parameter is kept, one gradient per example, until somebody needs it in full."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Outer:
    """`sum_t grads[n, t] inputs[n, t]^T`: what a linear layer gives to its weight.

    Attributes:
        inputs: `[n, tokens, in]`.
        grads: `[n, tokens, out]`, gradients of the layer's outputs.
        transposed: the weight is `[in, out]` (GPT-2's Conv1D) instead of `[out, in]`.
    """

    inputs: torch.Tensor
    grads: torch.Tensor
    transposed: bool = False

    def dense(self) -> torch.Tensor:
        """The weight's gradients: `[n, out, in]`, or `[n, in, out]`."""
        left, right = (self.inputs, self.grads) if self.transposed else (self.grads, self.inputs)
        return torch.bmm(left.mT, right)

    def __getitem__(self, rows: slice) -> "Outer":
        return Outer(self.inputs[rows], self.grads[rows], self.transposed)

    def __len__(self) -> int:
        return len(self.grads)


@dataclass(frozen=True)
class Rows:
    """`grads[n, t]` added to row `ids[n, t]` of a table: what an embedding gives to its weight.

    Attributes:
        ids: `[n, tokens]`; -1 adds nothing.
        grads: `[n, tokens, width]`.
        rows: rows of the table.
    """

    ids: torch.Tensor
    grads: torch.Tensor
    rows: int

    def dense(self) -> torch.Tensor:
        """The table's gradients: `[n, rows, width]`."""
        n, _, width = self.grads.shape
        table = self.grads.new_zeros(n, self.rows + 1, width)
        ids = torch.where(self.ids < 0, self.rows, self.ids)
        table.scatter_add_(1, ids[..., None].expand(-1, -1, width), self.grads)
        return table[:, : self.rows]

    def __getitem__(self, rows: slice) -> "Rows":
        return Rows(self.ids[rows], self.grads[rows], self.rows)

    def __len__(self) -> int:
        return len(self.grads)


@dataclass(frozen=True)
class Dense:
    """The gradients themselves: `[n, *shape]`."""

    values: torch.Tensor

    def dense(self) -> torch.Tensor:
        """The gradients: `[n, *shape]`."""
        return self.values

    def __getitem__(self, rows: slice) -> "Dense":
        return Dense(self.values[rows])

    def __len__(self) -> int:
        return len(self.values)


Form = Outer | Rows | Dense


def dense(forms: Iterable[Form]) -> torch.Tensor:
    """The sum of what several uses of one parameter give it: `[n, *shape]`."""
    first, *others = forms
    total = first.dense()
    for form in others:
        total = total + form.dense()
    return total
