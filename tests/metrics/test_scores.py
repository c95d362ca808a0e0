"""Scores of own data against scikit-learn on names; the positive class; metrics from elsewhere; thresholds."""

import itertools
import logging
import re
import textwrap
import warnings

import numpy as np
import pytest
import torch
from sklearn import metrics as sk
from transformers import EvalPrediction

from hf_ft_ext import InputError, metric_function
from hf_ft_ext.metrics import SCORES, best_thresholds, evident_positive, parse_threshold, probabilities
from hf_ft_ext.metrics.outputs import CLASSIFICATION, MULTI_LABEL

RNG = np.random.default_rng(3)
NAMES = ["ham", "spam"]
TRUE = RNG.integers(0, 2, 80)
LOGITS = RNG.normal(size=(80, 2)) + 0.8 * np.eye(2)[TRUE]
GUESS = LOGITS.argmax(1)
THREE = ["a", "b", "c"]
TRUE3 = RNG.choice(3, 90, p=[0.6, 0.3, 0.1])
LOGITS3 = RNG.normal(size=(90, 3)) + 0.8 * np.eye(3)[TRUE3]
LABELS = (RNG.random((60, 3)) < [0.2, 0.5, 0.8]).astype(np.float32)
SCORES_OF_LABELS = RNG.normal(size=(60, 3)) + LABELS


@pytest.fixture(autouse=True)
def _no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def words(names, ids) -> list[str]:
    return [names[i] for i in ids]


def score(metric, logits=LOGITS, labels=TRUE, names=NAMES, **options) -> dict[str, float]:
    return metric_function(metric, names, **options)(EvalPrediction(predictions=logits, label_ids=labels))


@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize("positive", NAMES)
@pytest.mark.parametrize("name", ["f1", "precision", "recall", "accuracy_f1", "average_precision"])
def test_scores_of_one_class_are_of_the_class_named_whatever_its_id(name, positive, swapped):
    order = [1, 0] if swapped else [0, 1]
    names, logits = [NAMES[i] for i in order], LOGITS[:, order]
    labels = np.array([order.index(i) for i in TRUE])
    found = score(name, logits, labels, names, positive_label=positive)
    truth, guess = words(NAMES, TRUE), words(NAMES, GUESS)
    if name == "average_precision":
        column = np.exp(LOGITS[:, NAMES.index(positive)]) / np.exp(LOGITS).sum(1)
        expected = sk.average_precision_score(truth, column, pos_label=positive)
    else:
        kind = name.removeprefix("accuracy_")
        expected = getattr(sk, f"{kind}_score")(truth, guess, pos_label=positive)
        name = kind
    assert found[name] == pytest.approx(expected)
    if "accuracy" in found:
        assert found["accuracy"] == pytest.approx(np.mean(GUESS == TRUE))


@pytest.mark.parametrize(
    ("kind", "average"), list(itertools.product(("f1", "precision", "recall"), ("macro", "micro", "weighted")))
)
def test_averages_equal_sklearn_on_names(kind, average):
    function = getattr(sk, f"{kind}_score")
    truth, guess = words(THREE, TRUE3), words(THREE, LOGITS3.argmax(1))
    found = score(f"{kind}_{average}", LOGITS3, TRUE3, THREE)[f"{kind}_{average}"]
    assert found == pytest.approx(function(truth, guess, average=average))
    several = score(f"{kind}_{average}", SCORES_OF_LABELS, LABELS, THREE)[f"{kind}_{average}"]
    assert several == pytest.approx(function(LABELS.astype(int), (SCORES_OF_LABELS >= 0).astype(int), average=average))


def test_averages_leave_out_classes_that_do_not_occur():
    logits, labels = LOGITS3[TRUE3 < 2], TRUE3[TRUE3 < 2]
    logits = np.column_stack([logits[:, :2], np.full(len(logits), -9.0)])
    assert score("f1_macro", logits, labels, THREE)["f1_macro"] == pytest.approx(
        sk.f1_score(labels, logits.argmax(1), average="macro")
    )


