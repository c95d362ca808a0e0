"""The launcher from end to end, in this process, on a tiny model and small files."""

import csv
import json
import os
import re
import shutil
import warnings
from pathlib import Path

import datasets
import evaluate
import pytest
import torch
import transformers
from datasets import Features, Value
from huggingface_hub.utils import are_progress_bars_disabled
from launched import KEEPS_WEIGHTS, ROOT, python, same, weights
from peft import PeftModel
from quick import ITERATIVE_METHODS, SOLVER_METHODS
from tiny import WORDS, text_dataset
from transformers import AutoConfig, AutoModelForSequenceClassification

import run_glue
from hf_ft_ext.kernel.saved.record import NOT_TRAINED
from hf_ft_ext.launch.results import split_suffix, without_secrets
from hf_ft_ext.methods import METHODS


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


# What a library says about itself, whoever uses it: peft asks transformers by the name of before.
# The second: datasets 4.0 leaves the files open that pandas reads for it.
FOREIGN = ("`is_gradient_checkpointing` is deprecated", "pandas/io/common.py:136: unclosed file")


@pytest.mark.parametrize("method", METHODS)
def test_train_evaluate_predict_without_a_warning(launch, method, capsys, tiny_bert_dir, tokenizer, recwarn):
    warnings.simplefilter("always")
    steps = ("--do_train", "--do_eval", "--do_predict", "--output_dir", "out")
    steps += () if method in SOLVER_METHODS else ("--num_train_epochs", "1")
    assert launch(*steps, "--hub_token", "secret", method=method) == 0
    said = [f"{warning.filename}:{warning.lineno}: {warning.message}" for warning in recwarn]
    assert not [text for text in said if not any(known in text for known in FOREIGN)]

    record = json.loads(Path("out/run.json").read_text())
    assert (record["method"], record["task"], record["model"], record["seed"]) == (
        method, "train.csv", tiny_bert_dir, 42,
    )  # fmt: skip
    assert {"eval_accuracy", "eval_loss", "train_loss"} <= record["metrics"].keys()
    counted_as = "counted_parameters" if method == "kernel" else "trainable_parameters"
    for key in ("train_seconds", "samples_per_second", counted_as, "total_parameters", "artefact_bytes"):
        assert record[key] > 0, key
    assert (record["trainable_parameters"] == 0) == (method == "kernel")
    assert record["peak_memory_kind"].startswith("resident set, above the level before training")
    assert record["peak_memory_bytes"] is not None and "secret" not in Path("out/run.json").read_text()
    assert record["arguments"].get("learning_rate") == (None if method in SOLVER_METHODS else 1e-2)

    printed = capsys.readouterr().out
    counted = "parameters of the kernel (no weight changes)" if method == "kernel" else "trainable parameters"
    for words in ("eval_accuracy", "training seconds", "peak memory", counted, "load it:", "out"):
        assert words in printed
    rows = list(csv.reader(Path("out/predictions.tsv").read_text().splitlines(), delimiter="\t"))
    assert rows[0] == ["index", "prediction"] and [row[0] for row in rows[1:]] == [str(i) for i in range(7)]

    line = next(line for line in printed.splitlines() if line.startswith("load it: ")).removeprefix("load it: ")
    if method in KEEPS_WEIGHTS:
        kept = {name: value for name, value in weights("out").items() if name != NOT_TRAINED}
        start = weights(tiny_bert_dir)
        assert kept.keys() == start.keys() and all(torch.equal(kept[name], start[name]) for name in kept)
        assert line == "load_kernel('out')" and NOT_TRAINED in weights("out")
        return
    names = {"AutoModelForSequenceClassification": AutoModelForSequenceClassification, "PeftModel": PeftModel}
    model = eval(line, {**names, "AutoConfig": AutoConfig}).eval()
    sentences = [row[0] for row in csv.reader(Path("test.csv").read_text().splitlines())][1:]
    with torch.no_grad():
        batch = tokenizer(sentences, padding=True, truncation=True, max_length=16, return_tensors="pt")
        predicted = model(**batch).logits.argmax(-1).tolist()
    assert [row[1] for row in rows[1:]] == [str(i) for i in predicted]


