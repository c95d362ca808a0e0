"""Solvers: from a train kernel and labels to predictions by the kernel between train and other examples."""

import enum
import logging
import warnings
from dataclasses import dataclass

import numpy as np

from hf_ft_ext.errors import InputError
from hf_ft_ext.kernel.formulas import Formula

# scipy and scikit-learn are imported where they solve: the arguments need this file for its names only, and loading
# both takes a quarter of the time that `--help` takes.

logger = logging.getLogger(__name__)


class Solver(enum.StrEnum):
    """How the task is solved with the kernel.

    LSTSQ: least squares on one-hot targets (or -1 and 1; scores in regression): kernel regression. Any task.
    LOGISTIC: logistic regression on kernel rows as features, its penalty chosen by cross-validation. Classification.
    SVR: support vector regression on the same targets as LSTSQ. Any task; symmetric kernels.
    SVC: support vector classification with the kernel summed over classes. Symmetric kernels.
    ASYM: the coupled least squares SVM of an asymmetric kernel and its flip, one class against the rest.
    """

    LSTSQ = "lstsq"
    LOGISTIC = "logistic"
    SVR = "svr"
    SVC = "svc"
    ASYM = "asym"

    @property
    def by_class(self) -> bool:
        """Whether only products of a class's scalar with the same class's enter."""
        return self in (Solver.SVC, Solver.ASYM)


@dataclass(frozen=True)
class SolverOptions:
    """Settings of the solvers, with the published code's defaults where it has any.

    Attributes:
        solver: see `Solver`.
        regularization: times the operator norm of the matrix that is solved with, on its diagonal.
        gamma: of `asym`, weight of the errors.
        mix: of `asym`, share of the kernel's prediction; the rest is the flip's.
        svm_c: penalty C of `svr` and `svc`.
        regression: targets are scores.
        multi_label: targets are -1 and 1 for each of several labels; every label is solved by itself.
    """

    solver: Solver = Solver.LOGISTIC
    regularization: float = 0.0
    gamma: float = 1.0
    mix: float = 0.5
    svm_c: float = 1.0
    regression: bool = False
    multi_label: bool = False

    @property
    def by_class(self) -> bool:
        """Whether only products of a scalar with the same scalar enter."""
        return self.multi_label or self.solver.by_class


def check_combination(
    solver: Solver,
    formula: Formula,
    regression: bool,
    adjust_for_init: bool,
    classes: int,
    binary: bool,
    multi_label: bool = False,
) -> None:
    """Refuse what cannot work, before any kernel is computed.

    Raises:
        InputError: the combination cannot work.
    """
    name = f"kernel_solver={solver.value}"
    if regression and solver not in (Solver.LSTSQ, Solver.SVR):
        raise InputError(f"{name} classifies, but the task is regression; pass kernel_solver=lstsq or svr")
    if multi_label and solver is not Solver.LSTSQ:
        raise InputError(
            f"{name} looks for one class per row, but this task has several labels per row; pass kernel_solver=lstsq, "
            "which solves for each label by itself"
        )
    if binary and (regression or multi_label or classes != 2):
        kind = "scores" if regression else "several labels per row" if multi_label else f"{classes} classes"
        raise InputError(f"binary_classification needs two classes, but the task has {kind}; leave it out")
    if solver is Solver.ASYM and formula is not Formula.ASYMMETRIC_SIGNGD:
        raise InputError(
            f"{name} solves with a kernel and its flip, which kernel_formula={formula.value} does not give; pass "
            "kernel_formula=asymmetric_signgd or another solver"
        )
    if solver in (Solver.SVR, Solver.SVC) and formula is Formula.ASYMMETRIC_SIGNGD:
        raise InputError(
            f"{name} needs a symmetric kernel, which asymmetric_signgd is not; pass kernel_solver=asym, lstsq or "
            "logistic"
        )
    if adjust_for_init and solver in (Solver.SVC, Solver.LOGISTIC):
        raise InputError(
            f"{name} predicts classes, from which the logits at the start cannot be subtracted; leave "
            "adjust_for_init out, or pass kernel_solver=lstsq"
        )


