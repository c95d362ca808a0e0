"""`KernelProblem`: a train kernel with its targets, as the linear systems that solvers solve."""

from collections.abc import Callable

import numpy as np

from hf_ft_ext.kernel.solvers.coupling import Coupling, view_of
from hf_ft_ext.kernel.solvers.matrices import GeneralMatrix, SymmetricMatrix, matrix_of
from hf_ft_ext.kernel.solvers.options import SolverOptions
from hf_ft_ext.kernel.solvers.targets import targets_of


class KernelProblem:
    """A train kernel with its targets: the linear systems that solvers solve.

    Args:
        options: which solver and how; see `SolverOptions`.
        kernel: of the train examples with themselves, `[kernels, N, C, N, C]`; where scalars are not coupled (see
            `Coupling`) one without the last axis too (see `KernelOptions.class_diagonal`).
        labels: `[N]`, class ids or scores; scores `[N, C]` of several scalars; with several labels per row 0 and 1,
            `[N, C]`.
        start: the model's scalars at the start `[N, C]` (`adjust_for_init`), subtracted from the targets.
        scalars: C; `None` = those of the kernel, which has a single one in `Coupling.PSEUDO`.

    Raises:
        InputError: labels that cannot be fitted (see `check_labels`), or of another shape than the kernel.
    """

    def __init__(
        self,
        options: SolverOptions,
        kernel: np.ndarray,
        labels: np.ndarray,
        start: np.ndarray | None = None,
        scalars: int | None = None,
    ):
        self.options, self.scalars, self.labels = options, scalars or kernel.shape[2], np.asarray(labels)
        self.kernel = view_of(kernel, options.coupling)
        self.targets = targets_of(options, self.labels, self.scalars)
        if start is not None:
            self.targets = self.targets - start
        self._matrices: list[SymmetricMatrix | GeneralMatrix] | None = None

    @property
    def matrices(self) -> list[SymmetricMatrix | GeneralMatrix]:
        """The systems' matrices: one of `[N C, N C]` (full) or `[N, N]` (shared), or C of `[N, N]` (by class).

        Transposed: with `f(x_j) = sum_i alpha_i K[i, j]` row j of the system is column j of the kernel.
        """
        if self._matrices is None:
            kernel = self.kernel[0]
            if self.options.coupling is Coupling.FULL:
                n, c = kernel.shape[:2]
                parts = [kernel.reshape(n * c, n * c)]
            elif self.options.coupling is Coupling.BY_CLASS:
                parts = [kernel[:, c] for c in range(kernel.shape[1])]
            else:
                parts = [kernel]
            self._matrices = [matrix_of(part.T) for part in parts]
        return self._matrices

    def coefficients(self, solve: Callable[..., np.ndarray]) -> np.ndarray:
        """`[N, C]` from `solve(matrix, targets)`, which takes and gives `[n, k]`."""
        if self.options.coupling is Coupling.BY_CLASS:
            return np.hstack([solve(matrix, self.targets[:, [c]]) for c, matrix in enumerate(self.matrices)])
        if self.options.coupling.one_kernel:
            return solve(self.matrices[0], self.targets)
        return solve(self.matrices[0], self.targets.reshape(-1, 1)).reshape(self.targets.shape)
