"""Generated texts and their scores."""

import importlib.util
import itertools
import json
import math
import re
import types

import pytest
import torch
from datasets import Dataset
from decoders import decoder, save_decoder, subword_tokenizer
from transformers.trainer_utils import EvalLoopOutput

import run_glue
from hf_ft_ext.errors import InputError
from hf_ft_ext.launch.language import encoder_decoder_rows
from hf_ft_ext.launch.language.trainers import Generation, Perplexity, generate_texts, report_long_rows
from hf_ft_ext.metrics.generation import generation_metrics


@pytest.mark.parametrize(
    ("prediction", "references", "exact", "f1"),
    [
        ("The Eiffel Tower.", ["eiffel tower"], 1, 1),
        ("a tower in Paris", ["Eiffel tower", "the tower of Paris"], 0, 2 / 3),
        ("", ["Paris"], 0, 0),
        ("in 1889", ["1889", "the year 1889"], 0, 2 / 3),
    ],
)
def test_exact_match_and_f1_are_squads(prediction, references, exact, f1):
    scores = generation_metrics([prediction], [references])
    assert scores["exact_match"] == exact and scores["f1"] == pytest.approx(f1)


def common_subsequence(left, right):
    """The longest, by trying all subsequences of `left`."""
    for n in range(len(left), 0, -1):
        for picked in itertools.combinations(left, n):
            rest = iter(right)
            if all(word in rest for word in picked):
                return n
    return 0


@pytest.mark.parametrize(
    ("prediction", "reference"),
    [
        ("the police killed the gunman", "police killed the gunman"),
        ("the gunman kill police", "police kill the gunman"),
        ("a b a b c", "b a a b c c"),
        ("none of it", "something else"),
    ],
)
def test_rouge_by_counting_everything(prediction, reference):
    scores = generation_metrics([prediction], [[reference]])
    p, r = prediction.split(), reference.split()
    for n in (1, 2):
        left, right = ([tuple(w[i : i + n]) for i in range(len(w) - n + 1)] for w in (p, r))
        common = 0
        rest = list(right)
        for gram in left:
            if gram in rest:
                rest.remove(gram)
                common += 1
        precision, recall = common / len(left), common / len(right)
        wanted = 2 * precision * recall / (precision + recall) if common else 0
        assert scores[f"rouge{n}"] == pytest.approx(wanted)
    common = common_subsequence(p, r)
    assert scores["rougeL"] == pytest.approx(2 * common / (len(p) + len(r)))


def test_scores_are_means_of_the_best_reference_of_each_row():
    scores = generation_metrics(["x", "a good one"], [["x", "y"], ["no", "good one"]])
    assert scores["exact_match"] == 1.0  # an article does not count
    assert generation_metrics(["x", "y"], [["x"], ["z"]])["rouge1"] == 0.5
    with pytest.raises(InputError, match="row 1 has no reference; add one"):
        generation_metrics(["x", "y"], [["x"], []])
    with pytest.raises(InputError, match="got 1 predictions and 2 lists"):
        generation_metrics(["x"], [["x"], ["y"]])


def stand_in(model, tokenizer):
    """What `generate_texts` reads of a trainer."""
    accelerator = types.SimpleNamespace(unwrap_model=lambda model: model)
    args = types.SimpleNamespace(process_index=0, world_size=1, device=torch.device("cpu"))
    return types.SimpleNamespace(model=model, processing_class=tokenizer, accelerator=accelerator, args=args)