@pytest.mark.parametrize("method", ITERATIVE_METHODS)
def test_resume_equals_unbroken(launch, method, caplog):
    options = ("--do_train", "--max_steps", "4", "--save_steps", "2", "--logging_steps", "1")
    assert launch(*options, "--output_dir", "a", method=method) == 0
    shutil.copytree("a", "b")
    for path in Path("b").glob("*.safetensors"):  # as if the run had been killed after its first checkpoint
        path.unlink()
    os.unlink("b/run.json")
    shutil.rmtree("b/checkpoint-4")
    assert launch(*options, "--output_dir", "b", "--resume_from_checkpoint", "true", method=method) == 0
    assert same("a", "b") and "differ from those of the checkpoint" not in caplog.text


def test_predictions_keep_every_row_and_its_place(launch, tmp_path):
    rows = text_dataset(21, seed=3).select_columns(["sentence", "label"])
    rows = rows.map(lambda row, i: {"label": i / 7}, with_indices=True, features=Features(
        {"sentence": Value("string"), "label": Value("float32")}
    ))  # fmt: skip
    rows.to_csv(tmp_path / "scores.csv")
    data = ["--train_file", "scores.csv", "--validation_file", "scores.csv", "--test_file", "scores.csv"]
    options = ("--do_train", "--do_eval", "--do_predict", "--max_steps", "1", "--per_device_eval_batch_size", "4")
    assert launch(*options, "--output_dir", "one", data=data) == 0
    again = ("--model_name_or_path", "one", "--do_eval", "--do_predict", "--per_device_eval_batch_size", "4")
    again += ("--train_sampling_strategy", "group_by_length", "--dataloader_drop_last")
    assert launch(*again, "--output_dir", "two", data=data) == 0
    one, two = ([float(row[1]) for row in tsv(f"{name}/predictions.tsv")[1:]] for name in ("one", "two"))
    assert len(set(one)) > 10 and two == pytest.approx(one, abs=1e-5)
    losses = [json.loads(Path(name, "run.json").read_text())["metrics"]["eval_loss"] for name in ("one", "two")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def tsv(path) -> list[list[str]]:
    return list(csv.reader(Path(path).read_text().splitlines(), delimiter="\t"))


@pytest.mark.parametrize("method", ["full", "lora", "kernel"])
def test_rows_of_a_single_class_are_evaluated_with_the_models_labels(launch, method):
    steps = () if method in SOLVER_METHODS else ("--max_steps", "2")
    assert launch("--do_train", *steps, "--output_dir", "out", method=method) == 0
    Path("one.csv").write_text("sentence,label\na good film,1\na dull plot,1\n")
    words = ["--model_name_or_path", "out", "--validation_file", "one.csv", "--test_file", "one.csv", "--use_cpu"]
    words += ["--method", method, "--do_eval", "--do_predict", "--metric", "f1", "accuracy", "--max_seq_length", "16"]
    assert run_glue.main([*words, "--output_dir", "again"]) == 0
    metrics = json.loads(Path("again/run.json").read_text())["metrics"]
    share = sum(row[1] == "1" for row in tsv("again/predictions.tsv")[1:]) / 2
    assert metrics["eval_accuracy"] == share and metrics["eval_f1"] == pytest.approx(2 * share / (1 + share))


@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_checkpoint_is_not_resumed_under_other_labels(launch, method, tmp_path, monkeypatch, capsys, caplog):
    monkeypatch.chdir(tmp_path)
    for name, labels in (("old", ("A", "B")), ("new", ("zzz", "aaa"))):  # the alphabet turns the order round
        rows = [f"a good film {i},{labels[i % 2]}" for i in range(16)]
        Path(f"{name}.csv").write_text("\n".join(["sentence,label", *rows]))
    old, new = (("--train_file", "old.csv"), ("--train_file", "new.csv"))
    options = ("--do_train", "--save_strategy", "steps", "--save_steps", "2")
    resume = ("--resume_from_checkpoint", "out/checkpoint-2")
    assert launch(*options, "--max_steps", "4", "--output_dir", "out", data=old, method=method) == 0
    assert launch(*options, *resume, "--max_steps", "4", "--output_dir", "b", data=new, method=method) == 2
    assert "was trained for the labels A, B, and here they are aaa, zzz" in capsys.readouterr().err
    assert launch(*options, *resume, "--max_steps", "1", "--output_dir", "b", data=old, method=method) == 2
    assert "is at step 2, beyond --max_steps 1" in capsys.readouterr().err
    short = ("--num_train_epochs", "1", "--per_device_train_batch_size", "16", "--output_dir", "b")
    assert launch(*options, *resume, *short, data=old, method=method) == 2
    assert "is at step 2, beyond --num_train_epochs 1, so nothing would be" in capsys.readouterr().err
    if method == "lora":
        other = ("--lora_alpha", "64", "--output_dir", "b")
        assert launch(*options, *resume, "--max_steps", "4", *other, data=old, method=method) == 2
        assert "its adapter has lora_alpha=16, here 64.0; pass the arguments that" in capsys.readouterr().err
    for name in ("optimizer.pt", "checkpoint_checksums.json"):
        Path("out", "checkpoint-2", name).unlink()
    changed = ("--max_steps", "4", "--max_seq_length", "9", "--per_device_eval_batch_size", "3", "--output_dir", "b")
    assert launch(*options, *resume, *changed, data=old, method=method) == 0
    assert "change the course of the run: max_seq_length=9 (checkpoint: 16). Pass" in caplog.text
    assert "out/checkpoint-2 holds no optimizer state (save_only_model): moments and learning rate" in caplog.text
    again = (*options, *resume, "--max_steps", "4", "--output_dir", "c", "--from_linearhead")
    assert launch(*again, data=old, method=method) == 2
    assert "from_linearhead=True has no effect" in capsys.readouterr().err


def test_best_model_by_the_primary_metric(launch):
    options = ("--num_train_epochs", "2", "--eval_strategy", "epoch", "--save_strategy", "epoch")
    assert launch(*options, "--load_best_model_at_end", "--output_dir", "out") == 0
    state = json.loads(
        (max(Path("out").glob("checkpoint-*"), key=os.path.getmtime) / "trainer_state.json").read_text()
    )
    best = max(entry["eval_accuracy"] for entry in state["log_history"] if "eval_accuracy" in entry)
    assert state["best_metric"] == best
    assert json.loads(Path("out/run.json").read_text())["metrics"]["eval_accuracy"] == best


def test_early_stopping(launch):
    options = ("--num_train_epochs", "8", "--eval_strategy", "epoch", "--save_strategy", "epoch")
    options += ("--load_best_model_at_end", "--early_stopping_patience", "2", "--learning_rate", "0")
    assert launch(*options, "--output_dir", "out") == 0
    metrics = json.loads(Path("out/run.json").read_text())["metrics"]
    assert metrics["epoch"] == 3  # the first is the best, and two more do not beat it
    second = sorted(Path("out").glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))[1]
    assert launch(*options, "--output_dir", "resumed", "--resume_from_checkpoint", str(second)) == 0
    assert json.loads(Path("resumed/run.json").read_text())["metrics"]["epoch"] == 3