def test_other_scores_equal_sklearn():
    shares3 = probabilities(LOGITS3, CLASSIFICATION)
    assert score("roc_auc")["roc_auc"] == pytest.approx(
        sk.roc_auc_score(TRUE, probabilities(LOGITS, CLASSIFICATION)[:, 1])
    )
    assert score("roc_auc", LOGITS3, TRUE3, THREE)["roc_auc"] == pytest.approx(
        sk.roc_auc_score(TRUE3, shares3, multi_class="ovr")
    )
    assert score("roc_auc", SCORES_OF_LABELS, LABELS, THREE)["roc_auc"] == pytest.approx(
        sk.roc_auc_score(LABELS, SCORES_OF_LABELS)
    )
    assert score("average_precision", SCORES_OF_LABELS, LABELS, THREE)["average_precision"] == pytest.approx(
        sk.average_precision_score(LABELS, SCORES_OF_LABELS)
    )
    assert score("balanced_accuracy", LOGITS3, TRUE3, THREE)["balanced_accuracy"] == pytest.approx(
        sk.balanced_accuracy_score(TRUE3, LOGITS3.argmax(1))
    )
    chosen = (SCORES_OF_LABELS >= 0).astype(int)
    assert score("subset_accuracy", SCORES_OF_LABELS, LABELS, THREE)["subset_accuracy"] == sk.accuracy_score(
        LABELS, chosen
    )
    assert score("f1_samples", SCORES_OF_LABELS, LABELS, THREE)["f1_samples"] == pytest.approx(
        sk.f1_score(LABELS, chosen, average="samples", zero_division=0)
    )


def test_the_area_does_not_suffer_from_probabilities_that_round_to_one():
    logits = np.array([[0.0, 900.0], [0.0, 800.0], [0.0, 700.0], [0.0, 600.0]])
    assert score("roc_auc", logits, np.array([1, 1, 0, 0]))["roc_auc"] == 1.0
    assert score("roc_auc", np.float16(logits), np.array([1, 0, 1, 0]))["roc_auc"] == 0.75
    assert score("roc_auc", np.array([[0, np.inf], [0, 1.0]]), np.array([1, 0]))["roc_auc"] == 1.0


@pytest.mark.parametrize("name", SCORES)
def test_rows_with_nan_logits_count_as_wrong_and_undefined_scores_are_zero(name):
    several = CLASSIFICATION not in SCORES[name].problem_types
    logits, labels = (SCORES_OF_LABELS, LABELS) if several else (LOGITS3, TRUE3)
    options = {"positive_label": "a"} if not several and SCORES[name].positive else {}
    whole = score(name, logits, labels, THREE, **options)[name]
    broken = logits.copy()
    broken[::2, 1] = np.nan
    assert 0 <= score(name, broken, labels, THREE, **options)[name] < whole
    broken[:, 0] = np.nan
    worst = sk.average_precision_score(TRUE3 == 0, TRUE3 != 0) if name == "average_precision" else 0  # of any order
    assert score(name, broken, labels, THREE, **options)[name] == pytest.approx(worst)


@pytest.mark.parametrize("name", ["matthews", "accuracy", "roc_auc", "f1_macro", "balanced_accuracy"])
def test_other_scores_do_not_depend_on_the_order_of_the_classes(name):
    for names, logits, labels in ((NAMES, LOGITS, TRUE), (THREE, LOGITS3, TRUE3)):
        order = list(range(len(names)))[::-1]
        turned = score(name, logits[:, order], np.array([order.index(i) for i in labels]), names[::-1])
        assert turned == pytest.approx(score(name, logits, labels, names))


# --- the positive class ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["0", "1"], "1"), (["1", "0"], "1"), (["-1", "1"], "1"), (["yes", "no"], "yes"), (["True", "False"], "True"),
        (["Negative", "POSITIVE"], "POSITIVE"), (["equivalent", "not_equivalent"], "equivalent"),
        (["Not spam", "spam"], "spam"), (["non-toxic", "toxic"], "toxic"), (["LABEL_1", "LABEL_0"], "LABEL_1"),
        (["ham", "spam"], None), (["a", "b"], None), (["1", "2"], None), (["notable", "able"], None),
        (["0", "1", "2"], None),
    ],
)  # fmt: skip
def test_the_positive_class_by_evidence(names, expected):
    assert evident_positive(names) == expected


