"""Adam's averages of a gradient, carried over from one basis to another."""

import torch

from hf_ft_ext.sparse.fixed import FixedSupport
from hf_ft_ext.sparse.optimizer.support import top_k


def correction(step: torch.Tensor, betas: tuple[float, float], dtype: torch.dtype) -> list[torch.Tensor]:
    """What Adam's two averages have to be divided by after `step` steps."""
    return [1 - beta ** step.to(dtype) for beta in betas]


def corrected(
    step: torch.Tensor, exp_avg: torch.Tensor, exp_avg_sq: torch.Tensor, betas: tuple[float, float]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Adam's averages without the bias of their start from zero."""
    weight1, weight2 = correction(step, betas, exp_avg.dtype)
    return exp_avg / weight1, exp_avg_sq / weight2


def rotate_moments(
    left: torch.Tensor, right: torch.Tensor, mean: torch.Tensor, square: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Averages of the gradient and of its square in a new basis, both bias-corrected before and after.

    The mean turns as gradients do: `left mean right`. Squares know nothing of how entries move together, so they
    turn as those of independent entries would, `left^2 square right^2`, except for what the means say: the square
    of the turned mean replaces the turned squares of the mean where it is larger. Without that, entries that pull the
    same way would give a mean far above the root of the square, and a step as far above the learning rate. A change
    of order or sign of the directions carries everything over exactly.

    Args:
        left: `V'^T V` from the old to the new directions of the output side, shape (r', r).
        right: `U^T U'`, likewise for the input side, shape (c, c').
        mean: shape (r, c), zero where nothing is known.
        square: shape (r, c), likewise.

    Returns:
        `(mean, square)` of shape (r', c').
    """
    turned = left @ mean @ right
    left, right = left.square(), right.square()
    alone = left @ mean.square() @ right
    return turned, left @ square @ right + (turned.square() - alone).clamp_(min=0)


def turn_fixed_moments(state: dict, old: FixedSupport, new: FixedSupport) -> None:
    """Turn AdamW's state of a layer's values from one fixed support to another, in place.

    All entries share one count of steps, so one that the old entries hardly reach has to look like one of long
    standing: the part of it that nothing is known of gets the mean square of all.

    Args:
        state: `exp_avg` and `exp_avg_sq`, shape (k,).
    """
    left, right = new.out_columns.T @ old.out_columns, old.in_columns.T @ new.in_columns
    known = old.spread(torch.ones_like(state["exp_avg"]))
    mean, square = rotate_moments(left, right, old.spread(state["exp_avg"]), old.spread(state["exp_avg_sq"]))
    unknown = (1 - left.square() @ known @ right.square()).clamp_(min=0)
    square += unknown * state["exp_avg_sq"].mean()
    state["exp_avg"].copy_(new.pick(mean))
    state["exp_avg_sq"].copy_(new.pick(square))


def turn_moments(
    state: dict, weight: torch.Tensor, betas: tuple[float, float], left: torch.Tensor, right: torch.Tensor
) -> None:
    """Turn the state that `SparseAdamW` keeps of a weight with dynamic support into a new basis, in place.

    As many entries as before keep moments, those of the largest squares. The number of steps behind an entry is the
    mean over the old entries that it is made of; those without moments count as zero.

    Args:
        state: `step`, `exp_avg`, `exp_avg_sq`, and `indices` unless all entries have moments.
        weight: the weight, for its shape (out, in).
        left, right: as for `rotate_moments`.
    """
    step, support = state["step"], state.get("indices")
    mean, square = corrected(step, state["exp_avg"], state["exp_avg_sq"], betas)
    if support is None:
        mean, square = rotate_moments(left, right, mean, square)
    else:
        mean, square, count = (_spread(part, support, weight) for part in (mean, square, step))
        count = left.square() @ count @ right.square()
        mean, square = rotate_moments(left, right, mean, square)
        support = top_k(square, len(support))
        mean, square, count = (part.flatten()[support.long()] for part in (mean, square, count))
        step = count.round().int()
        state["indices"] = support
    weight1, weight2 = correction(step, betas, mean.dtype)
    state.update(step=step, exp_avg=mean.mul_(weight1), exp_avg_sq=square.mul_(weight2))


def _spread(values: torch.Tensor, indices: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """`values` at the flat `indices` of a tensor of zeros with the shape of `like`."""
    full = like.detach().new_zeros(like.numel())
    full[indices.long()] = values.to(full.dtype)
    return full.view(like.shape)
