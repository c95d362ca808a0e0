"""Block schedule: how many examples are stored, run and multiplied at a time under a memory limit."""

import contextlib
import itertools
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from hf_ft_ext.errors import InputError
from hf_ft_ext.kernel.rows import ExampleRows
from hf_ft_ext.per_example.saved import saved_bytes

logger = logging.getLogger(__name__)

Bounds = tuple[int, int]  # a range of rows: (first, last exclusive)
Edges = tuple[list[Bounds], list[Bounds]]  # row ranges of the blocks, for the first and the second side

_GB = 1e9
_MOST_ROWS = 128  # of a block's second side; an interrupted run loses at most one block
_SHARE_OF_FREE = 0.5
# Fixed cost of a batch in tokens, measured with the demo encoder. It is high on a GPU because of kernel launches.
_CPU_BATCH, _OTHER_BATCH = 64, 4096
_CGROUPS = (  # memory limit and usage in a container
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)


@dataclass(frozen=True)
class MemoryNeeds:
    """Memory needs of the longest example, in bytes.

    Attributes:
        example: its stored gradients.
        constant: the part of `example` that does not depend on the number of tokens.
        tokens: its number of tokens.
        graph: what a forward and backward pass needs while it runs.
        row: its full gradient rows for the largest parameter.
        fixed: needs that do not depend on the examples: weights in a wider type.
    """

    example: int
    constant: int
    tokens: int
    graph: int
    row: int
    fixed: int = 0

    @property
    def least(self) -> int:
        """The smallest budget that works: one example on each side."""
        return self.fixed + 2 * self.example + self.graph + 2 * self.row

    def examples(self, lengths: Sequence[int]) -> list[float]:
        """Estimate the bytes of stored gradients for examples of these lengths (a few percent too much)."""
        return [self.constant + (self.example - self.constant) * length / self.tokens for length in lengths]


