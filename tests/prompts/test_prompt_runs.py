"""Prompts through the launcher: every method trains a prompt model, saves it, and it loads with its prompt."""

import csv
import json
import re
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForSequenceClassification, PeftModel
from safetensors.torch import load_file
from tiny import save_masked_lm, text_dataset, tiny_dataset, tiny_masked_lm, tiny_model, tiny_tokenizer, write_texts
from transformers import AutoModelForSequenceClassification, Trainer, TrainingArguments

import run_glue
from hf_ft_ext import (
    GradientlessTrainer,
    GradientlessTrainingArguments,
    PromptEncoder,
    PromptForSequenceClassification,
)

TEMPLATE = "*cls**sent_0*_it_was*mask*.*sep+*"
PROMPT = ("--few_shot_type", "prompt", "--template", TEMPLATE, "--mapping", "{'0': 'bad', '1': 'good'}")
METHODS = {
    "full": (),
    "signgd": ("--method", "full", "--optim", "sgd", "--optim_args", "sign=true", "--fix_layers", "1"),
    "prefix": ("--method", "full", "--peft", "prefix_tuning", "--peft_config", '{"num_virtual_tokens": 2}'),
    "lora": (),
    "sparse": ("--sparse_basis_steps", "2", "--sparse_density", "0.2"),
    "gradientless": ("--feature_cache_gb", "0.1", "--feature_cache_dir", "features"),
    "spsa": ("--method", "gradientless", "--search_method", "spsa", "--search_target", "all"),
    "spsa-lora": ("--method", "gradientless", "--search_method", "spsa", "--search_peft", "lora"),
    "spsa-prefix": (
        "--method", "gradientless", "--search_method", "spsa", "--search_peft", "prefix_tuning",
        "--search_peft_config", '{"num_virtual_tokens": 2, "init_from_activations": true}',
    ),
}  # fmt: skip