@pytest.mark.parametrize("family", ["gpt2", "llama", "t5"])
@torch.no_grad()
def test_texts_are_the_likeliest_tokens_one_by_one(family):
    tokenizer = subword_tokenizer({"gpt2": "byte-level", "llama": "llama", "t5": "unigram"}[family])
    tokenizer.padding_side = "right"
    model = decoder(family, len(tokenizer))
    prompts = ["a film", "we hated the dull scene, but not the ending", "it was"]
    found = generate_texts(stand_in(model, tokenizer), prompts, Generation(max_new_tokens=6, batch_size=2))
    for prompt, text in zip(prompts, found, strict=True):
        ids, new = tokenizer(prompt)["input_ids"], []
        while len(new) < 6 and tokenizer.eos_token_id not in new:
            if family == "t5":
                fed = torch.tensor([[0, *new]])
                logits = model(input_ids=torch.tensor([ids]), decoder_input_ids=fed).logits
            else:
                logits = model(input_ids=torch.tensor([[*ids, *new]])).logits
            new.append(int(logits[0, -1].argmax()))
        assert text == tokenizer.decode(new, skip_special_tokens=True).strip()
    assert tokenizer.padding_side == "right"


@torch.no_grad()
def test_a_causal_model_goes_on_from_the_prompt_not_from_behind_its_end():
    tokenizer = subword_tokenizer("bytes")  # puts an end token behind every text
    model = decoder("gpt2", len(tokenizer))
    (found,) = generate_texts(stand_in(model, tokenizer), ["a film"], Generation(max_new_tokens=5))
    ids = [ord(letter) + 3 for letter in "a film"]  # ByT5's tokens: bytes behind three special ones
    for _ in range(5):
        ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] == tokenizer.eos_token_id:
            break
    assert found == tokenizer.decode(ids[6:], skip_special_tokens=True).strip()


@pytest.mark.parametrize(("kind", "start", "end"), [("llama", [1], []), ("unigram", [], [2]), ("byte-level", [], [])])
def test_long_prompts_lose_their_beginning_but_for_the_start_token(kind, start, end):
    tokenizer = subword_tokenizer(kind)
    text = "we hated the dull scene, but not the ending! " * 3 + "it was"
    whole = tokenizer(text)["input_ids"]
    if kind != "llama":  # an encoder-decoder's
        data = Dataset.from_dict({"prompt": [text, "it was"], "completion": ["great", "great"]})
        rows = encoder_decoder_rows("train", data, tokenizer, 12)["input_ids"]
        assert rows[0] == whole[-12:] and rows[1] == tokenizer("it was")["input_ids"]
        assert rows[0][12 - len(end) :] == end
    asked = []
    trainer = stand_in(decoder("llama", len(tokenizer)), tokenizer)
    trainer.model.generate = lambda input_ids, **_: asked.extend(input_ids.tolist()) or input_ids
    generate_texts(trainer, [text], Generation(max_new_tokens=8), context=20)
    bare = whole[: len(whole) - len(end)]
    assert asked == [[*start, *bare[len(bare) - 12 + len(start) :]]]


def test_impossible_generations_are_refused():
    tokenizer = subword_tokenizer("byte-level")
    trainer = stand_in(decoder("gpt2", len(tokenizer)), tokenizer)
    with pytest.raises(
        InputError, match=r"max_new_tokens=128 leaves no room .* 128 positions; pass --max_new_tokens 64"
    ):
        generate_texts(trainer, ["a"], Generation(max_new_tokens=128), 128)
    with pytest.raises(InputError, match="no chat template to format them; pass --chat_template_path"):
        generate_texts(trainer, [[{"role": "user", "content": "a"}]], Generation())
    tokenizer.pad_token = None
    with pytest.raises(InputError, match="the tokenizer has no padding token; set one"):
        generate_texts(trainer, ["a"], Generation())


def test_long_rows_are_counted(caplog):
    caplog.set_level("WARNING")
    assert report_long_rows([3, 9, 12], 8, "train") == 2
    assert "2 of 3 rows of the train data are longer than 8 tokens (the longest has 12)" in caplog.text
    assert report_long_rows([3, 8], 8, "train") == 0


@pytest.mark.parametrize(("loss", "perplexity"), [(2.0, math.exp(2)), (800.0, math.inf), (math.nan, math.nan)])
def test_the_perplexity_of_a_loss_that_is_not_finite(loss, perplexity):
    class Loop:
        def evaluation_loop(self, metric_key_prefix):
            self._sums += torch.tensor([3 * loss, 3])
            return EvalLoopOutput(None, None, {}, 3)

    found = type("Evaluation", (Perplexity, Loop), {})().evaluation_loop().metrics["eval_perplexity"]
    assert found == pytest.approx(perplexity, nan_ok=True)


