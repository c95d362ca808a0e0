"""Tensors of a side's batches, one after the other in memory, so that to join them costs nothing."""

from collections.abc import Sequence

import torch


class Stacks:
    """Rows chosen out of each batch's tensors, put where the ones of the batch before end.

    Args:
        tokens, examples: in all batches.
    """

    def __init__(self, tokens: int, examples: int):
        self._all = tokens, examples
        self._here = self._all
        self._stacks: dict[str, tuple[torch.Tensor, int]] = {}

    def begin(self, tokens: int, examples: int) -> None:
        """From now on rows come from a batch of so many."""
        self._here = tokens, examples

    def put(self, name: str, source: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        """`source[places]`, after what was put under `name` before if there is room."""
        stack, used = self._stacks.get(name) or (source.new_empty(self._room(len(places)), *source.shape[1:]), 0)
        end = used + len(places)
        if end > len(stack) or source.shape[1:] != stack.shape[1:]:
            return source.index_select(0, places)
        self._stacks[name] = stack, end
        return torch.index_select(source, 0, places, out=stack[used:end])

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
