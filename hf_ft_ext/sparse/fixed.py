"""Fixed support: entries chosen once, the columns of the basis that they need, and their gradient."""

from collections.abc import Callable
from dataclasses import dataclass, fields

import torch

from hf_ft_ext.sparse.basis import ACTIVATIONS, GRADIENT, Basis


@dataclass
class FixedSupport:
    """Entries of `V^T W U` within a block of chosen rows and columns.

    Only the columns of `V` and `U` that the block needs are kept. The identity basis (MeProp) needs no products: rows
    and columns are indexed.

    Attributes:
        rows: chosen rows of the rotated weight, shape (r,), ascending.
        columns: chosen columns, shape (c,), ascending.
        entries: flat indices into the r x c block, shape (k,), ascending; `None` = the whole block.
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
        """Return the support of the whole block of the given rows and columns (structured support)."""
        return cls(rows, columns, None, *_columns(basis, rows, columns))

    @classmethod
    def of_entries(cls, basis: Basis, indices: torch.Tensor, n_in: int) -> "FixedSupport":
        """Return the support of entries at any flat `indices` (ascending) of the rotated weight (static support)."""
        rows, row_of = torch.unique(indices // n_in, return_inverse=True)
        columns, column_of = torch.unique(indices % n_in, return_inverse=True)
        entries = row_of * len(columns) + column_of
        return cls(rows, columns, entries, *_columns(basis, rows, columns))

    @classmethod
    def placeholder(
        cls, n_params: int, block: tuple[int, int] | None, weight: torch.Tensor, identity: bool
    ) -> "FixedSupport":
        """Return a placeholder of the right size, to measure memory before the real support is chosen."""
        n_out, n_in = weight.shape
        r, c = block or (n_out, n_in)
        rows, columns = (torch.arange(n, device=weight.device) for n in (r, c))
        entries = None if block else torch.linspace(0, r * c - 1, n_params, device=weight.device).long()
        sides = (None, None) if identity else (weight.new_zeros(n_out, r), weight.new_zeros(n_in, c))
        return cls(rows, columns, entries, *sides)

    def apply(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Replace each tensor by the result of `function`, so that `nn.Module.to` moves a support with its layer."""
        for field in fields(self):
            value = getattr(self, field.name)
            if value is not None:
                setattr(self, field.name, function(value))

    @property
    def sides(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """`(V_r, U_c)`, or `None` in the identity basis."""
        if self.out_columns is None or self.in_columns is None:
            return None
        return self.out_columns, self.in_columns

    @property
    def size(self) -> int:
        """Number of entries."""
        return len(self.rows) * len(self.columns) if self.entries is None else len(self.entries)

    def cheaper_route(self, n_out: int, n_in: int, tokens: int) -> str:
        """Return the way to compute the gradient of the block that takes fewer multiplications for `tokens` tokens.

        `"activations"`: `(g V_r)^T (x U_c)`. It also saves the narrow `x U_c` instead of `x` for the backward pass.
        `"gradient"`: `V_r^T (g^T x) U_c`. The dense gradient `g^T x` exists only during the product.
        """
        r, c = len(self.rows), len(self.columns)
        if self.out_columns is None:
            return ACTIVATIONS  # indexing needs no multiplications
        activations = tokens * (n_out * r + n_in * c + r * c)  # g V_r, x U_c, and their product
        # g^T x, then the cheaper order of V_r^T G U_c
        gradient = tokens * n_out * n_in + min(n_out * n_in * r + r * n_in * c, n_out * n_in * c + n_out * c * r)
        return ACTIVATIONS if activations <= gradient else GRADIENT

    def project_input(self, x: torch.Tensor) -> torch.Tensor:
        """Return `x U_c`, shape (tokens, c)."""
        return x[:, self.columns] if self.in_columns is None else x @ self.in_columns.to(x.dtype)

    def project_output(self, g: torch.Tensor) -> torch.Tensor:
        """Return `g V_r`, shape (tokens, r)."""
        return g[:, self.rows] if self.out_columns is None else g @ self.out_columns.to(g.dtype)

    def block_of(self, matrix: torch.Tensor) -> torch.Tensor:
        """Return `V_r^T M U_c = (V^T M U)[rows][:, columns]`, shape (r, c), of an (out, in) matrix `M`."""
        if (sides := self.sides) is None:
            return matrix[self.rows][:, self.columns]
        out_columns, in_columns = (side.to(matrix.dtype) for side in sides)
        n_out, n_in = matrix.shape
        r, c = len(self.rows), len(self.columns)
        if n_out * n_in * r + r * n_in * c <= n_out * n_in * c + n_out * c * r:
            return (out_columns.T @ matrix) @ in_columns  # (V_r^T M) U_c
        return out_columns.T @ (matrix @ in_columns)  # V_r^T (M U_c)

    def pick(self, block: torch.Tensor) -> torch.Tensor:
        """Return the supported entries of an r x c block, shape (k,)."""
        return block.reshape(-1) if self.entries is None else block.reshape(-1)[self.entries]

    def spread(self, values: torch.Tensor) -> torch.Tensor:
        """Return the r x c block with `values` (k,) at the entries and zero elsewhere."""
        shape = (len(self.rows), len(self.columns))
        if self.entries is None:
            return values.view(shape)
        return values.new_zeros(shape[0] * shape[1]).index_copy_(0, self.entries, values).view(shape)

    def add_to(self, weight: torch.Tensor, change: torch.Tensor) -> None:
        """`weight += V_r S U_c^T` in place, where `S` (r, c) holds `change` (k,) at the entries, else zero."""
        r, c = len(self.rows), len(self.columns)
        block = self.spread(change)
        if (sides := self.sides) is None:
            weight[self.rows[:, None], self.columns] += block.to(weight.dtype)
            return
        out_columns, in_columns = sides
        n_out, n_in = weight.shape
        if n_out * r * c + n_out * c * n_in <= r * c * n_in + n_out * r * n_in:
            left, right = out_columns @ block, in_columns.T  # (V_r S) U_c^T
        else:
            left, right = out_columns, block @ in_columns.T  # V_r (S U_c^T)
        weight.addmm_(left.to(weight.dtype), right.to(weight.dtype))


def _columns(basis: Basis, rows: torch.Tensor, columns: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    if basis.identity:
        return None, None
    out_factor, in_factor = basis.factors
    return out_factor[:, rows].contiguous(), in_factor[:, columns].contiguous()