def test_evaluation_alone_writes_no_model(launch, capsys):
    assert launch("--do_eval", "--output_dir", "out") == 0
    assert sorted(os.listdir("out")) == [".run.lock", "run.json"]
    record = json.loads(Path("out/run.json").read_text())
    assert record["train_seconds"] is None and 0 <= record["metrics"]["eval_accuracy"] <= 1
    assert "load it" not in capsys.readouterr().out


@pytest.mark.parametrize("method", ["full", "lora", "kernel", "linearhead"])
def test_rows_that_lack_a_class_are_scored_by_the_trained_head(launch, method):
    rows = [f"{WORDS[i]} {WORDS[i // 2]},{'bca'[i % 3]}" for i in range(18)]
    Path("all.csv").write_text("\n".join(["sentence,label", *rows]))
    Path("some.csv").write_text("\n".join(["sentence,label", *(row for row in rows if not row.endswith("c"))]))
    steps = () if method in SOLVER_METHODS else ("--max_steps", "2")
    data = ("--train_file", "all.csv", "--test_file", "all.csv")
    assert launch("--do_train", "--do_predict", *steps, "--output_dir", "out", data=data, method=method) == 0
    data = ("--model_name_or_path", "out", "--test_file", "some.csv", "--validation_file", "some.csv")
    assert launch("--do_eval", "--do_predict", "--output_dir", "again", data=data, method=method) == 0
    expected = [row[1] for row, text in zip(tsv("out/predictions.tsv")[1:], rows, strict=True) if text[-1] != "c"]
    assert [row[1] for row in tsv("again/predictions.tsv")[1:]] == expected
    right = [name == text[-1] for name, text in zip(expected, (r for r in rows if r[-1] != "c"), strict=True)]
    assert json.loads(Path("again/run.json").read_text())["metrics"]["eval_accuracy"] == sum(right) / 12


