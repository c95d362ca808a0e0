"""Solvers: from a train kernel and labels to coefficients that predict by the kernel with the training rows."""

import enum
import logging
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from hf_ft_ext.errors import InputError
from hf_ft_ext.kernel.formulas import Formula
from hf_ft_ext.kernel.solution import (
    Coupling,
    LinearSolution,
    LogisticSolution,
    PairwiseSolution,
    Solution,
    arrays_of,
    features_of,
    solution_of,
    view_of,
)
from hf_ft_ext.kernel.systems import GeneralMatrix, SymmetricMatrix, matrix_of

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
    def couplings(self) -> tuple[Coupling, ...]:
        """The couplings that the solver works with, the first one its own."""
        return _COUPLINGS[self]


_COUPLINGS = {
    Solver.LSTSQ: (Coupling.FULL, Coupling.BY_CLASS, Coupling.SHARED, Coupling.PSEUDO),
    Solver.LOGISTIC: (Coupling.FULL, Coupling.SHARED, Coupling.PSEUDO),
    Solver.SVR: (Coupling.FULL, Coupling.BY_CLASS, Coupling.SHARED, Coupling.PSEUDO),
    Solver.SVC: (Coupling.SHARED, Coupling.PSEUDO),
    Solver.ASYM: (Coupling.BY_CLASS,),
}
# Unknowns N C up to which all scalars are coupled unless something else is asked for: a matrix of 0.5 GB, whose
# eigendecomposition takes minutes on one core.
FULL_UNKNOWNS = 8192


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
        coupling: see `Coupling`; `None` = the solver's own, and `BY_CLASS` with several labels per row.
        time: of `lstsq`, where gradient flow stops (see `least_squares`); `None` = never.
    """

    solver: Solver = Solver.LOGISTIC
    regularization: float = 0.0
    gamma: float = 1.0
    mix: float = 0.5
    svm_c: float = 1.0
    regression: bool = False
    multi_label: bool = False
    coupling: Coupling | None = None
    time: float | None = None

    def __post_init__(self):
        object.__setattr__(self, "solver", Solver(self.solver))
        own = Coupling.BY_CLASS if self.multi_label else self.solver.couplings[0]
        object.__setattr__(self, "coupling", Coupling(self.coupling or own))


def chosen_coupling(
    solver: Solver, asked: str, multi_label: bool, rows: int, scalars: int, needs_logits: str | None = None
) -> Coupling:
    """The coupling that `kernel_classes` asks for, `auto` by the number of unknowns.

    Args:
        needs_logits: the argument that needs each class's own scalar, so that `PSEUDO` is out; `None` = none does.

    Raises:
        InputError: the solver, or a task with several labels per row, works with another one.
    """
    if multi_label:
        if asked not in ("auto", Coupling.BY_CLASS):
            raise InputError(
                f"kernel_classes={asked}: with several labels per row each label is solved by itself; leave it out"
            )
        return Coupling.BY_CLASS
    if asked != "auto":
        if asked == Coupling.PSEUDO and (needs_logits or scalars == 1):
            cause = f"{needs_logits} needs each class's own" if needs_logits else "this task has but one"
            raise InputError(
                f"kernel_classes=pseudo adds the logits up to one scalar, and {cause}; pass shared, or auto"
            )
        if asked not in solver.couplings:
            raise InputError(
                f"kernel_classes={asked} is not for kernel_solver={solver.value}; choose from: auto, "
                f"{', '.join(solver.couplings)}"
            )
        return Coupling(asked)
    coupling = solver.couplings[0]
    if coupling is Coupling.FULL and scalars > 1 and rows * scalars > FULL_UNKNOWNS:
        instead = Coupling.SHARED if needs_logits else Coupling.PSEUDO
        logger.warning(
            "%d rows times %d scalars are a system of %d unknowns, more than %d: one kernel for all classes takes its "
            "place (kernel_classes=%s; pass full for the whole system)",
            rows, scalars, rows * scalars, FULL_UNKNOWNS, instead.value,
        )  # fmt: skip
        return instead
    return coupling


def check_combination(
    solver: Solver,
    formula: Formula,
    regression: bool,
    adjust_for_init: bool,
    classes: int,
    binary: bool,
    multi_label: bool = False,
    time: float | None = None,
) -> None:
    """Refuse what cannot work, before any kernel is computed.

    Raises:
        InputError: the combination cannot work.
    """
    name = f"kernel_solver={solver.value}"
    if regression and solver not in (Solver.LSTSQ, Solver.SVR):
        raise InputError(f"{name} classifies, but the task is regression; pass kernel_solver=lstsq or svr")
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
    if time is not None and (solver is not Solver.LSTSQ or formula is not Formula.SGD):
        raise InputError(
            f"kernel_time={time:g} is about gradient flow on the squared loss: it needs kernel_solver=lstsq and "
            f"kernel_formula=sgd, not {solver.value} and {formula.value}"
        )
    if time is not None and not adjust_for_init:
        raise InputError(
            f"kernel_time={time:g}: training starts from the model's own outputs; pass adjust_for_init too, or leave "
            "kernel_time out"
        )


class KernelSystem:
    """A train kernel with its targets, to be solved under one or several regularizations.

    Norms and decompositions are computed once, when they are first needed.

    Args:
        options: which solver and how; `regularization` is that of `solve` without another one.
        kernel: of the train examples with themselves, `[kernels, N, C, N, C]`; where scalars are not coupled (see
            `Coupling`) one without the last axis too (see `KernelOptions.class_diagonal`).
        labels: `[N]`, class ids or scores; scores `[N, C]` of several scalars; with several labels per row 0 and 1,
            `[N, C]`.
        start: the model's scalars at the start `[N, C]` (`adjust_for_init`), subtracted from the targets.
        scalars: C; `None` = those of the kernel, which has a single one in `Coupling.PSEUDO`.

    Raises:
        InputError: labels that cannot be fitted (see `check_labels`), or of another shape than the kernel.
    """

    def __init__(
        self,
        options: SolverOptions,
        kernel: np.ndarray,
        labels: np.ndarray,
        start: np.ndarray | None = None,
        scalars: int | None = None,
    ):
        self.options, self.scalars, self.labels = options, scalars or kernel.shape[2], np.asarray(labels)
        self.kernel = view_of(kernel, options.coupling)
        self.targets = targets_of(options, self.labels, self.scalars)
        if start is not None:
            self.targets = self.targets - start
        self._matrices: list[SymmetricMatrix | GeneralMatrix] | None = None

    @property
    def matrices(self) -> list[SymmetricMatrix | GeneralMatrix]:
        """The systems' matrices: one of `[N C, N C]` (full) or `[N, N]` (shared), or C of `[N, N]` (by class).

        Transposed: with `f(x_j) = sum_i alpha_i K[i, j]` row j of the system is column j of the kernel.
        """
        if self._matrices is None:
            kernel = self.kernel[0]
            if self.options.coupling is Coupling.FULL:
                n, c = kernel.shape[:2]
                parts = [kernel.reshape(n * c, n * c)]
            elif self.options.coupling is Coupling.BY_CLASS:
                parts = [kernel[:, c] for c in range(kernel.shape[1])]
            else:
                parts = [kernel]
            self._matrices = [matrix_of(part.T) for part in parts]
        return self._matrices

    def solve(
        self, regularization: float | None = None, quiet: bool = False, time: float | None = None
    ) -> "KernelModel":
        """The fitted solver.

        Args:
            regularization, time: in the place of the options' own.
            quiet: no report of rank and condition number, and no warning about them.
        """
        options = self.options
        if regularization is not None:
            options = replace(options, regularization=regularization)
        if time is not None:
            options = replace(options, time=time)
        found = _FITS[options.solver](self, options)
        # in the order in memory that a file gives back, so that products round the same
        model = KernelModel(options, self.scalars, solution_of(found.kind, arrays_of(found)))
        if not quiet and options.solver in (Solver.LSTSQ, Solver.SVR):
            reports = [matrix.report(options.regularization) for matrix in self.matrices]
            size = self.matrices[0].size
            model.rank, model.condition = min(reports, key=lambda report: (report[0], -report[1]))
            if model.rank < size:
                logger.warning(
                    "the kernel matrix is ill-conditioned: rank %d of %d, condition number %.2g; the solution is the "
                    "one of least norm, and kernel_regularization (auto, or 1e-4, say) makes it stable",
                    model.rank, size, model.condition,
                )  # fmt: skip
        return model

    @property
    def leaves_one_out(self) -> bool:
        """Whether `leave_one_out` takes no further solutions: of least squares with symmetric kernels."""
        least_squares_alone = self.options.solver is Solver.LSTSQ and self.options.time is None
        return least_squares_alone and all(isinstance(matrix, SymmetricMatrix) for matrix in self.matrices)

    def leave_one_out(self, regularization: float) -> np.ndarray:
        """Predictions `[N, C]` of each row by the solution of all others, less the start.

        Args:
            regularization: above 0 where the kernel is singular.
        """
        if self.options.coupling is Coupling.BY_CLASS:
            columns = [m.leave_one_out(regularization, self.targets[:, [c]]) for c, m in enumerate(self.matrices)]
            return np.hstack(columns)
        return self.matrices[0].leave_one_out(regularization, self.targets)

    def best_left_out(self, values: Sequence[float]) -> float:
        """The one of `values`, above 0 each, whose squared error is least when each row is predicted by the others."""
        errors = [float(np.mean((self.leave_one_out(value) - self.targets) ** 2)) for value in values]
        return values[int(np.argmin(errors))]

    def coefficients(self, solve: Callable[..., np.ndarray]) -> np.ndarray:
        """`[N, C]` from `solve(matrix, targets)`, which takes and gives `[n, k]`."""
        if self.options.coupling is Coupling.BY_CLASS:
            return np.hstack([solve(matrix, self.targets[:, [c]]) for c, matrix in enumerate(self.matrices)])
        if self.options.coupling.one_kernel:
            return solve(self.matrices[0], self.targets)
        return solve(self.matrices[0], self.targets.reshape(-1, 1)).reshape(self.targets.shape)


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
        """Mean squared error against the targets; `logistic`: mean cross-entropy; `svc`, `asym`: mean hinge loss.

        With several labels per row squared errors add up over the labels, the others are means over them.
        """
        solver = self.options.solver
        if solver in (Solver.LSTSQ, Solver.SVR):
            return float(np.mean(np.sum((predictions - self.targets(labels)) ** 2, axis=1)))
        if self.options.multi_label:
            margins = self.targets(labels) * predictions
            losses = np.logaddexp(0, -margins) if solver is Solver.LOGISTIC else np.maximum(0, 1 - margins)
            return float(np.mean(losses))
        scores = predictions if self.scalars > 1 else np.hstack([-predictions, predictions]) / 2
        true = scores[np.arange(len(labels)), np.asarray(labels)]
        if solver is Solver.LOGISTIC:
            return float(np.mean(np.logaddexp.reduce(scores, axis=1) - true))
        others = np.where(np.arange(scores.shape[1]) == np.asarray(labels)[:, None], -np.inf, scores).max(1)
        return float(np.mean(np.maximum(0, 1 - true + others)))


def targets_of(options: SolverOptions, labels: np.ndarray, scalars: int) -> np.ndarray:
    """What is fitted, `[N, C]`: scores, -1 and 1 (one scalar; several labels per row), or one-hot.

    Raises:
        InputError: the labels are not of `scalars` numbers each.
    """
    labels = np.asarray(labels)
    if options.regression or options.multi_label:
        columns = labels.astype(float).reshape(len(labels), -1)
        if columns.shape[1] != scalars:
            raise InputError(
                f"each row has {columns.shape[1]} labels, but the kernel is of {scalars} scalars an example; pass "
                "labels of that shape, or a function that gives as many scalars"
            )
        return 2.0 * (columns > 0.5) - 1 if options.multi_label else columns
    if scalars == 1:
        return 2.0 * labels.reshape(-1, 1) - 1
    return np.eye(scalars)[labels]


# --- the solvers ------------------------------------------------------------------------------------------


def least_squares(system: KernelSystem, options: SolverOptions) -> LinearSolution:
    """Kernel regression: `alpha = (K + r n I)^-1 (y - f_0)`, with `n` the operator norm of `K`.

    With a time t the model is the linearised one, trained for t by gradient flow from its start on
    `1 / (2 N) (sum_i |f(x_i) - y_i|^2 + r n |theta - theta_0|^2)`, N rows (Lee et al. 2019, arXiv 1902.06720,
    equations 10 and 11): `alpha_t = M^-1 (I - exp(-M t / N)) (y - f_0)`, `M = K + r n I`. So t is the learning rate
    times the number of small steps, and t -> infinity gives kernel regression.
    """
    r, rows = options.regularization, len(system.targets)
    if options.time is None or options.time == math.inf:
        alpha = system.coefficients(lambda matrix, y: matrix.solve(r, y))
    elif all(isinstance(matrix, SymmetricMatrix) for matrix in system.matrices):
        alpha = system.coefficients(lambda matrix, y: matrix.flow(r, y, options.time / rows))
    else:
        raise InputError("gradient flow needs a symmetric kernel, which this one is not; pass a kernel of formula sgd")
    return LinearSolution(alpha[None], np.zeros(system.targets.shape[1]))


def support_vector_regression(system: KernelSystem, options: SolverOptions) -> LinearSolution:
    """`min 1/2 alpha^T K alpha + C sum_i max(0, |f(x_i) - y_i| - 0.1)`, by libsvm, with `K + r n I`.

    All scalars share an intercept where they are coupled, and have one each where they are not.
    """
    from sklearn.svm import SVR

    intercepts: list[float] = []

    def solve(matrix: SymmetricMatrix, targets: np.ndarray) -> np.ndarray:
        regularized = matrix.regularized(options.regularization)
        found = np.zeros_like(targets)
        for column in range(targets.shape[1]):
            svm = SVR(kernel="precomputed", C=options.svm_c).fit(regularized, targets[:, column])
            found[svm.support_, column] = svm.dual_coef_[0]
            intercepts.append(float(svm.intercept_[0]))
        return found

    coefficients = system.coefficients(solve)
    return LinearSolution(coefficients[None], np.broadcast_to(intercepts, (coefficients.shape[1],)).copy())


def support_vector_classification(system: KernelSystem, options: SolverOptions) -> LinearSolution | PairwiseSolution:
    """libsvm's classifier with the kernel summed over classes; with several labels per row one for each label."""
    if options.multi_label:
        columns = [
            _margin(matrix.regularized(options.regularization), system.labels[:, c] > 0.5, options, f"label {c}")
            for c, matrix in enumerate(system.matrices)
        ]
        coefficients, intercepts = zip(*columns, strict=True)
        return LinearSolution(np.stack(coefficients, 1)[None], np.array(intercepts))
    # The view is the mean over classes: the sum is it times C, and so are the coefficients of the mean.
    factor = system.scalars
    matrix = factor * system.matrices[0].regularized(options.regularization)
    if len(np.unique(system.labels)) == 2:
        coefficients, intercept = _margin(matrix, system.labels == system.labels.max(), options)
        return _of_scalars(factor * coefficients, intercept, system.scalars)
    from sklearn.svm import SVC

    svm = SVC(kernel="precomputed", C=options.svm_c).fit(matrix, system.labels)
    dual = np.zeros((len(svm.dual_coef_), len(matrix)))
    dual[:, svm.support_] = factor * svm.dual_coef_
    return PairwiseSolution(dual, system.labels.astype(np.int64), svm.intercept_.copy())


