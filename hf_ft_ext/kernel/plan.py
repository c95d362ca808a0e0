"""How many examples are held, run and multiplied at a time, so that a bound of memory is kept."""

import contextlib
import itertools
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
        record: kept for it.
        graph: what a forward and backward pass needs while it runs.
        row: its gradient rows of the largest parameter multiplied out.
        fixed: taken whatever the number of examples: weights in a wider type.
    """

    record: int
    graph: int
    row: int
    fixed: int = 0

    @property
    def least(self) -> int:
        """The smallest budget that works: one example on either side."""
        return self.fixed + 2 * self.record + self.graph + 2 * self.row


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


def measure(engine, rows: ExampleRows, fixed: int = 0) -> Needs:
    """What one example takes, measured on the longest row."""
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
    row = engine.contraction.row_bytes(side.largest() * side.scalars, engine.dtype)
    # the gradients of the outputs come on top of what the graph keeps
    return Needs(side.bytes(), 2 * sum(saved.values()) or side.bytes(), row, fixed)


def make_plan(
    needs: Needs,
    n1: int,
    n2: int | None,
    memory_gb: float,
    batch_size: int,
    block_rows: int | None,
    processes: int = 1,
) -> Plan:
    """Blocks for `n1 x n2` examples (`n2=None`: the kernel of one set with itself) within `memory_gb`.

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
    records = 2 + int(0.5 * spare // needs.record)
    if n2 is None:
        most = n1 if records >= n1 else max(1, records // 2)
        most = min(most, block_rows) if block_rows else most
        first = second = _split(n1, most if processes == 1 else min(most, -(-n1 // processes)))
    else:
        held = min(n1, records // 2)
        room = min(records - held, block_rows or _MOST_ROWS, -(-n2 // processes))
        first, second = _split(n1, held), _split(n2, room)
    return Plan(first, second, batch, max(1, 2 * rows * needs.row))


def _split(n: int, most: int) -> list[tuple[int, int]]:
    """Even blocks of up to `most`."""
    blocks = -(-n // most)
    bounds = [n * i // blocks for i in range(blocks + 1)]
    return list(itertools.pairwise(bounds))
