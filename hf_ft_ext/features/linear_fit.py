"""Logistic and linear regression by scikit-learn, with the regularisation chosen by cross-validation."""

import logging
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import log_softmax, xlogy
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression, Ridge, RidgeCV
from sklearn.model_selection import GroupKFold, StratifiedKFold
from threadpoolctl import threadpool_limits

from hf_ft_ext.data.few_shot import draw_order
from hf_ft_ext.errors import InputError

GRID = tuple(10.0**e for e in range(-4, 5))  # inverse regularisation strengths
TUNING_ROWS = 10_000  # maximum rows for cross-validation

# Iterations of these fits are so short that several threads mostly wait (16 times slower on two cores).
_ONE_THREAD = threadpool_limits.wrap(limits=1)

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LinearFit:
    """A fitted linear layer.

    Attributes:
        weight: `[outputs, width]`.
        bias: `[outputs]`; zeros where the layer has none.
        c: inverse regularisation strength.
        chosen: whether cross-validation chose it.
        score: accuracy, or R squared.
        loss: mean over the rows: cross-entropy, Kullback-Leibler divergence (`fit_probability`) or squared error.
    """

    weight: np.ndarray
    bias: np.ndarray
    c: float
    chosen: bool
    score: float
    loss: float

    def summary(self) -> str:
        """Regularisation and score, for the log."""
        how = "by cross-validation" if self.chosen else "as given"
        return f"C = {self.c:g} ({how}), score on them {self.score:.4f}"


@_ONE_THREAD
def fit_classes(
    x: np.ndarray,
    labels: np.ndarray,
    names: Sequence[str],
    bias: bool = True,
    c: float | None = None,
    folds: int = 5,
    max_iter: int = 1000,
) -> LinearFit:
    """Logistic regression, one row of weights per class.

    Args:
        x: `[rows, width]`.
        labels: class ids `[rows]`.
        names: class names, by id.
        bias: whether the layer has a bias.
        c: inverse regularisation strength, for features scaled to variance 1; `None` = the value of `GRID` with the
            lowest cross-validated loss.

    Raises:
        InputError: a class has no rows, or a label is not a class id.
    """
    if len(labels) and not 0 <= labels.min() <= labels.max() < len(names):
        wrong = labels[(labels < 0) | (labels >= len(names))][0]
        raise InputError(f"label {wrong} is not a class id (0 to {len(names) - 1}); remove rows without a label")
    counts = np.bincount(labels, minlength=len(names))
    if not counts.all():
        empty = names[int(counts.argmin())]
        raise InputError(f"class '{empty}' has no training rows, so no linear head can learn it; add rows of it")
    scaled, mean, scale = _scaled(x, bias)
    chosen = c is None
    if c is None:
        c = _choose(scaled, labels, None, None, bias, folds, max_iter)
    model = _logistic(scaled, labels, None, c, bias, max_iter)
    weight, offset = _rows(model, len(names))
    weight, offset = _unscaled(weight, offset, mean, scale)
    likely = log_softmax(x @ weight.T + offset, axis=-1)
    score, loss = np.mean(likely.argmax(-1) == labels), -np.mean(likely[np.arange(len(x)), labels])
    return LinearFit(weight, offset, c, chosen, float(score), float(loss))


