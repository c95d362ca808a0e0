"""Which entries of a rotated weight one step updates, and what their moments carry over."""

import torch


def top_k(rotated: torch.Tensor, k: int) -> torch.Tensor:
    """Flat indices (int32 where they fit, rising) of the `k` entries of largest magnitude."""
    indices = rotated.abs().flatten().topk(k, sorted=False).indices.sort().values
    return indices.int() if rotated.numel() <= torch.iinfo(torch.int32).max else indices


def carry_over(old: torch.Tensor | None, new: torch.Tensor, *states: torch.Tensor) -> list[torch.Tensor]:
    """Per-entry `states` of the support `old`, for the support `new`.

    Entries in both keep their state, entries that left drop it, entries that come (back) start from zero.

    Args:
        old: rising flat indices, shape (k_old,), or `None` before the first step.
        new: rising flat indices, shape (k,).
        states: tensors of shape (k_old,).
    """
    if old is None:
        return [state.new_zeros(new.shape) for state in states]
    position = torch.searchsorted(old, new).clamp_(max=old.numel() - 1)
    kept = old[position] == new
    return [torch.where(kept, state[position], torch.zeros_like(state[:1])) for state in states]
