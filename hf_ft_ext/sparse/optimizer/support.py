"""Choose the entries of a rotated weight that one step updates, and carry their moments over."""

import torch

# Every 17th entry is sampled to estimate a threshold for the largest ones. A prime, so that the sample covers all
# columns although their number is mostly a multiple of 64.
_STRIDE = 17


def top_k(rotated: torch.Tensor, k: int) -> torch.Tensor:
    """Return ascending flat indices (int32 if they fit) of the `k` entries of largest magnitude."""
    magnitude = rotated.abs().flatten()
    candidates = _candidates(magnitude, k)
    if candidates is None:
        indices = magnitude.topk(k, sorted=False).indices
    else:
        indices = candidates[magnitude[candidates].topk(k, sorted=False).indices]
    return _as_int32(indices.sort().values, rotated)


def above_threshold(rotated: torch.Tensor, threshold: float) -> torch.Tensor:
    """Return ascending flat indices (int32 if they fit) of the entries whose magnitude is at least `threshold`."""
    return _as_int32((rotated.abs().flatten() >= threshold).nonzero().squeeze(1), rotated)


def broadcast_support(support: torch.Tensor) -> torch.Tensor:
    """Return the first process's support on every process.

    All processes choose from the same averaged gradient, but on different processors it may differ in the last bit.
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
    """Return the per-entry `states` of the support `old` for the support `new`.

    Entries in both keep their state, entries only in `old` lose it, and entries only in `new` start from zero.

    Args:
        old: ascending flat indices, shape (k_old,), or `None` before the first step.
        new: ascending flat indices, shape (k,).
        states: tensors of shape (k_old,).
    """
    if old is None or not old.numel():
        return [state.new_zeros(new.shape) for state in states]
    position = torch.searchsorted(old, new).clamp_(max=old.numel() - 1)
    kept = old[position] == new
    return [torch.where(kept, state[position], torch.zeros_like(state[:1])) for state in states]


def _as_int32(indices: torch.Tensor, rotated: torch.Tensor) -> torch.Tensor:
    return indices.int() if rotated.numel() <= torch.iinfo(torch.int32).max else indices


def _candidates(magnitude: torch.Tensor, k: int) -> torch.Tensor | None:
    """Return indices of somewhat more than the `k` largest entries, or `None` if preselection does not pay.

    torch's `topk` on the CPU runs on one core and takes several times as long as a comparison of all entries with a
    threshold. The threshold comes from a sample, low enough to keep about 1.25 `k` entries. If fewer than `k` exceed
    it, all entries are used, so the result is exact.
    """
    if magnitude.device.type != "cpu" or magnitude.numel() < 2**18 or k < 16 * _STRIDE or 4 * k > magnitude.numel():
        return None
    sample = magnitude[::_STRIDE]
    threshold = sample.topk(k // _STRIDE + k // (4 * _STRIDE), sorted=False).values.min()
    candidates = (magnitude >= threshold).nonzero().squeeze(1)
    return candidates if k <= candidates.numel() <= magnitude.numel() // 2 else None
