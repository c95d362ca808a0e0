"""Rows of own files reach the model as written: columns in any order, numbers, dates, other scripts, tools."""

import csv
import json
import math

import pyarrow as pa
import pytest
import torch
from datasets import Dataset
from decoders import decoder, subword_tokenizer
from pyarrow import parquet
from transformers import AutoModelForCausalLM

import run_glue
from hf_ft_ext.arguments import DataArguments
from hf_ft_ext.data.language import load_language_data

pytest.importorskip("trl")

TEXTS = [
    {"prompt": 'say "hi", please', "completion": "007"},
    {"prompt": "2 + 2 =\t", "completion": "4"},
    {"prompt": "line\nbreak", "completion": "1.50"},
    {"prompt": "naïve é e\u0301 \u200f\u05e9\u05dc\u05d5\u05dd 你好 😀", "completion": "-1e5"},
    {"prompt": "null", "completion": "nan"},
    {"prompt": "x" * 20_000, "completion": "true"},
]
DATES = [
    {"prompt": "when?", "completion": "2020-01-01"},
    {"prompt": "and when?", "completion": "2020-01-02T03:04:05Z"},
]


def write(folder, kind: str, rows: list[dict]) -> str:
    """Columns in another order than usual, with more columns around them, one of them with gaps."""
    rows = [
        {"label": i, "completion": r["completion"], "note": None if i % 2 else "n", "prompt": r["prompt"]}
        for i, r in enumerate(rows)
    ]
    file = folder / f"rows.{kind}"
    if kind == "csv":
        with open(file, "w", newline="", encoding="utf-8") as out:
            writer = csv.DictWriter(out, list(rows[0]))
            writer.writeheader()
            writer.writerows({k: "" if v is None else v for k, v in row.items()} for row in rows)
    elif kind == "parquet":
        parquet.write_table(pa.Table.from_pylist(rows), file)
    elif kind == "json":
        file.write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    else:
        file.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")
    return str(file)


@pytest.mark.parametrize("rows", [TEXTS, DATES, TEXTS[1:2]], ids=["texts", "dates", "number"])
@pytest.mark.parametrize("kind", ["csv", "parquet", "jsonl", "json"])
def test_prompts_and_completions_are_those_written(tmp_path, kind, rows):
    file = write(tmp_path, kind, rows)
    loaded = load_language_data(DataArguments(train_file=file), cache_dir=str(tmp_path / "cache")).train
    assert loaded.to_list() == rows


def test_text_beside_messages_is_a_choice_of_the_user(tmp_path):
    rows = [{"messages": [{"role": "user", "content": "2020-01-01"}], "text": f"2020-01-0{i}"} for i in (1, 2)]
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    for columns, wanted in ((["text"], "text"), (["messages"], "messages")):
        data = load_language_data(
            DataArguments(train_file=str(file), text_columns=columns), cache_dir=str(tmp_path / "cache")
        )
        assert data.train.to_list() == [{wanted: row[wanted]} for row in rows]


TEMPLATE = (
    "{% if tools %}{% for t in tools %}a {{ t.name }}\n{% endfor %}{% endif %}{% if really %}really\n{% endif %}"
    "{% for m in messages %}{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}it was {% endif %}"
)
TOOLS = [[{"name": "film"}, {"name": "plot"}], [{"name": "cast"}]]
DIALOGUES = [("we saw", "a great scene"), ("the ending", "bad")]


@pytest.mark.parametrize("as_text", [True, False])
@torch.no_grad()
def test_tools_and_settings_of_a_dialogue_reach_the_chat_template(tmp_path, as_text):
    tokenizer = subword_tokenizer("byte-level")
    tokenizer.chat_template = TEMPLATE
    decoder("gpt2", len(tokenizer)).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    rows = [
        {
            "messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}],
            "tools": json.dumps(tools) if as_text else tools, "chat_template_kwargs": {"really": True},
        }
        for (question, answer), tools in zip(DIALOGUES, TOOLS, strict=True)
    ]  # fmt: skip
    file = str(tmp_path / "rows.parquet")
    Dataset.from_list(rows).to_parquet(file)
    status = run_glue.main(
        [
            "--model_name_or_path", str(tmp_path / "model"), "--task_type", "causal_lm", "--method", "full",
            "--validation_file", file, "--test_file", file, "--do_eval", "--do_predict", "--max_new_tokens", "4",
            "--use_cpu", "--disable_tqdm", "true", "--output_dir", str(tmp_path / "out"),
        ]
    )  # fmt: skip
    assert status == 0
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    total, count, texts = 0.0, 0, []
    for (question, answer), tools in zip(DIALOGUES, TOOLS, strict=True):
        start = "".join(f"a {tool['name']}\n" for tool in tools) + f"really\n{question}\n"
        ids = tokenizer(f"{start}{answer}\n")["input_ids"]
        log_p = model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)
        total -= sum(float(log_p[i - 1, token]) for i, token in enumerate(ids) if i)
        count += len(ids) - 1
        fed = tokenizer(f"{start}it was ")["input_ids"]
        new = []
        while len(new) < 4 and tokenizer.eos_token_id not in new:
            new.append(int(model(input_ids=torch.tensor([[*fed, *new]])).logits[0, -1].argmax()))
        texts.append(tokenizer.decode(new, skip_special_tokens=True).strip())
    metrics = json.loads((tmp_path / "out" / "run.json").read_text())["metrics"]
    assert metrics["eval_perplexity"] == pytest.approx(math.exp(total / count), rel=1e-4)
    written = (tmp_path / "out" / "predictions.jsonl").read_text().splitlines()
    assert [json.loads(line)["prediction"] for line in written] == texts


def test_rows_of_an_evaluation_are_prepared_and_counted_once(tmp_path, caplog):
    """trl prepares them when the trainer is made, and again when `evaluate` is given them."""
    tokenizer = subword_tokenizer("byte-level")
    decoder("gpt2", len(tokenizer)).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    for name, rows in (("train", TEXTS[:3]), ("dev", TEXTS[2:])):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    argv = [
        "--method", "full", "--task_type", "causal_lm", "--model_name_or_path", str(tmp_path / "base"),
        "--train_file", str(tmp_path / "train.jsonl"), "--validation_file", str(tmp_path / "dev.jsonl"), "--use_cpu",
        "--do_train", "--do_eval", "--eval_strategy", "steps", "--eval_steps", "1", "--max_steps", "2",
        "--max_seq_length", "60", "--output_dir", str(tmp_path / "out"),
    ]  # fmt: skip
    caplog.set_level("WARNING")
    assert run_glue.main(argv) == 0
    assert caplog.text.count("rows of the eval data are longer than 60 tokens") == 1
    history = json.loads((tmp_path / "out" / "trainer_state.json").read_text())["log_history"]
    losses = [entry["eval_loss"] for entry in history if "eval_loss" in entry]
    assert losses[-1] == json.loads((tmp_path / "out" / "run.json").read_text())["metrics"]["eval_loss"]
