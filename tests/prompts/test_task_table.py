"""MeZO's tasks through the launcher: predictions and metrics against the language model itself, one option at a time.

The prompts are written out here, as in MeZO's large_models/templates.py. Tasks whose answers are written (squad, drop,
record) are in tests/language/test_written_tasks.py.
"""

import csv
import json
import math

import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Value
from decoders import ENCODER_DECODERS, decoder, subword_tokenizer
from peft import PeftModel

import run_glue
from hf_ft_ext import PromptForSequenceClassification

YES = {"False": "No", "True": "Yes"}
NLI = {"entailment": "Yes", "neutral": "Maybe", "contradiction": "No"}
WORDS = ["a film", "the plot was dull", "we liked the cast", "it was great", "bad ending", "in paris"]
# task -> columns, label names in the order of the Hub's copy, prompt of a row, what each label is scored by
TASKS = {
    "sst2": (["sentence"], ["negative", "positive"], lambda r: f"{r['sentence'].strip()} It was",
             {"negative": " terrible", "positive": " great"}),
    "rte": (["sentence1", "sentence2"], ["entailment", "not_entailment"],
            lambda r: f'{r["sentence1"]}\nDoes this mean that "{r["sentence2"]}" is true? Yes or No?\n',
            {"entailment": "Yes", "not_entailment": "No"}),
    "cb": (["premise", "hypothesis"], ["entailment", "contradiction", "neutral"],
           lambda r: f'Suppose {r["premise"]} Can we infer that "{r["hypothesis"]}"? Yes, No, or Maybe?\n', NLI),
    "boolq": (["question", "passage"], ["False", "True"],
              lambda r: f"{r['passage']} {r['question'][0].upper()}{r['question'][1:]}?\n", YES),
    "wsc": (["text", "span1_text", "span2_text"], ["False", "True"],
            lambda r: f'{r["text"]}\nIn the previous sentence, does the pronoun "{r["span2_text"].lower()}" refer to '
                      f'{r["span1_text"]}? Yes or No?\n', YES),
    "wic": (["word", "sentence1", "sentence2"], ["False", "True"],
            lambda r: f'Does the word "{r["word"]}" have the same meaning in these two sentences? Yes, No?\n'
                      f'{r["sentence1"]}\n{r["sentence2"]}\n', YES),
    "multirc": (["paragraph", "question", "answer"], ["False", "True"],
                lambda r: f'{r["paragraph"]}\nQuestion: {r["question"]}\nI found this answer "{r["answer"]}". Is '
                          'that correct? Yes or No?\n', YES),
    "copa": (["premise", "choice1", "choice2", "question"], ["choice1", "choice2"],
             lambda r: r["premise"] + {"cause": " because", "effect": " so"}[r["question"]], None),
}  # fmt: skip
# task, family, tokenizer, its settings, way of scoring: each task by several words, long ones and options of its rows
CELLS = [
    ("sst2", "gpt2", "byte-level", {}, None),
    ("sst2", "opt", "bytes", {"padding_side": "left"}, "sequence"),
    ("rte", "llama", "llama", {"padding_side": "left"}, None),
    ("rte", "gpt2", "byte-level", {"pad_token": None}, "sequence_mean"),
    ("cb", "opt", "byte-level", {"padding_side": "left", "pad_token": None}, None),
    ("cb", "t5", "unigram", {}, "sequence"),
    ("boolq", "qwen3", "byte-level", {}, "sequence"),
    ("wsc", "llama", "llama", {"pad_token": None}, "sequence_mean"),
    ("wic", "gpt2", "bytes", {}, "sequence"),
    ("multirc", "qwen3", "byte-level", {"padding_side": "left"}, None),
    ("multirc", "opt", "bytes", {}, "sequence_mean"),
    ("copa", "gpt2", "bytes", {"padding_side": "left"}, None),
    ("copa", "llama", "llama", {}, "sequence_mean"),
    ("copa", "t5", "unigram", {}, None),
    ("copa", "opt", "byte-level", {"pad_token": None, "padding_side": "left"}, "sequence"),
]


def made_up_rows(task, count):
    columns, names, *_ = TASKS[task]
    rows = []
    for i in range(count):
        row = {name: " ".join(WORDS[(i * (k + 2) + j) % 6] for j in range(1 + (i + k) % 3)) for k, name in
               enumerate(columns)}  # fmt: skip
        if task == "copa":
            row["question"] = ("cause", "effect")[i % 2]
            row["choice1"] = ("I ", "It ", "THE ")[i % 3] + row["choice1"]
        if task == "sst2":
            row["sentence"] += " "  # as in the Hub's copy
        if task == "wsc":
            row["span2_text"] = ("He", "it", "They")[i % 3]
        rows.append({**row, "label": (i * i) % len(names)})
    return rows


