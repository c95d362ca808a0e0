"""Solvers: fit a task with a train kernel and labels; the result predicts from the kernel with the training rows.

`options` holds the settings, `coupling` selects the products of scalars that a solver uses, `targets` defines the
fitted targets. `matrices` decomposes the kernel matrix; `least_squares`, `support_vectors` and `logistic` solve;
`system` combines them. The result is a `solution`; together with the options it is a `model`, which predicts without a
solver.

scipy and scikit-learn are imported only where they solve. The arguments import this package for its names, and loading
both libraries would add a quarter to the time of `--help`.
"""

from hf_ft_ext.kernel.solvers.coupling import Coupling, view_of
from hf_ft_ext.kernel.solvers.least_squares import coupled_least_squares, least_squares
from hf_ft_ext.kernel.solvers.logistic import logistic_regression
from hf_ft_ext.kernel.solvers.matrices import GeneralMatrix, SymmetricMatrix, matrix_of
from hf_ft_ext.kernel.solvers.model import KernelModel
from hf_ft_ext.kernel.solvers.options import (
    FULL_UNKNOWNS,
    Solver,
    SolverOptions,
    check_combination,
    chosen_coupling,
)
from hf_ft_ext.kernel.solvers.solution import (
    LinearSolution,
    LogisticSolution,
    PairwiseSolution,
    Solution,
    arrays_of,
    features_of,
    solution_of,
)
from hf_ft_ext.kernel.solvers.support_vectors import support_vector_classification, support_vector_regression
from hf_ft_ext.kernel.solvers.system import GRID, LEAVE_ONE_OUT_GRID, KernelSystem
from hf_ft_ext.kernel.solvers.targets import check_labels, targets_of

__all__ = [
    "FULL_UNKNOWNS",
    "GRID",
    "LEAVE_ONE_OUT_GRID",
    "Coupling",
    "GeneralMatrix",
    "KernelModel",
    "KernelSystem",
    "LinearSolution",
    "LogisticSolution",
    "PairwiseSolution",
    "Solution",
    "Solver",
    "SolverOptions",
    "SymmetricMatrix",
    "arrays_of",
    "check_combination",
    "check_labels",
    "chosen_coupling",
    "coupled_least_squares",
    "features_of",
    "least_squares",
    "logistic_regression",
    "matrix_of",
    "solution_of",
    "support_vector_classification",
    "support_vector_regression",
    "targets_of",
    "view_of",
]
