"""Engine `structured`: the kernel parameter by parameter, from each layer's activations and output gradients."""

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch

from hf_ft_ext.kernel.engines.base import ExactEngine
from hf_ft_ext.kernel.engines.buffers import TokenBuffers
from hf_ft_ext.kernel.engines.packed import Packed, PackedDense, PackedEmbedding, PackedLinear, Packer
from hf_ft_ext.kernel.formulas import sign_scale
from hf_ft_ext.kernel.rows import ExampleRows
from hf_ft_ext.per_example.gradients import ExampleGradients


@dataclass
class StructuredRows:
    """Gradient rows of some examples.

    Attributes:
        order: positions of the examples, in the order of the rows.
        scalars: scalars per example.
        packed: for each parameter, (batch number, packed gradient) of each batch; where a parameter or batch is
            missing, the gradient is 0.
        starts: the first row of each batch.
        scale: see `formulas.sign_scale`; `None` if the formula takes no signs.
    """

    order: list[int] = field(default_factory=list)
    scalars: int = 1
    packed: dict[str, list[tuple[int, Packed]]] = field(default_factory=dict)
    starts: list[int] = field(default_factory=list)
    scale: torch.Tensor | None = None

    @property
    def rows(self) -> int:
        """Number of gradient rows: examples times scalars."""
        return len(self.order) * self.scalars

    def of_scalar(self, scalar: int) -> "StructuredRows":
        """The rows of one scalar."""
        c = self.scalars
        packed = {
            name: [(number, packed_gradient.of_scalar(scalar, c)) for number, packed_gradient in found]
            for name, found in self.packed.items()
        }
        scale = None if self.scale is None else self.scale[scalar::c]
        return StructuredRows(self.order, 1, packed, [start // c for start in self.starts], scale)

    def bytes(self) -> int:
        """Memory of the packed gradients; tensors that parameters share count once."""
        return _bytes((packed_gradient, 1) for packed in self.packed.values() for _, packed_gradient in packed)

    def constant_bytes(self, length: int) -> int:
        """The part of `bytes` that does not shrink with the number of tokens, for one example of `length` tokens."""

        def share(packed_gradient: Packed) -> float:
            # The head may read a single token; a layer that is used twice has two tokens for each token of the text.
            if isinstance(packed_gradient, PackedLinear):
                return packed_gradient.tokens % length / max(packed_gradient.tokens, 1)
            return isinstance(packed_gradient, PackedDense)

        return _bytes(
            (packed_gradient, share(packed_gradient))
            for packed in self.packed.values()
            for _, packed_gradient in packed
        )

    def names(self) -> set[str]:
        """Parameters with a gradient."""
        return set(self.packed)

    def largest(self) -> int:
        """Entries of the largest weight whose full gradient may be computed."""
        matrices = (r for packed in self.packed.values() for _, r in packed if isinstance(r, PackedLinear))
        return max((matrix.size for matrix in matrices), default=1)


class StructuredEngine(ExactEngine[StructuredRows]):
    """Computes packed gradients and their kernels. Arguments as for `ExactEngine`."""

    builds_batch_graph = True

    @cached_property
    def examples(self) -> ExampleGradients:
        """The per-example gradients, as factors."""
        return ExampleGradients(self.model, self.function, self.parameters, self.dtype)

    def prepare(self, rows: ExampleRows) -> None:
        """Verify the rules on two rows of medium length."""
        middle = len(rows) // 2
        order = sorted(range(len(rows)), key=lambda i: rows.lengths[i])
        self.examples.prepare(rows.batch(order[middle : middle + 2] or order, self.device))

    @property
    def uncovered(self) -> list[str]:
        """Parameters without a rule."""
        return self.examples.uncovered or []

    def gradient_rows(self, rows: ExampleRows, batches: Sequence[Sequence[int]]) -> StructuredRows:
        """The gradient rows of `batches` (positions in `rows`)."""
        side = StructuredRows()
        norms = []
        buffers = TokenBuffers(*_sizes(rows, itertools.chain(*batches)))
        for indices in batches:
            for part in self.examples(rows.batch(indices, self.device)):
                n, side.scalars = part.scalars.shape
                side.starts.append(side.rows)
                here = indices[part.first : part.first + n]
                side.order += here
                buffers.begin(*_sizes(rows, here))
                norms.append(self._add(side, part.gradients, Packer(n, self.formula.signs, buffers)))
                del part  # before the next batch runs
        if self.formula.signs:
            side.scale = sign_scale(torch.cat(norms))
        return side

    def _add(self, side: StructuredRows, gradients: list[dict], make: Packer) -> torch.Tensor:
        number = len(side.starts) - 1
        norms = torch.zeros(make.n * side.scalars, dtype=torch.float64, device=self.device)
        for name in sorted(set().union(*gradients)):
            packed_gradient = make(name, [scalar.get(name) for scalar in gradients])
            side.packed.setdefault(name, []).append((number, packed_gradient))
            if self.formula.signs:
                norms += _squared_norms(packed_gradient, len(norms))
        return norms

    def add(self, left: StructuredRows, right: StructuredRows, name: str, total: torch.Tensor) -> None:
        """Add the products of one parameter's gradients."""
        sides = (left, right)
        complete = all(len(side.packed[name]) == len(side.starts) for side in sides)
        if not complete:  # some batch has no gradient at all for this parameter
            rows = [_rows_of(side, name) for side in sides]
            part = total.new_zeros(total.shape[0], len(rows[0]), len(rows[1]))
            self._by_kind(left, right, name, rows, part)
            total[:, rows[0][:, None], rows[1]] += part
        else:
            self._by_kind(left, right, name, None, total)

    def _dense(self, side: StructuredRows, name: str) -> list[Packed]:
        """The full gradients of a parameter, one `PackedDense` per batch."""
        ends = [*side.starts[1:], side.rows]
        shape = self.parameters[name].shape
        return [
            packed_gradient.dense(shape, ends[number] - side.starts[number])
            for number, packed_gradient in side.packed[name]
        ]

    def _by_kind(self, left, right, name: str, rows: list[torch.Tensor] | None, out: torch.Tensor) -> None:
        packed = [[packed_gradient for _, packed_gradient in side.packed[name]] for side in (left, right)]
        scales = tuple(
            side.scale if side.scale is None or rows is None else side.scale[rows[i]]
            for i, side in enumerate((left, right))
        )
        if len({type(packed_gradient) for side in packed for packed_gradient in side}) > 1:
            # Batches packed the parameter differently, for example because one used a tied weight in a new way.
            packed = [self._dense(side, name) for side in (left, right)]
        mine, theirs = packed
        if isinstance(mine[0], PackedLinear):
            self.contraction.add_linear(mine, theirs, scales, out)
        elif isinstance(mine[0], PackedEmbedding):
            starts = tuple(_starts(side, name) for side in (left, right))
            self.contraction.add_embeddings(mine, theirs, starts, scales, out)
        else:
            self.contraction.add_dense(mine, theirs, scales, out)


def _sizes(rows: ExampleRows, indices: Iterable[int]) -> tuple[int, int]:
    """Number of tokens and number of examples of the rows `indices`."""
    lengths = [rows.lengths[i] for i in indices]
    return sum(lengths), len(lengths)


def _bytes(packed: Iterable[tuple[Packed, float]]) -> int:
    """Memory of the given shares of packed gradients; tensors that they share count once."""
    return int(
        sum(
            {
                t.data_ptr(): share * t.nbytes for packed_gradient, share in packed for t in packed_gradient.tensors()
            }.values()
        )
    )


def _rows_of(side: StructuredRows, name: str) -> torch.Tensor:
    ends = [*side.starts[1:], side.rows]
    return torch.cat([torch.arange(side.starts[number], ends[number]) for number, _ in side.packed[name]])


def _starts(side: StructuredRows, name: str) -> list[int]:
    ends, starts, at = [*side.starts[1:], side.rows], [], 0
    for number, _ in side.packed[name]:
        starts.append(at)
        at += ends[number] - side.starts[number]
    return starts


def _squared_norms(packed_gradient: Packed, rows: int) -> torch.Tensor:
    """Squared norm of each gradient row, `[rows]`; of an embedding table the sum of `|G[i]|^2` over its rows i."""
    if isinstance(packed_gradient, PackedLinear):
        return packed_gradient.squared_norms
    if isinstance(packed_gradient, PackedDense):
        return packed_gradient.values.square().sum(1)
    return packed_gradient.values.new_zeros(rows).index_add_(
        0, packed_gradient.rows, packed_gradient.values.square().sum(1)
    )
