"""Stochastic rounding to 16 bits: to one of the two nearest numbers, exact in the mean."""

import math

import pytest
import torch

from hf_ft_ext.gradientless.optimizers.perturbation.update_rules import rounded_stochastically


def neighbours(value: float, dtype: torch.dtype) -> tuple[float, float]:
    """The numbers of a 16-bit type below and above `value`, by search among all of them."""
    numbers = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype).double()
    numbers = numbers[numbers.isfinite()]
    return float(numbers[numbers <= value].max()), float(numbers[numbers >= value].min())


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("value", [1 + 2**-13, 1.7071, 0.9999, 0.0213, 3e-5, 2e-6, 1e-8, 254.9, 0.0])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rounding_is_to_a_neighbour_and_exact_in_the_mean(dtype, value, sign):
    exact = torch.full((100, 401), sign * value)
    below, above = neighbours(exact[0, 0].item(), dtype)
    rounded = rounded_stochastically(exact, dtype, torch.Generator().manual_seed(0)).double()
    assert set(rounded.unique().tolist()) <= {below, above}
    # five standard errors of a mean of draws from two values
    assert rounded.mean().item() == pytest.approx(
        exact[0, 0].item(), abs=5 * (above - below) / 2 / exact.numel() ** 0.5
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rounding_keeps_numbers_of_the_type(dtype):
    info = torch.finfo(dtype)
    smallest = info.smallest_normal * info.eps
    kept = [
        0.0,
        -0.5,
        1.5,
        info.max,
        info.min,
        info.smallest_normal,
        smallest,
        -smallest,
        math.inf,
        -math.inf,
        math.nan,
    ]
    rounded = rounded_stochastically(torch.tensor(kept), dtype, torch.Generator()).float()
    torch.testing.assert_close(rounded, torch.tensor(kept), rtol=0, atol=0, equal_nan=True)
