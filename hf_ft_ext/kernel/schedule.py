"""How many examples are held, run and multiplied at a time, so that a bound of memory is kept."""

import contextlib
import itertools
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from torch import nn

from hf_ft_ext.errors import InputError
from hf_ft_ext.kernel.rows import ExampleRows

logger = logging.getLogger(__name__)

Bounds = tuple[int, int]  # rows as (first, last exclusive)
Edges = tuple[list[Bounds], list[Bounds]]  # of the blocks on both sides

_GB = 1e9
_MOST_ROWS = 128  # of a block's second side: what an interrupted run may lose
_SHARE_OF_FREE = 0.5
# What a batch costs beside its tokens, in tokens: as measured with the demo encoder; a GPU waits for many launches.
_CPU_BATCH, _OTHER_BATCH = 64, 4096
_CGROUPS = (  # limit and use of memory in a container
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)


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
        first, second: blocks of the kernel's two sides.
        batch_size: examples of a forward pass.
        scratch_bytes: for gradient rows multiplied out, both sides together.
        first_parts, second_parts: for each block of a side the parts that are held one at a time; one, the block
            itself, where it fits into memory.
    """

    first: list[Bounds]
    second: list[Bounds]
    batch_size: int
    scratch_bytes: int
    first_parts: list[list[Bounds]]
    second_parts: list[list[Bounds]]

    @classmethod
    def of_blocks(
        cls, first: list[Bounds], second: list[Bounds], batch_size: int = 1, scratch_bytes: int = 1
    ) -> "Plan":
        """Blocks that fit into memory as they are."""
        return cls(first, second, batch_size, scratch_bytes, [[b] for b in first], [[b] for b in second])

    def parts(self, i: int, j: int, symmetric: bool) -> Iterator[tuple[Bounds, Bounds, bool]]:
        """The parts of block (i, j), and whether both are the same rows.

        Args:
            symmetric: both sides are the same rows, so that a pair of parts on the diagonal is computed once.
        """
        for number, mine in enumerate(self.first_parts[i]):
            for other, theirs in enumerate(self.second_parts[j]):
                if not symmetric or i != j or number <= other:
                    yield mine, theirs, symmetric and mine == theirs

    def within(self, i: int, j: int, part1: Bounds, part2: Bounds) -> tuple[Bounds, Bounds]:
        """Two parts counted from the beginning of block (i, j)."""
        (a, _), (p, _) = self.first[i], self.second[j]
        return (part1[0] - a, part1[1] - a), (part2[0] - p, part2[1] - p)


def free_bytes(device: torch.device) -> int:
    """Memory that is free on `device`; on the CPU what the system, or the container's limit, leaves."""
    if device.type != "cpu":
        module = getattr(torch, device.type, None)
        if hasattr(module, "mem_get_info"):
            return int(module.mem_get_info(device)[0])
    free = psutil.virtual_memory().available
    for limit, use in _CGROUPS:
        try:
            left = int(Path(limit).read_text()) - int(Path(use).read_text())
        except (OSError, ValueError):  # no such file, or "max"
            continue
        free = min(free, max(left, 0))
    return free


def memory_bound(memory_gb: float | None, device: torch.device, processes: int = 1) -> float:
    """The bound of memory in 10^9 bytes: the one that was given, or a share of what is free, which the log says."""
    if memory_gb is not None:
        return memory_gb
    here = 1 if device.type != "cpu" else int(os.environ.get("LOCAL_WORLD_SIZE", processes))
    free = free_bytes(device) / _GB
    bound = _SHARE_OF_FREE * free / here
    shared = f" for {here} processes" if here > 1 else ""
    logger.info("kernel_memory_gb: %.3g, half of the %.3g GB that are free on %s%s", bound, free, device.type, shared)
    return bound


def batch_overhead(device: torch.device) -> int:
    """What a batch costs beside its tokens, in tokens (see `ExampleRows.by_length`)."""
    return _CPU_BATCH if device.type == "cpu" else _OTHER_BATCH


@contextlib.contextmanager
def saved_bytes(model: nn.Module) -> Iterator[dict[int, int]]:
    """Sizes of what is kept for backward passes inside, by address; weights left out."""
    saved: dict[int, int] = {}
    weights: set[int] = set()

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if not weights:  # only now: inside, the engine may have widened them
            weights.update(p.untyped_storage().data_ptr() for p in model.parameters())
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield saved


