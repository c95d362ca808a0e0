"""The positive class through the launcher: F1 by the name of the class, whatever order the model's labels have."""

import csv
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from sklearn.metrics import f1_score, roc_auc_score
from tiny import text_dataset, tiny_model
from transformers import TrainingArguments

import run_glue
from hf_ft_ext.launch.validation import choose_best_metric
from hf_ft_ext.metrics import metric_function

TASK = ["not_equivalent", "equivalent"]


def save(folder: str, tokenizer, names, label2id=None, rows=(0, 1)) -> None:
    """A model that says either class, its two outputs in the order of `rows`, named `names`."""
    model = tiny_model(id2label=dict(enumerate(names)), label2id={n: i for i, n in enumerate(names)}).eval()
    data = text_dataset(40, pair=True)
    batch = tokenizer(data["sentence1"][:], data["sentence2"][:], padding=True, return_tensors="pt")
    with torch.no_grad():
        model.classifier.weight.mul_(100)
        middle = model(**batch).logits.median(0).values
        model.classifier.bias.copy_(-middle[list(rows)])
        model.classifier.weight.copy_(model.classifier.weight[list(rows)].clone())
    model.config.label2id = label2id or model.config.label2id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@pytest.fixture
def pairs(tmp_path, monkeypatch) -> list[str]:
    """The true classes of `dev.csv`, which has pairs of texts and the names of MRPC's classes."""
    monkeypatch.chdir(tmp_path)
    data, truth = text_dataset(40, pair=True), []
    with open("dev.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["sentence1", "sentence2", "label"])
        for row in data:
            truth.append(TASK[int(row["label"] or row["idx"] % 3 == 0)])
            writer.writerow([row["sentence1"], row["sentence2"], truth[-1]])
    return truth


def evaluate(*argv: str, task=("--task_name", "mrpc")) -> dict:
    status = run_glue.main(
        [
            "--method", "full", *task, "--validation_file", "dev.csv", "--test_file", "dev.csv", "--do_eval",
            "--do_predict", "--max_seq_length", "32", "--use_cpu", "--disable_tqdm", "true", "--output_dir", "out",
            "--overwrite_output_dir", *argv,
        ]
    )  # fmt: skip
    assert status == 0
    return json.loads(Path("out/run.json").read_text())


def predicted() -> list[dict[str, str]]:
    with open("out/predictions.tsv", newline="") as file:
        return list(csv.DictReader(file, delimiter="\t"))


@pytest.mark.parametrize(
    ("names", "label2id", "rows"),
    [
        (TASK, None, (0, 1)),
        (TASK[::-1], None, (1, 0)),
        (["EQUIVALENT", "Not_Equivalent"], None, (1, 0)),
        (TASK[::-1], {"not_equivalent": 0, "equivalent": 1}, (1, 0)),  # contradicts id2label, which names the outputs
    ],
)
def test_f1_is_of_the_named_class_in_every_order_of_the_labels(pairs, tokenizer, names, label2id, rows, caplog):
    save("model", tokenizer, names, label2id, rows)
    record = evaluate("--model_name_or_path", "model")
    found = [row["prediction"].lower() for row in predicted()]
    assert 0 < found.count("equivalent") < len(found)
    expected = f1_score(pairs, found, pos_label="equivalent")
    assert record["metrics"]["eval_f1"] == pytest.approx(expected)
    assert record["metrics"]["eval_f1"] != pytest.approx(f1_score(pairs, found, pos_label="not_equivalent"))
    assert record["positive_label"] == "equivalent"
    assert ("contradict each other" in caplog.text) == (label2id is not None)
    # the same predictions, whatever order they come in
    save("plain", tokenizer, TASK)
    plain = evaluate("--model_name_or_path", "plain")
    assert plain["metrics"]["eval_f1"] == pytest.approx(expected)


def test_own_data_scores_the_class_that_is_named(pairs, tokenizer, capsys, caplog):
    save("model", tokenizer, TASK[::-1], rows=(1, 0))
    own = ("--text_columns", "sentence1", "sentence2", "--metric", "f1", "roc_auc", "recall_macro")
    record = evaluate("--model_name_or_path", "model", *own, "--prediction_probabilities", task=())
    assert "The positive class is 'equivalent', by the names of the labels." in caplog.text
    rows = predicted()
    found = [row["prediction"] for row in rows]
    assert record["metrics"]["eval_f1"] == pytest.approx(f1_score(pairs, found, pos_label="equivalent"))
    shares = [float(row["probability_equivalent"]) for row in rows]
    assert record["metrics"]["eval_roc_auc"] == pytest.approx(
        roc_auc_score([p == "equivalent" for p in pairs], shares)
    )
    assert all(
        abs(float(row["probability_not_equivalent"]) + p - 1) < 1e-5 for row, p in zip(rows, shares, strict=True)
    )
    record = evaluate("--model_name_or_path", "model", *own, "--positive_label", "not_equivalent", task=())
    assert record["metrics"]["eval_f1"] == pytest.approx(f1_score(pairs, found, pos_label="not_equivalent"))

    text = Path("dev.csv").read_text().replace("not_equivalent", "ham").replace("equivalent", "spam")
    Path("dev.csv").write_text(text)
    argv = [
        "--validation_file",
        "dev.csv",
        "--do_eval",
        "--metric",
        "f1",
        "--use_cpu",
        "--model_name_or_path",
        "model",
    ]
    assert run_glue.main(argv) == 2
    assert "which cannot be inferred from the labels ham, spam" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("--positive_label", "equivalent", "--metric", "accuracy"), "no metric of this run (accuracy) is about one"),
        (("--positive_label", "equal"), "positive_label='equal' is not a label"),
        (("--multi_label_threshold", "0.3"), "is for several labels per row, but here each row has one"),
        (("--prediction_probabilities", "--no_do_predict"), "unknown argument"),
        (("--metric", "f1", "f2"), "unknown metric 'f2'"),
    ],
)
def test_options_without_effect_are_refused(pairs, tokenizer, argv, message, capsys):
    save("model", tokenizer, TASK)
    with pytest.raises(AssertionError):
        evaluate("--model_name_or_path", "model", *argv)
    assert message in capsys.readouterr().err


