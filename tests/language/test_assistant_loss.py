"""`--assistant_only_loss`: the loss is over the assistant's tokens, found here by their place in the written text."""

import json
import math
import re

import pytest
import torch
from decoders import TOKENIZER_OF, decoder, subword_tokenizer
from peft import AutoPeftModelForCausalLM, PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

import run_glue

pytest.importorskip("trl")
from trl.chat_template_utils import qwen3_chat_template

MARKED = (
    "{% for m in messages %}{% if m.role == 'assistant' %}we: {% generation %}{{ m.content }}</s>{% endgeneration %}"
    "{% else %}it: {{ m.content }}{% endif %}{{ '\\n' }}{% endfor %}{% if add_generation_prompt %}we: {% endif %}"
)
PLAIN = MARKED.replace("{% generation %}", "").replace("{% endgeneration %}", "")
ELSEWHERE = PLAIN.replace("it: {{ m.content }}", "{% generation %}it: {{ m.content }}{% endgeneration %}")
DIALOGUES = [
    ["a film?", "a great plot and a cast"], ["the plot", "dull", "not the ending!", "we liked it, really"],
    ["it was bad", "we hated the dull scene and the cast"],
]  # fmt: skip
METHODS = {
    "full": (),
    "lora": (),
    "sparse": ("--sparse_basis_steps", "2", "--sparse_density", "0.2"),
    "gradientless": ("--search_method", "spsa", "--search_target", "all"),
    "fisher": ("--fisher_examples", "3"),
}
_LOADERS = {
    "AutoModelForCausalLM": AutoModelForCausalLM, "AutoPeftModelForCausalLM": AutoPeftModelForCausalLM,
    "PeftModel": PeftModel,
}  # fmt: skip


def messages(turns: list[str]) -> list[dict]:
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(turns)]


def save(folder, family: str = "gpt2", template: str | None = MARKED, dialogues=DIALOGUES, kind: str | None = None):
    tokenizer = subword_tokenizer(kind or TOKENIZER_OF[family])
    tokenizer.chat_template = template
    decoder(family, len(tokenizer)).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    lines = [json.dumps({"messages": messages(turns)}) for turns in dialogues]
    (folder / "rows.jsonl").write_text("\n".join(lines))


def launch(folder, *options, method="full") -> int:
    file = str(folder / "rows.jsonl")
    return run_glue.main(
        [
            "--model_name_or_path", str(folder / "model"), "--task_type", "causal_lm", "--train_file", file,
            "--validation_file", file, "--do_train", "--do_eval", "--max_steps", "2", "--warmup_steps", "0",
            "--per_device_train_batch_size", "3", "--logging_steps", "1", "--use_cpu", "--disable_tqdm", "true",
            "--output_dir", str(folder / "out"), "--method", method, "--assistant_only_loss", *METHODS[method],
            *options,
        ]
    )  # fmt: skip


@torch.no_grad()
def mean_loss(model, tokenizer) -> tuple[float, float]:
    """Of the assistant's tokens with their end tokens, and of all tokens; one dialogue at a time."""
    ours, every = [], []
    for turns in DIALOGUES:
        text, spans = "", []
        for i, turn in enumerate(turns):
            text += "we: " if i % 2 else "it: "
            if i % 2:
                spans.append((len(text), len(text) + len(turn) + len("</s>")))
                turn += "</s>"
            text += f"{turn}\n"
        made = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        log_p = model(input_ids=torch.tensor([made["input_ids"]])).logits[0].double().log_softmax(-1)
        for i, (token, (begin, end)) in enumerate(zip(made["input_ids"], made["offset_mapping"], strict=True)):
            if i == 0:
                continue
            loss = -float(log_p[i - 1, token])
            every.append(loss)
            if any(begin < last and first < end for first, last in spans):  # also one that begins with a space before
                ours.append(loss)
    return sum(ours) / len(ours), sum(every) / len(every)


@pytest.mark.parametrize(("family", "method"), [("gpt2", method) for method in METHODS] + [("qwen3", "full")])
def test_the_loss_is_that_of_the_assistant_s_tokens(tmp_path, family, method):
    save(tmp_path, family)
    assert launch(tmp_path, method=method) == 0
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    ours, every = mean_loss(eval(record["load"], _LOADERS).eval(), tokenizer)
    assert record["metrics"]["eval_perplexity"] == pytest.approx(math.exp(ours), rel=1e-4)
    assert abs(ours - every) > 1e-3
    if method in ("full", "lora", "sparse"):  # the others log the loss of other weights than those they start from
        log = json.loads((tmp_path / "out" / "trainer_state.json").read_text())["log_history"]
        first = mean_loss(AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval(), tokenizer)[0]
        assert next(entry["loss"] for entry in log if "loss" in entry) == pytest.approx(first, abs=1e-4)


def test_a_template_that_trl_knows_needs_no_marks(tmp_path):
    save(tmp_path, "gpt2", qwen3_chat_template)
    assert launch(tmp_path) == 0
    perplexity = json.loads((tmp_path / "out" / "run.json").read_text())["metrics"]["eval_perplexity"]
    assert launch(tmp_path, "--assistant_only_loss", "false", "--output_dir", str(tmp_path / "all")) == 0
    every = json.loads((tmp_path / "all" / "run.json").read_text())["metrics"]["eval_perplexity"]
    assert abs(perplexity - every) > 0.1


def test_marks_may_come_from_a_file(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    save(tmp_path, "gpt2", PLAIN)
    (tmp_path / "marked.jinja").write_text(MARKED)
    assert launch(tmp_path, "--chat_template_path", "~/marked.jinja") == 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"template": PLAIN}, "does not mark the assistant's answers, and trl has no marked version of it"),
        ({"template": ELSEWHERE}, None),
        ({"template": MARKED.replace("'assistant'", "'bot'")}, "marks no token of the assistant in some row"),
        ({"dialogues": [["a film?", "great"], ["a film?"]]}, "row 1 of split 'train' has no message of the assistant"),
        ({"kind": "bytes"}, "ByT5Tokenizer is written in Python and cannot tell which tokens"),
    ],
)  # fmt: skip
def test_what_has_no_marks_is_refused_before_training(tmp_path, capsys, settings, message):
    save(tmp_path, **settings)
    status = launch(tmp_path)
    if message is None:  # marks around other messages are the template's own choice
        assert status == 0
        return
    error = capsys.readouterr().err.splitlines()[-1]
    assert status == 2 and re.search(message, error), error
    assert not (tmp_path / "out" / "run.json").exists()


def test_text_and_encoder_decoders_are_refused(tmp_path, capsys):
    save(tmp_path)
    (tmp_path / "rows.jsonl").write_text('{"text": "a film"}')
    assert launch(tmp_path) == 2
    assert "is about the answers in messages, and the data has text; leave it out" in capsys.readouterr().err
    assert launch(tmp_path, "--task_type", "seq2seq_lm") == 2
    assert "--assistant_only_loss is for --task_type causal_lm" in capsys.readouterr().err