def write_folder(folder, task):
    """As the Hub's copies: parquet, one configuration; a test split without labels (-1)."""
    columns, names, *_ = TASKS[task]
    features = Features({**dict.fromkeys(columns, Value("string")), "label": ClassLabel(names=names)})
    (folder / task).mkdir(parents=True)
    rows = made_up_rows(task, 9)
    for split in ("train", "validation", "test"):
        own = [{**row, "label": -1} for row in rows] if split == "test" else rows
        Dataset.from_list(own, features=features).to_parquet(folder / task / f"{split}.parquet")
    files = [f"  - {{split: {split}, path: {task}/{split}.parquet}}" for split in ("train", "validation", "test")]
    (folder / "README.md").write_text(
        "\n".join(["---", "configs:", f"- config_name: {task}", "  data_files:", *files, "---", ""])
    )
    return rows


def log_probabilities(network, tokenizer, text, answer):
    """Of each token of the answer behind the text: one row, no padding."""

    def ids_of(text):
        ids = tokenizer(text)["input_ids"]
        return ids[:-1] if ids[-1] == tokenizer.eos_token_id else ids

    if network.config.is_encoder_decoder:
        tokens = ids_of(answer)  # the decoder begins with it
        fed = [network.config.decoder_start_token_id, *tokens[:-1]]
        row = torch.tensor([tokenizer(text)["input_ids"]])
        logits = network(input_ids=row, decoder_input_ids=torch.tensor([fed])).logits[0]
    else:
        start, whole = ids_of(text), ids_of(text + answer)
        assert whole[: len(start)] == start
        tokens = whole[len(start) :]
        logits = network(input_ids=torch.tensor([whole])).logits[0, len(start) - 1 : -1]
    log_p = logits.double().log_softmax(-1)
    return [float(log_p[j, token]) for j, token in enumerate(tokens)]


def scores(network, tokenizer, task, row, scoring):
    """One number for each label, in the order of the Hub's copy."""
    _, names, prompt, words = TASKS[task]
    if task == "copa":
        premise = {**row, "premise": row["premise"].rstrip().removesuffix(".")}
        split = {name: row[name].split(" ") for name in names}
        options = {
            name: " " + " ".join([first if first == "I" else first.lower(), *rest])
            for name, (first, *rest) in split.items()
        }
        text = prompt(premise)
    else:
        options, text = words, prompt(row)
    found = {}
    for name in names:
        each = log_probabilities(network, tokenizer, text, options[name])
        first_only = scoring is None and task != "copa"
        total = each[0] if first_only else sum(each)
        found[name] = total / len(each) if scoring == "sequence_mean" else total
    return found


def save_model(folder, family, kind, settings):
    """Return the tokenizer, and what `decoder` takes to make the saved model again."""
    tokenizer = subword_tokenizer(kind, **settings)
    tokenizer.model_max_length = 512
    names = {"gpt2": "n_positions", **dict.fromkeys(ENCODER_DECODERS)}
    name = names.get(family, "max_position_embeddings")
    sizes = {} if name is None else {name: 512}
    decoder(family, len(tokenizer), seed=3, **sizes).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return tokenizer, sizes


def launch(tmp_path, **options):
    shared = {
        "dataset_name": tmp_path / "data", "few_shot_type": "prompt", "model_name_or_path": tmp_path / "model",
        "max_seq_length": 500, "do_eval": True, "do_predict": True, "prediction_probabilities": True,
        "per_device_eval_batch_size": 4, "use_cpu": True, "disable_tqdm": True, "output_dir": tmp_path / "out",
    }  # fmt: skip
    options = {**shared, **options}
    assert run_glue.main([text for name, value in options.items() for text in (f"--{name}", str(value))]) == 0
    with open(tmp_path / "out" / "predictions.tsv", encoding="utf-8") as file:
        return list(csv.DictReader(file, delimiter="\t"))


@pytest.mark.parametrize(("task", "family", "kind", "settings", "scoring"), CELLS)
@torch.no_grad()
def test_predictions_and_metrics_are_those_of_the_language_model(tmp_path, task, family, kind, settings, scoring):
    rows = write_folder(tmp_path / "data", task)
    tokenizer, sizes = save_model(tmp_path / "model", family, kind, settings)
    given = {} if scoring is None else {"word_scoring": scoring}
    table = launch(tmp_path, method="full", task_name=task, do_train=False, **given)
    network = decoder(family, len(tokenizer), seed=3, **sizes).double()
    found = [scores(network, tokenizer, task, row, scoring) for row in rows]
    # rows that are all but tied may go either way in float32
    clear = [i for i, one in enumerate(found) if sorted(one.values())[-1] - sorted(one.values())[-2] > 1e-4]
    assert len(clear) >= 6
    written = [row["prediction"] for row in table]
    assert [written[i] for i in clear] == [max(found[i], key=found[i].get) for i in clear]
    for one, row in zip(found, table, strict=True):
        total = sum(math.exp(score) for score in one.values())
        for name, score in one.items():
            assert float(row[f"probability_{name}"]) == pytest.approx(math.exp(score) / total, abs=1e-4)
    names = TASKS[task][1]
    labels = [names[row["label"]] for row in rows]
    metrics = json.loads((tmp_path / "out" / "run.json").read_text())["metrics"]
    right = sum(one == label for one, label in zip(written, labels, strict=True))
    assert metrics["eval_accuracy"] == pytest.approx(right / 9)
    if task == "multirc":  # F1 over answers, of the class True
        true = sum(one == label == "True" for one, label in zip(written, labels, strict=True))
        shown = written.count("True") + labels.count("True")
        assert metrics["eval_f1"] == pytest.approx(2 * true / shown)