def test_any_key_chooses_the_best_model(pairs, tokenizer, capsys):
    save("model", tokenizer, TASK)
    Path("ours_lowest.py").write_text("def gap(references, probabilities):\n    return float(probabilities.std())\n")
    train = (
        "--model_name_or_path", "model", "--train_file", "dev.csv", "--do_train", "--max_steps", "4",
        "--eval_strategy", "steps", "--eval_steps", "1", "--save_strategy", "steps", "--save_steps", "1",
        "--load_best_model_at_end", "--learning_rate", "1e-2", "--report_to", "none",
    )  # fmt: skip
    metrics = ("--metric", "f1_macro", "ours_lowest:gap", "roc_auc")
    for key, more in (("roc_auc", ()), ("gap", ("--greater_is_better", "false"))):
        record = evaluate(*train, *metrics, "--metric_for_best_model", key, *more)
        last = max(Path("out").glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
        history = json.loads((last / "trainer_state.json").read_text())["log_history"]
        values = [entry[f"eval_{key}"] for entry in history if f"eval_{key}" in entry]
        assert len(values) == 4
        best = min(values) if more else max(values)
        assert record["metrics"][f"eval_{key}"] == pytest.approx(best, abs=1e-6)
    with pytest.raises(AssertionError):
        evaluate(*train, *metrics, "--metric_for_best_model", "f1_makro")
    assert "metric_for_best_model cannot be 'f1_makro'; did you mean 'f1_macro'?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("chosen", "said"),
    [(None, "highest gap; pass --greater_is_better false"), ("gap", "highest gap"), ("eval_gap", "highest gap"),
     ("f1_macro", None), ("loss", None)],
)  # fmt: skip
def test_a_metric_whose_direction_is_not_known_is_logged_when_it_chooses_the_best_model(chosen, said, caplog):
    def gap(references):
        return float(references.mean())

    given = {} if chosen is None else {"metric_for_best_model": chosen}
    args = TrainingArguments("out", load_best_model_at_end=True, eval_strategy="steps", use_cpu=True, **given)
    with caplog.at_level("INFO"):
        choose_best_metric(SimpleNamespace(given=given, hp_search=0), args, metric_function([gap, "f1_macro"]))
    assert args.greater_is_better == (chosen != "loss")
    logged = [record.message for record in caplog.records if "The best model has the" in record.message]
    assert len(logged) == (said is not None) and all(said in line for line in logged)


def test_regressions_and_rows_without_labels_keep_the_models_own_problem(tmp_path, tokenizer, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    tiny_model(num_labels=1, problem_type="regression").save_pretrained("model")
    tokenizer.save_pretrained("model")
    Path("rows.csv").write_text("text\nthe film was good\na dull plot\n")
    argv = [
        "--method",
        "full",
        "--model_name_or_path",
        "model",
        "--test_file",
        "rows.csv",
        "--do_predict",
        "--use_cpu",
    ]
    argv += ["--max_seq_length", "16"]
    assert run_glue.main([*argv, "--output_dir", "out"]) == 0
    assert all("." in row["prediction"] for row in predicted())  # numbers, not the name of the one output
    assert run_glue.main([*argv, "--output_dir", "two", "--prediction_probabilities"]) == 2
    assert "--prediction_probabilities is for classes, and this is a regression" in capsys.readouterr().err


def test_a_head_that_keeps_its_weights_under_other_names_is_said(pairs, tokenizer, caplog):
    save("model", tokenizer, ["SAME", "OTHER"])
    evaluate("--model_name_or_path", "model", "--metric", "accuracy")
    assert "The labels of model are SAME, OTHER, those of the data not_equivalent, equivalent" in caplog.text


def test_a_model_without_label2id_is_read_by_id2label(pairs, tokenizer):
    save("model", tokenizer, TASK[::-1], rows=(1, 0))
    config = json.loads(Path("model/config.json").read_text())
    del config["label2id"]
    Path("model/config.json").write_text(json.dumps(config))
    record = evaluate("--model_name_or_path", "model")
    found = [row["prediction"] for row in predicted()]
    assert record["metrics"]["eval_f1"] == pytest.approx(f1_score(pairs, found, pos_label="equivalent"))