def test_a_positive_class_that_is_not_known_is_asked_for():
    with pytest.raises(InputError, match=r"'f1' needs a positive class, .*ham, spam; pass --positive_label"):
        metric_function("f1", NAMES)
    with pytest.raises(InputError, match=r"'precision' needs a positive class.*a, b, c.*f1_macro"):
        metric_function("precision", THREE)
    with pytest.raises(InputError, match=r"positive_label='span' is not a label; did you mean 'spam'"):
        metric_function("f1", NAMES, positive_label="span")
    with pytest.raises(InputError, match="positive_label='spam' needs label_names"):
        metric_function("f1", positive_label="spam")
    one_of_three = score("f1", LOGITS3, TRUE3, THREE, positive_label="B")["f1"]
    assert one_of_three == pytest.approx(sk.f1_score(TRUE3 == 1, LOGITS3.argmax(1) == 1))


@pytest.mark.parametrize("name", ["f1", "precision", "recall", "average_precision"])
def test_ids_without_names_are_enough_for_two_classes_only(name):
    logits, labels = np.random.default_rng(0).normal(size=(20, 3)), np.arange(20) % 3
    with pytest.raises(InputError, match=f"metric '{name}' needs a positive class, and there are 3 classes"):
        metric_function(name)(EvalPrediction(logits, labels))
    assert 0 <= metric_function(name)(EvalPrediction(logits[:, :2], labels % 2))[name] <= 1


def test_an_area_of_one_class_is_zero_with_a_warning(caplog):
    scores = metric_function("roc_auc")(EvalPrediction(np.eye(2)[[0, 1, 1]], np.array([1, 1, 1])))
    assert scores == {"roc_auc": 0.0} and "not defined if all rows are of one class" in caplog.text


def test_a_derived_positive_class_is_said(caplog):
    with caplog.at_level(logging.INFO):
        metric_function("f1", {1: "yes", 0: "no"})
    assert "The positive class is 'yes', by the names of the labels." in caplog.text


def test_several_metrics_give_all_keys_and_no_mean_of_them():
    found = score(["f1_macro", "accuracy_f1", "roc_auc"], positive_label="spam")
    assert list(found) == ["f1_macro", "accuracy", "f1", "roc_auc"]
    function = metric_function(["f1_macro", "accuracy_f1", "roc_auc"], NAMES, positive_label="spam")
    assert function.keys() == list(found)
    assert metric_function("accuracy_f1", NAMES, positive_label="spam").keys() == ["accuracy", "f1", "combined_score"]
    assert metric_function("f1_macro").keys(3) == ["f1_macro"]


def test_a_metric_must_fit_the_problem():
    with pytest.raises(InputError, match="'f1_macro' is not for regression; use one of: pearson_spearman"):
        metric_function("f1_macro", problem_type="regression")
    with pytest.raises(InputError, match="'subset_accuracy' is not for single_label"):
        metric_function("subset_accuracy", problem_type=CLASSIFICATION)
    with pytest.raises(InputError, match="'accuracy' needs one class per row, but got labels"):
        score(["accuracy", "f1_micro"], SCORES_OF_LABELS, LABELS, THREE)
    with pytest.raises(InputError, match="has 2 label names, but got logits of shape"):
        score("accuracy", LOGITS3, TRUE3, NAMES)
    with pytest.raises(InputError, match="no metric was passed"):
        metric_function([])


# --- metrics from elsewhere -------------------------------------------------------------------------------------


