"""Kernel regression, gradient flow, and the coupled least squares of an asymmetric kernel and its flip."""

import math

import numpy as np

from hf_ft_ext.errors import InputError
from hf_ft_ext.kernel.solvers.matrices import SymmetricMatrix
from hf_ft_ext.kernel.solvers.options import SolverOptions
from hf_ft_ext.kernel.solvers.problem import KernelProblem
from hf_ft_ext.kernel.solvers.solution import LinearSolution


def least_squares(system: KernelProblem, options: SolverOptions) -> LinearSolution:
    """Kernel regression: `alpha = (K + r n I)^-1 (y - f_0)`, with `n` the operator norm of `K`.

    With a time t, predict as the linearized model, trained for time t by gradient flow on
    `1 / (2 N) (sum_i |f(x_i) - y_i|^2 + r n |theta - theta_0|^2)` for N rows (Lee et al. 2019, arXiv 1902.06720,
    equations 10 and 11): `alpha_t = M^-1 (I - exp(-M t / N)) (y - f_0)`, `M = K + r n I`. So t is the learning rate
    times the number of small steps, and t -> infinity gives kernel regression.
    """
    r, rows, time = options.regularization, len(system.targets), options.time
    if time is None or time == math.inf:
        # alpha = (K + r n I)^-1 y; the targets y have f_0 subtracted
        alpha = system.coefficients(lambda matrix, y: matrix.solve(r, y))
    elif all(isinstance(matrix, SymmetricMatrix) for matrix in system.matrices):
        # alpha = M^-1 (I - exp(-M t / N)) y
        alpha = system.coefficients(lambda matrix, y: matrix.flow(r, y, time / rows))
    else:
        raise InputError("gradient flow needs a symmetric kernel, but this one is not; pass a kernel of formula sgd")
    return LinearSolution(alpha[None], np.zeros(system.targets.shape[1]))


def coupled_least_squares(system: KernelProblem, options: SolverOptions) -> LinearSolution:
    """The least-squares SVM of an asymmetric kernel and its flip, one class against the rest.

    For each class, with targets `y` of 1 and -1 (minus f_0 with `adjust_for_init`) and `M = K + r n I`:
    `[I/gamma, M; M^T, I/gamma] [a; b] = [y; y]`, `f(x) = mix K(., x)^T a + (1 - mix) K_flip(., x)^T b`.

    For targets of 1 and -1 this is the published system `[I/gamma, H; H^T, I/gamma] [alpha; beta] = 1` with
    `D = diag(y)`, `H = D M D`, `a = D alpha` and `b = D beta`, because `D^2 = I`. For other targets the published
    system would fit `1 / y`.
    """
    coefficients = [
        # `matrix` holds K^T
        _coupled(matrix.regularized(options.regularization).T, system.targets[:, c], options.gamma)
        for c, matrix in enumerate(system.matrices)
    ]
    a, b = (np.stack(columns, 1) for columns in zip(*coefficients, strict=True))
    return LinearSolution(np.stack([options.mix * a, (1 - options.mix) * b]), np.zeros(a.shape[1]))


def _coupled(matrix: np.ndarray, targets: np.ndarray, gamma: float) -> tuple[np.ndarray, np.ndarray]:
    """Solve `[I/gamma, M; M^T, I/gamma] [a; b] = [y; y]`; the solution of least norm if it is singular.

    With `M = U diag(s) V^T`, `a = U u` and `b = V v` the system decouples: `(1/gamma + s) (u + v) = p + q` and
    `(1/gamma - s) (u - v) = p - q`, where `p = U^T y` and `q = V^T y`. So one SVD of M replaces the decomposition of
    the coupled matrix, which is twice as large and singular wherever s = 1/gamma.
    """
    import scipy.linalg

    left, s, right = scipy.linalg.svd(matrix)
    # p = U^T y, q = V^T y
    p, q = left.T @ targets, right @ targets
    below = 1 / gamma - s
    zero = np.abs(below) <= 2 * len(s) * np.finfo(float).eps * (1 / gamma + s.max())
    # u + v = (p + q) / (1/gamma + s); u - v = (p - q) / (1/gamma - s), or 0 where 1/gamma - s is 0
    total = (p + q) / (1 / gamma + s)
    difference = np.where(zero, 0.0, (p - q) / np.where(zero, 1.0, below))
    # a = U u, b = V v
    return left @ (total + difference) / 2, right.T @ (total - difference) / 2
