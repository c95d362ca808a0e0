"""Logistic regression with kernel rows as features, and a cross-validated penalty."""

import warnings
from typing import TYPE_CHECKING

import numpy as np

from hf_ft_ext.errors import InputError
from hf_ft_ext.kernel.solvers.options import SolverOptions
from hf_ft_ext.kernel.solvers.problem import KernelProblem
from hf_ft_ext.kernel.solvers.solution import LinearSolution, LogisticSolution, features_of
from hf_ft_ext.kernel.solvers.targets import check_both

if TYPE_CHECKING:
    from sklearn.linear_model import LogisticRegression


def logistic_regression(system: KernelProblem, options: SolverOptions) -> LinearSolution | LogisticSolution:
    """Fit a logistic regression on kernel rows with a cross-validated penalty; in multi-label tasks one per label.

    Features are divided by the mean absolute diagonal entry of the kernel, so that the penalty has the same meaning
    for all formulas, whose kernels differ by many orders of magnitude.
    """
    kernel = system.kernel[:1]
    if options.multi_label:
        columns = []
        for c, matrix in enumerate(system.matrices):
            check_both(system.labels[:, c] > 0.5, "logistic", f"label {c}")
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
        # log p_0 = 0 and log p_1 = w x + b up to the softmax's normalization
        weights, intercept = np.vstack([np.zeros_like(weights), weights]), np.append(0.0, intercept)
    return LogisticSolution(weights, intercept, np.array([kernel.shape[1]]))


def _cross_validated(features: np.ndarray, labels: np.ndarray, matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return weights `[classes or 1, features]` for the unscaled features, and intercepts."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegressionCV
    from threadpoolctl import threadpool_limits

    # 1 / mean_i |K_ii|
    scale = 1 / max(float(np.mean(np.abs(matrix.diagonal()))), float(np.finfo(float).tiny))
    fewest = int(np.unique(labels, return_counts=True)[1].min())
    if fewest < 2:
        raise InputError(
            "kernel_solver=logistic uses cross-validation, but a class has a single example; pass kernel_solver=lstsq"
        )
    model = LogisticRegressionCV(
        Cs=np.logspace(-4, 8, 13), cv=min(5, fewest), max_iter=10_000, l1_ratios=(0,),
        scoring=_log_likelihood, use_legacy_attributes=False,
    )  # fmt: skip
    with warnings.catch_warnings(), threadpool_limits(1):  # as in `hf_ft_ext.features.linear_fit`
        warnings.simplefilter("ignore", ConvergenceWarning)
        model.fit(scale * features, labels)
    # w^T (scale x) = (scale w)^T x
    return scale * model.coef_, model.intercept_.copy()


def _log_likelihood(model: "LogisticRegression", features: np.ndarray, labels: np.ndarray) -> float:
    """Mean log-likelihood of held-out rows.

    It equals scikit-learn's `neg_log_loss`, whose checks of its arguments take longer than a fit to few rows.
    """
    likely = model.predict_proba(features)[np.arange(len(labels)), np.searchsorted(model.classes_, labels)]
    eps = np.finfo(likely.dtype).eps
    return float(np.mean(np.log(np.clip(likely, eps, 1 - eps))))
