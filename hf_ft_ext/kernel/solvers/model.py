"""`KernelModel`: a fitted solver, which predicts by the kernel with the training rows."""

import numpy as np

from hf_ft_ext.errors import InputError
from hf_ft_ext.kernel.solvers.coupling import view_of
from hf_ft_ext.kernel.solvers.options import SolverOptions
from hf_ft_ext.kernel.solvers.solution import Solution
from hf_ft_ext.kernel.solvers.targets import accuracy_of, class_scores, loss_of, targets_of


class KernelModel:
    """A fitted solver, without the train kernel that it was fitted on.

    Attributes:
        options: which solver and how.
        scalars: C, scalars of an example.
        solution: its coefficients.
        rank, condition: numerical rank of the regularised kernel matrix and its condition number (`lstsq`, `svr`).
    """

    def __init__(self, options: SolverOptions, scalars: int, solution: Solution):
        self.options, self.scalars, self.solution = options, scalars, solution
        self.rank: int | None = None
        self.condition: float | None = None

    def predict(self, kernel: np.ndarray, start: np.ndarray | None = None) -> np.ndarray:
        """Predictions `[M, C]` for a kernel `[kernels, N, C, M, C]`; of one scalar in classification the sign decides.

        Where scalars are not coupled, `[kernels, N, C, M]` too.

        Args:
            start: the model's scalars at the start `[M, C]`, added.
        """
        if kernel.shape[1] != self.solution.rows:
            raise InputError(
                f"a kernel with {kernel.shape[1]} training rows does not fit a solution of {self.solution.rows}; pass "
                "the kernel with the rows that were solved for"
            )
        found = self.solution.predict(view_of(kernel, self.options.coupling))
        return found if start is None else found + start

    def targets(self, labels: np.ndarray) -> np.ndarray:
        """`[N, C]`: scores, -1 and 1, or one-hot."""
        return targets_of(self.options, labels, self.scalars)

    def loss(self, predictions: np.ndarray, labels: np.ndarray) -> float:
        """The solver's loss: see `loss_of`."""
        return loss_of(self.options, predictions, labels, self.scalars)

    def accuracy(self, predictions: np.ndarray, labels: np.ndarray) -> float:
        """Share of right predictions: see `accuracy_of`."""
        return accuracy_of(self.options, predictions, labels)

    def class_scores(self, predictions: np.ndarray) -> np.ndarray:
        """`[N, classes]` of predictions: see `class_scores`."""
        return class_scores(self.options, predictions)
