"""`TokenBuffers`: stores the tensors of several batches contiguously, so that joining them needs no copy."""

from collections.abc import Sequence

import torch

_CHUNK = 2**26  # bytes; the C library maps allocations of this size separately from its heap
_ALIGNMENT = 64


class TokenBuffers:
    """Appends selected rows of each batch's tensors to buffers, one buffer per name.

    Args:
        tokens, examples: totals over all batches.
    """

    def __init__(self, tokens: int, examples: int):
        self._all = tokens, examples
        self._batch_sizes = self._all
        self._buffers: dict[str, tuple[torch.Tensor, int]] = {}
        self._chunk: torch.Tensor | None = None  # the unused rest of the current chunk

    def begin(self, tokens: int, examples: int) -> None:
        """Start a batch with these numbers of tokens and examples."""
        self._batch_sizes = tokens, examples

    def put(self, name: str, source: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Return `source[positions]`, stored behind the earlier rows of `name` if there is room."""
        buffer, used = self._buffers.get(name) or (self._new(self._room(len(positions)), source), 0)
        end = used + len(positions)
        if end > len(buffer) or source.shape[1:] != buffer.shape[1:]:
            return source.index_select(0, positions)
        self._buffers[name] = buffer, end
        return torch.index_select(source, 0, positions, out=buffer[used:end])

    def _new(self, rows: int, like: torch.Tensor) -> torch.Tensor:
        """Allocate `[rows, ...]`, from a large chunk if it is small.

        Small long-lived tensors between the short-lived ones of a batch would keep the heap from shrinking.
        """
        size = rows * like.shape[1:].numel() * like.element_size()
        if like.device.type != "cpu" or size > _CHUNK:
            return like.new_empty(rows, *like.shape[1:])
        if self._chunk is None or size > len(self._chunk):
            self._chunk = torch.empty(_CHUNK, dtype=torch.uint8)
        buffer = self._chunk[:size].view(like.dtype).view(rows, *like.shape[1:])
        self._chunk = self._chunk[-(-size // _ALIGNMENT) * _ALIGNMENT :]
        return buffer

    def _room(self, rows: int) -> int:
        """Estimate the rows of all batches from the first: a fixed number per token, or per example."""
        for here, every in zip(self._batch_sizes, self._all, strict=True):
            if rows % here == 0:
                return rows // here * every
        return rows


def concatenated(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """`torch.cat(parts)`, without a copy if the parts are contiguous in memory."""
    first, end = parts[0], parts[0].data_ptr()
    storage = first.untyped_storage().data_ptr()
    for part in parts:
        if part.data_ptr() != end or part.untyped_storage().data_ptr() != storage or not part.is_contiguous():
            return torch.cat(list(parts))
        end += part.numel() * part.element_size()
    return first.as_strided((sum(map(len, parts)), *first.shape[1:]), first.stride())
