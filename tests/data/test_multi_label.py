"""Several labels per row through the launcher, every method: metrics, predictions and losses against sums by hand."""

import csv
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from datasets import Dataset
from peft import PeftModel
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from tiny import one_layer_model, text_dataset
from torch.utils.data import DataLoader
from transformers import AutoConfig, AutoModelForSequenceClassification, DataCollatorWithPadding, EvalPrediction

import run_glue
from hf_ft_ext import (
    FullTrainer,
    FullTrainingArguments,
    InputError,
    KernelTrainer,
    KernelTrainingArguments,
    empirical_ntk,
    fit_linear_head,
    metric_function,
)
from hf_ft_ext.full.trainer import l2_loss
from hf_ft_ext.gradientless.scoring.objectives import make_objective
from hf_ft_ext.hub.card import model_card

NAMES = ["anger", "fear", "joy"]
MULTI = "multi_label_classification"
OPTIONS = {
    "full": ("--learning_rate", "1e-2"),
    "lora": ("--learning_rate", "1e-2"),
    "sparse": ("--sparse_basis_steps", "2", "--sparse_density", "0.2"),
    "gradientless": ("--feature_cache_dir", "features"),
    "gradientless without features": ("--feature_cache_gb", "0"),
    "gradientless on f1": ("--search_objective", "f1", "--feature_cache_dir", "features"),
    "fisher": ("--fisher_examples", "6", "--fisher_candidates", "lora", "bottleneck"),
    "linearhead": ("--linearhead_c", "1", "--feature_cache_dir", "features"),
    "kernel": ("--kernel_regularization", "1e-2"),
}


def labels_of_text(text: str) -> list[str]:
    """Labels that depend on the text: none, some or all of `NAMES`."""
    words = text.split()
    return [name for i, name in enumerate(NAMES) if len(words[i]) > 4 or words[3 + i] < "g"]


def batches(tokenizer, texts, size: int = 4):
    return [tokenizer(texts[i : i + size], padding=True, return_tensors="pt") for i in range(0, len(texts), size)]


@pytest.fixture
def files(tmp_path, monkeypatch, tokenizer) -> dict[str, list]:
    """`train.jsonl`, `dev.jsonl` and `test.jsonl` with lists of names; a model with another order of labels."""
    monkeypatch.chdir(tmp_path)
    texts = text_dataset(48)["sentence"][:]
    splits = {"train": texts[:28], "dev": texts[28:40], "test": texts[40:]}
    for name, rows in splits.items():
        lines = [json.dumps({"sentence": text, "label": labels_of_text(text)}) for text in rows]
        Path(f"{name}.jsonl").write_text("\n".join(lines))
    model = one_layer_model(id2label={0: "JOY", 1: "Anger", 2: "fear"}, label2id={"JOY": 0, "Anger": 1, "fear": 2})
    model.save_pretrained("model")
    tokenizer.save_pretrained("model")
    return splits


def launch(method: str, *argv: str, data: str = "jsonl") -> int:
    name = method.split()[0]
    steps = () if name in ("linearhead", "kernel") else ("--max_steps", "2")
    return run_glue.main(
        [
            "--method", name, "--model_name_or_path", "model", "--train_file", f"train.{data}",
            "--validation_file", f"dev.{data}", "--test_file", f"test.{data}", "--max_seq_length", "16", "--use_cpu",
            "--disable_tqdm", "true", "--do_train", "--do_eval", "--do_predict", "--output_dir", "out",
            "--report_to", "none", *OPTIONS.get(method, ()), *steps, *argv,
        ]
    )  # fmt: skip


def predictions(path="out/predictions.tsv") -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file, delimiter="\t"))


def by_hand(predicted: list[set], truth: list[set]) -> dict[str, float]:
    def f1(hits: int, said: int, true: int) -> float:
        return 2 * hits / (said + true) if said + true else 0.0

    pairs = list(zip(predicted, truth, strict=True))
    each = [
        f1(sum(n in p and n in t for p, t in pairs), sum(n in p for p in predicted), sum(n in t for t in truth))
        for n in NAMES
    ]
    micro = f1(sum(len(p & t) for p, t in pairs), sum(map(len, predicted)), sum(map(len, truth)))
    return {
        "f1_micro": micro,
        "f1_macro": sum(each) / len(each),
        "subset_accuracy": sum(p == t for p, t in pairs) / len(pairs),
    }