def test_mnli_has_two_validation_and_two_test_sets(launch, tmp_path):
    names = ["entailment", "neutral", "contradiction"]
    folder = tmp_path / "glue" / "mnli"
    folder.mkdir(parents=True)
    names_of_splits = ("train", "validation_matched", "validation_mismatched", "test_matched", "test_mismatched")
    for seed, split in enumerate(names_of_splits):
        data = text_dataset(9, pair=True, seed=seed).rename_columns(
            {"sentence1": "premise", "sentence2": "hypothesis"}
        )
        labels = [-1 if split == "test_mismatched" and i == 4 else i % 3 for i in range(9)]
        data = data.remove_columns(["label", "idx"]).add_column("label", labels)
        data.to_parquet(folder / f"{split}-00000-of-00001.parquet")
    splits = "".join(f"      - split: {name}\n        path: {name}-*\n" for name in names_of_splits)
    (folder / "README.md").write_text(f"---\nconfigs:\n  - config_name: mnli\n    data_files:\n{splits}---\n")
    data = ("--dataset_name", str(folder), "--task_name", "mnli")
    steps = ("--do_train", "--do_eval", "--do_predict", "--max_steps", "1")
    steps += ("--dataloader_num_workers", "1", "--dataloader_persistent_workers", "true")
    assert launch(*steps, "--output_dir", "out", data=data) == 0
    metrics = json.loads(Path("out/run.json").read_text())["metrics"]
    assert {"eval_accuracy", "eval_mm_accuracy"} <= metrics.keys() and metrics["eval_loss"] != metrics["eval_mm_loss"]
    for file, left_out in (("predictions.tsv", ()), ("predictions_mm.tsv", (4,))):  # numbered as in the source
        rows = tsv(f"out/{file}")[1:]
        assert [int(row[0]) for row in rows] == [i for i in range(9) if i not in left_out]
        assert {row[1] for row in rows} <= set(names)


def test_regression_predicts_numbers(launch):
    from datasets import Dataset

    rows = text_dataset(16)["sentence"]
    for name in ("train.csv", "dev.csv"):
        Dataset.from_dict({"sentence": rows, "label": [i / 4 + 0.1 for i in range(16)]}).to_csv(name)
    assert launch("--do_train", "--do_eval", "--do_predict", "--max_steps", "2", "--output_dir", "out") == 0
    assert "eval_pearson" in json.loads(Path("out/run.json").read_text())["metrics"]
    float(Path("out/predictions.tsv").read_text().splitlines()[1].split("\t")[1])


