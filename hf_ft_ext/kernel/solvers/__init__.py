"""Solvers: from a train kernel and labels to coefficients that predict by the kernel with the training rows.

`options` says which solver and how, `coupling` which products of several scalars it sees, `targets` what is fitted.
`matrices` decomposes what is solved with, `least_squares`, `support_vectors` and `logistic` solve; `system` brings
these together. What they leave is a `solution`, and with the options a `model`, which predicts without a solver.

scipy and scikit-learn are imported where they solve: the arguments need this package for its names only, and loading
both takes a quarter of the time that `--help` takes.
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
from hf_ft_ext.kernel.solvers.system import GRID, LEFT_OUT, KernelSystem
from hf_ft_ext.kernel.solvers.targets import check_labels, targets_of

__all__ = [
    "FULL_UNKNOWNS",
    "GRID",
    "LEFT_OUT",
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