@pytest.mark.parametrize("method", OPTIONS)
def test_every_method_trains_scores_and_predicts_several_labels(files, method, tokenizer):
    probabilities = () if method == "kernel" else ("--prediction_probabilities",)
    assert launch(method, *probabilities) == 0
    record = json.loads(Path("out/run.json").read_text())
    assert record["labels"] == ["JOY", "Anger", "fear"]  # the model's own order and spelling
    assert record["thresholds"] == dict.fromkeys(record["labels"], 0.5)

    rows = predictions()
    found = [{name.lower() for name in row["prediction"].split("|") if name} for row in rows]
    truth = [set(labels_of_text(text)) for text in files["test"]]
    for key, value in by_hand(found, truth).items():
        assert record["metrics"][f"test_{key}"] == pytest.approx(value), key
    assert {f"eval_{key}" for key in ("f1_micro", "f1_macro", "subset_accuracy", "loss")} <= record["metrics"].keys()
    if method == "kernel":
        return

    shares = [[float(row[f"probability_{name}"]) for name in record["labels"]] for row in rows]
    chosen = [{n.lower() for n, p in zip(record["labels"], row, strict=True) if p >= 0.5} for row in shares]
    assert chosen == found
    known = (AutoConfig, AutoModelForSequenceClassification, PeftModel)
    names = {kind.__name__: kind for kind in known}
    model = eval(record["load"], names).eval()  # as the last table says
    with torch.no_grad():
        logits = torch.cat([model(**batch).logits for batch in batches(tokenizer, files["test"])])
    assert np.allclose(logits.sigmoid(), shares, atol=1e-4)
    losses = [
        -math.log(p if name.lower() in true else 1 - p)
        for row, true in zip(shares, truth, strict=True)
        for name, p in zip(record["labels"], row, strict=True)
    ]
    assert record["metrics"]["test_loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-4)
    if not isinstance(model, PeftModel):
        assert (model.config.problem_type, model.config.label2id) == (MULTI, {"JOY": 0, "Anger": 1, "fear": 2})


def test_cached_features_change_nothing(files):
    assert launch("gradientless", "--output_dir", "cached", "--prediction_probabilities") == 0
    assert launch("gradientless without features", "--output_dir", "whole", "--prediction_probabilities") == 0
    assert predictions("cached/predictions.tsv") == predictions("whole/predictions.tsv")


def test_thresholds_chosen_on_the_dev_split_hold_for_the_test(files):
    assert launch("linearhead", "--multi_label_threshold", "auto", "--prediction_probabilities") == 0
    record = json.loads(Path("out/run.json").read_text())
    assert len(set(record["thresholds"].values())) == 3
    for row in predictions():
        expected = [n for n in record["labels"] if float(row[f"probability_{n}"]) >= record["thresholds"][n]]
        assert row["prediction"] == "|".join(expected)
    found = [{name.lower() for name in row["prediction"].split("|") if name} for row in predictions()]
    expected = by_hand(found, [set(labels_of_text(text)) for text in files["test"]])
    assert record["metrics"]["test_f1_macro"] == pytest.approx(expected["f1_macro"])
    # The saved model has them, for every later evaluation, and the card names them.
    again = ["--method", "full", "--model_name_or_path", "out", "--validation_file", "dev.jsonl", "--do_eval",
             "--test_file", "test.jsonl", "--do_predict", "--max_seq_length", "16", "--use_cpu"]  # fmt: skip
    assert run_glue.main([*again, "--output_dir", "again"]) == 0
    later = json.loads(Path("again/run.json").read_text())
    assert later["thresholds"] == record["thresholds"]
    assert later["metrics"]["test_f1_macro"] == record["metrics"]["test_f1_macro"]
    assert [row["prediction"] for row in predictions("again/predictions.tsv")] == [
        row["prediction"] for row in predictions()
    ]
    card = model_card("out", record, "me/x")
    assert "predicted if its probability is at least" in card and "slightly optimistic" in card
    results = yaml.safe_load(card.split("---\n")[1])["model-index"][0]["results"]
    assert {result["dataset"]["split"] for result in results} == {"test"}
    assert run_glue.main([*again, "--output_dir", "half", "--multi_label_threshold", "0.5"]) == 0
    assert set(json.loads(Path("half/run.json").read_text())["thresholds"].values()) == {0.5}
    # Rows to evaluate may have one of the model's labels.
    one = record["labels"][-1].upper()
    rows = [{"text": files["test"][0], "label": [one]}, {"text": files["test"][1], "label": []}]
    Path("test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert run_glue.main([*again[:4], *again[7:], "--output_dir", "one"]) == 0
    found = json.loads(Path("one/run.json").read_text())
    predicted = [set(filter(None, row["prediction"].lower().split("|"))) for row in predictions("one/predictions.tsv")]
    assert found["labels"] == record["labels"]
    assert found["metrics"]["test_f1_macro"] == pytest.approx(by_hand(predicted, [{one.lower()}, set()])["f1_macro"])


def test_a_squared_loss_gives_scores_and_no_probabilities(files, capsys):
    assert launch("full", "--l2_loss", "--prediction_probabilities") == 2
    assert "the predictions of method full are scores here" in capsys.readouterr().err
    labels = np.array([[1.0, 0.0, 1.0], [0.0, 0.0, 1.0]])
    fitted = 2 * labels - 1  # where the loss is 0, every label has to be predicted right
    assert float(l2_loss({"logits": torch.tensor(fitted)}, torch.tensor(labels))) == 0
    scores = metric_function("subset_accuracy", problem_type=MULTI)(EvalPrediction(fitted, labels))
    assert scores == {"subset_accuracy": 1.0}


def test_label_columns_give_what_lists_give(files):
    for name, texts in files.items():
        with open(f"{name}.csv", "w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["sentence", *NAMES])
            writer.writerows([text, *(int(n in labels_of_text(text)) for n in NAMES)] for text in texts)
    assert launch("full", "--output_dir", "lists") == 0
    assert launch("full", "--output_dir", "columns", "--label_column", *NAMES, data="csv") == 0
    one, two = (json.loads(Path(name, "run.json").read_text())["metrics"] for name in ("lists", "columns"))
    assert one["train_loss"] == two["train_loss"] and one["test_f1_micro"] == two["test_f1_micro"]
    assert predictions("lists/predictions.tsv") == predictions("columns/predictions.tsv")


@pytest.mark.parametrize("threshold", ["0.5", "auto"])
def test_a_saved_model_predicts_several_labels_for_rows_without_any(files, threshold):
    assert launch("full", "--output_dir", "first", "--multi_label_threshold", threshold) == 0
    Path("rows.jsonl").write_text("\n".join(json.dumps({"sentence": text}) for text in files["test"]))
    options = ["--method", "full", "--model_name_or_path", "first", "--test_file", "rows.jsonl", "--do_predict"]
    assert run_glue.main([*options, "--max_seq_length", "16", "--use_cpu", "--output_dir", "second"]) == 0
    assert predictions("second/predictions.tsv") == predictions("first/predictions.tsv")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("--num_k", "2"), "num_k=2 draws rows of each class, but rows with several labels"),
        (("--few_shot_type", "prompt"), "a prompt predicts one label per row"),
        (("--label_smoothing_factor", "0.1"), "label_smoothing_factor=0.1 smooths one class per row"),
        (("--metric", "accuracy"), "metric 'accuracy' is not for multi_label.*subset_accuracy"),
        (("--metric", "f1"), "metric 'f1' is not for multi_label_classification; use one of: .*f1_micro"),
        (("--positive_label", "joy"), "multi_label_classification has no positive class"),
        (("--multi_label_threshold", "1.5"), "must be between 0 and 1, or auto, got .1.5."),
        (("--streaming",), "--streaming needs one label per row"),
        (("--task_name", "sst2"), "task 'sst2' has one label per row"),
    ],
)
def test_options_for_one_label_per_row_are_refused_before_training(files, argv, message, capsys):
    import re

    assert launch("full", *argv) == 2
    assert re.search(message, capsys.readouterr().err)
    assert not Path("out").exists()


