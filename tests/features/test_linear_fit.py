"""The fits of a linear head, against direct calls of scikit-learn and optimality conditions."""

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.metrics import log_loss
from sklearn.model_selection import StratifiedKFold

from hf_ft_ext.errors import InputError
from hf_ft_ext.features.linear_fit import GRID, fit_classes, fit_probability, fit_regression

RANDOM = np.random.default_rng(0)
X = RANDOM.normal(size=(60, 5)) * [1, 10, 0.1, 1, 1] + 3


def softmax(z):
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


@pytest.mark.parametrize("classes", [2, 3])
def test_classes_equal_a_plain_logistic_regression_of_scaled_features(classes):
    labels = (X[:, 0] + X[:, 1] / 10 > 4).astype(int) + (classes == 3) * (X[:, 3] > 3.5)
    fit = fit_classes(X, labels, [str(i) for i in range(classes)], c=0.7)
    scaled = (X - X.mean(0)) / X.std(0)
    plain = LogisticRegression(C=0.7, max_iter=5000, tol=1e-8).fit(scaled, labels)
    ours = softmax(X @ fit.weight.T + fit.bias)
    np.testing.assert_allclose(ours, plain.predict_proba(scaled), atol=2e-3)
    assert fit.weight.shape == (classes, 5) and not fit.chosen and fit.c == 0.7
    assert fit.score == np.mean(ours.argmax(-1) == labels)
    assert fit.loss == pytest.approx(-np.log(ours[np.arange(60), labels]).mean())


def test_two_classes_get_opposite_rows():
    fit = fit_classes(X, (X[:, 0] > 3).astype(int), ["a", "b"], c=1.0)
    np.testing.assert_allclose(fit.weight[0], -fit.weight[1])
    np.testing.assert_allclose(fit.bias[0], -fit.bias[1])


def test_without_a_bias_features_are_not_centred():
    labels = (X[:, 0] > 3).astype(int)
    fit = fit_classes(X, labels, ["a", "b"], bias=False, c=1.0)
    assert not fit.bias.any()
    scaled = X / X.std(0)
    plain = LogisticRegression(C=1.0, fit_intercept=False, max_iter=5000, tol=1e-8).fit(scaled, labels)
    np.testing.assert_allclose(softmax(X @ fit.weight.T)[:, 1], plain.predict_proba(scaled)[:, 1], atol=2e-3)


def test_the_strength_is_chosen_by_the_loss_on_rows_left_out():
    noise = fit_classes(RANDOM.normal(size=(40, 30)), RANDOM.integers(0, 2, 40), ["a", "b"])
    signal = fit_classes(X, (X[:, 0] > 3).astype(int), ["a", "b"])
    assert noise.chosen and signal.chosen and {noise.c, signal.c} <= set(GRID)
    assert noise.c < 0.1 < signal.c  # noise is shrunk, a clean rule is not
    again = fit_classes(X, (X[:, 0] > 3).astype(int), ["a", "b"])
    np.testing.assert_array_equal(again.weight, signal.weight)


def test_strengths_after_the_best_are_skipped(monkeypatch):
    random = np.random.default_rng(1)
    x = random.normal(size=(80, 6))
    labels = (x[:, 0] + 2 * random.normal(size=80) > 0).astype(int)
    scaled = (x - x.mean(0)) / x.std(0)
    folds = list(StratifiedKFold(5, shuffle=True, random_state=0).split(labels, labels))
    losses = []
    for c in GRID:
        fits = [(LogisticRegression(C=c, max_iter=1000).fit(scaled[a], labels[a]), b) for a, b in folds]
        losses.append(sum(log_loss(labels[b], fit.predict_proba(scaled[b]), normalize=False) for fit, b in fits))
    tried, original = [], LogisticRegression.fit
    monkeypatch.setattr(
        LogisticRegression, "fit", lambda self, *a, **k: tried.append(self.C) or original(self, *a, **k)
    )
    assert fit_classes(x, labels, ["a", "b"]).c == GRID[int(np.argmin(losses))]
    assert 5 < len(tried) < 5 * len(GRID) and max(tried) < GRID[-1]


def test_one_row_of_a_class_leaves_no_cross_validation(caplog):
    caplog.set_level("INFO", logger="hf_ft_ext")
    assert fit_classes(X[:4], np.array([0, 0, 0, 1]), ["a", "b"]).c == 1.0
    assert "too few rows of a class for cross-validation: C = 1" in caplog.text


def test_cross_validation_uses_a_sample_of_many_rows(monkeypatch):
    labels, seen = (X[:, 0] > 3).astype(int), []
    monkeypatch.setattr("hf_ft_ext.features.linear_fit.TUNING_ROWS", 30)
    original = LogisticRegression.fit
    monkeypatch.setattr(
        LogisticRegression, "fit", lambda self, x, *a, **k: seen.append(len(x)) or original(self, x, *a, **k)
    )
    fit_classes(X, labels, ["a", "b"])
    assert max(seen[:-1]) <= 30 and seen[-1] == 60


@pytest.mark.parametrize("wrong", [-1, -100, 2])
def test_a_label_that_is_no_class_is_refused(wrong):
    labels = np.arange(60) % 2
    labels[7] = wrong
    with pytest.raises(InputError, match=f"label {wrong} is not a class id \\(0 to 1\\); remove rows without a label"):
        fit_classes(X, labels, ["a", "b"])


def test_a_class_without_rows_is_refused():
    with pytest.raises(InputError, match="class 'b' has no training rows, so no linear head can learn it; add rows"):
        fit_classes(X, np.zeros(60, int), ["a", "b"])


def test_iteration_limit_is_logged(caplog):
    fit_classes(X, (X[:, 0] > 3).astype(int), ["a", "b"], c=1e4, max_iter=2)
    assert "stopped after 2 iterations, before it converged" in caplog.text


def test_regression_equals_a_plain_ridge_regression():
    labels = X @ np.array([1.0, 0.2, 3.0, 0.0, -1.0]) + 0.1 * RANDOM.normal(size=60)
    fit = fit_regression(X, labels.astype(np.float32), c=0.5)
    scaled = (X - X.mean(0)) / X.std(0)
    plain = Ridge(alpha=2.0).fit(scaled, labels.astype(np.float32).astype(float)).predict(scaled)
    np.testing.assert_allclose((X @ fit.weight.T + fit.bias)[:, 0], plain, atol=1e-6)
    chosen = fit_regression(X, labels)
    assert chosen.chosen and chosen.score > 0.99 and chosen.weight.shape == (1, 5)
    assert not fit_regression(X, labels, bias=False).bias.any()


def test_a_place_on_a_scale_minimises_the_cross_entropy():
    place = 1 / (1 + np.exp(-(X[:, 0] - 3))) * 0.8 + 0.1
    fit = fit_probability(X, place, c=1e6)  # next to no regularisation: the gradient vanishes
    likely = softmax(X @ fit.weight.T + fit.bias)[:, 1]
    gradient = np.concatenate([(likely - place) @ ((X - X.mean(0)) / X.std(0)), [(likely - place).sum()]])
    assert np.abs(gradient).max() < 1e-2
    assert fit.score > 0.99 and 0 <= fit.loss < 1e-3
    assert fit_probability(X, place).chosen


def test_constant_features_give_finite_weights():
    x = np.concatenate([X, np.full((60, 1), 7.0)], 1)
    fit = fit_classes(x, (X[:, 0] > 3).astype(int), ["a", "b"], c=1.0)
    assert np.isfinite(fit.weight).all() and np.isfinite(fit.bias).all()
