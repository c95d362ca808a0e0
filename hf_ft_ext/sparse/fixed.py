"""A support that is chosen once: the entries, the few columns of the basis that they need, and their gradient."""

from collections.abc import Callable
from dataclasses import dataclass, fields

import torch

from hf_ft_ext.sparse.basis import ACTIVATIONS, GRADIENT, Basis


@dataclass
class FixedSupport:
    """Entries of `V^T W U` inside the block of some rows and columns.

    Only the columns of `V` and `U` that the block needs are kept. In the identity basis (MeProp) nothing is
    multiplied: rows and columns are picked.

    Attributes:
        rows: chosen rows of the rotated weight, shape (r,), rising.
        columns: chosen columns, shape (c,), rising.
        entries: flat indices into the r x c block, shape (k,), rising; `None` = the whole block.
        out_columns: `V[:, rows]`, shape (out, r), or `None` in the identity basis.
        in_columns: `U[:, columns]`, shape (in, c), or `None` in the identity basis.
    """

    rows: torch.Tensor
    columns: torch.Tensor
    entries: torch.Tensor | None
    out_columns: torch.Tensor | None
    in_columns: torch.Tensor | None

    @classmethod
    def of_block(cls, basis: Basis, rows: torch.Tensor, columns: torch.Tensor) -> "FixedSupport":
        """The whole block of the given rows and columns (structured support)."""
        return cls(rows, columns, None, *_columns(basis, rows, columns))

    @classmethod
    def of_entries(cls, basis: Basis, indices: torch.Tensor, n_in: int) -> "FixedSupport":
        """Entries at flat `indices` (rising) of the rotated weight, wherever they lie."""
        rows, row_of = torch.unique(indices // n_in, return_inverse=True)
        columns, column_of = torch.unique(indices % n_in, return_inverse=True)
        entries = row_of * len(columns) + column_of
        return cls(rows, columns, entries, *_columns(basis, rows, columns))

    @classmethod
    def stand_in(
        cls, n_params: int, block: tuple[int, int] | None, weight: torch.Tensor, identity: bool
    ) -> "FixedSupport":
        """A support of the right size and no meaning, for measuring memory before the real one is chosen."""
        n_out, n_in = weight.shape
        r, c = block or (n_out, n_in)
        rows, columns = (torch.arange(n, device=weight.device) for n in (r, c))
        entries = None if block else torch.linspace(0, r * c - 1, n_params, device=weight.device).long()
        sides = (None, None) if identity else (weight.new_zeros(n_out, r), weight.new_zeros(n_in, c))
        return cls(rows, columns, entries, *sides)

    def apply(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Replace each tensor by what `function` gives: `nn.Module.to` and the like move a support with its layer."""
        for field in fields(self):
            value = getattr(self, field.name)
            if value is not None:
                setattr(self, field.name, function(value))

    @property
    def size(self) -> int:
        """Number of entries."""
        return len(self.rows) * len(self.columns) if self.entries is None else len(self.entries)

    def cheaper_route(self, n_out: int, n_in: int, tokens: int) -> str:
        """Where to meet the basis, by the multiplications that `tokens` tokens take.

        `"activations"`: `(g V_r)^T (x U_c)`, which also keeps the narrow `x U_c` instead of `x` for the backward
        pass. `"gradient"`: `V_r^T (g^T x) U_c`, the dense gradient made and dropped at once.
        """
        r, c = len(self.rows), len(self.columns)
        if self.out_columns is None:
            return ACTIVATIONS  # picking costs nothing
        activations = tokens * (n_out * r + n_in * c + r * c)
        gradient = tokens * n_out * n_in + min(n_out * n_in * r + r * n_in * c, n_out * n_in * c + n_out * c * r)
        return ACTIVATIONS if activations <= gradient else GRADIENT

    def narrow_input(self, x: torch.Tensor) -> torch.Tensor:
        """`x U_c`, shape (tokens, c)."""
        return x[:, self.columns] if self.in_columns is None else x @ self.in_columns.to(x.dtype)

    def narrow_output(self, g: torch.Tensor) -> torch.Tensor:
        """`g V_r`, shape (tokens, r)."""
        return g[:, self.rows] if self.out_columns is None else g @ self.out_columns.to(g.dtype)

    def block_of(self, matrix: torch.Tensor) -> torch.Tensor:
        """`(V^T M U)[rows][:, columns]`, shape (r, c), of an (out, in) matrix."""
        if self.out_columns is None:
            return matrix[self.rows][:, self.columns]
        out_columns, in_columns = self.out_columns.to(matrix.dtype), self.in_columns.to(matrix.dtype)
        n_out, n_in = matrix.shape
        r, c = len(self.rows), len(self.columns)
        if n_out * n_in * r + r * n_in * c <= n_out * n_in * c + n_out * c * r:
            return (out_columns.T @ matrix) @ in_columns
        return out_columns.T @ (matrix @ in_columns)

    def pick(self, block: torch.Tensor) -> torch.Tensor:
        """The entries of an r x c block, shape (k,)."""
        return block.reshape(-1) if self.entries is None else block.reshape(-1)[self.entries]

    def spread(self, values: torch.Tensor) -> torch.Tensor:
        """The r x c block with `values` (k,) at the entries, else zero."""
        shape = (len(self.rows), len(self.columns))
        if self.entries is None:
            return values.view(shape)
        return values.new_zeros(shape[0] * shape[1]).index_copy_(0, self.entries, values).view(shape)

    def add_to(self, weight: torch.Tensor, change: torch.Tensor) -> None:
        """`weight += V_r S U_c^T` in place, where `S` holds `change` (k,) at the entries."""
        r, c = len(self.rows), len(self.columns)
        block = self.spread(change)
        if self.out_columns is None:
            weight[self.rows[:, None], self.columns] += block.to(weight.dtype)
            return
        n_out, n_in = weight.shape
        if n_out * r * c + n_out * c * n_in <= r * c * n_in + n_out * r * n_in:
            left, right = self.out_columns @ block, self.in_columns.T
        else:
            left, right = self.out_columns, block @ self.in_columns.T
        weight.addmm_(left.to(weight.dtype), right.to(weight.dtype))


def _columns(basis: Basis, rows: torch.Tensor, columns: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    if basis.identity:
        return None, None
    return basis.out_factor[:, rows].contiguous(), basis.in_factor[:, columns].contiguous()