def _margin(
    matrix: np.ndarray, positive: np.ndarray, options: SolverOptions, name: str = "the data"
) -> tuple[np.ndarray, float]:
    """Coefficients `[N]` and intercept of a two-class support vector machine; above 0 is positive."""
    from sklearn.svm import SVC

    _check_both(positive, "svc", name)
    svm = SVC(kernel="precomputed", C=options.svm_c).fit(matrix, positive)
    coefficients = np.zeros(len(matrix))
    coefficients[svm.support_] = svm.dual_coef_[0]
    return coefficients, float(svm.intercept_[0])


def logistic_regression(system: KernelSystem, options: SolverOptions) -> LinearSolution | LogisticSolution:
    """Logistic regression on kernel rows, its penalty by cross-validation; of several labels one for each label.

    Features are divided by the mean of the kernel's diagonal: kernels of the formulas differ by many powers of
    ten, and so would the meaning of the penalty.
    """
    kernel = system.kernel[:1]
    if options.multi_label:
        columns = []
        for c, matrix in enumerate(system.matrices):
            _check_both(system.labels[:, c] > 0.5, "logistic", f"label {c}")
            features = matrix.regularized(options.regularization)  # [example, training row]
            weights, intercept = _cross_validated(features, system.labels[:, c] > 0.5, features)
            columns.append((weights[0], intercept[0]))
        coefficients, intercepts = zip(*columns, strict=True)
        return LinearSolution(np.stack(coefficients, 1)[None], np.array(intercepts))
    matrix = system.matrices[0]
    regularized = matrix.regularized(options.regularization).T
    weights, intercept = _cross_validated(features_of(regularized.reshape(kernel.shape)), system.labels, regularized)
    if len(weights) == 1:
        if system.scalars == 1:  # log p_1 - log p_0 = w x + b
            return LinearSolution(weights.T[None], intercept)
        weights, intercept = np.vstack([np.zeros_like(weights), weights]), np.append(0.0, intercept)
    return LogisticSolution(weights, intercept, np.array([kernel.shape[1]]))


