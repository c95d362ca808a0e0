"""How good a module in a layer looks before it is trained: numbers out of its gradients' sums."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

from hf_ft_ext.adapters import AdapterType
from hf_ft_ext.errors import InputError, did_you_mean

# The thesis's factors, by peft type. It also leaves `lora_A` out, whose gradient is zero as long as `lora_B` is.
_THESIS_FACTORS = {AdapterType.LAYER_PREFIX.value: 10_000.0, AdapterType.BOTTLENECK.value: 5.0}
_THESIS_LEFT_OUT = ".lora_A."


@dataclass(frozen=True)
class ModuleSums:
    """What is known of one candidate in one layer.

    Attributes:
        peft_type: its kind.
        powers: per parameter name, the sum over examples of |gradient|^power.
        totals: per parameter name, the sum of the gradients.
        examples: how many examples.
    """

    peft_type: str
    powers: dict[str, torch.Tensor]
    totals: dict[str, torch.Tensor]
    examples: int


def thesis(sums: ModuleSums) -> float:
    """Mean of the summed squared gradients over the module's parameters, times the thesis's factor for its kind."""
    kept = {name: value for name, value in sums.powers.items() if _THESIS_LEFT_OUT not in name}
    return _THESIS_FACTORS.get(sums.peft_type, 1.0) * _mean(kept.values())


def mean(sums: ModuleSums) -> float:
    """Mean of the summed squared gradients over the module's parameters; no factors, nothing left out."""
    return _mean(sums.powers.values())


def decrease(sums: ModuleSums) -> float:
    """Expected decrease of the loss, to first order, by a gradient step of unit length: the mean gradient's norm.

    Estimated without bias: the squared norm of a mean over n examples is too large by the examples' scatter over n.
    """
    return _root(sum(_signal(sums, name).sum().item() for name in sums.powers))


def agreement(sums: ModuleSums) -> float:
    """How far gradients of examples point the same way: the mean product of two over the mean square of one.

    1 if all are equal, about 0 if they are unrelated, -1 / (examples - 1) at least. It is the part of the gradients
    that a step can use, free of the parameters' scale and number, which differ from kind to kind: a factor whose
    partner starts at zero changes neither product nor square.
    """
    scatter = sum(value.double().sum().item() for value in sums.powers.values()) / sums.examples
    return sum(_signal(sums, name).sum().item() for name in sums.powers) / scatter if scatter else 0.0


def _root(square: float) -> float:
    """The root, with the sign of an estimate that noise has made negative."""
    return math.copysign(abs(square) ** 0.5, square)


def _mean(values: Iterable[torch.Tensor]) -> float:
    values = list(values)
    count = sum(value.numel() for value in values)
    return sum(value.double().sum().item() for value in values) / count if count else 0.0


def _signal(sums: ModuleSums, name: str) -> torch.Tensor:
    """Unbiased estimate of the squared mean gradient, per scalar."""
    n = sums.examples
    if n < 2:
        raise InputError(f"this criterion tells signal from noise, and {n} example has no scatter; take 2 or more")
    total = sums.totals[name].double()
    return (total.square() - sums.powers[name].double()) / (n * (n - 1))


CRITERIA: dict[str, Callable[[ModuleSums], float]] = {
    "thesis": thesis,
    "mean": mean,
    "decrease": decrease,
    "agreement": agreement,
}
NEEDS_TOTALS = ("decrease", "agreement")
DEFAULT = "agreement"


def find_criterion(name: str) -> Callable[[ModuleSums], float]:
    """The criterion called `name`.

    Raises:
        InputError: there is none.
    """
    if name not in CRITERIA:
        raise InputError(f"criterion {name!r} is unknown{did_you_mean(name, CRITERIA)}; choose from: "
                         f"{', '.join(CRITERIA)}")  # fmt: skip
    return CRITERIA[name]
