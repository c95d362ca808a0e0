"""Targets of the solvers, and losses and accuracies of predictions."""

import numpy as np

from hf_ft_ext.errors import InputError
from hf_ft_ext.kernel.solvers.options import Solver, SolverOptions


def targets_of(options: SolverOptions, labels: np.ndarray, scalars: int) -> np.ndarray:
    """The fitted targets `[N, C]`: scores, one-hot, or -1 and 1 (one scalar, several labels per row, solver `asym`).

    Raises:
        InputError: a row does not have `scalars` labels.
    """
    labels = np.asarray(labels)
    if options.regression or options.multi_label:
        columns = labels.astype(float).reshape(len(labels), -1)
        if columns.shape[1] != scalars:
            raise InputError(
                f"each row has {columns.shape[1]} labels, but the kernel has {scalars} scalars per example; pass "
                "labels of that shape, or a function that returns as many scalars"
            )
        return 2.0 * (columns > 0.5) - 1 if options.multi_label else columns
    if scalars == 1:  # 0 and 1 to -1 and 1
        return 2.0 * labels.reshape(-1, 1) - 1
    one_hot = np.eye(scalars)[labels]
    return 2 * one_hot - 1 if options.solver is Solver.ASYM else one_hot


def check_labels(labels: np.ndarray, names: list[str]) -> None:
    """Refuse a train set that lacks a class.

    Raises:
        InputError: a class has no example.
    """
    missing = [name for i, name in enumerate(names) if not np.any(np.asarray(labels) == i)]
    if missing:
        raise InputError(
            f"the training data holds no example of {', '.join(map(repr, missing))}; a kernel method can only predict "
            "classes of its training rows: add rows, or draw k per class (--num_k)"
        )


def check_both(positive: np.ndarray, solver: str, name: str) -> None:
    """Refuse rows of a single class, for a solver of two-class problems.

    Raises:
        InputError: all rows are positive, or all are negative.
    """
    if positive.all() or not positive.any():
        raise InputError(
            f"kernel_solver={solver} separates two classes of rows, but all training rows have the same value of "
            f"{name}; add rows, or pass kernel_solver=lstsq"
        )


def class_scores(options: SolverOptions, predictions: np.ndarray) -> np.ndarray:
    """Scores `[N, classes]`; one scalar, a difference of two logits, becomes two. Other predictions are unchanged."""
    if options.regression or options.multi_label or predictions.shape[1] > 1:
        return predictions
    # f_1 - f_0 = s with f_0 + f_1 = 0
    return np.hstack([-predictions, predictions]) / 2


def loss_of(options: SolverOptions, predictions: np.ndarray, labels: np.ndarray, scalars: int) -> float:
    """Squared error against the targets, summed over scalars; `logistic`: cross-entropy; `svc`, `asym`: hinge loss.

    Losses are means over the rows. With several labels per row, cross-entropy and hinge loss are also means over the
    labels.
    """
    solver = options.solver
    if solver in (Solver.LSTSQ, Solver.SVR):
        # 1/N sum_i |f(x_i) - y_i|^2
        return float(np.mean(np.sum((predictions - targets_of(options, labels, scalars)) ** 2, axis=1)))
    if options.multi_label:
        # margins m = y f; log(1 + exp(-m)), or max(0, 1 - m)
        margins = targets_of(options, labels, scalars) * predictions
        losses = np.logaddexp(0, -margins) if solver is Solver.LOGISTIC else np.maximum(0, 1 - margins)
        return float(np.mean(losses))
    scores = class_scores(options, predictions)
    true = scores[np.arange(len(labels)), np.asarray(labels)]
    if solver is Solver.LOGISTIC:
        # log sum_c exp(f_c) - f_true
        return float(np.mean(np.logaddexp.reduce(scores, axis=1) - true))
    # max(0, 1 - f_true + max over other c of f_c)
    others = np.where(np.arange(scores.shape[1]) == np.asarray(labels)[:, None], -np.inf, scores).max(1)
    return float(np.mean(np.maximum(0, 1 - true + others)))


def accuracy_of(options: SolverOptions, predictions: np.ndarray, labels: np.ndarray) -> float:
    """Share of rows (or of labels, with several per row) that are predicted correctly; 0 in a regression."""
    if options.regression:
        return 0.0
    if options.multi_label:
        return float(np.mean((predictions >= 0) == (labels > 0.5)))
    return float(np.mean(class_scores(options, predictions).argmax(-1) == labels))
