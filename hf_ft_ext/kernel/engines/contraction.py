"""`Contraction`: products of two sets of gradient rows, one parameter at a time, by the cheapest formula."""

import functools
from collections.abc import Sequence

import torch

from hf_ft_ext.kernel.engines.buffers import concatenated
from hf_ft_ext.kernel.engines.packed import (
    PackedDense,
    PackedEmbedding,
    PackedLinear,
    batching_pays,
    join_embeddings,
    padded,
)
from hf_ft_ext.kernel.formulas import Formula, product, sign_product, sign_type, signs


class Scratch:
    """Reusable buffers, because allocating one for every layer would cost more than the products themselves."""

    def __init__(self):
        self._buffers: dict[tuple, torch.Tensor] = {}

    def take(self, name: str, rows: int, size: int, like: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Return a buffer `[rows, size]` with undefined content."""
        key = (name, dtype, like.device)
        if key not in self._buffers or self._buffers[key].numel() < rows * size:
            self._buffers.pop(key, None)
            self._buffers[key] = like.new_empty(rows * size, dtype=dtype)
        return self._buffers[key][: rows * size].view(rows, size)


class Contraction:
    """Computes kernels of one formula from gradient rows.

    Args:
        formula: the kernel's formula.

    Attributes:
        max_bytes: memory for full gradient rows of both sides together.
    """

    _CHUNK = 2**18  # entries of a product whose sign is taken while they are in the processor's cache

    def __init__(self, formula: Formula):
        self.formula, self.max_bytes, self.scratch = formula, 2**28, Scratch()
        self._shared: tuple | None = None

    def row_bytes(self, entries: int, dtype: torch.dtype) -> int:
        """Bytes of one gradient row of `entries` entries, in all views that the formula multiplies."""
        return entries * {Formula.SGD: dtype.itemsize, Formula.SIGNGD: 4}.get(self.formula, 2 * dtype.itemsize)

    # --- gradient rows in full ----------------------------------------------------------------------

    def views(self, values: torch.Tensor, scale: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
        """The factors of the formula for gradient rows `[rows, p]`: the rows, their signs, or both."""
        if self.formula is Formula.SGD:
            return (values,)
        if self.formula is Formula.SIGNGD:
            return (signs(values, scale),)
        return values, signs(values, scale).double()

    def multiply(self, left: tuple[torch.Tensor, ...], right: tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
        """Multiply the views of two sides: `[rows, rows']` for each kernel of the formula."""
        if self.formula is Formula.SGD:  # J J'^T
            return [product(left[0], right[0])]
        if self.formula is Formula.SIGNGD:  # sign(J) sign(J')^T
            return [sign_product(left[0], right[0])]
        # sign(J) J'^T, and its flip J sign(J')^T
        return [product(left[1], right[0]), product(left[0], right[1])]

    def add_dense(
        self, left: Sequence[PackedDense], right: Sequence[PackedDense], scales: tuple, out: torch.Tensor
    ) -> None:
        """Add the kernels of a parameter with full gradients to `out` `[kernels, rows, rows']`."""
        views = [
            self.views(torch.cat([vector.values for vector in side]), scale)
            for side, scale in zip((left, right), scales, strict=True)
        ]
        for total, part in zip(out, self.multiply(*views), strict=True):
            total += part

    # --- embedding tables ----------------------------------------------------------------------------

    def add_embeddings(
        self, left: Sequence[PackedEmbedding], right: Sequence[PackedEmbedding], starts: tuple, scales: tuple, out
    ) -> None:
        """Add the kernels of an embedding table, `sum over table rows i of <G[i], G'[i]>`, for rows both sides use."""
        sides = [join_embeddings(tables, offsets) for tables, offsets in zip((left, right), starts, strict=True)]
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

    # --- linear layers --------------------------------------------------------------------------------

    def add_linear(
        self, left: Sequence[PackedLinear], right: Sequence[PackedLinear], scales: tuple, out: torch.Tensor
    ) -> None:
        """Add the kernels of a linear layer's weight, by pairs of tokens or by entries of the weight."""
        if self.formula is Formula.SGD and tokens_are_cheaper(left, right):
            self._by_tokens(left, right, out[0])
            return
        c, size, like = left[0].scalars, left[0].size, left[0].output_gradients
        at_once = batching_pays(like)
        row_bytes = self.row_bytes(size, like.dtype)
        if at_once and self.formula is Formula.SIGNGD:
            row_bytes += size * like.dtype.itemsize  # the rows whose signs are taken
        share = max(self.max_bytes // (2 * c * row_bytes), 1)
        dense = self._dense_batched if at_once else functools.partial(self._dense, self._type_of_signs(like, scales))
        counts = [sum(len(matrix.counts) for matrix in side) for side in (left, right)]
        for i in range(0, counts[0], share):
            a = dense("left", _Tokens(left, i, i + share), i * c, scales[0])
            for j in range(0, counts[1], share):
                b = dense("right", _Tokens(right, j, j + share), j * c, scales[1])
                for total, part in zip(out, self.multiply(a, b), strict=True):
                    total[i * c : i * c + part.shape[0], j * c : j * c + part.shape[1]] += part

    def _dense_batched(self, name: str, tokens: "_Tokens", first: int, scale: torch.Tensor | None) -> tuple:
        """As `_dense`, in one batched product, because an accelerator is slow with many small ones."""
        inputs, grads = (padded(part, tokens.counts) for part in (tokens.activations, tokens.output_gradients))
        n, _, c, height = grads.shape
        rows = self.scratch.take(name, n * c, height * inputs.shape[2], inputs, grads.dtype)
        # G = sum_t g_t x_t^T for all examples and scalars; padded positions add 0
        torch.bmm(grads.flatten(2).mT, inputs, out=rows.view(n, c * height, -1))
        return self.views(rows, None if scale is None else scale[first : first + n * c])

    def _type_of_signs(self, like: torch.Tensor, scales: tuple) -> torch.dtype:
        """The type in which signs are multiplied; rows of scale 0 may hold NaN, which int8 would turn into 0."""
        if self.formula is not Formula.SIGNGD:
            return like.dtype
        return sign_type(like.device) if all(scale.all() for scale in scales) else torch.float32

    def _dense(self, kind: torch.dtype, name: str, tokens: "_Tokens", first: int, scale: torch.Tensor | None) -> tuple:
        """The views of the examples' full gradient rows.

        Args:
            kind: type of the signs.
            first: index of the first row.
        """
        all_inputs, all_grads = tokens.activations, tokens.output_gradients
        c, width, height = all_grads.shape[1], all_inputs.shape[1], all_grads.shape[2]
        rows, size, dtype = tokens.n * c, width * height, all_grads.dtype
        raw = None if self.formula is Formula.SIGNGD else self.scratch.take(name, rows, size, all_inputs, dtype)
        sign = None if scale is None else self.scratch.take(f"{name} signs", rows, size, all_inputs, kind)
        step = height if scale is None else -(-height // -(-size // self._CHUNK))  # rows of the weight per chunk
        chunk = self.scratch.take("chunk", step, width, all_inputs, dtype)
        row = 0
        for inputs, grads in zip(*(part.split(tokens.counts) for part in (all_inputs, all_grads)), strict=True):
            for scalar in range(c):
                g = grads[:, scalar]
                if raw is not None:  # G = sum_t g_t x_t^T
                    torch.mm(g.T, inputs, out=raw[row].view(height, width))
                if sign is not None and scale is not None:
                    # sign(G) = trunc(clamp(scale G, -1, 1)), see `formulas.sign_scale`
                    g = g * scale[first + row]
                    target = sign[row].view(height, width)
                    for top in range(0, height, step):  # chunks stay in the cache between product and sign
                        part = target[top : top + step]
                        found = torch.mm(g[:, top : top + step].T, inputs, out=chunk[: len(part)])
                        found.clamp_(-1, 1)
                        part.copy_(found) if kind == torch.int8 else part.copy_(found).trunc_()  # int8 truncates
                row += 1
        return (sign,) if raw is None else (raw,) if sign is None else (raw, sign)

    def _by_tokens(self, left: Sequence[PackedLinear], right: Sequence[PackedLinear], out: torch.Tensor) -> None:
        """`K = sum over tokens t, s of <g_t, g_s> <x_t, x_s>`, added to `out` `[rows, rows']`."""
        c = left[0].scalars
        a = _Tokens(left, 0, sum(len(matrix.counts) for matrix in left))
        n, done = sum(len(matrix.counts) for matrix in right), 0
        longest = max(count for matrix in right for count in matrix.counts) or 1
        pair = 3 * c * c * max(len(a.activations), 1) * longest * a.activations.element_size()
        step = max(self.max_bytes // pair, 1)  # examples of the right side
        while done < n:
            b = _Tokens(right, done, done + step)
            x = self._input_products(a, b)
            # <g_t, g_s> <x_t, x_s>
            g = (a.output_gradients.flatten(0, 1) @ b.output_gradients.flatten(0, 1).T).view(
                len(a.activations), c, len(b.activations), c
            )
            g.mul_(x[:, None, :, None])
            # Sum over the tokens t of each left example, then over the tokens s of each right example.
            part = g.new_zeros(a.n, c * len(b.activations) * c).index_add_(0, a.examples, g.flatten(1))
            part = part.view(a.n * c, len(b.activations), c)
            part = part.new_zeros(a.n * c, b.n, c).index_add_(1, b.examples, part)
            out[:, done * c : (done + b.n) * c] += part.flatten(1)
            done += b.n

    def _input_products(self, a: "_Tokens", b: "_Tokens") -> torch.Tensor:
        """`<x_t, x_s>`, cached: consecutive layers with the same input (query, key and value) share it."""
        key = (a.key, b.key)
        if self._shared is None or self._shared[0] != key:
            self._shared = None
            self._shared = (
                key,
                a.activations @ b.activations.T,
                a.held,
                b.held,
            )  # `held` keeps the tensors alive, so that their addresses stay unique keys
        return self._shared[1]


def tokens_are_cheaper(left: Sequence[PackedLinear], right: Sequence[PackedLinear]) -> bool:
    """Whether summing over pairs of tokens costs less than computing full gradients and multiplying them."""
    c, size = left[0].scalars, left[0].size
    width_in, width_out = left[0].activations.shape[1], left[0].output_gradients.shape[2]
    tokens1, tokens2 = (sum(matrix.tokens for matrix in side) for side in (left, right))
    n1, n2 = (sum(len(matrix.counts) for matrix in side) for side in (left, right))
    # Operations by entries: products of rows, and computing the full rows. By tokens: both products, and the sums.
    entries = c * c * n1 * n2 * size + c * size * (tokens1 + tokens2)
    return tokens1 * tokens2 * (c * c * (width_out + 16) + width_in) < entries


class _Tokens:
    """The tokens of examples `first` to `last` (exclusive) of one side, joined to one tensor."""

    def __init__(self, side: Sequence[PackedLinear], first: int, last: int):
        inputs, grads, counts, at = [], [], [], 0
        for matrix in side:
            lo, hi = max(first - at, 0), min(last - at, len(matrix.counts))
            at += len(matrix.counts)
            if lo < hi:
                start = sum(matrix.counts[:lo])
                stop = start + sum(matrix.counts[lo:hi])
                inputs.append(matrix.activations[start:stop])
                grads.append(matrix.output_gradients[start:stop])
                counts += matrix.counts[lo:hi]
        self.held, self.key = inputs, tuple((part.data_ptr(), len(part)) for part in inputs)
        self.activations, self.output_gradients = concatenated(inputs), concatenated(grads)
        self.n, self.counts = len(counts), counts

    @functools.cached_property
    def examples(self) -> torch.Tensor:
        """The index of each token's example."""
        device = self.activations.device
        return torch.arange(self.n, device=device).repeat_interleave(torch.tensor(self.counts, device=device))


def _ranges(ids: torch.Tensor) -> dict[int, tuple[int, int]]:
    """First and last position (exclusive) of each id in the ascending `ids`."""
    unique, counts = torch.unique_consecutive(ids, return_counts=True)
    ends = counts.cumsum(0)
    return {i: (e - n, e) for i, e, n in zip(unique.tolist(), ends.tolist(), counts.tolist(), strict=True)}