@_ONE_THREAD
def fit_labels(
    x: np.ndarray,
    labels: np.ndarray,
    names: Sequence[str],
    bias: bool = True,
    c: float | None = None,
    folds: int = 5,
    max_iter: int = 1000,
) -> LinearFit:
    """One-vs-rest: a separate logistic regression for each label, each with its own regularisation.

    `score` is the share of correctly predicted labels, `loss` the mean binary cross-entropy, `c` the median over the
    labels. A label that all rows or no rows have gets zero weights and the bias logit((n + 1/2) / (N + 1)), for n of N
    rows with the label.

    Args:
        x: `[rows, width]`.
        labels: 0 and 1, `[rows, labels]`.
        names: label names.
        bias, c, folds, max_iter: as for `fit_classes`.

    Raises:
        InputError: all rows or no rows have a label, and the layer has no bias to represent that.
    """
    scaled, mean, scale = _scaled(x, bias)
    chosen, used, weights, offsets, constant = c is None, [], [], [], []
    for i, name in enumerate(names):
        truth = (labels[:, i] > 0.5).astype(np.int64)
        count = int(truth.sum())
        if count in (0, len(truth)):
            if not bias:
                state = "no training row has" if count == 0 else "every training row has"
                raise InputError(f"{state} the label '{name}', and a layer without a bias cannot learn that; drop it")
            constant.append(name)
            share = (count + 0.5) / (len(truth) + 1)
            weights.append(np.zeros((1, x.shape[1])))
            offsets.append(np.array([np.log(share / (1 - share))]))
            continue
        strength = _choose(scaled, truth, None, None, bias, folds, max_iter) if c is None else c
        model = _logistic(scaled, truth, None, strength, bias, max_iter)
        weight, offset = _unscaled(model.coef_, np.zeros(1) + model.intercept_, mean, scale)
        used.append(strength)
        weights.append(weight)
        offsets.append(offset)
    if constant:
        logger.warning("all training rows agree on the label %s: only its bias is fitted", ", ".join(constant))
    weight, offset = np.concatenate(weights), np.concatenate(offsets)
    logits, truth = x @ weight.T + offset, labels > 0.5
    loss = np.mean(np.logaddexp(0, logits) - truth * logits)  # log(1 + exp(f)) - y f
    score = np.mean((logits >= 0) == truth)
    strength = float(np.median(used)) if used else float(c or 1.0)
    return LinearFit(weight, offset, strength, chosen, float(score), float(loss))


@_ONE_THREAD
def fit_probability(
    x: np.ndarray,
    probability: np.ndarray,
    bias: bool = True,
    c: float | None = None,
    folds: int = 5,
    max_iter: int = 1000,
) -> LinearFit:
    """Logistic regression of a probability: two rows of weights, for the lower and the upper end of a scale.

    The loss is the cross-entropy with the probability p. Each row is used twice: for the lower end with weight
    `1 - p`, and for the upper end with weight `p`.

    Args:
        x: `[rows, width]`.
        probability: p, `[rows]`: positions on the scale, in [0, 1].
    """
    scaled, mean, scale = _scaled(x, bias)
    rows = np.arange(len(x))
    double = np.concatenate([scaled, scaled])
    ends = np.repeat([0, 1], len(x))
    weights = np.concatenate([1 - probability, probability])
    chosen = c is None
    if c is None:
        c = _choose(double, ends, weights, np.concatenate([rows, rows]), bias, folds, max_iter)
    model = _logistic(double, ends, weights, c, bias, max_iter)
    weight, offset = _unscaled(*_rows(model, 2), mean, scale)
    likely = log_softmax(x @ weight.T + offset, axis=-1)
    # KL(p || softmax): sum over both ends of p log p - p log softmax
    target = np.stack([1 - probability, probability], -1)
    loss = float((xlogy(target, target) - target * likely).sum(-1).mean())
    return LinearFit(weight, offset, c, chosen, _r_squared(probability, np.exp(likely[:, 1])), loss)


def fit_regression(x: np.ndarray, labels: np.ndarray, bias: bool = True, c: float | None = None) -> LinearFit:
    """Ridge regression; `c=None` = the value of `GRID` with the lowest leave-one-out error.

    Args:
        x: `[rows, width]`.
        labels: `[rows]` or `[rows, outputs]`.
    """
    labels = labels.reshape(len(x), -1).astype(np.float64)
    scaled, mean, scale = _scaled(x, bias)
    chosen = c is None
    if c is None:
        c = 1 / float(RidgeCV(alphas=[1 / value for value in GRID], fit_intercept=bias).fit(scaled, labels).alpha_)
    model = Ridge(alpha=1 / c, fit_intercept=bias).fit(scaled, labels)
    weight = np.atleast_2d(model.coef_).reshape(labels.shape[1], -1)
    offset = np.zeros(labels.shape[1]) + (model.intercept_ if bias else 0.0)
    weight, offset = _unscaled(weight, offset, mean, scale)
    found = x @ weight.T + offset
    return LinearFit(weight, offset, c, chosen, _r_squared(labels, found), float(((found - labels) ** 2).mean()))


