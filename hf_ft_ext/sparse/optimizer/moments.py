"""Rotate Adam's moments from one basis into another."""

import torch

from hf_ft_ext.sparse.fixed import FixedSupport
from hf_ft_ext.sparse.optimizer.support import top_k


def correction(step: torch.Tensor, betas: tuple[float, float], dtype: torch.dtype) -> list[torch.Tensor]:
    """Return Adam's bias corrections after `step` steps: `1 - beta1^step` and `1 - beta2^step`."""
    return [1 - beta ** step.to(dtype) for beta in betas]


def corrected(
    step: torch.Tensor, exp_avg: torch.Tensor, exp_avg_sq: torch.Tensor, betas: tuple[float, float]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return Adam's bias-corrected moments, `m / (1 - beta1^step)` and `v / (1 - beta2^step)`."""
    weight1, weight2 = correction(step, betas, exp_avg.dtype)
    return exp_avg / weight1, exp_avg_sq / weight2


def rotate_moments(
    left: torch.Tensor, right: torch.Tensor, mean: torch.Tensor, square: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotate the mean of the gradient and the mean of its square into a new basis.

    The mean rotates as gradients do: `left mean right`. The mean squares hold no covariances, so they rotate as
    those of uncorrelated entries: `left^2 square right^2`, with elementwise squares. The means give a lower bound,
    because a mean square is at least the square of the mean. (For Adam's two averages, which have different weights,
    this holds approximately.) Therefore the part of the mean squares that comes from the means,
    `left^2 mean^2 right^2`, is replaced by `(left mean right)^2` where that is larger. Without this, correlated
    entries would give a mean far above the root mean square, and a step far above the learning rate. A permutation or
    sign change of the directions is exact. Means and mean squares are compared, so pass Adam's moments with their
    bias correction (`corrected`).

    Args:
        left: `V'^T V` from the old to the new directions of the output side, shape (r', r).
        right: `U^T U'`, likewise for the input side, shape (c, c').
        mean: shape (r, c), zero for entries without moments.
        square: shape (r, c), likewise.

    Returns:
        `(mean, square)` of shape (r', c').
    """
    rotated = left @ mean @ right
    left, right = left.square(), right.square()
    uncorrelated = left @ mean.square() @ right  # the rotated squares of the means, as if uncorrelated
    # left^2 square right^2 + max(0, (left mean right)^2 - left^2 mean^2 right^2)
    return rotated, left @ square @ right + (rotated.square() - uncorrelated).clamp_(min=0)


def rotate_fixed_moments(state: dict, betas: tuple[float, float], old: FixedSupport, new: FixedSupport) -> None:
    """Rotate AdamW's state of a layer's values from one fixed support into another, in place.

    All entries share one step count. A new entry that the old entries hardly span would have a second moment near
    zero, and a step that is too large. So its unknown part, `1 - left^2 known right^2`, gets the mean of all second
    moments.

    Args:
        state: `step`, a scalar, and `exp_avg` and `exp_avg_sq`, shape (k,).

    Raises:
        ValueError: a support is in the identity basis, which has no rotation.
    """
    if (before := old.sides) is None or (after := new.sides) is None:
        raise ValueError("a support in the identity basis has nothing to rotate")
    left, right = after[0].T @ before[0], before[1].T @ after[1]  # V'^T V and U^T U'
    known = old.spread(torch.ones_like(state["exp_avg"]))  # 1 at the old entries, else 0
    # The rotation compares squared means with mean squares, so both need their bias correction.
    mean, square = corrected(state["step"], state["exp_avg"], state["exp_avg_sq"], betas)
    average = square.mean()
    mean, square = rotate_moments(left, right, old.spread(mean), old.spread(square))
    unknown = (1 - left.square() @ known @ right.square()).clamp_(min=0)
    square += unknown * average
    weight1, weight2 = correction(state["step"], betas, mean.dtype)
    state["exp_avg"].copy_(new.pick(mean).mul_(weight1))
    state["exp_avg_sq"].copy_(new.pick(square).mul_(weight2))


def rotate_dynamic_moments(
    state: dict, weight: torch.Tensor, betas: tuple[float, float], left: torch.Tensor, right: torch.Tensor
) -> None:
    """Rotate the state of `SparseAdamW` for a weight with dynamic support into a new basis, in place.

    The number of entries with moments stays the same: those with the largest second moments. The step count of an
    entry is the weighted mean over the old entries that contribute to it; entries without moments count as zero.

    Args:
        state: `step`, `exp_avg`, `exp_avg_sq`, and `indices` unless all entries have moments.
        weight: the weight, for its shape (out, in).
        left, right: as for `rotate_moments`.
    """
    step, support = state["step"], state.get("indices")
    # An expert that got no tokens since the last refresh may have entries with a count of 0, and moments of 0.
    mean, square = corrected(step.clamp(min=1), state["exp_avg"], state["exp_avg_sq"], betas)
    if support is None:
        mean, square = rotate_moments(left, right, mean, square)
    else:
        mean, square, count = (_scattered(part, support, weight) for part in (mean, square, step))
        count = left.square() @ count @ right.square()  # weights: squared entries of the rotations
        mean, square = rotate_moments(left, right, mean, square)
        support = top_k(square, len(support))
        mean, square, count = (part.flatten()[support.long()] for part in (mean, square, count))
        step = count.round().int()
        state["indices"] = support
    weight1, weight2 = correction(step, betas, mean.dtype)
    state.update(step=step, exp_avg=mean.mul_(weight1), exp_avg_sq=square.mul_(weight2))


def _scattered(values: torch.Tensor, indices: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Return a tensor of zeros with the shape of `like` and `values` at the flat `indices`."""
    full = like.detach().new_zeros(like.numel())
    full[indices.long()] = values.to(full.dtype)
    return full.view(like.shape)
