"""`KernelProblem`: the linear systems of a train kernel and its targets."""

from collections.abc import Callable

import numpy as np

from hf_ft_ext.kernel.solvers.coupling import Coupling, view_of
from hf_ft_ext.kernel.solvers.matrices import GeneralMatrix, SymmetricMatrix, matrix_of
from hf_ft_ext.kernel.solvers.options import SolverOptions
from hf_ft_ext.kernel.solvers.targets import targets_of


class KernelProblem:
    """The linear systems of a train kernel and its targets.

    Args:
        options: see `SolverOptions`.
        kernel: the train kernel `[kernels, N, C, N, C]`. For uncoupled scalars (see `Coupling`) it may lack the last
            axis (see `KernelOptions.class_diagonal`).
        labels: class ids or scores `[N]`; scores `[N, C]` of several scalars; 0 and 1 `[N, C]` for several labels per
            row.
        start: the model's scalars before training `[N, C]` (`adjust_for_init`), subtracted from the targets.
        scalars: C; `None` = that of the kernel. `Coupling.PSEUDO` needs it, because its kernel has one scalar.

    Raises:
        InputError: the labels' shape does not fit the kernel.
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
        self.kernel = view_of(kernel, options.used_coupling)
        self.targets = targets_of(options, self.labels, self.scalars)
        if start is not None:
            self.targets = self.targets - start
        self._matrices: list[SymmetricMatrix | GeneralMatrix] | None = None

    @property
    def matrices(self) -> list[SymmetricMatrix | GeneralMatrix]:
        """The matrices of the systems: one `[N C, N C]` (full) or `[N, N]` (shared), or C of `[N, N]` (by class).

        They are K^T: with `f(x_j) = sum_i alpha_i K[i, j]`, row j of the system is column j of the kernel.
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
        """Solve all systems with `solve(matrix, targets)`, which takes and returns `[n, k]`: `[N, C]`."""
        if self.options.coupling is Coupling.BY_CLASS:
            return np.hstack([solve(matrix, self.targets[:, [c]]) for c, matrix in enumerate(self.matrices)])
        if self.options.used_coupling.one_kernel:
            return solve(self.matrices[0], self.targets)
        return solve(self.matrices[0], self.targets.reshape(-1, 1)).reshape(self.targets.shape)
