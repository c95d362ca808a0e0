"""Products of two sides' gradient rows, one parameter at a time, in the cheaper of the ways there are."""

from collections.abc import Iterator, Sequence

import torch

from hf_ft_ext.kernel.formulas import Formula, product, sign_product, signs
from hf_ft_ext.kernel.records import Matrix, Table, Vector, joined


class Scratch:
    """Buffers that are used again and again: a fresh one for every layer would cost more than what is done in it."""

    def __init__(self):
        self._buffers: dict[tuple, torch.Tensor] = {}

    def take(self, name: str, rows: int, size: int, like: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """A buffer `[rows, size]` with any content."""
        key = (name, dtype, like.device)
        if key not in self._buffers or self._buffers[key].numel() < rows * size:
            self._buffers.pop(key, None)
            self._buffers[key] = like.new_empty(rows * size, dtype=dtype)
        return self._buffers[key][: rows * size].view(rows, size)


class Contraction:
    """Kernels of one formula out of gradient rows.

    Args:
        formula: which products are taken.
        max_bytes: for gradient rows multiplied out, both sides together.
    """

    _CHUNK = 2**20  # entries in float64 between product and sign: what stays in the cache

    def __init__(self, formula: Formula, max_bytes: int):
        self.formula, self.max_bytes, self.scratch = formula, max_bytes, Scratch()

    def row_bytes(self, entries: int, dtype: torch.dtype) -> int:
        """Memory of one gradient row of so many entries in the views that the formula takes."""
        return entries * {Formula.SGD: dtype.itemsize, Formula.SIGNGD: 4}.get(self.formula, 2 * dtype.itemsize)

    # --- gradient rows in full ----------------------------------------------------------------------

    def views(self, values: torch.Tensor, scale: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
        """What the formula multiplies of gradient rows `[rows, p]`: themselves, their signs, or both."""
        if self.formula is Formula.SGD:
            return (values,)
        if self.formula is Formula.SIGNGD:
            return (signs(values, scale),)
        return values, signs(values, scale).double()

    def multiply(self, left: tuple[torch.Tensor, ...], right: tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
        """The products of two sides' views: `[rows, rows']` for each kernel of the formula."""
        if self.formula is Formula.SGD:
            return [product(left[0], right[0])]
        if self.formula is Formula.SIGNGD:
            return [sign_product(left[0], right[0])]
        return [product(left[1], right[0]), product(left[0], right[1])]

    def vectors(self, left: Sequence[Vector], right: Sequence[Vector], scales: tuple, out: torch.Tensor) -> None:
        """Add the kernels of a parameter kept in full to `out` `[kernels, rows, rows']`."""
        views = [
            self.views(torch.cat([vector.values for vector in side]), scale)
            for side, scale in zip((left, right), scales, strict=True)
        ]
        for total, part in zip(out, self.multiply(*views), strict=True):
            total += part

    # --- tables --------------------------------------------------------------------------------------

    def tables(self, left: Sequence[Table], right: Sequence[Table], starts: tuple, scales: tuple, out) -> None:
        """Add the kernels of a table: only rows that both sides use meet."""
        sides = [joined(tables, offsets) for tables, offsets in zip((left, right), starts, strict=True)]
        ranges = [_ranges(side.ids) for side in sides]
        views = [
            self.views(side.values, None if scale is None else scale[side.rows])
            for side, scale in zip(sides, scales, strict=True)
        ]
        for key in ranges[0].keys() & ranges[1].keys():
            here = [slice(*found[key]) for found in ranges]
            parts = self.multiply(*(tuple(v[s] for v in view) for view, s in zip(views, here, strict=True)))
            rows, columns = (side.rows[s] for side, s in zip(sides, here, strict=True))
            for total, part in zip(out, parts, strict=True):
                total[rows[:, None], columns] += part

    # --- weights --------------------------------------------------------------------------------------

    def matrices(self, left: Sequence[Matrix], right: Sequence[Matrix], scales: tuple, out: torch.Tensor) -> None:
        """Add the kernels of a weight, over pairs of tokens or over the entries of the weight."""
        if self.formula is Formula.SGD and _tokens_are_cheaper(left, right):
            self._by_tokens(left, right, out)
            return
        share = max(self.max_bytes // (2 * self.row_bytes(left[0].size * left[0].scalars, left[0].grads.dtype)), 1)
        for first in _groups(left, share):
            start = first[0][3]
            a = self._written("left", left, first, scales[0])
            for second in _groups(right, share):
                begin = second[0][3]
                b = self._written("right", right, second, scales[1])
                for total, part in zip(out, self.multiply(a, b), strict=True):
                    total[start : start + part.shape[0], begin : begin + part.shape[1]] += part

    def _written(self, name: str, side: Sequence[Matrix], spans: list, scale: torch.Tensor | None) -> tuple:
        c, like = side[0].scalars, side[0].grads
        rows, size = sum(last - first for _, first, last, _ in spans) * c, side[0].size
        if self.formula is Formula.SGD:
            outs = (self.scratch.take(name, rows, size, like, like.dtype),)
        elif self.formula is Formula.SIGNGD:
            outs = (self.scratch.take(name, rows, size, like, torch.float32),)
        else:
            outs = tuple(self.scratch.take(f"{name}{i}", rows, size, like, like.dtype) for i in range(2))
        at = 0
        for index, first, last, row in spans:
            step = last - first if self.formula is Formula.SGD else max(self._CHUNK // (size * c), 1)
            for lo in range(first, last, step):
                hi = min(lo + step, last)
                until = at + (hi - lo) * c
                if self.formula is Formula.SIGNGD:
                    part = self.scratch.take("chunk", until - at, size, like, like.dtype)
                    side[index].write(lo, hi, part)
                    begin = row + (lo - first) * c
                    part.mul_(scale[begin : begin + len(part), None]).trunc_().clamp_(-1, 1)
                    outs[0][at:until].copy_(part)
                else:
                    side[index].write(lo, hi, outs[0][at:until])
                    if len(outs) == 2:
                        begin = row + (lo - first) * c
                        outs[1][at:until].copy_(outs[0][at:until]).mul_(
                            scale[begin : begin + until - at, None]
                        ).trunc_().clamp_(-1, 1)
                at = until
        return outs

    def _by_tokens(self, left: Sequence[Matrix], right: Sequence[Matrix], out: torch.Tensor) -> None:
        """`K = sum over tokens t, s of <g_t, g_s> <x_t, x_s>`."""
        row = 0
        for a in left:
            rows, t1, c = len(a.grads), a.grads.shape[1], a.scalars
            column = 0
            for b in right:
                pairs = 2 * rows * t1 * b.grads.shape[1] * c * a.grads.element_size()
                step = max(self.max_bytes // pairs, 1)  # examples of b
                for lo in range(0, len(b.inputs), step):
                    inputs, grads = b.inputs[lo : lo + step], b.grads[lo * c : (lo + step) * c]
                    n1, n2, t2 = len(a.inputs), len(inputs), inputs.shape[1]
                    x = (a.inputs.flatten(0, 1) @ inputs.flatten(0, 1).T).view(n1, 1, t1, n2, 1, t2)
                    g = (a.grads.flatten(0, 1) @ grads.flatten(0, 1).T).view(n1, c, t1, n2, c, t2)
                    part = (g.mul_(x)).sum((2, 5)).reshape(rows, n2 * c)
                    out[0, row : row + rows, column : column + n2 * c] += part
                    column += n2 * c
            row += rows


def _tokens_are_cheaper(left: Sequence[Matrix], right: Sequence[Matrix]) -> bool:
    """Whether products over pairs of tokens cost less than multiplying the gradients out and over their entries."""
    c, size = left[0].scalars, left[0].size
    width_in, width_out = left[0].inputs.shape[2], left[0].grads.shape[2]
    tokens1, tokens2 = (sum(matrix.tokens for matrix in side) for side in (left, right))
    n1, n2 = (sum(len(matrix.inputs) for matrix in side) for side in (left, right))
    entries = c * c * n1 * n2 * size + c * size * (tokens1 + tokens2)
    return tokens1 * tokens2 * (c * c * (width_out + 8) + width_in) < entries


def _groups(side: Sequence[Matrix], limit: int) -> Iterator[list[tuple[int, int, int, int]]]:
    """Spans (matrix, first example, last, row of the first) in groups of up to `limit` examples."""
    group, room, row = [], limit, 0
    for index, matrix in enumerate(side):
        n, first = len(matrix.inputs), 0
        while first < n:
            last = min(first + room, n)
            group.append((index, first, last, row + first * matrix.scalars))
            room -= last - first
            first = last
            if room == 0:
                yield group
                group, room = [], limit
        row += n * matrix.scalars
    if group:
        yield group


def _ranges(ids: torch.Tensor) -> dict[int, tuple[int, int]]:
    """First and last position (exclusive) of each id in the ascending `ids`."""
    unique, counts = torch.unique_consecutive(ids, return_counts=True)
    ends = counts.cumsum(0)
    return {i: (e - n, e) for i, e, n in zip(unique.tolist(), ends.tolist(), counts.tolist(), strict=True)}