@pytest.mark.parametrize("solver", ["logistic", "svr", "svc", "asym"])
def test_every_kernel_solver_solves_each_label(files, solver, capsys):
    formula = ("--kernel_formula", "asymmetric_signgd") if solver == "asym" else ()
    few = ("--max_train_samples", "10", "--max_eval_samples", "4", "--max_predict_samples", "1")
    assert launch("kernel", "--kernel_solver", solver, *formula, "--kernel_regularization", "1e-2", *few) == 0
    metrics = json.loads(Path("out/run.json").read_text())["metrics"]
    assert metrics["eval_loss"] > 0 and metrics["train_loss"] > 0


@pytest.mark.parametrize("option", [("--prediction_probabilities",), ("--multi_label_threshold", "0.3")])
def test_a_kernel_has_no_probabilities(files, option, capsys):
    assert launch("kernel", *option) == 2
    assert "scores" in capsys.readouterr().err


def test_a_kernel_keeps_its_chosen_thresholds_of_scores(files):
    few = ("--max_train_samples", "10", "--max_eval_samples", "4")
    assert launch("kernel", "--multi_label_threshold", "auto", *few) == 0
    again = ["--method", "kernel", "--model_name_or_path", "out", "--test_file", "test.jsonl", "--do_predict"]
    assert run_glue.main([*again, "--max_seq_length", "16", "--use_cpu", "--output_dir", "again"]) == 0
    first, later = (json.loads(Path(name, "run.json").read_text()) for name in ("out", "again"))
    assert len(set(first["thresholds"].values())) > 1 and later["thresholds"] == first["thresholds"]
    assert predictions("again/predictions.tsv") == predictions("out/predictions.tsv")


