"""`KernelSystem`: a train kernel with its targets, solved under one or several regularizations."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from hf_ft_ext.kernel.solvers.coupling import Coupling
from hf_ft_ext.kernel.solvers.least_squares import coupled_least_squares, least_squares
from hf_ft_ext.kernel.solvers.logistic import logistic_regression
from hf_ft_ext.kernel.solvers.matrices import SymmetricMatrix
from hf_ft_ext.kernel.solvers.model import KernelModel
from hf_ft_ext.kernel.solvers.options import Solver, SolverOptions
from hf_ft_ext.kernel.solvers.problem import KernelProblem
from hf_ft_ext.kernel.solvers.solution import Solution, arrays_of, solution_of
from hf_ft_ext.kernel.solvers.support_vectors import support_vector_classification, support_vector_regression

logger = logging.getLogger(__name__)

# Candidate regularizations: for the choice on evaluation data, and for leave-one-out.
GRID = (0.0, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
LEAVE_ONE_OUT_GRID = (1e-6, 1e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 1.0)

_FITS: dict[Solver, Callable[[KernelProblem, SolverOptions], Solution]] = {
    Solver.LSTSQ: least_squares,
    Solver.LOGISTIC: logistic_regression,
    Solver.SVR: support_vector_regression,
    Solver.SVC: support_vector_classification,
    Solver.ASYM: coupled_least_squares,
}


class KernelSystem(KernelProblem):
    """A train kernel with its targets, which can be solved under several regularizations.

    Norms and decompositions are computed once, when they are first needed. Arguments and errors as for
    `KernelProblem`; the `regularization` of the options is the default of `solve`.
    """

    def solve(
        self, regularization: float | None = None, quiet: bool = False, time: float | None = None
    ) -> KernelModel:
        """The fitted solver.

        Args:
            regularization, time: used instead of those of the options.
            quiet: do not compute rank and condition number, and do not warn about them.
        """
        options = self.options
        if regularization is not None:
            options = replace(options, regularization=regularization)
        if time is not None:
            options = replace(options, time=time)
        found = _FITS[options.solver](self, options)
        # Same memory layout as after loading from a file, so that products round the same.
        model = KernelModel(options, self.scalars, solution_of(found.kind, arrays_of(found)))
        if not quiet and options.solver in (Solver.LSTSQ, Solver.SVR):
            reports = [matrix.report(options.regularization) for matrix in self.matrices]
            size = self.matrices[0].size
            model.rank, model.condition = min(reports, key=lambda report: (report[0], -report[1]))
            if model.rank < size:
                logger.warning(
                    "the kernel matrix is ill-conditioned: rank %d of %d, condition number %.2g; the solution of "
                    "least norm is used; pass kernel_regularization (auto, or a value such as 1e-4) for a stable one",
                    model.rank, size, model.condition,
                )  # fmt: skip
        return model

    @property
    def has_leave_one_out(self) -> bool:
        """Whether `leave_one_out` has a closed form: for least squares with symmetric kernels."""
        least_squares_alone = self.options.solver is Solver.LSTSQ and self.options.time is None
        return least_squares_alone and all(isinstance(matrix, SymmetricMatrix) for matrix in self.matrices)

    def leave_one_out(self, regularization: float) -> np.ndarray:
        """Predict each row with the solution of all other rows: `[N, C]`, without the model's initial scalars.

        Args:
            regularization: above 0 if the kernel is singular.
        """
        symmetric = [matrix for matrix in self.matrices if isinstance(matrix, SymmetricMatrix)]
        if self.options.coupling is Coupling.BY_CLASS:
            columns = [m.leave_one_out(regularization, self.targets[:, [c]]) for c, m in enumerate(symmetric)]
            return np.hstack(columns)
        return symmetric[0].leave_one_out(regularization, self.targets)

    def best_by_leave_one_out(self, values: Sequence[float]) -> float:
        """The one of `values` (all above 0) with the least squared leave-one-out error."""
        # 1/(N C) sum_i |f_(-i)(x_i) - y_i|^2, with f_(-i) fitted without row i
        errors = [float(np.mean((self.leave_one_out(value) - self.targets) ** 2)) for value in values]
        return values[int(np.argmin(errors))]

    def best_on(
        self, kernel: np.ndarray, labels: np.ndarray, start: np.ndarray | None = None, values: Sequence[float] = GRID
    ) -> float:
        """The one of `values` that predicts evaluation rows best: by accuracy, then by the solver's loss.

        Args:
            kernel, start: as for `KernelModel.predict`, for the evaluation rows.
            labels: their labels.
        """
        results = []
        for value in values:
            model = self.solve(value, quiet=True)
            found = model.predict(kernel, start)
            results.append((model.accuracy(found, labels), -model.loss(found, labels), value))
        return max(results)[2]
