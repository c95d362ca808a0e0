"""Metrics against scikit-learn, scipy and plain formulas; the undefined cases; the Trainer's function."""

import math
import warnings

import evaluate
import numpy as np
import pytest
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef
from transformers import EvalPrediction

from hf_ft_ext.errors import InputError
from hf_ft_ext.metrics import METRICS, check_metric, load_metric, metric_function, primary_key

RNG = np.random.default_rng(0)
TRUE = RNG.integers(0, 2, 60)
GUESS = np.where(RNG.random(60) < 0.7, TRUE, 1 - TRUE)


@pytest.fixture(autouse=True)
def _no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def compute(name, predictions, references):
    return load_metric(name).compute(predictions=predictions, references=references)


def test_two_class_metrics_equal_sklearn_and_the_formula():
    tp, tn = int(np.sum(GUESS & TRUE)), int(np.sum((1 - GUESS) & (1 - TRUE)))
    fp, fn = int(np.sum(GUESS & (1 - TRUE))), int(np.sum((1 - GUESS) & TRUE))
    scores = compute("accuracy_f1", GUESS, TRUE)
    assert list(scores) == ["accuracy", "f1"]
    assert scores["accuracy"] == pytest.approx(accuracy_score(TRUE, GUESS)) == pytest.approx((tp + tn) / 60)
    assert scores["f1"] == pytest.approx(f1_score(TRUE, GUESS)) == pytest.approx(2 * tp / (2 * tp + fp + fn))
    mcc = compute("matthews", GUESS, TRUE)["matthews_correlation"]
    plain = (tp * tn - fp * fn) / math.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
    assert mcc == pytest.approx(matthews_corrcoef(TRUE, GUESS)) == pytest.approx(plain)
    assert compute("accuracy", GUESS, TRUE) == {"accuracy": scores["accuracy"]}


def test_correlations_equal_scipy_and_the_formula():
    x = RNG.normal(size=50)
    y = x + RNG.normal(size=50)
    scores = compute("pearson_spearman", x, y)
    a, b = x - x.mean(), y - y.mean()
    ranks = [np.argsort(np.argsort(v)).astype(float) for v in (x, y)]
    assert (
        scores["pearson"] == pytest.approx(pearsonr(x, y).statistic) == pytest.approx(a @ b / np.sqrt(a @ a * (b @ b)))
    )
    assert scores["spearmanr"] == pytest.approx(spearmanr(x, y).statistic)
    assert scores["spearmanr"] == pytest.approx(np.corrcoef(*ranks)[0, 1])


def test_matthews_takes_several_classes():
    true, guess = RNG.integers(0, 3, 40), RNG.integers(0, 3, 40)
    assert compute("matthews", guess, true)["matthews_correlation"] == pytest.approx(matthews_corrcoef(true, guess))


@pytest.mark.parametrize(
    ("name", "predictions", "references", "expected"),
    [
        ("matthews", [1, 1, 1], [0, 1, 1], {"matthews_correlation": 0.0}),
        ("matthews", [0, 1, 1], [1, 1, 1], {"matthews_correlation": 0.0}),
        ("matthews", [1, 1], [1, 1], {"matthews_correlation": 0.0}),
        ("accuracy_f1", [0, 0], [0, 0], {"accuracy": 1.0, "f1": 0.0}),
        ("accuracy_f1", [0, 0], [1, 0], {"accuracy": 0.5, "f1": 0.0}),
        ("accuracy_f1", [-1, 1], [1, 1], {"accuracy": 0.5, "f1": 2 / 3}),
        ("pearson_spearman", [2.0, 2.0, 2.0], [1.0, 2.0, 3.0], {"pearson": 0.0, "spearmanr": 0.0}),
        ("pearson_spearman", [1.0, 2.0, 3.0], [2.0, 2.0, 2.0], {"pearson": 0.0, "spearmanr": 0.0}),
        ("pearson_spearman", [1.0], [2.0], {"pearson": 0.0, "spearmanr": 0.0}),
        ("pearson_spearman", [1.0, np.nan, 3.0], [1.0, 2.0, 3.0], {"pearson": 0.0, "spearmanr": 0.0}),
        ("pearson_spearman", [1.0, np.inf, 3.0], [1.0, 2.0, 3.0], {"pearson": 0.0, "spearmanr": 0.0}),
    ],
)
def test_undefined_scores_are_zero(name, predictions, references, expected):
    assert compute(name, predictions, references) == pytest.approx(expected)


def test_nearly_constant_predictions_raise_no_warning():
    assert abs(compute("pearson_spearman", [1.0, 1.0 + 1e-15, 1.0], [1.0, 2.0, 3.0])["pearson"]) <= 1