# --- the trainers by themselves -------------------------------------------------------------------------------


@pytest.fixture
def rows(tokenizer):
    data = text_dataset(18, seed=4).remove_columns(["label", "idx"])
    return data.map(
        lambda row: {
            **tokenizer(row["sentence"]),
            "labels": [float(name in labels_of_text(row["sentence"])) for name in NAMES],
        },
        remove_columns="sentence",
    )


@pytest.fixture
def model():
    return one_layer_model(num_labels=3, problem_type=MULTI).eval()


@pytest.mark.parametrize("labels", [3, 1])
def test_a_kernel_solves_each_label_by_itself(labels, rows, tokenizer, tmp_path):
    model = one_layer_model(num_labels=labels, problem_type=MULTI).eval()
    rows = Dataset.from_list([{**row, "labels": row["labels"][:labels]} for row in rows])
    train, test = rows.select(range(12)), rows.select(range(12, 18))
    args = KernelTrainingArguments(str(tmp_path), kernel_regularization="1e-3", use_cpu=True, report_to="none")
    trainer = KernelTrainer(model, args, train_dataset=train, processing_class=tokenizer)
    trainer.train()
    found = trainer.predict(test).predictions

    collate = DataCollatorWithPadding(tokenizer)
    one, two = (
        [{k: v for k, v in b.items() if k != "labels"} for b in DataLoader(d, batch_size=4, collate_fn=collate)]
        for d in (train, test)
    )
    kernel, other = empirical_ntk(model, one).numpy(), empirical_ntk(model, one, two).numpy()
    for label in range(labels):
        matrix = kernel[:, label, :, label]
        matrix = matrix + 1e-3 * np.linalg.norm(matrix, 2) * np.eye(12)
        targets = 2 * np.array(train["labels"])[:, label] - 1
        expected = other[:, label, :, label].T @ np.linalg.solve(matrix, targets)
        assert np.allclose(found[:, label], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("labels", [3, 1])
def test_a_linear_head_is_one_logistic_regression_per_label(labels, rows, tokenizer):
    model = one_layer_model(num_labels=labels, problem_type=MULTI).eval()
    rows = Dataset.from_list([{**row, "labels": row["labels"][:labels]} for row in rows])
    fit_linear_head(model, rows, DataCollatorWithPadding(tokenizer), c=0.5)
    with torch.no_grad():
        features, logits = [], []
        for row in rows:
            batch = {key: torch.tensor([row[key]]) for key in ("input_ids", "attention_mask")}
            features.append(model.bert(**batch).pooler_output[0].numpy())
            logits.append(model(**batch).logits[0].numpy())
    scaled = StandardScaler().fit_transform(np.array(features))
    for label in range(labels):
        truth = np.array(rows["labels"])[:, label].astype(int)
        expected = LogisticRegression(C=0.5, max_iter=5000, tol=1e-8).fit(scaled, truth).decision_function(scaled)
        assert np.allclose(np.array(logits)[:, label], expected, atol=2e-2)


def test_a_linear_head_takes_a_label_without_rows_by_its_bias(model, rows, tokenizer):
    rows = rows.map(lambda row: {"labels": [*row["labels"][:2], 0.0]})
    fit_linear_head(model, rows, DataCollatorWithPadding(tokenizer), c=1.0)
    assert model.classifier.weight[2].abs().max() == 0
    assert model.classifier.bias[2].item() == pytest.approx(math.log(0.5 / 18.5))


@pytest.mark.parametrize("name", ["accuracy", "f1", "loss"])
def test_objectives_of_several_labels(name):
    generator = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(5, 7, 3, generator=generator), (torch.rand(7, 3, generator=generator) < 0.5).float()
    found = make_objective(name, MULTI, 3)(logits, labels)
    for one, value in zip(logits, found, strict=True):
        sets = [{n for n, z in zip(NAMES, row, strict=True) if z >= 0} for row in one.tolist()]
        truth = [{n for n, z in zip(NAMES, row, strict=True) if z > 0} for row in labels.tolist()]
        scores = by_hand(sets, truth)
        loss = sum(
            math.log1p(math.exp(-z if y else z)) / 21
            for z, y in zip(one.flatten().tolist(), labels.flatten().tolist(), strict=True)
        )
        expected = {"accuracy": 1 - scores["subset_accuracy"], "f1": 1 - scores["f1_micro"], "loss": loss}[name]
        assert float(value) == pytest.approx(expected, rel=1e-5)


def test_matthews_is_refused_as_an_objective_of_several_labels():
    with pytest.raises(InputError, match="matthews is for one label per row"):
        make_objective("matthews", MULTI, 3)
    with pytest.raises(InputError, match=r"label_smoothing_factor=0.1 smooths one class per row"):
        make_objective("loss", MULTI, 3, smoothing=0.1)


def test_the_squared_loss_takes_several_labels():
    logits, labels = torch.tensor([[1.0, 0.0], [0.5, 2.0]]), torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    squares = 0 + 1 + 1.5**2 + 1  # to 1, -1, -1 and 1: a sigmoid of 0.5 lies in the middle
    assert float(l2_loss({"logits": logits}, labels)) == pytest.approx(squares / 4)
    assert float(l2_loss({"logits": logits}, labels, 8)) == pytest.approx(squares / 8)  # of a step twice it


@pytest.mark.parametrize("accumulated", [1, 2])
def test_the_squared_loss_of_a_step_is_the_mean_over_its_rows_and_labels(rows, tokenizer, tmp_path, accumulated):
    model = one_layer_model(
        num_labels=3, problem_type=MULTI, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
    )
    args = FullTrainingArguments(
        str(tmp_path), l2_loss=True, max_steps=1, learning_rate=0.0, per_device_train_batch_size=8 // accumulated,
        gradient_accumulation_steps=accumulated, train_sampling_strategy="sequential", use_cpu=True, report_to="none",
    )  # fmt: skip
    loss = FullTrainer(model, args, train_dataset=rows, processing_class=tokenizer).train().training_loss
    expected = []
    for row in rows.select(range(8)):
        with torch.no_grad():
            logits = model.eval()(torch.tensor([row["input_ids"]])).logits[0]
        expected += [(z - (2 * y - 1)) ** 2 for z, y in zip(logits.tolist(), row["labels"], strict=True)]
    assert loss == pytest.approx(sum(expected) / 24, rel=1e-5)


def test_a_trainer_of_transformers_gets_the_same_numbers(model, rows, tokenizer):
    from transformers import Trainer, TrainingArguments

    args = TrainingArguments("unused", use_cpu=True, report_to="none", disable_tqdm=True)
    compute = metric_function(["f1_micro", "f1_macro", "subset_accuracy"], NAMES)
    trainer = Trainer(model, args, eval_dataset=rows, processing_class=tokenizer, compute_metrics=compute)
    found = trainer.evaluate()
    output = trainer.predict(rows)
    sets = [{n for n, z in zip(NAMES, row, strict=True) if z >= 0} for row in output.predictions.tolist()]
    truth = [{n for n, z in zip(NAMES, row, strict=True) if z} for row in rows["labels"]]
    for key, value in by_hand(sets, truth).items():
        assert found[f"eval_{key}"] == pytest.approx(value)
