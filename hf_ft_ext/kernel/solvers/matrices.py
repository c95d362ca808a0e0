"""Kernel matrices and their regularized systems; norms and decompositions are shared by all regularizations.

With `n = ||K||` (operator norm) and a relative regularization `r` the system is `(K + r n I) a = y`.
"""

from functools import cached_property

import numpy as np

# scipy is imported only where it solves, because `--help` imports this module.

_ASYMMETRY = 1e-5  # largest |K[i, j] - K[j, i]| that float32 rounding explains, relative to the largest entry


def matrix_of(values: np.ndarray) -> "SymmetricMatrix | GeneralMatrix":
    """Wrap the matrix `[n, n]`, as symmetric if it is so up to rounding in float32."""
    largest = np.abs(values).max(initial=0.0)
    symmetric = np.abs(values - values.T).max(initial=0.0) <= _ASYMMETRY * largest
    return SymmetricMatrix(values) if symmetric else GeneralMatrix(values)


class SymmetricMatrix:
    """A symmetric kernel matrix `K = Q diag(l) Q^T`: one eigendecomposition serves all regularizations and times.

    Cost: `eigh` once, about 9 n^3 operations and 3 matrices of memory; then n^2 for each solution.

    Args:
        values: `[n, n]`; symmetrized as `(K + K^T) / 2`.
    """

    def __init__(self, values: np.ndarray):
        self.values = (values + values.T) / 2
        self.size = len(values)

    @cached_property
    def eigen(self) -> tuple[np.ndarray, np.ndarray]:
        """Eigenvalues `l` `[n]`, ascending, and eigenvectors `Q` `[n, n]`, one per column."""
        import scipy.linalg

        return scipy.linalg.eigh(self.values, driver="evd")

    @cached_property
    def eigenvalues(self) -> np.ndarray:
        """`l` only, which takes a quarter of the time, unless the eigenvectors are known already."""
        import scipy.linalg

        return self.eigen[0] if "eigen" in vars(self) else scipy.linalg.eigvalsh(self.values)

    @cached_property
    def norm(self) -> float:
        """Operator norm: the largest `|l|`."""
        return float(np.abs(self.eigenvalues).max())

    def regularized(self, r: float) -> np.ndarray:
        """`K + r n I`."""
        return self.values + r * self.norm * np.eye(self.size) if r else self.values

    def solve(self, r: float, targets: np.ndarray) -> np.ndarray:
        """`(K + r n I)^-1 y`, of least norm where the matrix is singular; `targets` and result `[n, k]`."""
        vectors = self.eigen[1]
        # a = Q diag(1 / (l + r n)) Q^T y
        return vectors @ (self._inverses(r)[:, None] * (vectors.T @ targets))

    def _inverses(self, r: float) -> np.ndarray:
        """`1 / (l + r n)`, or 0 where `l + r n` is 0 up to rounding, as in a pseudo-inverse."""
        shifted = self.eigen[0] + r * self.norm
        zero = np.abs(shifted) <= _smallest(np.abs(shifted))
        return np.where(zero, 0.0, 1 / np.where(zero, 1.0, shifted))

    def flow(self, r: float, targets: np.ndarray, time: float) -> np.ndarray:
        """`M^-1 (I - exp(-M time)) y` with `M = K + r n I`: coefficients of gradient flow; `[n, k]`.

        Lee et al. 2019 (arXiv 1902.06720), equations 10 and 11. Negative eigenvalues of the Gram matrix are rounding
        errors and count as 0.
        """
        values, vectors = self.eigen
        # m = max(l, 0) + r n, the eigenvalues of M
        decay = np.maximum(values, 0) + r * self.norm
        # (1 - exp(-m t)) / m, which tends to t as m tends to 0
        small = decay * time <= np.finfo(float).eps
        factors = np.where(small, time, -np.expm1(-decay * time) / np.where(small, 1.0, decay))
        # a = Q diag(factors) Q^T y
        return vectors @ (factors[:, None] * (vectors.T @ targets))

    def leave_one_out(self, r: float, targets: np.ndarray) -> np.ndarray:
        """Predict each row with the solution for all other rows: `[rows, c]`.

        With `G = (K + r n I)^-1` and the block `G_ii` of row i's scalars, the residual `y_i - f_(-i)(x_i)` is
        `G_ii^-1 (G y)_i`, so no further system is solved (Rasmussen and Williams 2006, equation 5.12, for one scalar).
        The norm `n` is that of the matrix of all rows.

        Args:
            targets: `[rows, c]`, where row `i` has the matrix's rows `i c` to `(i + 1) c`; or `[n, k]` for `k`
                problems with the same matrix.
        """
        vectors, inverses = self.eigen[1], self._inverses(r)
        rows, scalars = targets.shape
        if rows == self.size:
            # one scalar a row: residual (G y)_i / G_ii with G = Q diag(1 / (l + r n)) Q^T
            diagonal = np.einsum("ik,k,ik->i", vectors, inverses, vectors)
            return targets - self.solve(r, targets) / diagonal[:, None]
        # several: G_ii = Q_i diag(1 / (l + r n)) Q_i^T, residual G_ii^-1 (G y)_i
        parts = vectors.reshape(rows, scalars, -1)
        blocks = np.einsum("iak,k,ibk->iab", parts, inverses, parts, optimize=True)
        solution = self.solve(r, targets.reshape(-1, 1)).reshape(rows, scalars)
        return targets - np.linalg.solve(blocks, solution[:, :, None])[:, :, 0]

    def report(self, r: float) -> tuple[int, float]:
        """Numerical rank and condition number of `K + r n I`."""
        return _report(np.abs(self.eigenvalues + r * self.norm))


