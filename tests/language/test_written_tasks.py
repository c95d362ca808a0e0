"""MeZO's tasks with written answers (squad, drop, record) through the launcher, against plain loops over the rows.

The prompts are written out here, as in MeZO's large_models/templates.py.
"""

import json
import math
import re
import string
from collections import Counter

import pytest
import torch
from decoders import decoder, subword_tokenizer
from peft import AutoPeftModelForCausalLM, PeftModel
from transformers import AutoModelForCausalLM

import run_glue

pytest.importorskip("trl")

WORDS = ["a film", "the plot was dull", "we liked the cast", "it was great", "bad ending", "in paris"]
LOADERS = {
    "PeftModel": PeftModel, "AutoModelForCausalLM": AutoModelForCausalLM,
    "AutoPeftModelForCausalLM": AutoPeftModelForCausalLM,
}  # fmt: skip
_ONE = {"max_steps": 3, "warmup_steps": 0, "do_train": True}
WAYS = {
    "full": {"do_train": False},
    "lora": {**_ONE, "learning_rate": 0.05},
    "sparse": {**_ONE, "learning_rate": 0.05, "sparse_basis_steps": 2, "sparse_density": 0.2},
    "gradientless": {**_ONE, "search_method": "spsa", "search_target": "all", "learning_rate": 1e-3},
    "fisher": {**_ONE, "learning_rate": 0.05, "fisher_examples": 4},
}
CELLS = [
    ("squad", "opt", "full"), ("drop", "gpt2", "full"), ("record", "llama", "full"), ("squad", "llama", "lora"),
    ("drop", "opt", "sparse"), ("squad", "opt", "gradientless"), ("record", "opt", "gradientless"),
    ("record", "qwen3", "fisher"),
]  # fmt: skip
TOKENIZERS = {"opt": "byte-level", "gpt2": "byte-level", "qwen3": "byte-level", "llama": "llama"}


def hub_rows(task: str) -> list[dict]:
    """Rows as in the Hub's copies; the answers of the second row are several."""
    found = []
    for i in range(6):
        text, question, answer = (WORDS[(i * k + 1) % 6] for k in (1, 2, 5))
        answers = [answer, WORDS[i]] if i == 1 else [answer]
        if task == "squad":
            row = {"id": str(i), "title": "Film", "context": text, "question": f" {question}? ",
                   "answers": {"text": answers, "answer_start": [0] * len(answers)}}  # fmt: skip
        elif task == "drop":
            row = {"section_id": "x", "query_id": str(i), "passage": text, "question": f"{question}?",
                   "answers_spans": {"spans": answers, "types": ["span"] * len(answers)}}  # fmt: skip
        else:
            row = {"passage": f"{text}\n@highlight\nit was", "query": f"{question} @placeholder", "answers": answers,
                   "entities": [answer, "Mark"], "idx": {"passage": i, "query": i}}  # fmt: skip
        found.append(row)
    return found


def prompt_of(task: str, row: dict) -> str:
    if task == "squad":
        return f"Title: {row['title']}\nContext: {row['context']}\nQuestion: {row['question'].strip()}\nAnswer:"
    if task == "drop":
        return f"Passage: {row['passage']}\nQuestion: {row['question'].strip()}\nAnswer:"
    return f'{row["passage"]}\n{row["query"]}\nQuestion: what is the "@placeholder"\nAnswer:'


def answers_of(task: str, row: dict) -> list[str]:
    return {"squad": lambda: row["answers"]["text"], "drop": lambda: row["answers_spans"]["spans"],
            "record": lambda: row["answers"]}[task]()  # fmt: skip


def normalized(text: str) -> list[str]:
    """As SQuAD's evaluation script."""
    text = "".join(letter for letter in text.lower() if letter not in set(string.punctuation))
    return re.sub(r"\b(a|an|the)\b", " ", text).split()


