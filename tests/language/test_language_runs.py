"""Every method on every family of decoders, as a classifier by prompt and as a language model, by the launcher."""

import csv
import json
import math
from pathlib import Path

import pytest
import torch
from decoders import DECODERS, save_decoder
from peft import AutoPeftModelForCausalLM, AutoPeftModelForSeq2SeqLM, PeftModel
from processes import launch_two
from safetensors.torch import load_file
from tiny import text_dataset
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

import run_glue
from hf_ft_ext import PromptEncoder, PromptForSequenceClassification

METHODS = {
    "full": (),
    "lora": (),
    "sparse": ("--sparse_basis_steps", "2", "--sparse_density", "0.2"),
    "gradientless": ("--search_method", "spsa", "--search_target", "all"),
    "fisher": ("--fisher_examples", "4"),
    "kernel": (),
}
TRAINED = [method for method in METHODS if method != "kernel"]  # it takes no steps
TEMPLATE = "*cls**sent_0*_it_was*mask*.*sep+*"
PROMPT = ("--few_shot_type", "prompt", "--template", TEMPLATE, "--mapping", "{'no': 'bad', 'yes': 'great'}")
STEPS = ("--do_train", "--do_eval", "--do_predict")
SAVING = ("--save_steps", "2")
# Every method resumes on every family, in one of the two tasks.
RESUMED = {"prompt": ("gpt2", "t5"), "language": ("opt", "llama", "qwen3")}
PAIRS = [("the film was", " great"), ("a dull plot, and", " not the ending"), ("we hated it and really", " bad")]
_LOADERS = {
    "PromptForSequenceClassification": PromptForSequenceClassification, "PeftModel": PeftModel,
    "AutoModelForCausalLM": AutoModelForCausalLM, "AutoModelForSeq2SeqLM": AutoModelForSeq2SeqLM,
    "AutoPeftModelForCausalLM": AutoPeftModelForCausalLM, "AutoPeftModelForSeq2SeqLM": AutoPeftModelForSeq2SeqLM,
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Models of all families, classified sentences, and prompts with completions."""
    root = tmp_path_factory.mktemp("decoders")
    for family in DECODERS:
        save_decoder(root / family, family)
    for name, rows, seed in (("train", 24, 0), ("test", 6, 1)):
        data = text_dataset(rows, seed=seed)
        labels = [data.features["label"].names[i] for i in data["label"]]
        lines = [{"sentence": s, "label": label} for s, label in zip(data["sentence"], labels, strict=True)]
        (root / f"{name}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    pairs = [{"prompt": prompt, "completion": completion} for prompt, completion in PAIRS * 4]
    (root / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    return root


def launch(folder, family, method, out, *more, task="prompt", steps=STEPS, prompt=PROMPT):
    data = {"prompt": ("train.jsonl", "test.jsonl"), "language": ("pairs.jsonl", "pairs.jsonl")}[task]
    language = ("--task_type", "seq2seq_lm" if family == "t5" else "causal_lm")
    if "--do_eval" in steps:
        language = (*language, "--predict_with_generate", "--max_new_tokens", "3")
    options = METHODS[method] if "--do_train" in steps else ()
    count = "4" if {"--save_steps", "--resume_from_checkpoint"} & set(more) else "2"
    many = () if method == "kernel" else ("--max_steps", count, "--warmup_steps", "0")
    status = run_glue.main(
        [
            "--model_name_or_path", str(folder / family), "--method", method, *options,
            "--train_file", str(folder / data[0]), "--validation_file", str(folder / data[1]),
            "--test_file", str(folder / data[1]), "--max_seq_length", "48", "--use_cpu", "--disable_tqdm", "true",
            *steps, "--output_dir", str(out), *many,
            *(prompt if task == "prompt" else language), *more,
        ]
    )  # fmt: skip
    assert status == 0
    return json.loads((Path(out) / "run.json").read_text())


def resumes_as_it_went_on(folder, family, method, out, task) -> None:
    """Fail unless a run from the checkpoint in the middle of the run in `out` ends with the same bits."""
    last = ("--resume_from_checkpoint", str(out / "checkpoint-2"), *SAVING)
    launch(folder, family, method, out / "resumed", *last, task=task, steps=("--do_train",))
    whole, resumed = weights(out), weights(out / "resumed")
    assert whole and whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def weights(folder):
    return {k: v for path in Path(folder).glob("*model.safetensors") for k, v in load_file(path).items()}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", DECODERS)
def test_a_decoder_classifies_by_prompt_with_every_method(folder, tmp_path, family, method):
    resumes = method != "kernel" and family in RESUMED["prompt"]
    record = launch(folder, family, method, tmp_path, *(SAVING if resumes else ()))
    assert 0 <= record["metrics"]["eval_accuracy"] <= 1 and record["labels"] == ["no", "yes"]
    with open(tmp_path / "predictions.tsv", encoding="utf-8") as file:
        predicted = [row["prediction"] for row in csv.DictReader(file, delimiter="\t")]
    if method == "kernel":  # its result is more than a model
        assert len(predicted) == 6
        launch(folder, tmp_path, method, tmp_path / "again", steps=("--do_predict",), prompt=())
        assert (tmp_path / "again" / "predictions.tsv").read_text() == (tmp_path / "predictions.tsv").read_text()
        return
    model = eval(record["load"], _LOADERS).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder / family)
    config = model.get_base_model().config if isinstance(model, PeftModel) else model.config
    texts = [json.loads(line)["sentence"] for line in (folder / "test.jsonl").read_text().splitlines()]
    rows = PromptEncoder(tokenizer, config.template, 1, 48, reading=config.reading)([texts])
    with torch.no_grad():
        logits = model(**tokenizer.pad(rows, return_tensors="pt")).logits
    assert [config.id2label[i] for i in logits.argmax(-1).tolist()] == predicted
    if resumes:
        resumes_as_it_went_on(folder, family, method, tmp_path, "prompt")


def mean_loss(model, tokenizer, both):
    """Mean negative log-likelihood of the completions' tokens, one row at a time, by plain forward passes."""
    total, count = 0.0, 0
    for prompt, completion in PAIRS:
        if both:
            ids, answer = tokenizer(prompt)["input_ids"], tokenizer(completion.strip())["input_ids"]
            fed = [model.config.decoder_start_token_id, *answer[:-1]]
            logits = model(input_ids=torch.tensor([ids]), decoder_input_ids=torch.tensor([fed])).logits[0]
        else:
            ids = tokenizer(prompt)["input_ids"]
            whole = tokenizer(prompt + completion + tokenizer.eos_token)["input_ids"]
            answer = whole[len(ids) :]
            logits = model(input_ids=torch.tensor([whole])).logits[0, len(ids) - 1 : -1]
        total += float(functional.cross_entropy(logits.double(), torch.tensor(answer), reduction="sum"))
        count += len(answer)
    return total / count


@pytest.mark.parametrize("method", TRAINED)
@pytest.mark.parametrize("family", DECODERS)
def test_a_decoder_writes_text_with_every_method(folder, tmp_path, family, method):
    resumes = family in RESUMED["language"]
    record = launch(folder, family, method, tmp_path, *(SAVING if resumes else ()), task="language")
    assert record["task_type"] == ("seq2seq_lm" if family == "t5" else "causal_lm") and record["labels"] is None
    assert record["quality"] == "eval_f1" and len(record["generations"]) == 5
    lines = (tmp_path / "predictions.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(lines) == 12 and json.loads(lines[1])["references"] == ["not the ending"]
    model = eval(record["load"], _LOADERS).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder / family)
    with torch.no_grad():
        loss = mean_loss(model, tokenizer, family == "t5")
    assert record["metrics"]["eval_perplexity"] == pytest.approx(math.exp(loss), rel=1e-4)
    if resumes:
        resumes_as_it_went_on(folder, family, method, tmp_path, "language")


@pytest.mark.parametrize("family", ["gpt2", "t5"])
def test_perplexity_on_two_processes_counts_each_token_once(folder, tmp_path, family):
    argv = [
        "--task_type", "seq2seq_lm" if family == "t5" else "causal_lm", "--model_name_or_path", str(folder / family),
        "--method", "full", "--validation_file", str(folder / "pairs.jsonl"), "--do_eval", "--use_cpu",
        "--per_device_eval_batch_size", "1", "--disable_tqdm", "true", "--output_dir", str(tmp_path / "out"),
    ]  # fmt: skip
    ended = launch_two(argv, tmp_path)
    assert [process.status for process in ended] == [0, 0], ended[0].err
    auto = AutoModelForSeq2SeqLM if family == "t5" else AutoModelForCausalLM
    with torch.no_grad():
        model = auto.from_pretrained(folder / family).eval()
        loss = mean_loss(model, AutoTokenizer.from_pretrained(folder / family), family == "t5")
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    assert record["metrics"]["eval_perplexity"] == pytest.approx(math.exp(loss), rel=1e-4)


def test_every_family_resumes():
    assert set(RESUMED["prompt"]) | set(RESUMED["language"]) == set(DECODERS)


def test_label_smoothing_is_refused_where_the_loss_ignores_it(folder, tmp_path, capsys):
    status = run_glue.main(
        [
            "--task_type", "seq2seq_lm", "--model_name_or_path", str(folder / "t5"), "--method", "full", "--do_train",
            "--train_file", str(folder / "pairs.jsonl"), "--label_smoothing_factor", "0.1", "--use_cpu",
            "--output_dir", str(tmp_path / "out"),
        ]
    )  # fmt: skip
    error = capsys.readouterr().err.splitlines()[-1]
    assert status == 2 and "--label_smoothing_factor 0.1 is not supported by seq2seq_lm; leave it out" in error


@pytest.mark.parametrize("method", ["full", "gradientless"])
def test_perplexity_is_that_of_the_plain_likelihood_with_label_smoothing(folder, tmp_path, method):
    record = launch(
        folder, "llama", method, tmp_path, "--label_smoothing_factor", "0.3", "--per_device_eval_batch_size", "2",
        task="language", steps=("--do_train", "--do_eval"),
    )  # fmt: skip
    model = eval(record["load"], _LOADERS).eval()
    with torch.no_grad():
        loss = mean_loss(model, AutoTokenizer.from_pretrained(folder / "llama"), False)
    assert record["metrics"]["eval_perplexity"] == pytest.approx(math.exp(loss), rel=1e-4)
    assert abs(record["metrics"]["eval_loss"] - loss) > 0.01  # transformers' own, which is smoothed


def test_hyperparameters_are_searched_by_the_loss(folder, tmp_path):
    pytest.importorskip("optuna")
    launch(folder, "gpt2", "sparse", tmp_path, "--hp_search", "2", task="language", steps=("--do_train", "--do_eval"))
    found = json.loads((tmp_path / "hp_search.json").read_text())
    losses = [trial["eval_loss"] for trial in found["trials"]]
    assert found["metric"] == "eval_loss" and len(losses) == 2
    best = found["trials"][losses.index(min(losses))]
    assert found["best"] == {name: best[name] for name in found["best"]}
    assert json.loads((tmp_path / "run.json").read_text())["metrics"]["eval_loss"] == pytest.approx(min(losses))
