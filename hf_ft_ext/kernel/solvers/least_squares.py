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

    With signs `y`, `D = diag(y)`, `H = D (K + r n I) D` and ones on the right-hand side:
    `[I/gamma, H; H^T, I/gamma] [alpha; beta] = 1`, `f(x) = mix K(., x)^T D alpha + (1 - mix) K_flip(., x)^T D beta`.
    """
    alphas, betas = [], []
    for c, matrix in enumerate(system.matrices):
        targets = system.targets[:, c]
        signs = targets if options.multi_label or system.scalars == 1 else 2 * targets - 1
        # H = D (K + r n I) D; `matrix` holds K^T
        alpha, beta = _coupled(signs[:, None] * matrix.regularized(options.regularization).T * signs, options.gamma)
        alphas.append(options.mix * signs * alpha)
        betas.append((1 - options.mix) * signs * beta)
    return LinearSolution(np.stack([np.stack(alphas, 1), np.stack(betas, 1)]), np.zeros(len(alphas)))


def _coupled(h: np.ndarray, gamma: float) -> tuple[np.ndarray, np.ndarray]:
    """Solve `[I/gamma, H; H^T, I/gamma] [alpha; beta] = 1`; the solution of least norm if it is singular.

    With `H = U diag(s) V^T`, `alpha = U a` and `beta = V b` the system decouples: `(1/gamma + s) (a + b) = p + q` and
    `(1/gamma - s) (a - b) = p - q`, where `p = U^T 1` and `q = V^T 1`. So one SVD of H replaces the decomposition of
    the coupled matrix, which is twice as large and singular wherever s = 1/gamma.
    """
    import scipy.linalg

    u, s, vt = scipy.linalg.svd(h)
    # p = U^T 1, q = V^T 1
    p, q = u.sum(0), vt.sum(1)
    below = 1 / gamma - s
    zero = np.abs(below) <= 2 * len(s) * np.finfo(float).eps * (1 / gamma + s.max())
    # a + b = (p + q) / (1/gamma + s); a - b = (p - q) / (1/gamma - s), or 0 where 1/gamma - s is 0
    total = (p + q) / (1 / gamma + s)
    difference = np.where(zero, 0.0, (p - q) / np.where(zero, 1.0, below))
    # alpha = U a, beta = V b
    return u @ (total + difference) / 2, vt.T @ (total - difference) / 2
