"""Criteria: scores of a candidate in a layer before training, computed from sums of its gradients."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

from hf_ft_ext.adapters import AdapterType
from hf_ft_ext.errors import InputError, did_you_mean

# The thesis's factors, by peft type. It also skips `lora_A`, whose gradient is zero as long as `lora_B` is zero.
_THESIS_FACTORS = {AdapterType.LAYER_PREFIX.value: 10_000.0, AdapterType.BOTTLENECK.value: 5.0}
_THESIS_LEFT_OUT = ".lora_A."


@dataclass(frozen=True)
class ModuleSums:
    """Sums over the n examples of the gradients `g_i` of one candidate in one layer.

    Attributes:
        peft_type: the candidate's peft type.
        powers: `sum_i |g_i|^power`, by parameter name.
        totals: `sum_i g_i`, by parameter name.
        examples: n.
    """

    peft_type: str
    powers: dict[str, torch.Tensor]
    totals: dict[str, torch.Tensor]
    examples: int


def thesis(sums: ModuleSums) -> float:
    """`factor * mean over parameters of sum_i g_i^2`, with the thesis's factor for the type, without `lora_A`."""
    kept = {name: value for name, value in sums.powers.items() if _THESIS_LEFT_OUT not in name}
    return _THESIS_FACTORS.get(sums.peft_type, 1.0) * _mean(kept.values())


def mean(sums: ModuleSums) -> float:
    """`mean over parameters of sum_i g_i^2`, over all parameters of the module."""
    return _mean(sums.powers.values())


def decrease(sums: ModuleSums) -> float:
    """Expected decrease of the loss, to first order, by a step of unit length: the norm `|G|` of the mean gradient.

    `|G|^2` is estimated without bias from products of different examples (see `_squared_mean`): the squared norm of
    the sample mean would be too large by the variance of an example's gradient over n.
    """
    return _signed_root(sum(_squared_mean(sums, name).sum().item() for name in sums.powers))


def agreement(sums: ModuleSums) -> float:
    """Alignment of the examples' gradients: `mean over i != j of <g_i, g_j>` divided by `mean over i of |g_i|^2`.

    It is 1 if all gradients are equal, about 0 if they are unrelated, and at least -1 / (n - 1). It does not depend on
    the scale or number of the parameters, which differ between types of adapters. Parameters with zero gradient, such
    as a factor whose partner starts at zero, change neither numerator nor denominator.
    """
    square = sum(value.double().sum().item() for value in sums.powers.values()) / sums.examples  # mean_i |g_i|^2
    return sum(_squared_mean(sums, name).sum().item() for name in sums.powers) / square if square else 0.0


CRITERIA: dict[str, Callable[[ModuleSums], float]] = {
    "thesis": thesis,
    "mean": mean,
    "decrease": decrease,
    "agreement": agreement,
}
NEEDS_TOTALS = ("decrease", "agreement")
DEFAULT = "agreement"


def find_criterion(name: str) -> Callable[[ModuleSums], float]:
    """Return the criterion called `name`.

    Raises:
        InputError: the name is unknown.
    """
    if name not in CRITERIA:
        raise InputError(f"criterion {name!r} is unknown{did_you_mean(name, CRITERIA)}; choose from: "
                         f"{', '.join(CRITERIA)}")  # fmt: skip
    return CRITERIA[name]


def _signed_root(square: float) -> float:
    """`sign(x) sqrt(|x|)`: noise may make the estimate of a square negative."""
    return math.copysign(abs(square) ** 0.5, square)


def _mean(values: Iterable[torch.Tensor]) -> float:
    values = list(values)
    count = sum(value.numel() for value in values)
    return sum(value.double().sum().item() for value in values) / count if count else 0.0


def _squared_mean(sums: ModuleSums, name: str) -> torch.Tensor:
    """Unbiased estimate of the squared mean gradient, `mean over i != j of g_i g_j`, entry by entry."""
    n = sums.examples
    if n < 2:
        raise InputError(f"this criterion compares gradients of different examples, but there is {n}; use 2 or more")
    total = sums.totals[name].double()
    # sum over i != j of g_i g_j = (sum_i g_i)^2 - sum_i g_i^2
    return (total.square() - sums.powers[name].double()) / (n * (n - 1))
