"""The kernel of each update rule as a product of gradient rows, and the rule for gradient entries that are zero."""

import enum

import torch


class Formula(enum.StrEnum):
    """The update rule that the kernel describes (Malladi et al., ICML 2023, arXiv 2210.05643).

    SGD: `<J, J'>`.
    SIGNGD: `<sign J, sign J'>`, the kernel of Adam early in training.
    ASYMMETRIC_SIGNGD: `<sign J, J'>` together with its flip `<J, sign J'>`, stacked on a first axis of length 2.
    """

    SGD = "sgd"
    SIGNGD = "signgd"
    ASYMMETRIC_SIGNGD = "asymmetric_signgd"

    @property
    def signs(self) -> bool:
        """Whether the formula takes signs; the gradients are then computed in float64."""
        return self is not Formula.SGD

    @property
    def kernels(self) -> int:
        """Number of kernels that the formula gives: 2 if it is asymmetric, otherwise 1."""
        return 2 if self is Formula.ASYMMETRIC_SIGNGD else 1


# sign(J_k) = 0 if |J_k| < ZERO |J|, for a gradient row J with Euclidean norm |J|. In float64, rounding leaves about
# 1e-18 |J| where exact arithmetic gives 0 (the bias of an attention key). Hardly any other entry is that small.
ZERO = 1e-14
_EXACT_SUM = 2**24  # sums of up to 2^24 products of signs are exact in float32


def sign_scale(squared_norms: torch.Tensor) -> torch.Tensor:
    """Factors `1 / (ZERO |J|)` for gradient rows J, so that scaled entries below 1 count as zero: `[rows]`.

    0 for a row of zeros, and for one with NaN or infinity.
    """
    norms = squared_norms.clamp_min(0).sqrt()
    return torch.where(norms > 0, 1 / (ZERO * norms), 0.0)


def signs(values: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Signs -1, 0 or 1 of the entries of `values` `[rows, p]` (float64), as float32.

    Args:
        scale: from `sign_scale`, `[rows]`.
    """
    # trunc gives 0 for |J_k| / (ZERO |J|) < 1
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
    """The fastest type for products of signs on `device`: int8 where the processor supports it, else float32."""
    quick = torch.backends.mkldnn.is_available() and torch.backends.cpu.get_cpu_capability().startswith("AVX512")
    return torch.int8 if device.type == "cpu" and quick and hasattr(torch, "_int_mm") else torch.float32


def product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """`left @ right.T`, computed in the operands' type and returned in float64."""
    return (left @ right.T).double()