@pytest.mark.parametrize("method", METHODS)
def test_dry_run_shows_the_plan_and_writes_nothing(launch, method, capsys):
    assert launch("--dry_run", "--output_dir", "out", method=method) == 0
    printed = capsys.readouterr().out
    assert "what trains" in printed and "memory estimate" in printed
    assert ("steps: 1 of" if method in SOLVER_METHODS else "steps: 12 of 8 examples") in printed
    assert not os.path.exists("out")


def test_overwriting_happens_only_after_everything_loaded(launch, capsys):
    assert launch("--do_train", "--max_steps", "2", "--save_steps", "1", "--output_dir", "out", method="lora") == 0
    Path("out/notes.txt").write_text("mine")
    again = ("--do_train", "--max_steps", "1", "--save_strategy", "no", "--output_dir", "out")
    assert launch(*again) == 2
    assert "already holds a run" in capsys.readouterr().err
    assert launch(*again, "--overwrite_output_dir", "--max_seq_length", "9999") == 2
    assert "max_seq_length" in capsys.readouterr().err
    assert Path("out/run.json").exists() and Path("out/checkpoint-2").exists()
    assert launch(*again, "--overwrite_output_dir") == 0
    left = set(os.listdir("out"))
    assert {"notes.txt", "run.json", "model.safetensors"} <= left
    assert not left & {"checkpoint-1", "checkpoint-2", "adapter_config.json", "adapter_model.safetensors"}


def test_hyperparameter_search(launch):
    pytest.importorskip("optuna")
    options = ("--hp_search", "2", "--max_steps", "2", "--save_strategy", "steps", "--save_steps", "1")
    assert launch(*options, "--output_dir", "out", method="lora") == 0
    found = json.loads(Path("out/hp_search.json").read_text())
    assert found["metric"] == "eval_accuracy" and len(found["trials"]) == 2
    assert 1e-6 <= found["best"]["learning_rate"] <= 1e-1
    assert found["best"]["per_device_train_batch_size"] in (16, 32)
    assert not list(Path("out").glob("run-*")) and Path("out/adapter_model.safetensors").exists()
    state = json.loads(Path("out/checkpoint-2/trainer_state.json").read_text())
    assert state["train_batch_size"] == found["best"]["per_device_train_batch_size"]
    assert launch(*options, "--output_dir", "again", method="lora") == 0
    assert json.loads(Path("again/hp_search.json").read_text()) == found
    assert same("out", "again")


def test_a_trial_that_diverges_loses_the_search(launch, monkeypatch, caplog):
    pytest.importorskip("optuna")
    monkeypatch.setattr("hf_ft_ext.launch.search.LEARNING_RATES", (1e-30, 1e50))  # of two trials one diverges
    assert launch("--hp_search", "2", "--max_steps", "3", "--output_dir", "out") == 0
    found = json.loads(Path("out/hp_search.json").read_text())
    first, second = found["trials"]
    assert second["learning_rate"] > 1e12 and second["eval_accuracy"] is None and "trial diverged" in caplog.text
    assert found["best"]["learning_rate"] == first["learning_rate"]


