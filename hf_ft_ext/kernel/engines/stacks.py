"""Tensors of a side's batches, one after the other in memory, so that to join them costs nothing."""

from collections.abc import Sequence

import torch

_CHUNK = 2**26  # bytes: pieces that the C library takes from the system one by one, not from its heap
_ALIGNMENT = 64


class Stacks:
    """Rows chosen out of each batch's tensors, put where the ones of the batch before end.

    Args:
        tokens, examples: in all batches.
    """

    def __init__(self, tokens: int, examples: int):
        self._all = tokens, examples
        self._here = self._all
        self._stacks: dict[str, tuple[torch.Tensor, int]] = {}
        self._chunk: torch.Tensor | None = None  # what is left of it

    def begin(self, tokens: int, examples: int) -> None:
        """From now on rows come from a batch of so many."""
        self._here = tokens, examples

    def put(self, name: str, source: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        """`source[places]`, after what was put under `name` before if there is room."""
        stack, used = self._stacks.get(name) or (self._new(self._room(len(places)), source), 0)
        end = used + len(places)
        if end > len(stack) or source.shape[1:] != stack.shape[1:]:
            return source.index_select(0, places)
        self._stacks[name] = stack, end
        return torch.index_select(source, 0, places, out=stack[used:end])

    def _new(self, rows: int, like: torch.Tensor) -> torch.Tensor:
        """`[rows, ...]`. Between tensors that live for a batch, those of a side would keep the heap from shrinking."""
        size = rows * like.shape[1:].numel() * like.element_size()
        if like.device.type != "cpu" or size > _CHUNK:
            return like.new_empty(rows, *like.shape[1:])
        if self._chunk is None or size > len(self._chunk):
            self._chunk = torch.empty(_CHUNK, dtype=torch.uint8)
        stack = self._chunk[:size].view(like.dtype).view(rows, *like.shape[1:])
        self._chunk = self._chunk[-(-size // _ALIGNMENT) * _ALIGNMENT :]
        return stack

    def _room(self, rows: int) -> int:
        """Rows of all batches if this one's are some for every token, or some for every example."""
        for here, every in zip(self._here, self._all, strict=True):
            if rows % here == 0:
                return rows // here * every
        return rows


def joined(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """`torch.cat(parts)`; no copy where they lie one after the other in memory."""
    first, end = parts[0], parts[0].data_ptr()
    storage = first.untyped_storage().data_ptr()
    for part in parts:
        if part.data_ptr() != end or part.untyped_storage().data_ptr() != storage or not part.is_contiguous():
            return torch.cat(list(parts))
        end += part.numel() * part.element_size()
    return first.as_strided((sum(map(len, parts)), *first.shape[1:]), first.stride())