@dataclass(frozen=True)
class BlockSchedule:
    """How a kernel is divided into blocks.

    Attributes:
        first, second: row ranges of the blocks on the kernel's two sides.
        batch_size: examples in a forward pass.
        scratch_bytes: memory for full gradient rows of both sides together.
        first_parts, second_parts: for each block of a side, the parts that are in memory one at a time; a block that
            fits into memory has itself as its only part.
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
    ) -> "BlockSchedule":
        """A schedule of blocks that fit into memory without further division."""
        return cls(first, second, batch_size, scratch_bytes, [[b] for b in first], [[b] for b in second])

    def parts(self, i: int, j: int, symmetric: bool) -> Iterator[tuple[Bounds, Bounds, bool]]:
        """Yield the pairs of parts of block (i, j), and whether both parts are the same rows.

        Args:
            symmetric: both sides hold the same rows; in a diagonal block each pair of parts is then computed once.
        """
        for number, mine in enumerate(self.first_parts[i]):
            for other, theirs in enumerate(self.second_parts[j]):
                if not symmetric or i != j or number <= other:
                    yield mine, theirs, symmetric and mine == theirs

    def within(self, i: int, j: int, part1: Bounds, part2: Bounds) -> tuple[Bounds, Bounds]:
        """The row ranges of two parts relative to the start of block (i, j)."""
        (a, _), (p, _) = self.first[i], self.second[j]
        return (part1[0] - a, part1[1] - a), (part2[0] - p, part2[1] - p)


def free_bytes(device: torch.device) -> int:
    """Free memory on `device`; on the CPU, the smaller of the system's and the container's."""
    if device.type != "cpu":
        module = getattr(torch, device.type, None)
        if module is not None and hasattr(module, "mem_get_info"):
            return int(module.mem_get_info(device)[0])
    free = psutil.virtual_memory().available
    for limit, use in _CGROUPS:
        try:
            left = int(Path(limit).read_text()) - int(Path(use).read_text())
        except (OSError, ValueError):  # the file does not exist, or it says "max" (no limit)
            continue
        free = min(free, max(left, 0))
    return free


def memory_bound(memory_gb: float | None, device: torch.device, processes: int = 1) -> float:
    """The memory limit in 10^9 bytes: `memory_gb`, or a share of the free memory, which is logged."""
    if memory_gb is not None:
        return memory_gb
    here = 1 if device.type != "cpu" else int(os.environ.get("LOCAL_WORLD_SIZE", processes))
    free = free_bytes(device) / _GB
    bound = _SHARE_OF_FREE * free / here
    shared = f" for {here} processes" if here > 1 else ""
    logger.info("kernel_memory_gb: %.3g, half of the %.3g GB free on %s%s", bound, free, device.type, shared)
    return bound


def batch_overhead(device: torch.device) -> int:
    """Fixed cost of a batch, in tokens (see `ExampleRows.by_length`)."""
    return _CPU_BATCH if device.type == "cpu" else _OTHER_BATCH


def longest_row(rows: ExampleRows) -> int:
    """Position of the row with the most tokens."""
    return max(range(len(rows)), key=lambda i: rows.lengths[i])


def measure(engine, rows: ExampleRows, fixed: int = 0, class_diagonal: bool = False) -> MemoryNeeds:
    """Measure the memory needs on the longest row; `class_diagonal` multiplies the scalars one at a time."""
    longest = longest_row(rows)
    with contextlib.ExitStack() as stack:
        saved = stack.enter_context(saved_bytes(engine.model)) if engine.builds_batch_graph else {}
        side = engine.gradient_rows(rows, [[longest]])
    row = engine.contraction.row_bytes(side.largest() * (1 if class_diagonal else side.scalars), engine.dtype)
    # During the backward pass, output gradients are about as large as the saved tensors.
    graph = 2 * sum(saved.values()) or side.bytes()
    length = rows.lengths[longest]
    return MemoryNeeds(side.bytes(), side.constant_bytes(length), length, graph, row, fixed)


def refuse_too_little(memory_gb: float, least: float, unit: str = "one pair of examples") -> None:
    """Refuse a limit below `least` bytes.

    Raises:
        InputError: the limit is too low.
    """
    if memory_gb * _GB < least:
        raise InputError(
            f"kernel_memory_gb={memory_gb:g} is too small: {unit} takes {least / _GB:.3g} GB with "
            f"this model and length; pass at least {1.01 * least / _GB:.3g}, or shorten max_seq_length"
        )


def make_schedule(
    needs: MemoryNeeds,
    lengths1: Sequence[int],
    lengths2: Sequence[int] | None,
    memory_gb: float,
    batch_size: int,
    block_rows: int | None,
    processes: int = 1,
    edges: Edges | None = None,
) -> BlockSchedule:
    """Divide the kernel into blocks that fit into `memory_gb`.

    A quarter of the spare memory goes to the forward and backward pass, a quarter to full gradient rows, and half to
    stored gradients.

    Args:
        lengths1, lengths2: tokens of the examples on the two sides; `lengths2=None` = the kernel of one set with
            itself.
        edges: existing blocks, some of which are finished. Blocks that do not fit into memory are computed in parts.

    Raises:
        InputError: not even one example fits.
    """
    refuse_too_little(memory_gb, needs.least)
    spare = memory_gb * _GB - needs.least
    batch = max(1, min(batch_size, 1 + int(0.25 * spare // needs.graph)))
    rows = max(1, 1 + int(0.25 * spare // (2 * needs.row)))
    scratch = max(1, 2 * rows * needs.row)
    room = 2 * needs.example + 0.5 * spare
    left = needs.examples(lengths1)
    right = left if lengths2 is None else needs.examples(lengths2)
    if edges is not None:
        largest = [max(sum(sizes[a:b]) for a, b in side) for sizes, side in zip((left, right), edges, strict=True)]
        one_side = lengths2 is None and len(edges[0]) == 1
        fits = (largest[0] if one_side else sum(largest)) <= room
        if fits:
            return BlockSchedule.of_blocks(*edges, batch, scratch)
        parts = [
            [_split_within(bounds, sizes, room / 2) for bounds in side]
            for sizes, side in zip((left, right), edges, strict=True)
        ]
        return BlockSchedule(*edges, batch, scratch, *parts)
    if lengths2 is None:
        whole = sum(left) <= room
        most = min(block_rows or len(left), -(-len(left) // processes))
        first = second = _split(left, room if whole else room / 2, most)
    else:
        first = _split(left, room / 2, len(left))
        held = max(sum(left[a:b]) for a, b in first)
        second = _split(right, room - held, min(block_rows or _MOST_ROWS, -(-len(right) // processes)))
    return BlockSchedule.of_blocks(first, second, batch, scratch)


def _split_within(bounds: Bounds, sizes: Sequence[float], room: float) -> list[Bounds]:
    """`_split` the rows in `bounds`, keeping their numbering."""
    first, last = bounds
    return [(first + a, first + b) for a, b in _split(sizes[first:last], room, last - first)]


def _split(sizes: Sequence[float], room: float, most: int) -> list[tuple[int, int]]:
    """Split into the fewest even blocks of up to `most` examples that take up to `room` bytes each."""
    n, before = len(sizes), [0.0, *itertools.accumulate(sizes)]
    for blocks in range(max(-(-n // most), int(before[n] / room)) or 1, n):
        cut = list(itertools.pairwise(n * i // blocks for i in range(blocks + 1)))
        if all(before[last] - before[first] <= room for first, last in cut):
            return cut
    return [(i, i + 1) for i in range(n)]
