"""Forms in which the gradient of a parameter is kept, one gradient per example, until somebody needs it in full."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Outer:
    """`sum_t grads[n, t] inputs[n, t]^T`: what a linear layer gives to its weight.

    Attributes:
        inputs: `[n, tokens, in]`, or `[1, tokens, in]` if all examples have the same.
        grads: `[n, tokens, out]`, gradients of the layer's outputs.
        transposed: the weight is `[in, out]` (GPT-2's Conv1D) instead of `[out, in]`.
    """

    inputs: torch.Tensor
    grads: torch.Tensor
    transposed: bool = False

    def dense(self) -> torch.Tensor:
        """The weight's gradients: `[n, out, in]`, or `[n, in, out]`."""
        left, right = self._factors()
        return torch.bmm(left.mT, right)

    def subtract_from(self, total: torch.Tensor) -> None:
        """Take the first example's gradient from `total` (of `shape`) without writing it out."""
        left, right = self._factors()
        total.addmm_(left[0].mT, right[0], alpha=-1)

    def _factors(self) -> tuple[torch.Tensor, torch.Tensor]:
        inputs = self.inputs.expand(len(self), -1, -1)
        return (inputs, self.grads) if self.transposed else (self.grads, inputs)

    @property
    def shape(self) -> tuple[int, int]:
        """The weight's."""
        left, right = self._factors()
        return left.shape[-1], right.shape[-1]

    @property
    def shared(self) -> bool:
        """Whether all examples have the same inputs."""
        return len(self.inputs) == 1 < len(self.grads)

    @property
    def size(self) -> int:
        """Numbers that `dense` makes for each example."""
        return self.inputs.shape[-1] * self.grads.shape[-1]

    def __getitem__(self, rows: slice) -> "Outer":
        return Outer(self.inputs if self.shared else self.inputs[rows], self.grads[rows], self.transposed)

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

    @property
    def size(self) -> int:
        """Numbers that `dense` makes for each example."""
        return self.rows * self.grads.shape[-1]

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

    @property
    def size(self) -> int:
        """Numbers that `dense` makes for each example: none, they are there."""
        return 0

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


def largest(tensor: torch.Tensor) -> float:
    """The largest absolute value; NaN if there is one, 0 of nothing. Nothing of the tensor's size is made."""
    if not tensor.numel():
        return 0.0
    low, high = tensor.aminmax()
    return max(-low.item(), high.item())


def joined(forms: list[Outer]) -> Outer:
    """Several uses of one weight as one, their tokens one after the other: one product in place of several."""
    if len(forms) == 1:
        return forms[0]
    return Outer(torch.cat([f.inputs for f in forms], 1), torch.cat([f.grads for f in forms], 1), forms[0].transposed)


def parts(forms: list[Form], numbers: int) -> Iterator[tuple[int, torch.Tensor]]:
    """First example and `dense` of some examples at a time, so that at most about `numbers` are made at once."""
    n = len(forms[0])
    size = max(form.size for form in forms)
    step = max(1, numbers // size) if size else n
    for first in range(0, n, step):
        yield first, dense(form[first : first + step] for form in forms)