@pytest.fixture
def module(tmp_path, monkeypatch):
    """A file `ours_MODULE.py` of the user's with some metrics."""
    (tmp_path / "ours_scores.py").write_text(
        textwrap.dedent("""
            import numpy as np

            NUMBER = 3

            def share_of_ones(predictions):
                return np.float32(np.mean(predictions == 1))

            def hits(y_true, y_pred, scale=1):
                return {"hits": scale * int((y_true == y_pred).sum()), "rows": len(y_true)}

            def likelihood(references, probabilities, label_names):
                assert label_names in (["ham", "spam"], ["spam", "ham"])
                return probabilities[np.arange(len(references)), references].mean()

            def as_trainer_calls_it(eval_pred):
                logits, labels = eval_pred
                return {"gap": float((logits[np.arange(len(labels)), labels]).mean())}

            def odd(first, second):
                return 0.0

            def text(predictions):
                return "good"

            def loss(predictions):
                return {"loss": 1.0}

            def broken(predictions):
                raise RuntimeError("no such luck")
        """)
    )
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("name", ["ours_scores:hits", "ours_scores.py:hits"])
def test_a_function_of_the_users_gets_what_its_parameters_ask_for(module, name):
    assert score(name) == {"hits": float((GUESS == TRUE).sum()), "rows": 80.0}
    expected = probabilities(LOGITS, CLASSIFICATION)[np.arange(80), TRUE].mean()
    assert score("ours_scores:likelihood")["likelihood"] == pytest.approx(expected)
    assert score("ours_scores:as_trainer_calls_it")["gap"] == pytest.approx(LOGITS[np.arange(80), TRUE].mean())
    assert metric_function(["ours_scores:hits", "accuracy"], NAMES).keys() == ["hits", "rows", "accuracy"]
    assert score(lambda predictions: {"half": torch.tensor(0.5)}) == {"half": 0.5}
    kappa = score(sk.matthews_corrcoef)
    assert kappa["matthews_corrcoef"] == pytest.approx(sk.matthews_corrcoef(TRUE, GUESS))


def test_a_function_sees_classes_in_one_order_whatever_the_models_is(module):
    with pytest.raises(InputError, match="'ours_scores:share_of_ones' needs a positive class"):
        score("ours_scores:share_of_ones")
    for order in ([0, 1], [1, 0]):
        names, labels = [NAMES[i] for i in order], np.array([order.index(i) for i in TRUE])
        found = score("ours_scores:share_of_ones", LOGITS[:, order], labels, names, positive_label="ham")
        assert found["share_of_ones"] == pytest.approx(np.mean(GUESS == 0))
    three = [2, 0, 1]
    labels, names = np.array([three.index(i) for i in TRUE3]), [THREE[i] for i in three]
    function = metric_function("ours_scores:share_of_ones", names, label_order=THREE)
    found = function(EvalPrediction(predictions=LOGITS3[:, three], label_ids=labels))
    assert found["share_of_ones"] == pytest.approx(np.mean(LOGITS3.argmax(1) == 1))


def test_metrics_that_clash_are_refused(module):
    with pytest.raises(InputError, match="'f1_macro' is named twice"):
        metric_function(["f1_macro", "f1_macro"])

    def accuracy(predictions):
        return {"balanced_accuracy": -1.0}

    with pytest.raises(
        InputError, match="two of them return the key 'balanced_accuracy' with different values; rename it"
    ):
        score(["balanced_accuracy", accuracy])