def longest_row(rows: ExampleRows) -> int:
    """Position of the row with the most tokens."""
    return max(range(len(rows)), key=lambda i: rows.lengths[i])


def measure(engine, rows: ExampleRows, fixed: int = 0, class_diagonal: bool = False) -> Needs:
    """What one example takes, measured on the longest row; with `class_diagonal` scalars are multiplied one by one."""
    longest = longest_row(rows)
    with contextlib.ExitStack() as stack:
        saved = stack.enter_context(saved_bytes(engine.model)) if engine.keeps_graph else {}
        side = engine.side(rows, [[longest]])
    row = engine.contraction.row_bytes(side.largest() * (1 if class_diagonal else side.scalars), engine.dtype)
    # the gradients of the outputs come on top of what the graph keeps
    graph = 2 * sum(saved.values()) or side.bytes()
    length = rows.lengths[longest]
    return Needs(side.bytes(), side.same_bytes(length), length, graph, row, fixed)


def refuse_too_little(memory_gb: float, least: float, unit: str = "one pair of examples") -> None:
    """Refuse a bound below `least` bytes.

    Raises:
        InputError: so it is.
    """
    if memory_gb * _GB < least:
        raise InputError(
            f"kernel_memory_gb={memory_gb:g} is too small: {unit} takes {least / _GB:.3g} GB with "
            f"this model and length; pass at least {1.01 * least / _GB:.3g}, or shorten max_seq_length"
        )


def make_plan(
    needs: Needs,
    lengths1: Sequence[int],
    lengths2: Sequence[int] | None,
    memory_gb: float,
    batch_size: int,
    block_rows: int | None,
    processes: int = 1,
    edges: Edges | None = None,
) -> Plan:
    """Blocks for examples of so many tokens (`lengths2=None`: the kernel of one set with itself) within `memory_gb`.

    Args:
        edges: blocks that are cut already, because some of them are finished; those that do not fit into memory are
            computed in parts.

    Raises:
        InputError: not even one example fits.
    """
    refuse_too_little(memory_gb, needs.least)
    spare = memory_gb * _GB - needs.least
    batch = max(1, min(batch_size, 1 + int(0.25 * spare // needs.graph)))
    rows = max(1, 1 + int(0.25 * spare // (2 * needs.row)))
    scratch = max(1, 2 * rows * needs.row)
    room = 2 * needs.record + 0.5 * spare
    left = needs.records(lengths1)
    right = left if lengths2 is None else needs.records(lengths2)
    if edges is not None:
        largest = [max(sum(sizes[a:b]) for a, b in side) for sizes, side in zip((left, right), edges, strict=True)]
        one_side = lengths2 is None and len(edges[0]) == 1
        fits = (largest[0] if one_side else sum(largest)) <= room
        if fits:
            return Plan.of_blocks(*edges, batch, scratch)
        parts = [
            [_split_within(bounds, sizes, room / 2) for bounds in side]
            for sizes, side in zip((left, right), edges, strict=True)
        ]
        return Plan(*edges, batch, scratch, *parts)
    if lengths2 is None:
        whole = sum(left) <= room
        most = min(block_rows or len(left), -(-len(left) // processes))
        first = second = _split(left, room if whole else room / 2, most)
    else:
        first = _split(left, room / 2, len(left))
        held = max(sum(left[a:b]) for a, b in first)
        second = _split(right, room - held, min(block_rows or _MOST_ROWS, -(-len(right) // processes)))
    return Plan.of_blocks(first, second, batch, scratch)


def _split_within(bounds: Bounds, sizes: Sequence[float], room: float) -> list[Bounds]:
    """`_split` of the rows `bounds`, which stay numbered as they are."""
    first, last = bounds
    return [(first + a, first + b) for a, b in _split(sizes[first:last], room, last - first)]


def _split(sizes: Sequence[float], room: float, most: int) -> list[tuple[int, int]]:
    """The fewest even blocks of up to `most` examples that take up to `room` bytes."""
    n, before = len(sizes), [0.0, *itertools.accumulate(sizes)]
    for blocks in range(max(-(-n // most), int(before[n] / room)) or 1, n):
        cut = list(itertools.pairwise(n * i // blocks for i in range(blocks + 1)))
        if all(before[last] - before[first] <= room for first, last in cut):
            return cut
    return [(i, i + 1) for i in range(n)]
