"""Share the evaluations of a search between processes and combine the losses; only scalars are exchanged."""

from collections.abc import Callable

import torch

from hf_ft_ext.errors import InputError

MODES = DATA, CANDIDATES = ("data", "candidates")
SumOverRanks = Callable[[torch.Tensor], torch.Tensor]


class SingleProcess:
    """One process evaluates everything."""

    def mine(self, n: int) -> range:
        """Indices of the candidates, of `n`, that this process evaluates."""
        return range(n)

    def combine(self, losses: torch.Tensor) -> torch.Tensor:
        """Losses of all candidates (float64, `[n]`), from this process's (zero where it did not evaluate)."""
        return losses

    def union(self, numbers: set[int], n: int) -> set[int]:
        """The numbers, below `n`, that are in the set of any process."""
        return numbers

    def added(self, values: torch.Tensor) -> torch.Tensor:
        """The sum over the processes of what each has computed from its share of the work."""
        return values

    def weight_of_all(self, weight: float) -> float:
        """Weight of the whole batch, from that of this process's part."""
        return weight

    def first_rows(self) -> list[int] | None:
        """Index, in the whole step, of the first row of each micro-batch; `None` if this process has all rows."""
        return None


class _Shared(SingleProcess):
    """Base of exchanges between several processes: shared by copies of the optimizer, and refused by pickle."""

    total: SumOverRanks

    def union(self, numbers: set[int], n: int) -> set[int]:
        found = torch.zeros(n, dtype=torch.float64)
        for number in numbers:
            found[number] = 1.0
        return set(self.total(found).nonzero().flatten().tolist())

    def added(self, values: torch.Tensor) -> torch.Tensor:
        return self.total(values)

    def __deepcopy__(self, memo: dict) -> "_Shared":
        return self

    def __reduce__(self):
        raise InputError(
            "an optimizer that shares its work with other processes cannot be pickled; save optimizer.state_dict()"
        )


class SharedData(_Shared):
    """Every process evaluates all candidates on its own part of the batch; losses are averaged over the processes.

    `loss = sum_p weight_p loss_p / sum_p weight_p`.

    Args:
        total: all-reduce: sums a tensor over the processes.
        weight: rows or label tokens of this process's part, set for each batch.
        rank, world: index of this process and number of processes, for searches that draw noise for each row.

    Attributes:
        rows: rows of each micro-batch of this process's part, set for each step; for the same searches.
    """

    def __init__(self, total: SumOverRanks, weight: float = 1.0, rank: int = 0, world: int = 1):
        self.total, self.weight, self.rank, self.world = total, weight, rank, world
        self.rows: list[int] | None = None

    def combine(self, losses: torch.Tensor) -> torch.Tensor:
        """Losses averaged over the processes with their weights."""
        sums = self.total(torch.cat([losses * self.weight, losses.new_tensor([self.weight])]))
        return sums[:-1] / (sums[-1] if sums[-1] else 1.0)  # all 0 if no process has a label token

    def weight_of_all(self, weight: float) -> float:
        return float(self.total(torch.tensor([weight], dtype=torch.float64)))

    def first_rows(self) -> list[int]:
        """As if one process took the processes' first micro-batches, then their second ones, and so on.

        Raises:
            InputError: `rows` is not set.
        """
        if self.rows is None:
            raise InputError(
                "each row of the step gets noise of its own: set exchange.rows to the rows of each micro-batch"
            )
        counts = torch.zeros(self.world, dtype=torch.float64)
        counts[self.rank] = len(self.rows)
        most = int(self.total(counts).max())
        rows = torch.zeros(most, self.world, dtype=torch.float64)
        rows[: len(self.rows), self.rank] = torch.tensor(self.rows, dtype=torch.float64)
        rows = self.total(rows)
        before = rows.flatten().cumsum(0).view(most, self.world) - rows
        return before[: len(self.rows), self.rank].long().tolist()


class SharedCandidates(_Shared):
    """Every process has the whole batch and evaluates its share of the candidates.

    Args:
        total: all-reduce: sums a tensor over the processes.
        rank, world: index of this process and number of processes.
    """

    def __init__(self, total: SumOverRanks, rank: int, world: int):
        self.total, self.rank, self.world = total, rank, world

    def mine(self, n: int) -> range:
        """Every `world`-th candidate, from `rank` on."""
        return range(self.rank, n, self.world)

    def combine(self, losses: torch.Tensor) -> torch.Tensor:
        """The losses of all processes' candidates."""
        return self.total(losses)  # each loss is 0 on all processes but one
