"""Solutions: coefficients that predict from the kernel with the training rows, and their form on disk.

Every solver results in coefficients of the training rows, so predicting needs no solver.
"""

from dataclasses import dataclass, fields
from typing import Any, ClassVar

import numpy as np

from hf_ft_ext.errors import InputError


@dataclass(frozen=True)
class LinearSolution:
    """`f_c(x) = sum_k sum_i coefficients[k, i, c] K_k(i, x) + intercept[c]`, over the products of the coupling.

    Attributes:
        coefficients: `[kernels, N, C]`.
        intercept: `[C]`.
    """

    kind: ClassVar[str] = "linear"
    coefficients: np.ndarray
    intercept: np.ndarray

    def predict(self, kernel: np.ndarray) -> np.ndarray:
        """`[M, C]` of a kernel in the form that `view_of` gives."""
        scores = np.broadcast_to(self.intercept, (kernel.shape[3 if kernel.ndim > 3 else 2], len(self.intercept)))
        for part, coefficients in zip(kernel, self.coefficients, strict=False):
            scores = scores + _sums(part, coefficients)
        return scores

    @property
    def rows(self) -> int:
        """Training rows N."""
        return self.coefficients.shape[1]


@dataclass(frozen=True)
class PairwiseSolution:
    """Support vector classification of three or more classes: one decision per pair of classes, then a vote.

    Attributes:
        dual: `[C - 1, N]`: for a row of class c, its coefficients against the other classes, in their order.
        classes: class of each row, `[N]`.
        intercept: `[C (C - 1) / 2]`, for the pairs (0, 1), (0, 2), ..., (1, 2), ...
    """

    kind: ClassVar[str] = "pairwise"
    dual: np.ndarray
    classes: np.ndarray
    intercept: np.ndarray

    def predict(self, kernel: np.ndarray) -> np.ndarray:
        """Return votes plus confidences of less than one vote, `[M, C]`, for a kernel `[1, N, M]`."""
        count = len(self.dual) + 1
        # parts[c][d] = sum over rows i of class c of dual[d, i] K(i, x)
        parts = [self.dual[:, self.classes == c] @ kernel[0][self.classes == c] for c in range(count)]
        votes, confidence = np.zeros((kernel.shape[2], count)), np.zeros((kernel.shape[2], count))
        pair = 0
        for a in range(count):
            for b in range(a + 1, count):
                # f_ab(x) = sum_i dual_i K(i, x) + b_ab; positive for class a
                decision = parts[a][b - 1] + parts[b][a] + self.intercept[pair]
                votes[:, a] += decision >= 0
                votes[:, b] += decision < 0
                confidence[:, a] += decision
                confidence[:, b] -= decision
                pair += 1
        # Confidences are mapped into (-1/3, 1/3), so that they only break ties between equal votes.
        return votes + confidence / (3 * (np.abs(confidence) + 1))

    @property
    def rows(self) -> int:
        """Training rows N."""
        return len(self.classes)


@dataclass(frozen=True)
class LogisticSolution:
    """Log class probabilities of a logistic regression with kernel rows as features.

    Attributes:
        weights: `[C, features]`; the features are all products of an example with the training rows.
        intercept: `[C]`.
        training_rows: N, `[1]`.
    """

    kind: ClassVar[str] = "logistic"
    weights: np.ndarray
    intercept: np.ndarray
    training_rows: np.ndarray

    def predict(self, kernel: np.ndarray) -> np.ndarray:
        """`[M, C]` of a kernel in the form that `view_of` gives."""
        # f_c = <w_c, x> + b_c
        scores = features_of(kernel) @ self.weights.T + self.intercept
        return scores - np.logaddexp.reduce(scores, axis=1, keepdims=True)  # log softmax

    @property
    def rows(self) -> int:
        """Training rows N."""
        return int(self.training_rows[0])


def features_of(kernel: np.ndarray) -> np.ndarray:
    """Each example's kernel row as features: `[M, N C C]` for a full kernel, `[M, N]` for a shared one."""
    if kernel.ndim == 3:
        return kernel[0].T
    n, c, m = kernel.shape[1:4]
    return kernel[0].transpose(2, 0, 1, 3).reshape(m, n * c * c)


Solution = LinearSolution | PairwiseSolution | LogisticSolution
_KINDS = {kind.kind: kind for kind in (LinearSolution, PairwiseSolution, LogisticSolution)}


def arrays_of(solution: Solution) -> dict[str, np.ndarray]:
    """The arrays of a solution, by name."""
    return {f.name: np.ascontiguousarray(getattr(solution, f.name)) for f in fields(solution)}


def solution_of(kind: str, arrays: dict[str, Any]) -> Solution:
    """Make a solution from the result of `arrays_of`.

    Raises:
        InputError: the kind is unknown, or it needs other arrays.
    """
    if kind not in _KINDS:
        raise InputError(f"a kernel solution of kind {kind!r} is unknown; it needs a newer version of hf_ft_ext")
    wanted = {f.name for f in fields(_KINDS[kind])}
    if arrays.keys() != wanted:
        raise InputError(
            f"the coefficients of the kernel are {', '.join(sorted(arrays)) or 'missing'}, expected "
            f"{', '.join(sorted(wanted))}; save the solved kernel again"
        )
    return _KINDS[kind](**arrays)


def _sums(kernel: np.ndarray, coefficients: np.ndarray) -> np.ndarray:
    if kernel.ndim == 2:  # [N, M], shared: sum_i a[i, c] K[i, m]
        return kernel.T @ coefficients
    n, c, m = kernel.shape[:3]
    if kernel.ndim == 3:  # [N, C, M], by class: sum_i a[i, c] K[i, c, m]
        return np.stack([kernel[:, scalar].T @ coefficients[:, scalar] for scalar in range(c)], 1)
    # [N, C, M, C], full: sum_i sum_a a[i, a] K[i, a, m, c]
    return (kernel.reshape(n * c, m * c).T @ coefficients.reshape(-1)).reshape(m, c)
