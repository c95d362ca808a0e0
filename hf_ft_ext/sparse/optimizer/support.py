"""Which entries of a rotated weight one step updates, and what their moments carry over."""

import torch

# One entry of so many is looked at to find out where the largest ones begin. A prime: the number of columns,
# mostly a multiple of 64, must not make the sample a sample of a few columns.
_STRIDE = 17


def top_k(rotated: torch.Tensor, k: int) -> torch.Tensor:
    """Flat indices (int32 where they fit, rising) of the `k` entries of largest magnitude."""
    magnitude = rotated.abs().flatten()
    candidates = _candidates(magnitude, k)
    if candidates is None:
        indices = magnitude.topk(k, sorted=False).indices
    else:
        indices = candidates[magnitude[candidates].topk(k, sorted=False).indices]
    return _compact(indices.sort().values, rotated)


def above(rotated: torch.Tensor, threshold: float) -> torch.Tensor:
    """Flat indices (int32 where they fit, rising) of the entries whose magnitude is at least `threshold`."""
    return _compact((rotated.abs().flatten() >= threshold).nonzero().squeeze(1), rotated)


def _compact(indices: torch.Tensor, rotated: torch.Tensor) -> torch.Tensor:
    return indices.int() if rotated.numel() <= torch.iinfo(torch.int32).max else indices


def _candidates(magnitude: torch.Tensor, k: int) -> torch.Tensor | None:
    """Indices of somewhat more than the `k` largest entries, or `None` where looking at all is as good.

    torch's selection on the CPU runs on one core and takes several times as long as a comparison of all
    entries with a threshold. The threshold is one that the k-th largest entry of a sample exceeds; a sample
    that misleads (too few candidates) is noticed, so the result is exact.
    """
    if magnitude.device.type != "cpu" or magnitude.numel() < 2**18 or k < 16 * _STRIDE or 4 * k > magnitude.numel():
        return None
    sample = magnitude[::_STRIDE]
    threshold = sample.topk(k // _STRIDE + k // (4 * _STRIDE), sorted=False).values.min()
    candidates = (magnitude >= threshold).nonzero().squeeze(1)
    return candidates if k <= candidates.numel() <= magnitude.numel() // 2 else None


def agreed(support: torch.Tensor) -> torch.Tensor:
    """The first process's support, on every process.

    All processes choose from the same averaged gradient; on unlike processors it may differ in the last bit.
    """
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return support
    if torch.distributed.get_world_size() == 1:
        return support
    count = torch.tensor(len(support), device=support.device)
    torch.distributed.broadcast(count, 0)  # with a threshold the number of entries may differ too
    result = support if len(support) == int(count) else support.new_empty(int(count))
    torch.distributed.broadcast(result, 0)
    return result


def carry_over(old: torch.Tensor | None, new: torch.Tensor, *states: torch.Tensor) -> list[torch.Tensor]:
    """Per-entry `states` of the support `old`, for the support `new`.

    Entries in both keep their state, entries that left drop it, entries that come (back) start from zero.

    Args:
        old: rising flat indices, shape (k_old,), or `None` before the first step.
        new: rising flat indices, shape (k,).
        states: tensors of shape (k_old,).
    """
    if old is None or not old.numel():
        return [state.new_zeros(new.shape) for state in states]
    position = torch.searchsorted(old, new).clamp_(max=old.numel() - 1)
    kept = old[position] == new
    return [torch.where(kept, state[position], torch.zeros_like(state[:1])) for state in states]
