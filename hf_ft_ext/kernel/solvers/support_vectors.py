"""Support vector regression and classification with libsvm."""

import numpy as np

from hf_ft_ext.kernel.solvers.matrices import SymmetricMatrix
from hf_ft_ext.kernel.solvers.options import SolverOptions
from hf_ft_ext.kernel.solvers.problem import KernelProblem
from hf_ft_ext.kernel.solvers.solution import LinearSolution, PairwiseSolution
from hf_ft_ext.kernel.solvers.targets import check_both


def support_vector_regression(system: KernelProblem, options: SolverOptions) -> LinearSolution:
    """`min 1/2 alpha^T M alpha + C sum_i max(0, |f(x_i) - y_i| - 0.1)` with `M = K + r n I`, by libsvm.

    Coupled scalars share one intercept; uncoupled scalars have one each.
    """
    from sklearn.svm import SVR

    intercepts: list[float] = []

    def solve(matrix: SymmetricMatrix, targets: np.ndarray) -> np.ndarray:
        regularized = matrix.regularized(options.regularization)
        found = np.zeros_like(targets)
        for column in range(targets.shape[1]):
            # f(x) = sum_i dual_i K(i, x) + b, with dual_i = 0 except for support vectors
            svm = SVR(kernel="precomputed", C=options.svm_c).fit(regularized, targets[:, column])
            found[svm.support_, column] = svm.dual_coef_[0]
            intercepts.append(float(svm.intercept_[0]))
        return found

    coefficients = system.coefficients(solve)
    return LinearSolution(coefficients[None], np.broadcast_to(intercepts, (coefficients.shape[1],)).copy())


def support_vector_classification(system: KernelProblem, options: SolverOptions) -> LinearSolution | PairwiseSolution:
    """Fit libsvm's classifier with the kernel summed over classes; one for each label of a multi-label task."""
    if options.multi_label:
        columns = [
            _margin(matrix.regularized(options.regularization), system.labels[:, c] > 0.5, options, f"label {c}")
            for c, matrix in enumerate(system.matrices)
        ]
        coefficients, intercepts = zip(*columns, strict=True)
        return LinearSolution(np.stack(coefficients, 1)[None], np.array(intercepts))
    # The matrix holds the mean over classes. sum_c K_c = C mean_c K_c, so coefficients of the sum, times C, are
    # coefficients of the mean.
    factor = system.scalars
    matrix = factor * system.matrices[0].regularized(options.regularization)
    if len(np.unique(system.labels)) == 2:
        coefficients, intercept = _margin(matrix, system.labels == system.labels.max(), options)
        return _as_scalars(factor * coefficients, intercept, system.scalars)
    from sklearn.svm import SVC

    svm = SVC(kernel="precomputed", C=options.svm_c).fit(matrix, system.labels)
    dual = np.zeros((len(svm.dual_coef_), len(matrix)))
    dual[:, svm.support_] = factor * svm.dual_coef_
    return PairwiseSolution(dual, system.labels.astype(np.int64), svm.intercept_.copy())


def _margin(
    matrix: np.ndarray, positive: np.ndarray, options: SolverOptions, name: str = "the data"
) -> tuple[np.ndarray, float]:
    """Coefficients `[N]` and intercept of a two-class support vector machine; values above 0 mean positive."""
    from sklearn.svm import SVC

    check_both(positive, "svc", name)
    svm = SVC(kernel="precomputed", C=options.svm_c).fit(matrix, positive)
    coefficients = np.zeros(len(matrix))
    coefficients[svm.support_] = svm.dual_coef_[0]
    return coefficients, float(svm.intercept_[0])


def _as_scalars(coefficients: np.ndarray, intercept: float, scalars: int) -> LinearSolution:
    """A two-class margin as one scalar, or as two that differ by it."""
    if scalars == 1:
        return LinearSolution(coefficients[None, :, None], np.array([intercept]))
    # f_1 = -f_0 = (sum_i a_i K(i, x) + b) / 2
    both = np.stack([-coefficients, coefficients], 1) / 2
    return LinearSolution(both[None], np.array([-intercept, intercept]) / 2)