def _scaled(x: np.ndarray, center: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Scale features to variance 1 (and mean 0), so that the solver converges faster and one grid suits all models."""
    mean = x.mean(0) if center else np.zeros(x.shape[1])
    scale = x.std(0)
    scale[scale < 1e-12 * max(1.0, float(np.abs(x).max()))] = 1.0  # constant features
    return (x - mean) / scale, mean, scale


def _unscaled(weight, offset, mean, scale) -> tuple[np.ndarray, np.ndarray]:
    """Weights and biases for the features themselves: `w^T ((x - m) / s) + b = (w / s)^T x + b - (w / s)^T m`."""
    weight = weight / scale
    return weight, offset - weight @ mean


def _logistic(x, y, weights, c: float, bias: bool, max_iter: int, start: LogisticRegression | None = None):
    model = start or LogisticRegression(fit_intercept=bias, max_iter=max_iter, warm_start=True, random_state=0)
    model.set_params(C=c)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        model.fit(x, y, sample_weight=weights)
    if start is None and int(np.max(model.n_iter_)) >= max_iter:
        logger.warning("the logistic regression stopped after %d iterations, before it converged", max_iter)
    return model


def _rows(model: LogisticRegression, classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Weights and biases per class; with two classes, each gets half of the difference, with opposite signs."""
    weight, offset = model.coef_, np.zeros(len(model.coef_)) + model.intercept_
    if classes == 2:
        halves = np.array([[-0.5], [0.5]])
        return halves * weight, halves[:, 0] * offset
    return weight, offset


def _choose(x, y, weights, groups, bias: bool, folds: int, max_iter: int) -> float:
    """The inverse strength with the lowest mean loss on held-out rows."""
    if groups is None and len(x) > TUNING_ROWS:
        kept = draw_order(range(len(x)), 0)[:TUNING_ROWS]
        if len(np.unique(y[kept])) == len(np.unique(y)):
            x, y = x[kept], y[kept]
    splits = list(_folds(y, groups, folds))
    if not splits:
        logger.info("too few rows of a class for cross-validation: C = 1")
        return 1.0
    models: list[LogisticRegression | None] = [None] * len(splits)
    losses: list[float] = []
    for c in GRID:
        total = 0.0
        for i, (train, test) in enumerate(splits):
            weighted = None if weights is None else weights[train]
            # Warm start from the fit with the next stronger regularisation.
            model = models[i] = _logistic(x[train], y[train], weighted, c, bias, max_iter, models[i])
            likely = model.predict_proba(x[test])[np.arange(len(test)), np.searchsorted(model.classes_, y[test])]
            loss = -np.log(np.maximum(likely, 1e-300))
            total += float(loss.sum() if weights is None else (loss * weights[test]).sum())
        losses.append(total)
        if len(losses) > 2 and min(losses[-2:]) > losses[-3]:
            break  # past the optimum; weaker regularisation fits more slowly
    return GRID[int(np.argmin(losses))]


def _folds(y, groups, folds: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Cross-validation splits with every class in each training part."""
    if groups is not None:
        parts = min(folds, len(np.unique(groups)))
        yield from GroupKFold(parts).split(y, y, groups) if parts > 1 else ()
        return
    parts = min(folds, int(np.bincount(y).min()))
    if parts > 1:
        yield from StratifiedKFold(parts, shuffle=True, random_state=0).split(y, y)


def _r_squared(true: np.ndarray, found: np.ndarray) -> float:
    """`1 - sum (y - f)^2 / sum (y - mean y)^2`; 0 if all `y` are equal."""
    spread = float(((true - true.mean(0)) ** 2).sum())
    return 1 - float(((true - found) ** 2).sum()) / spread if spread else 0.0