def test_unusable_references_are_errors():
    with pytest.raises(InputError, match="1 of 2 true scores are NaN"):
        compute("pearson_spearman", [1.0, 2.0], [np.nan, 1.0])
    with pytest.raises(InputError, match=r"two classes, but the labels contain \[2\]; use 'accuracy'"):
        compute("accuracy_f1", [0, 1], [0, 2])
    with pytest.raises(InputError, match="no rows to score"):
        compute("accuracy", [], [])
    with pytest.raises(InputError, match=r"class ids must be whole numbers, got 0\.5; correct the labels"):
        METRICS["accuracy"].cls.score([0, 1], [0.5, 1.0])


@pytest.mark.parametrize("name", METRICS)
def test_scores_of_arrays_are_those_of_the_table_of_rows(name):
    for predictions, references in ((GUESS, TRUE), (GUESS.astype(np.float32), TRUE.astype(bool))):
        assert METRICS[name].cls.score(predictions, references) == compute(name, GUESS, TRUE)


def test_metrics_are_evaluate_metrics_that_write_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate.config, "HF_METRICS_CACHE", str(tmp_path / "cache"))
    for name, spec in METRICS.items():
        metric = load_metric(name)
        assert isinstance(metric, evaluate.Metric)
        other = load_metric(name)
        metric.add_batch(predictions=[0, 1], references=[0, 1])
        other.add_batch(predictions=[1, 0], references=[0, 1])
        metric.add(prediction=1, reference=1)
        scores = metric.compute()
        assert spec.primary in scores
        assert all(value > 0.99 for value in scores.values())
        assert other.compute()[spec.primary] < 0.5
    assert not list(tmp_path.iterdir())


def test_unknown_metric_names_the_known_ones():
    with pytest.raises(
        InputError, match=r"unknown metric 'f2'; known: accuracy, accuracy_f1, matthews, pearson_spear"
    ):
        load_metric("f2")
    with pytest.raises(InputError, match="unknown metric"):
        metric_function("f2")


def test_a_metric_must_fit_the_problem():
    check_metric("accuracy", "single_label_classification", 3)
    check_metric("pearson_spearman", "regression")
    with pytest.raises(
        InputError, match=r"'accuracy' is for classification.*this is regression.*use pearson_spearman"
    ):
        check_metric("accuracy", "regression")
    with pytest.raises(InputError, match=r"'pearson_spearman' is for regression.*use accuracy or"):
        check_metric("pearson_spearman", "single_label_classification")
    with pytest.raises(InputError, match="two classes, but the data has 3"):
        check_metric("accuracy_f1", "single_label_classification", 3)


def test_primary_keys():
    assert {name: primary_key(name) for name in METRICS} == {
        "accuracy": "accuracy",
        "accuracy_f1": "accuracy",
        "matthews": "matthews_correlation",
        "pearson_spearman": "pearson",
    }


def test_trainer_function_classification():
    logits = np.stack([1.0 - GUESS, GUESS], axis=1)
    function = metric_function("accuracy_f1")
    plain = function(EvalPrediction(predictions=logits, label_ids=TRUE))
    assert plain == function(EvalPrediction(predictions=(logits, np.zeros((60, 4, 8))), label_ids=TRUE))
    assert plain["combined_score"] == pytest.approx((plain["accuracy"] + plain["f1"]) / 2)
    assert set(metric_function("accuracy")(EvalPrediction(predictions=logits, label_ids=TRUE))) == {"accuracy"}


def test_trainer_function_regression():
    x = RNG.normal(size=20).astype(np.float32)
    function = metric_function("pearson_spearman")
    scores = function(EvalPrediction(predictions=x[:, None], label_ids=2 * x))
    assert scores == pytest.approx({"pearson": 1.0, "spearmanr": 1.0, "combined_score": 1.0})
    assert scores == function(EvalPrediction(predictions=x, label_ids=2 * x))


def test_rows_with_nan_logits_count_as_wrong():
    logits = np.array([[np.nan, 0.0], [0.0, np.nan], [0.0, 1.0], [1.0, 0.0]])
    scores = metric_function("accuracy")(EvalPrediction(predictions=logits, label_ids=np.array([0, 1, 1, 0])))
    assert scores == {"accuracy": 0.5}


def test_trainer_function_rejects_other_shapes():
    with pytest.raises(InputError, match="has no labels"):
        metric_function("accuracy")(EvalPrediction(predictions=np.zeros((2, 2)), label_ids=None))
    with pytest.raises(InputError, match="the model returned no predictions, so there is nothing to score; pass its"):
        metric_function("accuracy")(EvalPrediction(predictions=None, label_ids=np.zeros(2)))
    with pytest.raises(InputError, match=r"needs logits \[rows, classes\].*\(2, 1\)"):
        metric_function("accuracy")(EvalPrediction(predictions=np.zeros((2, 1)), label_ids=np.zeros(2)))
    with pytest.raises(InputError, match=r"one score per row.*\(2, 2\)"):
        metric_function("pearson_spearman")(EvalPrediction(predictions=np.zeros((2, 2)), label_ids=np.zeros(2)))
