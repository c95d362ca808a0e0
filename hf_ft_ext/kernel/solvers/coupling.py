"""Which products of an example's scalars a solver sees."""

import enum

import numpy as np

from hf_ft_ext.errors import InputError


class Coupling(enum.StrEnum):
    """Which products of scalars a solver sees, with kernels `K[i, a, j, b]` of scalar a and scalar b.

    FULL: all of them, as one system of N C unknowns: what gradient descent couples. Time grows with (N C)^3.
    BY_CLASS: each scalar's own kernel `K[i, c, j, c]`, C systems of N unknowns.
    SHARED: one kernel for all classes, the mean over c of `K[i, c, j, c]`, one system of N unknowns: the full kernel
        is near it times the identity.
    PSEUDO: as SHARED, from the kernel of a single scalar, `sum_c e_c f_c / sqrt(C)`, so that a row takes one backward
        pass in place of C. With random signs `e` its mean is the shared kernel, and it stays apart from 0 where a
        head's rows add up to 0 (Mohamadi et al., ICML 2023, arXiv 2206.12543, with all signs 1).
    """

    FULL = "full"
    BY_CLASS = "by_class"
    SHARED = "shared"
    PSEUDO = "pseudo"

    @property
    def one_kernel(self) -> bool:
        """Whether one kernel `[N, N]` serves all classes."""
        return self in (Coupling.SHARED, Coupling.PSEUDO)


def view_of(kernel: np.ndarray, coupling: Coupling) -> np.ndarray:
    """The part of a kernel that enters: `[kernels, N, C, M, C]`, `[kernels, N, C, M]` or `[kernels, N, M]`.

    Args:
        kernel: `[kernels, N, C, M, C]`; `[kernels, N, C, M]` where scalars are not coupled; C = 1 for `PSEUDO`.

    Raises:
        InputError: products of different scalars are needed and not there.
    """
    if coupling is Coupling.FULL:
        if kernel.ndim == 4 and kernel.shape[2] == 1:  # of one scalar there is nothing else
            return kernel[..., None]
        if kernel.ndim == 4:
            raise InputError(
                f"kernel_classes=full needs products of different classes too, which this kernel of shape "
                f"{kernel.shape} lacks; compute it with class_diagonal=False, or pass kernel_classes=shared"
            )
        return kernel
    # K[i, c, j, c], and its mean over c
    diagonal = kernel if kernel.ndim == 4 else np.einsum("kicjc->kicj", kernel)
    return diagonal if coupling is Coupling.BY_CLASS else diagonal.mean(2)
