"""Types for per-example gradients of one parameter, stored as factors until the full gradients are needed."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class LinearGradient:
    """Gradients of a linear layer's weight: `dL_n/dW = sum_t g_nt a_nt^T`.

    Attributes:
        activations: `a`, the layer's input: `[n, tokens, in]`, or `[1, tokens, in]` if all examples share it.
        output_gradients: `g`, the gradients of the layer's output: `[n, tokens, out]`.
        transposed: whether the weight is `[in, out]` (GPT-2's Conv1D) instead of `[out, in]`.
    """

    activations: torch.Tensor
    output_gradients: torch.Tensor
    transposed: bool = False

    def dense(self) -> torch.Tensor:
        """The weight's gradients: `[n, out, in]`, or `[n, in, out]`."""
        left, right = self._factors()
        return torch.bmm(left.mT, right)  # sum_t g_t a_t^T (transposed: sum_t a_t g_t^T)

    def squared_norms(self) -> torch.Tensor:
        """Squared Euclidean norm of each example's gradient, `[n]`; over pairs of tokens if that is cheaper.

        `|sum_t g_t a_t^T|^2 = sum_ts <g_t, g_s> <a_t, a_s>` (the "ghost norm" of Li et al. 2022, arXiv 2110.05679).
        """
        tokens, width_out = self.output_gradients.shape[1:]
        width_in = self.activations.shape[-1]
        if tokens * (width_in + width_out) > width_in * width_out:
            return torch.cat([part.dense().square().sum((1, 2)) for part in self._one_by_one()])
        activations = self.activations @ self.activations.mT  # <a_t, a_s>
        # sum_ts <g_t, g_s> <a_t, a_s>
        return (self.output_gradients @ self.output_gradients.mT).mul_(activations).sum((1, 2))

    def subtract_from(self, total: torch.Tensor) -> None:
        """Subtract the first example's gradient from `total` (of `shape`) in place, without materializing it."""
        left, right = self._factors()
        total.addmm_(left[0].mT, right[0], alpha=-1)

    def _factors(self) -> tuple[torch.Tensor, torch.Tensor]:
        activations = self.activations.expand(len(self), -1, -1)
        return (activations, self.output_gradients) if self.transposed else (self.output_gradients, activations)

    def _one_by_one(self) -> Iterator["LinearGradient"]:
        return (self[i : i + 1] for i in range(len(self)))

    @property
    def shape(self) -> tuple[int, int]:
        """The weight's shape."""
        left, right = self._factors()
        return left.shape[-1], right.shape[-1]

    @property
    def shared(self) -> bool:
        """Whether all examples share their activations."""
        return len(self.activations) == 1 < len(self.output_gradients)

    @property
    def size(self) -> int:
        """Values that `dense` allocates for each example."""
        return self.activations.shape[-1] * self.output_gradients.shape[-1]

    def __getitem__(self, rows: slice) -> "LinearGradient":
        activations = self.activations if self.shared else self.activations[rows]
        return LinearGradient(activations, self.output_gradients[rows], self.transposed)

    def __len__(self) -> int:
        return len(self.output_gradients)


@dataclass(frozen=True)
class EmbeddingGradient:
    """Gradients of an embedding table: `dL_n/dW[i] = sum over tokens t with ids[n, t] = i of output_gradients[n, t]`.

    Attributes:
        ids: `[n, tokens]`; tokens with id -1 are ignored.
        output_gradients: `[n, tokens, width]`.
        rows: rows of the table.
    """

    ids: torch.Tensor
    output_gradients: torch.Tensor
    rows: int

    def dense(self) -> torch.Tensor:
        """The table's gradients: `[n, rows, width]`."""
        n, _, width = self.output_gradients.shape
        table = self.output_gradients.new_zeros(n, self.rows + 1, width)
        ids = torch.where(self.ids < 0, self.rows, self.ids)
        table.scatter_add_(1, ids[..., None].expand(-1, -1, width), self.output_gradients)
        return table[:, : self.rows]

    def squared_norms(self) -> torch.Tensor:
        """Squared Euclidean norm of each example's gradient, `sum_ts [id_t = id_s] <g_t, g_s>`: `[n]`."""
        same = (self.ids[:, :, None] == self.ids[:, None]) & (self.ids >= 0)[:, None]
        return (self.output_gradients @ self.output_gradients.mT).mul_(same).sum((1, 2))

    @property
    def size(self) -> int:
        """Values that `dense` allocates for each example."""
        return self.rows * self.output_gradients.shape[-1]

    def __getitem__(self, rows: slice) -> "EmbeddingGradient":
        return EmbeddingGradient(self.ids[rows], self.output_gradients[rows], self.rows)

    def __len__(self) -> int:
        return len(self.output_gradients)


@dataclass(frozen=True)
class DenseGradient:
    """The gradients themselves: `[n, *shape]`."""

    values: torch.Tensor

    def dense(self) -> torch.Tensor:
        """The gradients: `[n, *shape]`."""
        return self.values

    def squared_norms(self) -> torch.Tensor:
        """Squared Euclidean norm of each example's gradient: `[n]`."""
        return as_rows(self.values).square().sum(1)

    @property
    def size(self) -> int:
        """Values that `dense` allocates for each example: none."""
        return 0

    def __getitem__(self, rows: slice) -> "DenseGradient":
        return DenseGradient(self.values[rows])

    def __len__(self) -> int:
        return len(self.values)


Gradient = LinearGradient | EmbeddingGradient | DenseGradient


def as_rows(values: torch.Tensor) -> torch.Tensor:
    """Flatten `[n, *shape]` to `[n, p]`; p = 1 for a parameter that is one number."""
    return values[..., None].flatten(1)


def dense(gradients: Iterable[Gradient]) -> torch.Tensor:
    """Sum the gradients from all uses of one parameter: `[n, *shape]`."""
    first, *others = gradients
    total = first.dense()
    for gradient in others:
        total = total + gradient.dense()
    return total


def dense_in_chunks(gradients: Sequence[Gradient], numbers: int) -> Iterator[tuple[int, torch.Tensor]]:
    """Yield first example and `dense` gradients of chunks of examples, each of up to about `numbers` values."""
    n = len(gradients[0])
    size = max(gradient.size for gradient in gradients)
    step = max(1, numbers // size) if size else n
    for first in range(0, n, step):
        yield first, dense(gradient[first : first + step] for gradient in gradients)


def squared_norms(gradients: Sequence[Gradient], numbers: int = 2**24) -> torch.Tensor:
    """Squared Euclidean norm `[n]` of the summed gradients from all uses of one parameter.

    If all uses are linear layers, or all are embeddings, the factors suffice. Otherwise (a table that is tied to a
    decoder) full gradients are computed for a chunk of examples at a time, of up to about `numbers` values.
    """
    joined = join_uses(gradients)
    if len(joined) == 1:
        return joined[0].squared_norms()
    return torch.cat([as_rows(values).square().sum(1) for _, values in dense_in_chunks(joined, numbers)])


def join_uses(gradients: Sequence[Gradient]) -> Sequence[Gradient]:
    """Join the uses of one weight along the token axis into one gradient, if all are of the same factored type."""
    if len(gradients) == 1:
        return gradients
    linear = [gradient for gradient in gradients if isinstance(gradient, LinearGradient)]
    if len(linear) == len(gradients) and len({gradient.transposed for gradient in linear}) == 1:
        activations = [gradient.activations.expand(len(gradient), -1, -1) for gradient in linear]
        output_gradients = [gradient.output_gradients for gradient in linear]
        return [LinearGradient(torch.cat(activations, 1), torch.cat(output_gradients, 1), linear[0].transposed)]
    tables = [gradient for gradient in gradients if isinstance(gradient, EmbeddingGradient)]
    if len(tables) == len(gradients):
        ids = torch.cat([gradient.ids for gradient in tables], 1)
        output_gradients = [gradient.output_gradients for gradient in tables]
        return [EmbeddingGradient(ids, torch.cat(output_gradients, 1), tables[0].rows)]
    return gradients


def share_activations(gradient: Gradient) -> Gradient:
    """Store the activations of a linear layer only once if all examples share them (a prefix's network).

    With many tokens `squares_of_shared` is not cheaper, so the check is skipped.
    """
    if not isinstance(gradient, LinearGradient) or len(gradient) < 2 or gradient.shared:
        return gradient
    activations = gradient.activations
    if activations.shape[1] ** 2 > 16 * len(gradient) or not torch.equal(activations[0, 0], activations[1, 0]):
        return gradient
    one = activations[:1]
    if not bool((activations == one).all()):
        return gradient
    return LinearGradient(one, gradient.output_gradients, gradient.transposed)


def squares_of_shared(gradient: LinearGradient, weights: torch.Tensor | float) -> torch.Tensor:
    """`sum_n w_n (dL_n/dW)^2`, entry by entry, for activations `a` that all examples share.

    `sum_n w_n (sum_t g_nt a_t)^2 = sum_ts (sum_n w_n g_nt g_ns) a_t a_s`: one product over pairs of tokens, without
    any example's full gradient.

    Args:
        weights: `[n]`, or one value for all.
    """
    a, g = gradient.activations[0], gradient.output_gradients
    weighted = g * weights.to(g.dtype)[:, None, None] if isinstance(weights, torch.Tensor) else g * weights
    pairs = (weighted[:, :, None] * g[:, None]).sum(0).flatten(0, 1)  # sum_n w_n g_nt g_ns: [tokens^2, out]
    squares = (pairs.mT @ (a[:, None] * a[None]).flatten(0, 1)).clamp_min_(0)  # negative only by rounding
    return squares.mT if gradient.transposed else squares


def max_abs(tensor: torch.Tensor) -> float:
    """The largest absolute value, without a temporary tensor; NaN if the tensor holds one, 0 if it is empty."""
    if not tensor.numel():
        return 0.0
    low, high = tensor.aminmax()
    return max(-low.item(), high.item())