class KernelModel:
    """A fitted solver.

    Args:
        options: which solver and how.
        kernel: of the train examples with themselves, `[kernels, N, C, N, C]`; `svc` and `asym` take one without the
            last axis too (see `KernelOptions.class_diagonal`).
        labels: `[N]`, class ids or scores; with several labels per row 0 and 1, `[N, C]`.
        start: the model's scalars at the start `[N, C]` (`adjust_for_init`), subtracted from the targets.
        quiet: no warning about an ill-conditioned kernel.

    Attributes:
        rank, condition: numerical rank of the regularised kernel matrix and its condition number (`lstsq`, `svr`).

    Raises:
        InputError: labels that cannot be fitted (see `check_labels`).
    """

    def __init__(
        self,
        options: SolverOptions,
        kernel: np.ndarray,
        labels: np.ndarray,
        start: np.ndarray | None = None,
        quiet: bool = False,
    ):
        self.options, self.scalars, self._quiet = options, kernel.shape[2], quiet
        self.rank: int | None = None
        self.condition: float | None = None
        self._labels = np.asarray(labels)
        kernel = self._taken(kernel)
        targets = self.targets(self._labels)
        if start is not None:
            targets = targets - start
        getattr(self, f"_fit_{options.solver.value}")(kernel, targets)

    def targets(self, labels: np.ndarray) -> np.ndarray:
        """`[N, C]`: scores, -1 and 1, or one-hot."""
        labels = np.asarray(labels)
        if self.options.multi_label:
            return 2.0 * (labels.reshape(len(labels), self.scalars) > 0.5) - 1
        if self.options.regression:
            return labels.astype(float).reshape(-1, 1)
        if self.scalars == 1:
            return 2.0 * labels.reshape(-1, 1) - 1
        return np.eye(self.scalars)[labels]

    def predict(self, kernel: np.ndarray, start: np.ndarray | None = None) -> np.ndarray:
        """Predictions `[M, C]` for a kernel `[kernels, N, C, M, C]`; of one scalar in classification the sign decides.

        `svc` and `asym` take `[kernels, N, C, M]` too.

        Args:
            start: the model's scalars at the start `[M, C]`, added.
        """
        found = getattr(self, f"_predict_{self.options.solver.value}")(self._taken(kernel))
        return found if start is None else found + start

    def loss(self, predictions: np.ndarray, labels: np.ndarray) -> float:
        """Mean squared error against the targets; `logistic`: mean cross-entropy; `svc`, `asym`: mean hinge loss."""
        if self.options.solver in (Solver.LOGISTIC, Solver.SVC, Solver.ASYM):
            scores = predictions if self.scalars > 1 else np.hstack([-predictions, predictions]) / 2
            true = scores[np.arange(len(labels)), np.asarray(labels)]
            if self.options.solver is Solver.LOGISTIC:
                return float(np.mean(np.logaddexp.reduce(scores, axis=1) - true))
            others = np.where(np.arange(scores.shape[1]) == np.asarray(labels)[:, None], -np.inf, scores).max(1)
            return float(np.mean(np.maximum(0, 1 - true + others)))
        return float(np.mean(np.sum((predictions - self.targets(labels)) ** 2, axis=1)))

    # --- solvers --------------------------------------------------------------------------------------

    def _fit_lstsq(self, kernel: np.ndarray, targets: np.ndarray) -> None:
        # f(x_j) = sum_i alpha_i K[i, j]: for an asymmetric kernel the system is the transpose's
        import scipy.linalg

        if self.options.multi_label:
            self._fit_each_label(kernel, targets)
            return
        matrix = self._regularized(_flat(kernel[0])).T
        self._solution, _, self.rank, sizes = scipy.linalg.lstsq(matrix, targets.reshape(-1))
        self._report(sizes, len(matrix))

    def _fit_each_label(self, kernel: np.ndarray, targets: np.ndarray) -> None:
        import scipy.linalg

        solutions, reports = [], []
        for c in range(self.scalars):
            matrix = self._regularized(kernel[0, :, c]).T
            solution, _, rank, sizes = scipy.linalg.lstsq(matrix, targets[:, c])
            solutions.append(solution)
            reports.append((rank, sizes))
        self._solution = np.stack(solutions)
        self.rank, sizes = min(reports, key=lambda report: report[0])  # of the label that is worst off
        self._report(sizes, kernel.shape[1])

    def _predict_lstsq(self, kernel: np.ndarray) -> np.ndarray:
        if self.options.multi_label:
            return np.einsum("ci,icj->jc", self._solution, kernel[0])
        return (_flat(kernel[0]).T @ self._solution).reshape(-1, self.scalars)

    def _fit_svr(self, kernel: np.ndarray, targets: np.ndarray) -> None:
        from sklearn.svm import SVR

        matrix = self._regularized(_flat(kernel[0]))
        self.rank = int(np.linalg.matrix_rank(matrix))
        self._report(np.linalg.svd(matrix, compute_uv=False), len(matrix))
        self._svm = SVR(kernel="precomputed", C=self.options.svm_c).fit(matrix, targets.reshape(-1))

    def _predict_svr(self, kernel: np.ndarray) -> np.ndarray:
        return self._svm.predict(_flat(kernel[0]).T).reshape(-1, self.scalars)

    def _fit_svc(self, kernel: np.ndarray, targets: np.ndarray) -> None:
        from sklearn.svm import SVC

        self._svm = SVC(kernel="precomputed", C=self.options.svm_c, decision_function_shape="ovr")
        self._svm.fit(self._regularized(_over_classes(kernel[0])), self._labels)

    def _predict_svc(self, kernel: np.ndarray) -> np.ndarray:
        return self._by_scalar(self._svm.decision_function(_over_classes(kernel[0]).T))

    def _fit_logistic(self, kernel: np.ndarray, targets: np.ndarray) -> None:
        from sklearn.exceptions import ConvergenceWarning
        from sklearn.linear_model import LogisticRegressionCV
        from threadpoolctl import threadpool_limits

        n, c = kernel.shape[1:3]
        kernel = self._regularized(_flat(kernel[0])).reshape(1, n, c, n, c)
        # One scale for all formulas: kernels differ by many powers of ten, and so would the penalty's meaning.
        self._scale = 1 / max(float(np.mean(np.abs(_flat(kernel[0]).diagonal()))), np.finfo(float).tiny)
        fewest = int(np.unique(self._labels, return_counts=True)[1].min())
        if fewest < 2:
            raise InputError(
                "kernel_solver=logistic cross-validates, but a class has a single example; pass kernel_solver=lstsq"
            )
        model = LogisticRegressionCV(
            Cs=np.logspace(-4, 8, 13), cv=min(5, fewest), max_iter=10_000, l1_ratios=(0,), scoring="neg_log_loss",
            use_legacy_attributes=False,
        )  # fmt: skip
        with warnings.catch_warnings(), threadpool_limits(1):  # as in `hf_ft_ext.linear_fit`
            warnings.simplefilter("ignore", ConvergenceWarning)
            self._logistic = model.fit(self._features(kernel), self._labels)

    def _predict_logistic(self, kernel: np.ndarray) -> np.ndarray:
        return self._by_scalar(self._logistic.predict_log_proba(self._features(kernel)))

    def _features(self, kernel: np.ndarray) -> np.ndarray:
        """Each example's kernel rows: `[M, N * C * C]`."""
        n, c, m, _ = kernel[0].shape
        return self._scale * kernel[0].transpose(2, 0, 1, 3).reshape(m, n * c * c)

    def _fit_asym(self, kernel: np.ndarray, targets: np.ndarray) -> None:
        import scipy.linalg

        n = kernel.shape[1]
        self._duals = []
        for c in range(self.scalars):
            signs = targets[:, c] if self.scalars == 1 else 2 * targets[:, c] - 1
            coupled = signs[:, None] * self._regularized(kernel[0, :, c]) * signs
            system = np.block([[np.eye(n) / self.options.gamma, coupled], [coupled.T, np.eye(n) / self.options.gamma]])
            alpha, beta = np.split(scipy.linalg.lstsq(system, np.ones(2 * n))[0], 2)
            self._duals.append((alpha * signs, beta * signs))

    def _predict_asym(self, kernel: np.ndarray) -> np.ndarray:
        mix = self.options.mix
        scores = [
            mix * (kernel[0, :, c].T @ alpha) + (1 - mix) * (kernel[1, :, c].T @ beta)
            for c, (alpha, beta) in enumerate(self._duals)
        ]
        return np.stack(scores, axis=1)

    # --- helpers --------------------------------------------------------------------------------------

    def _taken(self, kernel: np.ndarray) -> np.ndarray:
        """The part that the solver takes: `[kernels, N, C, M]` where it goes class by class."""
        if self.options.by_class:
            return kernel if kernel.ndim == 4 else np.einsum("kicjc->kicj", kernel)
        if kernel.ndim == 4:
            raise InputError(
                f"kernel_solver={self.options.solver.value} needs products of different classes too, which this "
                f"kernel of shape {kernel.shape} lacks; compute it with class_diagonal=False"
            )
        return kernel

    def _regularized(self, matrix: np.ndarray) -> np.ndarray:
        factor = self.options.regularization
        return matrix + factor * np.linalg.norm(matrix, 2) * np.eye(len(matrix)) if factor else matrix

    def _by_scalar(self, scores: np.ndarray) -> np.ndarray:
        """A classifier's scores as one column per scalar of the kernel."""
        if scores.ndim == 1:  # a binary margin
            return scores[:, None] if self.scalars == 1 else np.stack([-scores, scores], axis=1) / 2
        return scores[:, 1:] - scores[:, :1] if self.scalars == 1 else scores

    def _report(self, singular: np.ndarray, size: int) -> None:
        smallest = float(singular.min())
        self.condition = float(singular.max()) / smallest if smallest > 0 else np.inf
        if self.rank < size and not self._quiet:
            logger.warning(
                "the kernel matrix is ill-conditioned: rank %d of %d, condition number %.2g; the solution is the one "
                "of least norm, and kernel_regularization (auto, or 1e-4, say) makes it stable",
                self.rank, size, self.condition,
            )  # fmt: skip


def check_labels(labels: np.ndarray, names: list[str]) -> None:
    """Refuse a train set that lacks a class.

    Raises:
        InputError: a class has no example.
    """
    missing = [name for i, name in enumerate(names) if not np.any(np.asarray(labels) == i)]
    if missing:
        raise InputError(
            f"the training data holds no example of {', '.join(map(repr, missing))}; a kernel method learns only "
            "classes it has seen: add rows, or draw k per class (--num_k)"
        )


def _flat(kernel: np.ndarray) -> np.ndarray:
    """`[N, C, M, C]` as `[N C, M C]`."""
    n, c, m, _ = kernel.shape
    return kernel.reshape(n * c, m * c)


def _over_classes(kernel: np.ndarray) -> np.ndarray:
    """`[N, C, M]` summed over classes: `[N, M]`."""
    return kernel.sum(1)
