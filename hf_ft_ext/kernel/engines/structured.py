"""Engine `structured`: parameter by parameter, from what each layer read and the gradients of what it gave."""

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch

from hf_ft_ext.kernel.engines.base import ExactEngine
from hf_ft_ext.kernel.engines.packed import Packed, PackedDense, PackedEmbedding, PackedLinear, Packer
from hf_ft_ext.kernel.engines.stacks import Stacks
from hf_ft_ext.kernel.formulas import sign_scale
from hf_ft_ext.kernel.rows import ExampleRows
from hf_ft_ext.per_example.gradients import ExampleGradients


@dataclass
class StructuredSide:
    """Gradient rows of some examples.

    Attributes:
        order: the examples' positions, in the order of the rows.
        scalars: scalars of an example.
        records: by parameter, one per batch; a parameter that is absent has gradient 0.
        starts: the first row of each batch.
        scale: see `formulas.sign_scale`; `None` where no signs are taken.
    """

    order: list[int] = field(default_factory=list)
    scalars: int = 1
    records: dict[str, list[tuple[int, Packed]]] = field(default_factory=dict)
    starts: list[int] = field(default_factory=list)
    scale: torch.Tensor | None = None

    @property
    def rows(self) -> int:
        return len(self.order) * self.scalars

    def of_scalar(self, scalar: int) -> "StructuredSide":
        """The rows of one scalar."""
        c = self.scalars
        records = {
            name: [(number, record.of_scalar(scalar, c)) for number, record in found]
            for name, found in self.records.items()
        }
        scale = None if self.scale is None else self.scale[scalar::c]
        return StructuredSide(self.order, 1, records, [start // c for start in self.starts], scale)

    def bytes(self) -> int:
        """Memory of the records; tensors that parameters share count once."""
        return _bytes((record, 1) for records in self.records.values() for _, record in records)

    def same_bytes(self, length: int) -> int:
        """Of the `bytes` of one example of `length` tokens, the part that is no less for a short one."""

        def share(record: Packed) -> float:
            if isinstance(record, PackedLinear):  # the head may read one token; a layer used twice has two for each
                return record.tokens % length / max(record.tokens, 1)
            return isinstance(record, PackedDense)

        return _bytes((record, share(record)) for records in self.records.values() for _, record in records)

    def names(self) -> set[str]:
        """Parameters with a gradient."""
        return set(self.records)

    def largest(self) -> int:
        """Entries of the largest weight that may have to be multiplied out."""
        matrices = (r for records in self.records.values() for _, r in records if isinstance(r, PackedLinear))
        return max((matrix.size for matrix in matrices), default=1)


class StructuredEngine(ExactEngine[StructuredSide]):
    """Computes packed gradients, and their kernels. Arguments as for `ExactEngine`."""

    keeps_graph = True

    @cached_property
    def examples(self) -> ExampleGradients:
        """The gradients of single examples, in factors."""
        return ExampleGradients(self.model, self.function, self.parameters, self.dtype)

    def prepare(self, rows: ExampleRows) -> None:
        """Try the rules on two rows of middling lengths."""
        middle = len(rows) // 2
        order = sorted(range(len(rows)), key=lambda i: rows.lengths[i])
        self.examples.prepare(rows.batch(order[middle : middle + 2] or order, self.device))

    @property
    def uncovered(self) -> list[str]:
        """Parameters without a rule."""
        return self.examples.uncovered

    def side(self, rows: ExampleRows, batches: Sequence[Sequence[int]]) -> StructuredSide:
        """The gradient rows of `batches` (positions in `rows`)."""
        side = StructuredSide()
        norms = []
        stacks = Stacks(*_sizes(rows, itertools.chain(*batches)))
        for indices in batches:
            for part in self.examples(rows.batch(indices, self.device)):
                n, side.scalars = part.scalars.shape
                side.starts.append(side.rows)
                here = indices[part.first : part.first + n]
                side.order += here
                stacks.begin(*_sizes(rows, here))
                norms.append(self._add(side, part.gradients, Packer(n, self.formula.signs, stacks)))
                del part  # before the next batch runs
        if self.formula.signs:
            side.scale = sign_scale(torch.cat(norms))
        return side

    def _add(self, side: StructuredSide, gradients: list[dict], make: Packer) -> torch.Tensor:
        number = len(side.starts) - 1
        norms = torch.zeros(make.n * side.scalars, dtype=torch.float64, device=self.device)
        for name in sorted(set().union(*gradients)):
            record = make(name, [scalar.get(name) for scalar in gradients])
            side.records.setdefault(name, []).append((number, record))
            if self.formula.signs:
                norms += _squared_norms(record, len(norms))
        return norms

    def add(self, left: StructuredSide, right: StructuredSide, name: str, total: torch.Tensor) -> None:
        """Add the products of one parameter's gradients, from what its layer read and gave."""
        sides = (left, right)
        complete = all(len(side.records[name]) == len(side.starts) for side in sides)
        if not complete:  # some batch has no gradient at all for this parameter
            rows = [_rows_of(side, name) for side in sides]
            part = total.new_zeros(total.shape[0], len(rows[0]), len(rows[1]))
            self._by_kind(left, right, name, rows, part)
            total[:, rows[0][:, None], rows[1]] += part
        else:
            self._by_kind(left, right, name, None, total)

    def _dense(self, side: StructuredSide, name: str) -> list[Packed]:
        """The packed gradients of a parameter, written out."""
        ends = [*side.starts[1:], side.rows]
        shape = self.parameters[name].shape
        return [record.dense(shape, ends[number] - side.starts[number]) for number, record in side.records[name]]

    def _by_kind(self, left, right, name: str, rows: list[torch.Tensor] | None, out: torch.Tensor) -> None:
        records = [[record for _, record in side.records[name]] for side in (left, right)]
        scales = tuple(
            side.scale if side.scale is None or rows is None else side.scale[rows[i]]
            for i, side in enumerate((left, right))
        )
        if len({type(record) for side in records for record in side}) > 1:
            # A batch was the first to use a tied weight in a way that no rule was tried for.
            records = [self._dense(side, name) for side in (left, right)]
        mine, theirs = records
        if isinstance(mine[0], PackedLinear):
            self.contraction.matrices(mine, theirs, scales, out)
        elif isinstance(mine[0], PackedEmbedding):
            starts = tuple(_starts(side, name) for side in (left, right))
            self.contraction.tables(mine, theirs, starts, scales, out)
        else:
            self.contraction.vectors(mine, theirs, scales, out)


def _sizes(rows: ExampleRows, indices: Iterable[int]) -> tuple[int, int]:
    """Tokens and number of the rows `indices`."""
    lengths = [rows.lengths[i] for i in indices]
    return sum(lengths), len(lengths)


def _bytes(records: Iterable[tuple[Packed, float]]) -> int:
    """Memory of the given shares of records; tensors that they have in common count once."""
    return int(sum({t.data_ptr(): share * t.nbytes for record, share in records for t in record.tensors()}.values()))


def _rows_of(side: StructuredSide, name: str) -> torch.Tensor:
    ends = [*side.starts[1:], side.rows]
    return torch.cat([torch.arange(side.starts[number], ends[number]) for number, _ in side.records[name]])


def _starts(side: StructuredSide, name: str) -> list[int]:
    ends, starts, at = [*side.starts[1:], side.rows], [], 0
    for number, _ in side.records[name]:
        starts.append(at)
        at += ends[number] - side.starts[number]
    return starts


def _squared_norms(record: Packed, rows: int) -> torch.Tensor:
    if isinstance(record, PackedLinear):
        return record.squared_norms
    if isinstance(record, PackedDense):
        return record.values.square().sum(1)
    return record.values.new_zeros(rows).index_add_(0, record.rows, record.values.square().sum(1))