# --- bad input through the launcher ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("language")
    save_decoder(root / "gpt2", "gpt2")
    save_decoder(root / "t5", "t5")
    save_decoder(root / "endless", "gpt2", subword_tokenizer("byte-level", eos_token=None))
    rows = [
        {"prompt": "the film was", "completion": " great"},
        {"prompt": "a dull plot and", "completion": " end"},
    ]
    chat = [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}]
    forms = {
        "pairs": rows, "text": [{"text": "a film"}] * 2, "chat": chat * 2,
        "two": [{**row, "text": "x"} for row in rows], "none": [{"words": "x"}], "gap": [{"text": "x"}, {"text": ""}],
        "mixed": [{"prompt": "a", "completion": None}, *rows], "numbers": [{"text": 1}],
        "strings": [{"messages": ["a", "b"]}], "keys": [{"messages": [{"from": "user", "value": "a"}]}],
        "silent": [{"messages": [{"role": "user", "content": None}]}],
        "answer": [{"messages": chat[0]["messages"][1:]}],
        "halves": [{"prompt": "a", "completion": chat[0]["messages"]}],
        "scores": [{**row, "references": "great"} for row in rows],
        "turns": [{"prompt": chat[0]["messages"][:1], "completion": chat[0]["messages"][1:]}],
    }  # fmt: skip
    (root / "strict.jinja").write_text("{{ raise_exception('only system may begin') }}")
    (root / "broken.jinja").write_text("{% for m in messages %}{{ m.content ")
    (root / "plain.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    for name, lines in forms.items():
        (root / f"{name}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return root


@pytest.mark.parametrize(
    ("data", "options", "message"),
    [
        ("chat", (), "the data has messages, and the tokenizer has no chat template .* pass --chat_template_path"),
        ("two", (), "columns of two forms, text and prompt and completion; choose .*--text_columns text or --text"),
        ("none", (), "has the columns words, and language modelling needs text, prompt and completion, or messages"),
        ("gap", (), "column 'text' of split 'train' is empty in row 1; fill or remove it"),
        ("mixed", (), "column 'completion' of split 'train' is empty in row 0"),
        ("numbers", (), "column 'text' of split 'train' needs text, and row 0 has 1; convert it"),
        ("strings", (), "row 0 has a message without the texts role and content; rename or fill its keys, such as"),
        ("keys", (), "row 0 has a message without the texts role and content"),
        ("silent", (), "row 0 has a message without the texts role and content"),
        ("halves", (), "has text in one of prompt and completion and messages in the other; pass both"),
        ("scores", (), "column 'references' of split 'train' holds lists of texts, and row 0 has 'great'"),
        ("chat", ("--chat_template_path", "strict.jinja"), "rejects this data: only system may begin; change"),
        ("chat", ("--chat_template_path", "broken.jinja"), "rejects this data: unexpected end of template"),
        ("chat", ("--chat_template_path", "chat.jsonl"), "chat.jsonl: trl reads files named .jinja or .j2; rename it"),
        ("answer", ("--chat_template_path", "plain.jinja", "--predict_with_generate"), "holds only an answer, so"),
        ("text", ("--predict_with_generate",), "--predict_with_generate continues a prompt, and rows of text"),
        ("text", ("--chat_template_path", "x"), "is about messages, and the data has text; leave it out"),
        ("text", ("--completion_only_loss", "true"), "is about prompts and completions, and the data has text: all"),
        (
            "chat", ("--completion_only_loss", "true", "--chat_template_path", "plain.jinja"),
            "the data has messages: all tokens train; leave it out; --assistant_only_loss trains the assistant's",
        ),
        ("pairs", ("--max_new_tokens", "5"), "is about generated texts, and this run writes none"),
        ("pairs", ("--predict_with_generate", "--max_new_tokens", "128"), "leaves no room for a prompt"),
        ("pairs", ("--predict_with_generate", "--max_new_tokens", "0"), "max_new_tokens must be 1 or more, got 0"),
        ("pairs", ("--max_seq_length", "129"), "more than the model can take .128 tokens.; pass --max_seq_length 128"),
        ("pairs", ("--max_seq_length", "2"), "no row of the train data has a token of its completion left"),
        pytest.param(
            "pairs", ("--method", "kernel"), "method kernel solves for class scores, and a language model writes text",
            id="kernel",
        ),
        pytest.param(
            "pairs", ("--method", "linearhead"), "method linearhead solves for class scores", id="linearhead"
        ),
        ("pairs", ("--l2_loss",), "--l2_loss is a loss of class scores; leave it out, or --task_type causal_lm"),
        ("pairs", ("--metric", "f1"), "--metric f1 is about classes, and a language model writes text"),
        ("pairs", ("--text_columns", "prompt", "answer"), "split 'train' has no column 'answer', only prompt"),
        ("pairs", ("--task_name", "squat"), "task 'squat' is not a language-modelling task; did you mean 'squad'"),
        ("pairs", ("--metric_for_best_model", "f1", "--eval_strategy", "steps"), "a language model has: loss, perpl"),
        ("pairs", ("--few_shot_type", "prompt"), "--few_shot_type prompt predicts classes by words"),
        ("pairs", ("--sample", "stratified", "--max_train_samples", "1"), "keeps the shares of classes"),
        pytest.param(
            "pairs", ("--use_liger_kernel",), "use_liger_kernel needs a library: pip install liger-kernel", id="liger",
            marks=pytest.mark.skipif(importlib.util.find_spec("liger_kernel") is not None, reason="it is installed"),
        ),
        ("pairs", ("--streaming", "--max_steps", "1"), "--streaming: rows of a language model are checked"),
    ],
)  # fmt: skip
def test_bad_input_ends_in_one_line_before_training(folder, tmp_path, capsys, monkeypatch, data, options, message):
    monkeypatch.chdir(folder)
    file = str(folder / f"{data}.jsonl")
    method = () if "--method" in options else ("--method", "full")
    status = run_glue.main(
        [
            "--task_type", "causal_lm", "--model_name_or_path", str(folder / "gpt2"), "--train_file", file,
            "--validation_file", file, "--use_cpu", "--output_dir", str(tmp_path / "out"), *method, *options,
        ]
    )  # fmt: skip
    error = capsys.readouterr().err.splitlines()[-1]
    assert status == 2 and error.startswith("error: "), error
    assert re.search(message, error), error
    assert not (tmp_path / "out" / "run.json").exists()


@pytest.mark.parametrize(
    ("model", "task", "data", "message"),
    [
        ("endless", "causal_lm", "pairs", "has no end token, which ends each row of prompt and completion; set eos_"),
        ("endless", "causal_lm", "text", "has no end token, which ends each row of text; set eos_token"),
        (
            "t5",
            "causal_lm",
            "pairs",
            "model '.*t5' is an encoder-decoder; pass another one, or --task_type seq2",
        ),
        ("gpt2", "seq2seq_lm", "pairs", "model '.*gpt2' is causal; pass another one, or --task_type causal_lm"),
        ("t5", "seq2seq_lm", "text", "writes a completion to a prompt, both texts, and the data has text"),
        ("t5", "seq2seq_lm", "turns", "writes a completion to a prompt, both texts, and the data has messages"),
    ],
)
def test_the_model_has_to_be_of_the_task_s_kind(folder, tmp_path, capsys, model, task, data, message):
    file = str(folder / f"{data}.jsonl")
    status = run_glue.main(
        [
            "--task_type", task, "--model_name_or_path", str(folder / model), "--train_file", file, "--do_train",
            "--use_cpu", "--output_dir", str(tmp_path / "out"), "--method", "full",
        ]
    )  # fmt: skip
    error = capsys.readouterr().err.splitlines()[-1]
    assert status == 2 and re.search(message, error), error