@pytest.fixture
def launch(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_texts("train.csv", 80)
    write_texts("test.csv", 12, seed=1)
    save_masked_lm("mlm")

    def call(*argv, prompt=PROMPT):
        return run_glue.main(
            [
                "--model_name_or_path", "mlm", "--train_file", "train.csv", "--test_file", "test.csv", "--num_k", "8",
                "--max_seq_length", "32", "--use_cpu", "--disable_tqdm", "true", *prompt, *argv,
            ]
        )  # fmt: skip

    return call


def loaded(line):
    names = {"PromptForSequenceClassification": PromptForSequenceClassification, "PeftModel": PeftModel}
    return eval(line.removeprefix("load it: "), names).eval()


def predicted(model, folder="out"):
    sentences = [row[0] for row in csv.reader(Path("test.csv").read_text().splitlines())][1:]
    tokenizer = tiny_tokenizer()
    rows = PromptEncoder(tokenizer, model.config.template, 1, 32)([sentences])
    with torch.no_grad():
        return model(**tokenizer.pad(rows, return_tensors="pt")).logits


@pytest.mark.parametrize("name", METHODS)
def test_train_save_load(launch, name, capsys):
    method = () if "--method" in METHODS[name] else ("--method", name)
    steps = ("--do_train", "--do_eval", "--do_predict", "--max_steps", "3", "--learning_rate", "1e-2")
    assert launch(*method, *METHODS[name], *steps, "--output_dir", "out") == 0
    printed = capsys.readouterr().out
    model = loaded(next(line for line in printed.splitlines() if line.startswith("load it: ")))
    logits = predicted(model)
    rows = list(csv.reader(Path("out/predictions.tsv").read_text().splitlines(), delimiter="\t"))[1:]
    assert [row[1] for row in rows] == [str(i) for i in logits.argmax(-1).tolist()]
    if Path("out/adapter_config.json").exists():
        assert torch.equal(predicted(AutoPeftModelForSequenceClassification.from_pretrained("out").eval()), logits)
    if "prefix" not in name:  # transformers itself adds no adapters that are prompts
        whole = AutoModelForSequenceClassification.from_pretrained("out").eval()
        assert torch.equal(predicted(whole), logits) and whole.config.id2label == {0: "0", 1: "1"}
    start = PromptForSequenceClassification.from_masked_lm("mlm", tiny_tokenizer(), TEMPLATE, ["bad", "good"])
    assert not torch.allclose(predicted(start), logits)
    assert {"eval_accuracy", "test_accuracy"} <= json.loads(Path("out/run.json").read_text())["metrics"].keys()


def test_zero_shot_needs_no_training(launch):
    assert launch("--do_eval", "--do_predict", "--output_dir", "out") == 0
    start = PromptForSequenceClassification.from_masked_lm("mlm", tiny_tokenizer(), TEMPLATE, ["bad", "good"])
    rows = list(csv.reader(Path("out/predictions.tsv").read_text().splitlines(), delimiter="\t"))[1:]
    assert [row[1] for row in rows] == [str(i) for i in predicted(start).argmax(-1).tolist()]
    assert not Path("out/model.safetensors").exists()


def test_calibration_with_demonstrations_is_saved_with_the_model(launch):
    demo = ("--few_shot_type", "prompt-demo", *PROMPT[2:], "--calibrate", "--num_sample", "2")
    options = ("--method", "full", "--do_train", "--max_steps", "1", "--max_seq_length", "60", "--output_dir", "out")
    assert launch(*options, prompt=demo) == 0
    bias = json.loads(Path("out/config.json").read_text())["word_bias"]
    assert len(bias) == 2 and bias[0] != bias[1]


def test_a_saved_prompt_model_is_used_with_its_prompt(launch, capsys):
    first = ("--method", "full", "--do_train", "--do_predict", "--max_steps", "3", "--learning_rate", "1e-2")
    assert launch(*first, "--output_dir", "out") == 0
    again = ("--model_name_or_path", "out", "--do_predict")
    assert launch(*again, "--output_dir", "again", prompt=()) == 0
    assert Path("again/predictions.tsv").read_text() == Path("out/predictions.tsv").read_text()
    Path("one.csv").write_text("sentence,label\na good film,1\n")  # lacks a label of the model's
    one = ["--method", "full", "--validation_file", "one.csv", "--do_eval", "--use_cpu", "--output_dir", "one"]
    assert run_glue.main(["--model_name_or_path", "out", *one, "--max_seq_length", "32"]) == 0
    other = ("--few_shot_type", "prompt", "--template", "*cls**mask*_was*sent_0**sep*")
    assert launch(*again, "--output_dir", "other", prompt=other) == 0
    swapped = ("--few_shot_type", "prompt", "--mapping", "{'0': 'good', '1': 'bad'}")
    assert launch(*again, "--output_dir", "swapped", prompt=swapped) == 0
    for a, b in zip(*(Path(n, "predictions.tsv").read_text().split() for n in ("out", "swapped")), strict=True):
        assert a == b or {a, b} == {"0", "1"}
    capsys.readouterr()
    assert launch(*again, "--output_dir", "no", prompt=("--few_shot_type", "finetune")) == 2
    assert "the model was saved with a prompt" in capsys.readouterr().err


def test_resumed_adapters_equal_unbroken_ones(launch):
    options = ("--method", "lora", "--do_train", "--max_steps", "4", "--save_steps", "2")
    assert launch(*options, "--output_dir", "a") == 0
    assert Path("a/checkpoint-2/prompt_config.json").exists()
    assert launch(*options, "--resume_from_checkpoint", "a/checkpoint-2", "--output_dir", "b") == 0
    assert Path("a/adapter_model.safetensors").read_bytes() == Path("b/adapter_model.safetensors").read_bytes()


def test_a_regression_says_a_place_between_two_words(launch):
    from datasets import Dataset

    rows = text_dataset(60)["sentence"][:]
    Dataset.from_dict({"sentence": rows, "label": [i / 12 for i in range(60)]}).to_csv("train.csv")
    Dataset.from_dict({"sentence": rows[:9], "label": [i / 2 + 0.1 for i in range(9)]}).to_csv("test.csv")
    for name in ("full", "linearhead", "gradientless"):
        extra = () if name == "linearhead" else ("--max_steps", "2", "--learning_rate", "1e-2")
        extra += () if name == "full" else ("--feature_cache_gb", "0")
        assert launch("--method", name, "--do_train", "--do_eval", "--do_predict", *extra, "--output_dir", name) == 0
        values = [float(line.split("\t")[1]) for line in Path(name, "predictions.tsv").read_text().splitlines()[1:]]
        assert all(0 <= value <= 59 / 12 for value in values) and len(set(values)) > 1


def test_searching_a_prompt_s_head_takes_cached_features(tmp_path):
    encoder = PromptEncoder(tiny_tokenizer(), TEMPLATE, 1, 32)
    rows = text_dataset(32)
    data = rows.map(lambda batch: dict(encoder([batch["sentence"]])), batched=True, remove_columns=["sentence", "idx"])
    model = PromptForSequenceClassification.from_masked_lm(
        tiny_masked_lm(), tiny_tokenizer(), TEMPLATE, ["bad", "good"], untie_words=True
    )
    args = GradientlessTrainingArguments(
        str(tmp_path), max_steps=30, learning_rate=0.05, per_device_train_batch_size=32, use_cpu=True,
        report_to="none", save_strategy="no", feature_cache_dir=str(tmp_path / "features"),
    )  # fmt: skip
    trainer = GradientlessTrainer(model, args, train_dataset=data, processing_class=tiny_tokenizer())
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    first = trainer.evaluate(data)["eval_loss"]
    trainer.train()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    (features,) = load_file(next((tmp_path / "features").glob("*.safetensors"))).values()
    assert features.shape == (32, 32)
    assert moved and all("cls.predictions" in name for name in moved)
    assert trainer.evaluate(data)["eval_loss"] < first


def test_accumulated_loss_equals_that_of_one_batch(tmp_path):
    encoder = PromptEncoder(tiny_tokenizer(), TEMPLATE, 1, 32)
    data = text_dataset(32).map(
        lambda batch: dict(encoder([batch["sentence"]])), batched=True, remove_columns=["sentence", "idx"]
    )
    losses = []
    for size, accumulation in ((8, 1), (2, 4)):
        lm = tiny_masked_lm(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
        model = PromptForSequenceClassification.from_masked_lm(lm, tiny_tokenizer(), TEMPLATE, ["bad", "good"])
        args = TrainingArguments(
            str(tmp_path), per_device_train_batch_size=size, gradient_accumulation_steps=accumulation, max_steps=3,
            logging_steps=1, save_strategy="no", report_to="none", use_cpu=True, disable_tqdm=True,
        )  # fmt: skip
        trainer = Trainer(model, args, train_dataset=data, processing_class=tiny_tokenizer())
        trainer.train()
        losses.append([log["loss"] for log in trainer.state.log_history if "loss" in log])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


@pytest.mark.parametrize(
    ("argv", "prompt", "message"),
    [
        (("--template", "*sent_0**mask*"), (), "--template .* is for prompts, but few_shot_type=finetune does not"),
        (("--num_demo", "2"), PROMPT, "--num_demo 2 is for prompts, .* pass --few_shot_type prompt-demo"),
        ((), PROMPT[:4], "has no prompt of its own; pass --mapping"),
        ((), (*PROMPT[:3], "*sent_1**mask*", *PROMPT[4:]), "names text 1, but the rows of this data have one text"),
        ((), (*PROMPT[:5], "{'0': 'bad', '1': 'brilliantly'}"), "label word 'brilliantly' is unknown"),
        (("--first_sent_limit", "30"), PROMPT, "first_sent_limit=30 cannot keep the mask"),
        (("--max_seq_length", "6"), PROMPT, "no sentence limit can keep the mask"),
        (("--num_k", "30"), PROMPT, r"num_k=30 needs 60 rows .* class '\d' has"),
        (("--model_name_or_path", "head"), PROMPT, "have no language-model head"),
    ],
)  # fmt: skip
def test_bad_input_ends_before_training(launch, capsys, argv, prompt, message):
    tiny_model().save_pretrained("head")
    tiny_tokenizer().save_pretrained("head")
    assert launch("--do_train", *argv, "--output_dir", "out", prompt=prompt) == 2
    error = capsys.readouterr().err
    assert re.search(message, error) and "Traceback" not in error, error


def test_rows_tokenised_without_the_template_are_refused(tmp_path):
    model = PromptForSequenceClassification.from_masked_lm(
        tiny_masked_lm(), tiny_tokenizer(), TEMPLATE, ["bad", "good"]
    )
    args = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none", disable_tqdm=True)
    trainer = Trainer(model, args, train_dataset=tiny_dataset(8), processing_class=tiny_tokenizer())
    with pytest.raises(ValueError, match="has 0 mask tokens, but a prompt model reads one"):
        trainer.train()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--method", "linearhead"), "a linear head is fitted in their place; leave one of the two out"),
        (
            ("--method", "lora", "--from_linearhead"),
            "a linear head is fitted in their place; leave one of the two out",
        ),
        (("--method", "kernel"), "method kernel does not read without adjust_for_init; pass --adjust_for_init too"),
    ],
)
def test_a_calibration_of_logits_that_nothing_reads_is_refused(launch, capsys, words, message):
    assert launch(*words, "--calibrate", "--output_dir", "out") == 2
    assert message in capsys.readouterr().err


def test_a_linear_head_replaces_the_calibration_of_a_saved_model(launch):
    assert launch("--method", "linearhead", "--do_eval", "--calibrate", "--output_dir", "zero-shot") == 0
    model = PromptForSequenceClassification.from_language_model(
        "mlm", tiny_tokenizer(), TEMPLATE, ["bad", "good"], ["0", "1"]
    )
    model.calibrate(torch.tensor([[2, 40, 12, 4, 44, 3]]))
    assert model.config.word_bias is not None
    model.save_pretrained("calibrated")
    tiny_tokenizer().save_pretrained("calibrated")
    fit = ("--method", "linearhead", "--feature_cache_gb", "0", "--do_train", "--do_eval")
    for name in ("mlm", "calibrated"):
        assert launch(*fit, "--model_name_or_path", name, "--output_dir", name + "-head") == 0
    plain, calibrated = (json.loads(Path(f"{name}-head/run.json").read_text()) for name in ("mlm", "calibrated"))
    assert calibrated["metrics"]["eval_loss"] == pytest.approx(plain["metrics"]["eval_loss"], rel=1e-4)