def test_functions_take_several_labels_per_row():
    def rows_and_labels(references, predictions, probabilities):
        return {"labels": references.sum(), "said": (probabilities >= 0.5).sum(), "same": predictions.sum()}

    names = ["no", "yes"]  # two labels are not two classes
    found = score(rows_and_labels, SCORES_OF_LABELS[:, :2], LABELS[:, :2], names)
    said = (SCORES_OF_LABELS[:, :2] >= 0).sum()
    assert found == {"labels": LABELS[:, :2].sum(), "said": said, "same": said}
    assert score(rows_and_labels, SCORES_OF_LABELS[:, :2], LABELS[:, :2], names, problem_type=MULTI_LABEL) == found


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("ours_scores:odd", "has the parameters first, second; use only the names predictions"),
        ("ours_scores:text", "returned str for 'text'; it must return a number"),
        ("ours_scores:loss", "returned the key 'loss', which Trainer itself uses"),
        ("ours_scores:broken", "fails on 48 rows .RuntimeError: no such luck"),
        ("ours_scores:missing", "ours_scores has no missing"),
        ("ours_scores:NUMBER", "is not a function but a int"),
        ("nowhere_at_all:f", "cannot be imported .ModuleNotFoundError"),
        ("nowhere.py:f", "cannot be imported .FileNotFoundError"),
        ("f1_makro", "unknown metric 'f1_makro'.*did you mean 'f1_macro'.*known: accuracy"),
    ],
)
def test_unusable_metrics_are_one_line_before_training(module, name, message):
    with pytest.raises(InputError, match=message) as raised:
        metric_function(name, NAMES, positive_label="spam").keys()
    assert "\n" not in str(raised.value)


def test_a_metric_of_evaluate_by_its_path(tmp_path):
    folder = tmp_path / "hit_rate"
    folder.mkdir()
    (folder / "hit_rate.py").write_text(
        textwrap.dedent("""
            import datasets
            import evaluate

            class HitRate(evaluate.Metric):
                def _info(self):
                    features = {"predictions": datasets.Value("int32"), "references": datasets.Value("int32")}
                    return evaluate.MetricInfo("", "", datasets.Features(features), "", "")

                def _compute(self, predictions, references):
                    true = [p == r == 1 for p, r in zip(predictions, references)]
                    return {"hit_rate": sum(true) / max(1, sum(r == 1 for r in references))}
        """)
    )
    found = score(str(folder), positive_label="ham")
    assert found["hit_rate"] == pytest.approx(sk.recall_score(TRUE, GUESS, pos_label=0))
    with pytest.raises(InputError, match="needs a positive class"):
        score(str(folder))
    with pytest.raises(InputError, match="takes one label per row, but this is multi-label"):
        score(str(folder), SCORES_OF_LABELS, LABELS, THREE)


# --- thresholds -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", ["0", "1", "-0.1", "1.5", "best", "nan"])
def test_a_threshold_is_between_zero_and_one_or_auto(value):
    with pytest.raises(InputError, match=re.escape(f"between 0 and 1, or auto, got '{value}'")):
        parse_threshold(value)
    assert parse_threshold("auto") is None and parse_threshold("0.25") == 0.25


def test_chosen_thresholds_are_the_best_of_all():
    logits = SCORES_OF_LABELS.round(1)  # with ties
    found, shares = best_thresholds(logits, LABELS), probabilities(logits, MULTI_LABEL)
    for i in range(3):
        chosen = shares[:, i] >= np.linspace(0, 1, 2001)[:, None]
        everything = 2 * (chosen & (LABELS[:, i] == 1)).sum(1) / (chosen.sum(1) + LABELS[:, i].sum())
        assert sk.f1_score(LABELS[:, i], shares[:, i] >= found[i]) == pytest.approx(everything.max())
    nobody = LABELS.copy()
    nobody[:, 0] = 0
    assert best_thresholds(logits, nobody)[0] == 0.5


def test_a_threshold_acts_on_probabilities():
    found = score("f1_micro", SCORES_OF_LABELS, LABELS, THREE, threshold=0.3)["f1_micro"]
    chosen = 1 / (1 + np.exp(-SCORES_OF_LABELS)) >= 0.3
    assert found == pytest.approx(sk.f1_score(LABELS, chosen.astype(int), average="micro"))
    function = metric_function("f1_macro", THREE, threshold="auto")
    best = function(EvalPrediction(predictions=SCORES_OF_LABELS, label_ids=LABELS))["f1_macro"]
    assert best >= score("f1_macro", SCORES_OF_LABELS, LABELS, THREE)["f1_macro"]
    function.thresholds = np.array([0.999, 0.999, 0.999])
    assert function(EvalPrediction(predictions=SCORES_OF_LABELS, label_ids=LABELS))["f1_macro"] < best
