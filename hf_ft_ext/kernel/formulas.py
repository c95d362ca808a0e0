"""The kernel of each update rule as a product of gradient rows, and when a gradient entry counts as zero."""

import enum

import torch


class Formula(enum.StrEnum):
    """Which update rule the kernel stands for (Malladi et al., ICML 2023, arXiv 2210.05643).

    SGD: `<J, J'>`.
    SIGNGD: `<sign J, sign J'>`, early Adam's kernel.
    ASYMMETRIC_SIGNGD: `<sign J, J'>` together with its flip `<J, sign J'>`, as a first axis of two.
    """

    SGD = "sgd"
    SIGNGD = "signgd"
    ASYMMETRIC_SIGNGD = "asymmetric_signgd"

    @property
    def signs(self) -> bool:
        """Whether signs are taken, so that the gradients are computed in float64."""
        return self is not Formula.SGD

    @property
    def kernels(self) -> int:
        """Kernels that come together: 2 for the asymmetric formula, else 1."""
        return 2 if self is Formula.ASYMMETRIC_SIGNGD else 1


# An entry of a gradient row J is zero for its sign if it is smaller than this times the row's Euclidean norm. In
# float64, rounding leaves about 1e-18 of the norm where exact arithmetic gives 0 (an attention key's bias), and hardly
# any other entry of a network's gradient is that small.
ZERO = 1e-14
_EXACT_SUM = 2**24  # sums of so many products of signs are exact in float32


def sign_scale(squared_norms: torch.Tensor) -> torch.Tensor:
    """Factors by which gradient rows `[rows, p]` are multiplied so that entries below 1 count as zero: `[rows]`."""
    norms = squared_norms.clamp_min(0).sqrt()
    return torch.where(norms > 0, 1 / (ZERO * norms), 0.0)


def signs(values: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """-1, 0 or 1 for each entry of the rows `values` `[rows, p]` (float64), as float32.

    Args:
        scale: from `sign_scale`, `[rows]`.
    """
    return (values * scale[:, None]).trunc_().clamp_(-1, 1).float()


def sign_product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """`left @ right.T` in float64, exact, for entries -1, 0 and 1 in float32 or int8 (see `sign_type`)."""
    if left.dtype == torch.int8:
        return torch._int_mm(left, right.T).double()
    total = left.new_zeros(len(left), len(right), dtype=torch.float64)
    for first in range(0, left.shape[1], _EXACT_SUM):
        total += left[:, first : first + _EXACT_SUM] @ right[:, first : first + _EXACT_SUM].T
    return total


def sign_type(device: torch.device) -> torch.dtype:
    """The type in which products of signs are quickest on `device`: int8 where the processor multiplies such."""
    quick = torch.backends.mkldnn.is_available() and torch.backends.cpu.get_cpu_capability().startswith("AVX512")
    return torch.int8 if device.type == "cpu" and quick and hasattr(torch, "_int_mm") else torch.float32


def product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """`left @ right.T` in float64, computed in the type that both have."""
    return (left @ right.T).double()