def test_every_row_of_mezos_table_is_tried():
    assert {cell[0] for cell in CELLS} == set(TASKS)


# --- every other method on one of the tasks ---------------------------------------------------------------

_ONE = {"max_steps": 3, "warmup_steps": 0, "do_train": True}
LOADERS = {"PeftModel": PeftModel, "PromptForSequenceClassification": PromptForSequenceClassification}
WAYS = {
    "lora": {**_ONE, "learning_rate": 0.05},
    "sparse": {**_ONE, "learning_rate": 0.05, "sparse_basis_steps": 2, "sparse_density": 0.2},
    "gradientless": {**_ONE, "search_method": "spsa", "search_target": "all", "learning_rate": 1e-3},
    "fisher": {**_ONE, "learning_rate": 0.05, "fisher_examples": 4},
}


@pytest.mark.parametrize("method", WAYS)
@pytest.mark.parametrize(("task", "scoring"), [("rte", "first_token"), ("copa", "sequence")])
def test_what_a_method_trained_predicts_as_its_language_model_says(tmp_path, method, task, scoring):
    rows = write_folder(tmp_path / "data", task)
    tokenizer, sizes = save_model(tmp_path / "model", "llama", "llama", {})
    table = launch(tmp_path, method=method, task_name=task, word_scoring=scoring, **WAYS[method])
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    model = eval(record["load"], LOADERS).eval()
    model = model.get_base_model() if isinstance(model, PeftModel) else model  # with the adapters in its layers
    network = model.masked_lm
    network.model._forward_pre_hooks.clear()  # the classifier's: its model keeps one position
    network.model._forward_hooks.clear()
    start = decoder("llama", len(tokenizer), seed=3, **sizes)
    moved = 0.0
    for row, one in zip(rows, table, strict=True):
        with torch.no_grad():
            found = scores(network, tokenizer, task, row, None if task == "rte" else scoring)
            before = scores(start, tokenizer, task, row, None if task == "rte" else scoring)
        total = sum(math.exp(score) for score in found.values())
        for name, score in found.items():
            assert float(one[f"probability_{name}"]) == pytest.approx(math.exp(score) / total, abs=1e-4)
            moved = max(moved, abs(score - before[name]))
    assert moved > 1e-3


def test_kernel_regression_on_label_words_by_gradients_of_the_language_model(tmp_path):
    """`f_1 - f_0` of the words' logits, its gradients row by row in float64, and one linear system."""
    rows = write_folder(tmp_path / "data", "rte")
    tokenizer, sizes = save_model(tmp_path / "model", "llama", "llama", {})
    table = launch(
        tmp_path, method="kernel", task_name="rte", do_train=True, kernel_formula="sgd", kernel_solver="lstsq",
        kernel_regularization=0.1, binary_classification=True, prediction_probabilities=False,
    )  # fmt: skip
    network = decoder("llama", len(tokenizer), seed=3, **sizes).double()
    names, prompt, words = TASKS["rte"][1:]
    ids = [tokenizer(f"\n{words[name]}")["input_ids"] for name in names]
    gradients = []
    for row in rows:
        text = tokenizer(prompt(row))["input_ids"]
        heads = [whole[len(tokenizer("\n")["input_ids"])] for whole in ids]
        logits = network(input_ids=torch.tensor([text])).logits[0, -1]
        parts = torch.autograd.grad(logits[heads[1]] - logits[heads[0]], list(network.parameters()))
        gradients.append(torch.cat([part.flatten() for part in parts]))
    jacobian = torch.stack(gradients)
    kernel = jacobian @ jacobian.T
    targets = torch.tensor([2.0 * row["label"] - 1 for row in rows], dtype=torch.float64)
    norm = torch.linalg.matrix_norm(kernel, 2)
    fitted = kernel @ torch.linalg.solve(kernel + 0.1 * norm * torch.eye(len(rows), dtype=torch.float64), targets)
    clear = [i for i, value in enumerate(fitted.tolist()) if abs(value) > 1e-4]
    assert len(clear) >= 8 and len({table[i]["prediction"] for i in clear}) == 2
    assert [table[i]["prediction"] for i in clear] == [names[int(fitted[i] > 0)] for i in clear]
