"""Candidate values of the searched entries, computed in one block or one by one."""

import itertools
from dataclasses import dataclass

import torch

_BLOCK = 2**20  # entries; larger sets of candidates are computed row by row, one candidate at a time


@dataclass(frozen=True)
class IndexView:
    """Entries of one tensor: ascending flat `indices`, or `None` for all entries."""

    parameter: torch.Tensor
    indices: torch.Tensor | None

    @property
    def size(self) -> int:
        """Number of entries."""
        return self.parameter.numel() if self.indices is None else self.indices.numel()

    def read(self) -> torch.Tensor:
        """A copy of the entries, flat, in the parameter's type."""
        flat = self.parameter.detach().view(-1)
        return flat.clone() if self.indices is None else flat[self.indices]

    def write(self, values: torch.Tensor) -> None:
        """Set the entries; writing what `read` returned restores them bit for bit."""
        flat = self.parameter.detach().view(-1)
        if self.indices is None:
            flat.copy_(values)
        else:
            flat[self.indices] = values.to(flat.dtype)


def read_views(views: list[IndexView]) -> torch.Tensor:
    """The entries of all views, concatenated."""
    return views[0].read() if len(views) == 1 else torch.cat([view.read() for view in views])


def write_views(views: list[IndexView], values: torch.Tensor) -> None:
    """Set the entries of all views from `values`, in the order of `read_views`."""
    if len(views) == 1:
        views[0].write(values)
        return
    for view, part in zip(views, values.split([view.size for view in views]), strict=True):
        view.write(part)


class Candidates:
    """`n` candidates for the same entries: row `i` is `starts[start[i]] + scale[i] * noise[i]`.

    The noise is standard normal on the entries `positions` and zero elsewhere. It is drawn from a seed: small sets of
    candidates are computed in one block, rows of large sets one at a time.

    Args:
        starts: `[S, u]`: starting points, in the type of the computation.
        start: for each candidate, its row of `starts`.
        scale: for each candidate, the factor of its noise; 0 = the starting point itself.
        noise: for each candidate, the index of its noise vector (the same for an antithetic pair).
        positions: entries that get noise, as positions in a row (int64); `None` = all.
        seed: of the noise.
        dtype: of the candidates: that of the parameters.
        block: number of consecutive entries that get the same noise.
    """

    def __init__(
        self,
        starts,
        start: list[int],
        scale: list[float],
        noise: list[int],
        positions,
        seed: int,
        dtype,
        block: int = 1,
    ):
        self.block_size = block
        self.starts, self.start, self.scale, self.noise = starts, start, scale, noise
        self.positions, self.seed, self.dtype = positions, seed, dtype
        self.width = starts.shape[1]
        self.drawn = self.width if positions is None else positions.numel()
        self.in_block = len(start) * self.width <= _BLOCK
        self._block: torch.Tensor | None = None

    def __len__(self) -> int:
        return len(self.start)

    def _normal(self, *rows: int, seed: int) -> torch.Tensor:
        # drawn on the CPU, so that it is the same on every device and in every process
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn(*rows, self.drawn // self.block_size, generator=generator, dtype=self.starts.dtype)
        return noise.repeat_interleave(self.block_size, -1).to(self.starts.device)

    def block(self) -> torch.Tensor:
        """All candidates, `[n, u]`."""
        if not self.in_block:
            return torch.stack([self.row(i) for i in range(len(self))])
        if self._block is None:
            device = self.starts.device
            noise = self._normal(max(self.noise) + 1, seed=self.seed)
            scale = torch.tensor(self.scale, dtype=noise.dtype, device=device)
            move = noise[self.noise] * scale[:, None]  # +- R / 2^k z_k
            values = self.starts[self.start]
            if self.positions is None:
                values += move
            else:
                values[:, self.positions] += move
            self._block = values.to(self.dtype)
        return self._block

    def row(self, i: int) -> torch.Tensor:
        """Candidate `i`, `[u]`."""
        if self.in_block:
            return self.block()[i]
        values = self.starts[self.start[i]].clone()
        if self.scale[i]:
            move = self._normal(seed=self.seed + self.noise[i]).mul_(self.scale[i])
            if self.positions is None:
                values += move
            else:
                values[self.positions] += move
        return values.to(self.dtype)

    def squares(self, present: torch.Tensor) -> torch.Tensor:
        """Sum of squares of each candidate's entries, then of `present` (`[u]`): float64, `[n + 1]`."""
        if self.in_block:
            return torch.cat([self.block(), present[None]]).double().square().sum(1)
        rows = itertools.chain(map(self.row, range(len(self))), [present])
        return torch.stack([torch.linalg.vector_norm(row.to(self.starts.dtype)).double().square() for row in rows])
