"""`KernelModel`: a fitted solver, which predicts from the kernel with the training rows."""

import numpy as np

from hf_ft_ext.errors import InputError
from hf_ft_ext.kernel.solvers.coupling import view_of
from hf_ft_ext.kernel.solvers.options import SolverOptions
from hf_ft_ext.kernel.solvers.solution import Solution
from hf_ft_ext.kernel.solvers.targets import accuracy_of, class_scores, loss_of


class KernelModel:
    """A fitted solver, without the train kernel that it was fitted on.

    Attributes:
        options: the solver and its settings.
        scalars: C, the scalars per example.
        solution: its coefficients.
        rank, condition: numerical rank and condition number of the regularized kernel matrix (`lstsq`, `svr`).
    """

    def __init__(self, options: SolverOptions, scalars: int, solution: Solution):
        self.options, self.scalars, self.solution = options, scalars, solution
        self.rank: int | None = None
        self.condition: float | None = None

    def predict(self, kernel: np.ndarray, start: np.ndarray | None = None) -> np.ndarray:
        """Predict `[M, C]` from a kernel `[kernels, N, C, M, C]`.

        For uncoupled scalars a kernel `[kernels, N, C, M]` works too. In binary classification with one scalar, its
        sign gives the class.

        Args:
            start: the model's scalars before training `[M, C]`, which are added.
        """
        if kernel.shape[1] != self.solution.rows:
            raise InputError(
                f"a kernel with {kernel.shape[1]} training rows does not fit a solution of {self.solution.rows}; pass "
                "the kernel with the rows that the solution was fitted on"
            )
        found = self.solution.predict(view_of(kernel, self.options.used_coupling))
        return found if start is None else found + start

    def loss(self, predictions: np.ndarray, labels: np.ndarray) -> float:
        """The solver's loss: see `loss_of`."""
        return loss_of(self.options, predictions, labels, self.scalars)

    def accuracy(self, predictions: np.ndarray, labels: np.ndarray) -> float:
        """Share of correct predictions: see `accuracy_of`."""
        return accuracy_of(self.options, predictions, labels)

    def class_scores(self, predictions: np.ndarray) -> np.ndarray:
        """Scores `[N, classes]` from predictions: see `class_scores`."""
        return class_scores(self.options, predictions)
