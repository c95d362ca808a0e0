"""Several processes at one search: who evaluates what, and how the losses come together. Scalars only."""

from collections.abc import Callable

import torch

from hf_ft_ext.errors import InputError

MODES = DATA, CANDIDATES = ("data", "candidates")
SumOverRanks = Callable[[torch.Tensor], torch.Tensor]


class SingleProcess:
    """One process evaluates everything."""

    def mine(self, n: int) -> range:
        """Which of `n` candidates this process evaluates."""
        return range(n)

    def combine(self, losses: torch.Tensor) -> torch.Tensor:
        """All candidates' losses (float64, shape `[n]`) from this process's, zero where it did not look."""
        return losses


class _Shared(SingleProcess):
    """Work on several processes, which are the same for a copy of the optimizer and cannot be written to a file."""

    def __deepcopy__(self, memo: dict) -> "_Shared":
        return self

    def __reduce__(self):
        raise InputError(
            "an optimizer that shares its work with other processes cannot be pickled; save optimizer.state_dict()"
        )


class SharedData(_Shared):
    """Every process scores every candidate on its own part of the batch; the losses are averaged.

    Args:
        total: sums a tensor over the processes, the same result on each.
        weight: rows of this process's part, set for each batch.
    """

    def __init__(self, total: SumOverRanks, weight: float = 1.0):
        self.total, self.weight = total, weight

    def combine(self, losses: torch.Tensor) -> torch.Tensor:
        sums = self.total(torch.cat([losses * self.weight, losses.new_tensor([self.weight])]))
        return sums[:-1] / sums[-1]


class SharedCandidates(_Shared):
    """Every process has the whole batch and scores its share of the candidates.

    Args:
        total: sums a tensor over the processes, the same result on each.
    """

    def __init__(self, total: SumOverRanks, rank: int, world: int):
        self.total, self.rank, self.world = total, rank, world

    def mine(self, n: int) -> range:
        return range(self.rank, n, self.world)

    def combine(self, losses: torch.Tensor) -> torch.Tensor:
        return self.total(losses)