class GeneralMatrix:
    """A kernel matrix that is not symmetric.

    The norm is computed once. Each regularization takes one LU decomposition, or a least-squares solution if the
    matrix is singular to working precision. A decomposition that serves every `K + c I` would cost more: a Schur form
    takes about 25 n^3 operations, one LU decomposition 2/3 n^3.

    Args:
        values: `[n, n]`.
    """

    def __init__(self, values: np.ndarray):
        self.values, self.size = values, len(values)

    @cached_property
    def norm(self) -> float:
        """Operator norm: the largest singular value."""
        return float(np.linalg.norm(self.values, 2))

    def regularized(self, r: float) -> np.ndarray:
        """`K + r n I`."""
        return self.values + r * self.norm * np.eye(self.size) if r else self.values

    def solve(self, r: float, targets: np.ndarray) -> np.ndarray:
        """`(K + r n I)^-1 y`, of least norm where the matrix is singular; `targets` and result `[n, k]`."""
        import scipy.linalg

        matrix = self.regularized(r)
        threshold = self.size * np.finfo(float).eps
        # P L U = K + r n I
        factors, pivots, singular = scipy.linalg.lapack.dgetrf(matrix)
        if not singular:  # the reciprocal condition number, estimated in the 1-norm
            reciprocal, _ = scipy.linalg.lapack.dgecon(factors, float(np.linalg.norm(matrix, 1)))
            singular = reciprocal <= threshold
        if singular:
            return scipy.linalg.lstsq(matrix, targets, cond=threshold)[0]
        return scipy.linalg.lapack.dgetrs(factors, pivots, targets)[0]

    def report(self, r: float) -> tuple[int, float]:
        """Numerical rank and condition number of `K + r n I`."""
        return _report(np.linalg.svd(self.regularized(r), compute_uv=False))


def _smallest(sizes: np.ndarray) -> float:
    """The threshold up to which singular values count as 0 (as in `numpy.linalg.matrix_rank`)."""
    return float(sizes.max(initial=0.0) * len(sizes) * np.finfo(float).eps)


def _report(sizes: np.ndarray) -> tuple[int, float]:
    """Numerical rank and condition number from singular values."""
    rank, smallest = int(np.sum(sizes > _smallest(sizes))), float(sizes.min())
    return rank, float(sizes.max()) / smallest if smallest > 0 else float("inf")
