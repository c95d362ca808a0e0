"""What solvers fit, and how far predictions are from it."""

import numpy as np

from hf_ft_ext.errors import InputError
from hf_ft_ext.kernel.solvers.options import Solver, SolverOptions


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


def check_both(positive: np.ndarray, solver: str, name: str) -> None:
    """Refuse rows that are all of one kind, for a solver that tells two kinds apart.

    Raises:
        InputError: so they are.
    """
    if positive.all() or not positive.any():
        raise InputError(
            f"kernel_solver={solver} tells two kinds of rows apart, and of {name} all training rows are of one kind; "
            "add rows, or pass kernel_solver=lstsq"
        )


def class_scores(options: SolverOptions, predictions: np.ndarray) -> np.ndarray:
    """`[N, classes]`: one scalar is the difference of two logits. Several labels and a regression stay as they are."""
    if options.regression or options.multi_label or predictions.shape[1] > 1:
        return predictions
    # f_1 - f_0 = s with f_0 + f_1 = 0
    return np.hstack([-predictions, predictions]) / 2


def loss_of(options: SolverOptions, predictions: np.ndarray, labels: np.ndarray, scalars: int) -> float:
    """Mean squared error against the targets; `logistic`: mean cross-entropy; `svc`, `asym`: mean hinge loss.

    With several labels per row squared errors add up over the labels, the others are means over them.
    """
    solver = options.solver
    if solver in (Solver.LSTSQ, Solver.SVR):
        # 1/N sum_i |f(x_i) - y_i|^2
        return float(np.mean(np.sum((predictions - targets_of(options, labels, scalars)) ** 2, axis=1)))
    if options.multi_label:
        # with margins m = y f: log(1 + exp(-m)), or max(0, 1 - m)
        margins = targets_of(options, labels, scalars) * predictions
        losses = np.logaddexp(0, -margins) if solver is Solver.LOGISTIC else np.maximum(0, 1 - margins)
        return float(np.mean(losses))
    scores = class_scores(options, predictions)
    true = scores[np.arange(len(labels)), np.asarray(labels)]
    if solver is Solver.LOGISTIC:
        # log sum_c exp(f_c) - f_true
        return float(np.mean(np.logaddexp.reduce(scores, axis=1) - true))
    # max(0, 1 - f_true + the largest other f_c)
    others = np.where(np.arange(scores.shape[1]) == np.asarray(labels)[:, None], -np.inf, scores).max(1)
    return float(np.mean(np.maximum(0, 1 - true + others)))


def accuracy_of(options: SolverOptions, predictions: np.ndarray, labels: np.ndarray) -> float:
    """Share of rows (several labels per row: of labels) that are predicted right; 0 in a regression."""
    if options.regression:
        return 0.0
    if options.multi_label:
        return float(np.mean((predictions >= 0) == (labels > 0.5)))
    return float(np.mean(class_scores(options, predictions).argmax(-1) == labels))