def test_search_without_optuna(launch, monkeypatch, capsys):
    monkeypatch.setattr("hf_ft_ext.launch.search.importlib.util.find_spec", lambda name: None)
    assert launch("--hp_search", "2") == 2
    assert 'pip install "hf_ft_ext[hp]"' in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "data", "message"),
    [
        (["--do_train"], ["--validation_file", "dev.csv"], "has no training split"),
        (["--do_train", "--do_eval"], ["--train_file", "train.csv"], "has no validation split"),
        (["--do_train", "--eval_strategy", "epoch"], ["--train_file", "train.csv"], "any --eval_strategy"),
        (["--do_predict"], ["--validation_file", "dev.csv"], "has no test split"),
        (["--do_train", "--hp_search", "2"], ["--train_file", "train.csv"], "--hp_search compares"),
        (["--load_best_model_at_end", "--eval_strategy", "steps", "--metric_for_best_model", "f1"], None,
         "metric_for_best_model cannot be 'f1'.*loss, accuracy"),
        (["--load_best_model_at_end", "--eval_strategy", "epoch", "--save_strategy", "epoch", "--prediction_loss_only",
          "--metric_for_best_model", "accuracy"], None, "metric_for_best_model=accuracy is computed from predictions"),
        (["--model_name_or_path", "./none"], None, "no such folder"),
        (["--batch_eval_metrics"], None, "compute_result"),
        (["--early_stopping_patience", "2"], None, "add --load_best_model_at_end"),
        (["--early_stopping_patience", "-1"], None, r"early_stopping_patience must be .* got -1"),
        (["--push_to_hub"], None, "--push_to_hub: the Hub repository cannot be made"),
        (["--task_name", "colla"], [], "colla"),
        (["--do_train", "--dataloader_drop_last", "--per_device_train_batch_size", "64"], None,
         "drops every batch: the training data has 32 rows, fewer than a batch of 64"),
    ],
)  # fmt: skip
def test_bad_input_ends_before_training(launch, capsys, argv, data, message):
    assert launch(*argv, "--output_dir", "out", data=data) == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    assert re.search(message, error), error
    assert not os.path.exists("out/run.json")


def test_label_smoothing_of_a_regression_ends_before_training(launch, tmp_path, capsys):
    text_dataset(16).select_columns(["sentence"]).add_column("label", [i / 2 for i in range(16)]).to_csv("numbers.csv")
    data = ["--train_file", "numbers.csv", "--validation_file", "numbers.csv"]
    assert launch("--label_smoothing_factor", "0.1", "--output_dir", "out", data=data) == 2
    error = capsys.readouterr().err
    assert "label_smoothing_factor=0.1 moves probability between classes, and this task is a regression" in error
    assert "Traceback" not in error and not os.path.exists("out/run.json")


def test_resuming_with_another_method(launch, capsys):
    options = ("--do_train", "--max_steps", "2", "--save_steps", "1", "--output_dir", "out")
    assert launch(*options, method="lora") == 0
    assert launch(*options, "--resume_from_checkpoint", "true", method="full") == 2
    assert "holds an adapter, but method 'full' trains a whole model" in capsys.readouterr().err


def test_disable_tqdm_silences_the_bars_of_all_libraries(launch, capsys):
    transformers.utils.logging.enable_progress_bar()  # earlier runs in this process have silenced them
    datasets.enable_progress_bars()
    evaluate.logging.enable_progress_bar()
    argv = ("--do_train", "--do_eval", "--max_steps", "1")
    assert launch(*argv, "--output_dir", "shown", "--disable_tqdm", "false") == 0
    shown = capsys.readouterr().err
    assert all(
        bar in shown for bar in ("Loading weights: 100%", "Tokenizing train: 100%", "Writing model shards: 100%")
    )
    assert launch(*argv, "--output_dir", "silent") == 0
    assert "%|" not in capsys.readouterr().err
    bars = transformers.utils.logging.is_progress_bar_enabled, evaluate.logging.is_progress_bar_enabled
    assert datasets.are_progress_bars_disabled() and are_progress_bars_disabled() and not any(on() for on in bars)


def test_secrets_and_suffixes():
    command = ["run_glue.py", "--token", "a", "--hub-token=b", "--seed", "1"]
    assert without_secrets(command) == ["run_glue.py", "--token", "***", "--hub-token=***", "--seed", "1"]
    assert [split_suffix(i, n) for i, n in enumerate(("a", "validation_mismatched", "b"))] == ["", "mm", "b"]


def test_help_and_an_error_as_commands(capsys):
    assert run_glue.main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in METHODS) and len(shown) < 2000
    failed = python(str(ROOT / "run_glue.py"), "--method", "fulll")
    assert failed.returncode == 2 and failed.stdout == ""
    assert failed.stderr.splitlines()[-1].startswith("error: unknown method 'fulll'; did you mean 'full'?")
    assert "Traceback" not in failed.stderr and "usage" not in failed.stderr