def f1(prediction: str, answer: str) -> float:
    found, wanted = normalized(prediction), normalized(answer)
    same = sum((Counter(found) & Counter(wanted)).values())
    if not found or not wanted or not same:
        return float(found == wanted)
    precision, recall = same / len(found), same / len(wanted)
    return 2 * precision * recall / (precision + recall)


@torch.no_grad()
def greedy(model, tokenizer, prompt: str, count: int) -> str:
    ids, new = tokenizer(prompt)["input_ids"], []
    while len(new) < count and tokenizer.eos_token_id not in new:
        new.append(int(model(input_ids=torch.tensor([[*ids, *new]])).logits[0, -1].argmax()))
    return tokenizer.decode(new, skip_special_tokens=True).strip()


@torch.no_grad()
def log_likelihood(model, tokenizer, prompt: str, answer: str) -> tuple[float, int]:
    """Of the answer and the end token behind the prompt, and the number of these tokens."""
    ids = tokenizer(prompt)["input_ids"]
    whole = [*tokenizer(f"{prompt} {answer}")["input_ids"], tokenizer.eos_token_id]
    assert whole[: len(ids)] == ids
    log_p = model(input_ids=torch.tensor([whole])).logits[0].double().log_softmax(-1)
    return sum(float(log_p[j - 1, whole[j]]) for j in range(len(ids), len(whole))), len(whole) - len(ids)


@pytest.mark.parametrize(("task", "family", "method"), CELLS)
def test_scores_and_texts_are_those_of_the_language_model(tmp_path, task, family, method):
    rows = hub_rows(task)
    (tmp_path / "data").mkdir()
    for split in ("train", "validation", "test"):
        (tmp_path / "data" / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    tokenizer = subword_tokenizer(TOKENIZERS[family])
    decoder(family, len(tokenizer), seed=3).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    options = {
        "task_type": "causal_lm", "task_name": task, "dataset_name": tmp_path / "data", "method": method,
        "model_name_or_path": tmp_path / "model", "do_eval": True, "do_predict": True, "predict_with_generate": True,
        "max_new_tokens": 5, "per_device_eval_batch_size": 4, "use_cpu": True, "disable_tqdm": True,
        "output_dir": tmp_path / "out", **WAYS[method],
    }  # fmt: skip
    assert run_glue.main([text for name, value in options.items() for text in (f"--{name}", str(value))]) == 0
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    if method == "full":
        model = decoder(family, len(tokenizer), seed=3)
    else:
        model = eval(record["load"], LOADERS).eval()
        assert any(
            not torch.equal(p, q)
            for p, q in zip(
                model(input_ids=torch.tensor([[5, 6, 7]])).logits,
                decoder(family, len(tokenizer), seed=3)(input_ids=torch.tensor([[5, 6, 7]])).logits,
                strict=True,
            )
        )
    texts = [greedy(model, tokenizer, prompt_of(task, row), 5) for row in rows]
    written = [json.loads(line) for line in (tmp_path / "out" / "predictions.jsonl").read_text().splitlines()]
    assert [line["prediction"] for line in written] == texts
    assert [line["references"] for line in written] == [answers_of(task, row) for row in rows]
    scores = [max(f1(text, answer) for answer in answers_of(task, row)) for text, row in zip(texts, rows, strict=True)]
    exact = [
        any(normalized(text) == normalized(answer) for answer in answers_of(task, row))
        for text, row in zip(texts, rows, strict=True)
    ]
    metrics = record["metrics"]
    assert metrics["eval_f1"] == pytest.approx(sum(scores) / 6)
    assert metrics["eval_exact_match"] == pytest.approx(sum(exact) / 6)
    found = [log_likelihood(model, tokenizer, prompt_of(task, row), answers_of(task, row)[0]) for row in rows]
    mean = -sum(total for total, _ in found) / sum(count for _, count in found)
    assert metrics["eval_perplexity"] == pytest.approx(math.exp(mean), rel=1e-4)
