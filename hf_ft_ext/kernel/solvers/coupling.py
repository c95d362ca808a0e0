"""`Coupling`: which products of an example's scalars a solver uses."""

import enum

import numpy as np

from hf_ft_ext.errors import InputError


class Coupling(enum.StrEnum):
    """Which products of scalars a solver uses, for kernels `K[i, a, j, b]` of scalar a and scalar b.

    FULL: all of them, as one system of N C unknowns, as gradient descent couples them. Time grows with (N C)^3.
    BY_CLASS: each scalar's own kernel `K[i, c, j, c]`, as C systems of N unknowns.
    SHARED: one kernel for all classes, `mean_c K[i, c, j, c]`, as one system of N unknowns. The full kernel is close
        to this kernel times the identity.
    PSEUDO: as SHARED, with the kernel of the single scalar `sum_c e_c f_c / sqrt(C)`, so that a row takes one
        backward pass instead of C. Over random signs `e` its mean is the shared kernel. Mohamadi et al. (ICML 2023,
        arXiv 2206.12543) take all signs 1; the encoder's part of that kernel is 0 if the rows of a head sum to 0.
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
    """The part of a kernel that a coupling uses: `[kernels, N, C, M, C]`, `[kernels, N, C, M]` or `[kernels, N, M]`.

    Args:
        kernel: `[kernels, N, C, M, C]`, or `[kernels, N, C, M]` for uncoupled scalars; C = 1 for `PSEUDO`.

    Raises:
        InputError: the coupling needs products of different scalars, which the kernel does not hold.
    """
    if coupling is Coupling.FULL:
        if kernel.ndim == 4 and kernel.shape[2] == 1:  # a single scalar has no products with others
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