def _cross_validated(features: np.ndarray, labels: np.ndarray, matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Weights `[classes or 1, features]` of unscaled features, and intercepts."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegressionCV
    from threadpoolctl import threadpool_limits

    scale = 1 / max(float(np.mean(np.abs(matrix.diagonal()))), np.finfo(float).tiny)
    fewest = int(np.unique(labels, return_counts=True)[1].min())
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
        model.fit(scale * features, labels)
    return scale * model.coef_, model.intercept_.copy()


def coupled_least_squares(system: KernelSystem, options: SolverOptions) -> LinearSolution:
    """The least squares SVM of an asymmetric kernel and its flip, one class against the rest.

    With signs `y`, `D = diag(y)`, `H = D (K + r n I) D` and ones on the right:
    `[I/gamma, H; H^T, I/gamma] [alpha; beta] = 1`, `f(x) = mix K(., x)^T D alpha + (1 - mix) K_flip(., x)^T D beta`.
    """
    alphas, betas = [], []
    for c, matrix in enumerate(system.matrices):
        targets = system.targets[:, c]
        signs = targets if options.multi_label or system.scalars == 1 else 2 * targets - 1
        alpha, beta = _coupled(signs[:, None] * matrix.regularized(options.regularization).T * signs, options.gamma)
        alphas.append(options.mix * signs * alpha)
        betas.append((1 - options.mix) * signs * beta)
    return LinearSolution(np.stack([np.stack(alphas, 1), np.stack(betas, 1)]), np.zeros(len(alphas)))


def _coupled(h: np.ndarray, gamma: float) -> tuple[np.ndarray, np.ndarray]:
    """`alpha` and `beta` of `[I/gamma, H; H^T, I/gamma] [alpha; beta] = 1`, of least norm if it is singular.

    With `H = U diag(s) V^T`, `alpha = U a` and `beta = V b` it falls into pairs: `(1/gamma + s) (a + b) = p + q` and
    `(1/gamma - s) (a - b) = p - q`, where `p = U^T 1` and `q = V^T 1`. So one SVD of H takes the place of one of the
    coupled matrix, which is twice as large and singular wherever s = 1/gamma.
    """
    import scipy.linalg

    u, s, vt = scipy.linalg.svd(h)
    p, q = u.sum(0), vt.sum(1)
    below = 1 / gamma - s
    zero = np.abs(below) <= 2 * len(s) * np.finfo(float).eps * (1 / gamma + s.max())
    total = (p + q) / (1 / gamma + s)
    difference = np.where(zero, 0.0, (p - q) / np.where(zero, 1.0, below))
    return u @ (total + difference) / 2, vt.T @ (total - difference) / 2


_FITS: dict[Solver, Callable[[KernelSystem, SolverOptions], Solution]] = {
    Solver.LSTSQ: least_squares,
    Solver.LOGISTIC: logistic_regression,
    Solver.SVR: support_vector_regression,
    Solver.SVC: support_vector_classification,
    Solver.ASYM: coupled_least_squares,
}


def _of_scalars(coefficients: np.ndarray, intercept: float, scalars: int) -> LinearSolution:
    """A two-class margin as one scalar, or as two that differ by it."""
    if scalars == 1:
        return LinearSolution(coefficients[None, :, None], np.array([intercept]))
    both = np.stack([-coefficients, coefficients], 1) / 2
    return LinearSolution(both[None], np.array([-intercept, intercept]) / 2)


def _check_both(positive: np.ndarray, solver: str, name: str) -> None:
    if positive.all() or not positive.any():
        raise InputError(
            f"kernel_solver={solver} tells two kinds of rows apart, and of {name} all training rows are of one kind; "
            "add rows, or pass kernel_solver=lstsq"
        )


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
