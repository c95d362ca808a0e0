"""How many examples are held, run and multiplied at a time, so that a bound of memory is kept."""

import contextlib
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from hf_ft_ext.errors import InputError
from hf_ft_ext.kernel.rows import ExampleRows

_GB = 1e9
_MOST_ROWS = 128  # of a block's second side: what an interrupted run may lose


@dataclass(frozen=True)
class Needs:
    """Bytes that one example takes.

    Attributes:
        record: kept for the longest.
        same: the part of `record` that is the same for a short one.
        longest: tokens of the longest.
        graph: what a forward and backward pass needs while it runs.
        row: its gradient rows of the largest parameter multiplied out.
        fixed: taken whatever the number of examples: weights in a wider type.
    """

    record: int
    same: int
    longest: int
    graph: int
    row: int
    fixed: int = 0

    @property
    def least(self) -> int:
        """The smallest budget that works: one example on either side."""
        return self.fixed + 2 * self.record + self.graph + 2 * self.row

    def records(self, lengths: Sequence[int]) -> list[float]:
        """What is kept for examples of so many tokens; a few percent more where tokens of the longest are alike."""
        return [self.same + (self.record - self.same) * length / self.longest for length in lengths]


@dataclass(frozen=True)
class Plan:
    """How a kernel is cut.

    Attributes:
        first, second: blocks of the kernel's two sides as (first, last exclusive).
        batch_size: examples of a forward pass.
        scratch_bytes: for gradient rows multiplied out, both sides together.
    """

    first: list[tuple[int, int]]
    second: list[tuple[int, int]]
    batch_size: int
    scratch_bytes: int


def measure(engine, rows: ExampleRows, fixed: int = 0, class_diagonal: bool = False) -> Needs:
    """What one example takes, measured on the longest row; with `class_diagonal` scalars are multiplied one by one."""
    longest = max(range(len(rows)), key=lambda i: rows.lengths[i])
    saved: dict[int, int] = {}
    weights: set[int] = set()

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if not weights:  # only now: inside, the engine may have widened them
            weights.update(p.untyped_storage().data_ptr() for p in engine.model.parameters())
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    with hooks if engine.keeps_graph else contextlib.nullcontext():
        side = engine.side(rows, [[longest]])
    row = engine.contraction.row_bytes(side.largest() * (1 if class_diagonal else side.scalars), engine.dtype)
    # the gradients of the outputs come on top of what the graph keeps
    graph = 2 * sum(saved.values()) or side.bytes()
    length = rows.lengths[longest]
    return Needs(side.bytes(), side.same_bytes(length), length, graph, row, fixed)


def make_plan(
    needs: Needs,
    lengths1: Sequence[int],
    lengths2: Sequence[int] | None,
    memory_gb: float,
    batch_size: int,
    block_rows: int | None,
    processes: int = 1,
) -> Plan:
    """Blocks for examples of so many tokens (`lengths2=None`: the kernel of one set with itself) within `memory_gb`.

    Raises:
        InputError: not even one example fits.
    """
    budget = memory_gb * _GB
    if budget < needs.least:
        raise InputError(
            f"kernel_memory_gb={memory_gb:g} is too small: one pair of examples takes {needs.least / _GB:.3g} GB with "
            f"this model and length; pass at least {1.01 * needs.least / _GB:.3g}, or shorten max_seq_length"
        )
    spare = budget - needs.least
    batch = max(1, min(batch_size, 1 + int(0.25 * spare // needs.graph)))
    rows = max(1, 1 + int(0.25 * spare // (2 * needs.row)))
    room = 2 * needs.record + 0.5 * spare
    left = needs.records(lengths1)
    if lengths2 is None:
        whole = sum(left) <= room
        most = min(block_rows or len(left), -(-len(left) // processes))
        first = second = _split(left, room if whole else room / 2, most)
    else:
        first = _split(left, room / 2, len(left))
        held = max(sum(left[a:b]) for a, b in first)
        right = needs.records(lengths2)
        second = _split(right, room - held, min(block_rows or _MOST_ROWS, -(-len(right) // processes)))
    return Plan(first, second, batch, max(1, 2 * rows * needs.row))


def _split(sizes: Sequence[float], room: float, most: int) -> list[tuple[int, int]]:
    """The fewest even blocks of up to `most` examples that take up to `room` bytes."""
    n, before = len(sizes), [0.0, *itertools.accumulate(sizes)]
    for blocks in range(max(-(-n // most), int(before[n] / room)) or 1, n):
        cut = list(itertools.pairwise(n * i // blocks for i in range(blocks + 1)))
        if all(before[last] - before[first] <= room for first, last in cut):
            return cut
    return [(i, i + 1) for i in range(n)]
