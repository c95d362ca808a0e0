"""Limits and losses of decoders and encoder-decoders of families that other tests leave out, and of unusual runs."""

import json
import math
import re

import pytest
import torch
from decoders import decoder, save_decoder, subword_tokenizer
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

import run_glue
from hf_ft_ext.models import decoder_max_length, model_max_length

pytest.importorskip("trl")

_IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_PAIR = {
    "d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "dropout": 0.0,
    "decoder_start_token_id": 2, **_IDS,
}  # fmt: skip
CONFIGS = {
    "led": {**_PAIR, "attention_window": 8, "max_encoder_position_embeddings": 64,
            "max_decoder_position_embeddings": 16},
    "mpt": {"d_model": 16, "n_heads": 2, "n_layers": 2, "expansion_ratio": 2, "max_seq_len": 32, **_IDS},
    "bart": {**_PAIR, "max_position_embeddings": 24},
}  # fmt: skip
PAIRS = [
    ("the film was", " great"), ("a dull plot, and", " not the ending"),
    ("we hated it and really " * 3, " bad but not the whole great brilliant scene in paris"),
]  # fmt: skip


def unlimited(kind: str):
    """A tokenizer that knows no maximum length."""
    tokenizer = subword_tokenizer(kind)
    tokenizer.model_max_length = 10**9
    return tokenizer


def save(folder, family: str):
    tokenizer = unlimited("unigram" if family in ("led", "bart") else "byte-level")
    config = AutoConfig.for_model(family, vocab_size=len(tokenizer), **CONFIGS[family])
    kind = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = kind.from_config(config).eval()
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    rows = [{"prompt": prompt, "completion": completion} for prompt, completion in PAIRS]
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tokenizer, model


def launch(folder, *options, model="model", task="seq2seq_lm", steps=("--do_eval",), out="out") -> int:
    file = str(folder / "pairs.jsonl")
    data = {"--do_train": "--train_file", "--do_eval": "--validation_file", "--do_predict": "--test_file"}
    words = [word for step in steps for word in (step, data[step], file)]
    return run_glue.main(
        [
            "--model_name_or_path", str(folder / model), "--task_type", task, *words, "--use_cpu", "--disable_tqdm",
            "true", "--output_dir", str(folder / out), *options,
        ]
    )  # fmt: skip


@pytest.mark.parametrize(
    ("family", "positions", "of_decoder"), [("led", 64, 16), ("mpt", 32, None), ("bart", 24, 24), ("t5", None, None)]
)
def test_positions_are_found_under_other_names_too(family, positions, of_decoder):
    tokenizer = unlimited("byte-level")
    if family == "t5":
        model = decoder("t5", len(tokenizer))
    else:
        config = AutoConfig.for_model(family, vocab_size=len(tokenizer), **CONFIGS[family])
        kind = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
        model = kind.from_config(config)
    assert model_max_length(model, tokenizer) == positions
    if model.config.is_encoder_decoder:
        assert decoder_max_length(model) == of_decoder


@torch.no_grad()
def test_led_reads_long_prompts_and_cuts_completions_to_its_decoder(tmp_path, caplog):
    caplog.set_level("WARNING")
    tokenizer, model = save(tmp_path, "led")
    assert len(tokenizer(PAIRS[2][0])["input_ids"]) > 24
    with torch.enable_grad():
        assert launch(tmp_path, "--method", "full") == 0
    assert re.search(r"1 of 3 completions of the validation data are longer than 16 tokens", caplog.text)
    assert "prompts of the" not in caplog.text
    total, count = 0.0, 0
    for prompt, completion in PAIRS:
        labels = tokenizer(completion.strip())["input_ids"][:16]
        fed = torch.tensor([[2, *labels[:-1]]])
        logits = model(input_ids=torch.tensor([tokenizer(prompt)["input_ids"]]), decoder_input_ids=fed).logits[0]
        total += float(functional.cross_entropy(logits.double(), torch.tensor(labels), reduction="sum"))
        count += len(labels)
    metrics = json.loads((tmp_path / "out" / "run.json").read_text())["metrics"]
    assert metrics["eval_perplexity"] == pytest.approx(math.exp(total / count), rel=1e-4)


@pytest.mark.parametrize(("family", "positions"), [("led", 16), ("bart", 24)])
def test_more_new_tokens_than_the_decoder_has_positions_are_refused(tmp_path, capsys, family, positions):
    save(tmp_path, family)
    assert launch(tmp_path, "--predict_with_generate", "--max_new_tokens", str(positions + 1)) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert f"pass --max_new_tokens {positions} or less" in error
    assert launch(tmp_path, "--predict_with_generate", "--max_new_tokens", str(positions)) == 0


def test_a_model_s_longest_row_of_another_name_is_refused_before_training(tmp_path, capsys):
    save(tmp_path, "mpt")
    assert launch(tmp_path, "--max_seq_length", "33", task="causal_lm") == 2
    assert "--max_seq_length 33 is more than the model can take (32 tokens)" in capsys.readouterr().err
    assert launch(tmp_path, task="causal_lm") == 0


def test_a_model_that_reads_the_tokens_after_a_position_is_refused(tmp_path, capsys):
    tokenizer = unlimited("byte-level")
    sizes = {"d_model": 16, "n_layer": 2, "n_head": 2, "d_inner": 24, **_IDS}
    config = AutoConfig.for_model("xlnet", vocab_size=len(tokenizer), **sizes)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "pairs.jsonl").write_text(json.dumps({"text": "a"}))
    assert launch(tmp_path, task="causal_lm") == 2
    assert "XLNetLMHeadModel predicts tokens in any order" in capsys.readouterr().err


TEXTS = ["a film with a great plot", "we hated the dull scene, but not the ending!", "it was", "in paris"]
SMALL = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64, **_IDS}
PLAIN = {
    "ctrl": {**SMALL, "dff": 24, "resid_pdrop": 0.0, "embd_pdrop": 0.0},
    "openai-gpt": {**SMALL, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
}


@pytest.mark.parametrize("method", ["full", "lora", "gradientless"])
@pytest.mark.parametrize("family", ["gpt2", "ctrl", "openai-gpt", "modernbert-decoder"])
def test_losses_of_text_are_means_over_the_tokens_that_the_model_s_own_logits_predict(tmp_path, family, method):
    """transformers counts the first tokens of GPT-2's rows too; trl leaves out layers of ModernBERT's head."""
    tokenizer = subword_tokenizer("byte-level")
    if family in PLAIN:
        config = AutoConfig.for_model(family, vocab_size=len(tokenizer), **PLAIN[family])
        with torch.random.fork_rng():
            torch.manual_seed(0)
            AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
        tokenizer.save_pretrained(tmp_path / "model")
    else:
        save_decoder(tmp_path / "model", family)
    (tmp_path / "pairs.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in TEXTS))
    options = ("--search_method", "spsa", "--search_target", "all") if method == "gradientless" else ()
    assert launch(
        tmp_path, "--method", method, *options, "--max_steps", "1", "--warmup_steps", "0", "--logging_steps", "1",
        "--per_device_train_batch_size", "4", "--per_device_eval_batch_size", "4", "--learning_rate", "0",
        "--lr_scheduler_type", "constant", task="causal_lm", steps=("--do_train", "--do_eval"),
    ) == 0  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    total = count = right = 0
    for text in TEXTS:
        ids = tokenizer(text + tokenizer.eos_token, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            logits = model(input_ids=ids, use_cache=False).logits[0, :-1].double()
        total += float(functional.cross_entropy(logits, ids[0, 1:], reduction="sum"))
        right += int((logits.argmax(-1) == ids[0, 1:]).sum())
        count += ids.shape[1] - 1
    record = json.loads((tmp_path / "out" / "run.json").read_text())["metrics"]
    assert record["eval_loss"] == pytest.approx(total / count, abs=1e-4)
    assert record["eval_perplexity"] == pytest.approx(math.exp(total / count), rel=1e-4)
    assert record["eval_mean_token_accuracy"] == pytest.approx(right / count, abs=1e-6)
    log = json.loads((tmp_path / "out" / "trainer_state.json").read_text())["log_history"]
    assert next(entry["loss"] for entry in log if "loss" in entry) == pytest.approx(total / count, abs=2e-3)


@torch.no_grad()
def test_experts_whose_number_trl_does_not_find_train_with_their_own_balance(tmp_path):
    tokenizer = subword_tokenizer("byte-level")
    sizes = {
        "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 1, "num_local_experts": 4, "num_experts_per_tok": 2, "max_position_embeddings": 64,
        "router_aux_loss_coef": 0.5, **_IDS,
    }  # fmt: skip
    config = AutoConfig.for_model("granitemoe", vocab_size=len(tokenizer), **sizes)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config).eval()
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "pairs.jsonl").write_text(json.dumps({"text": TEXTS[0]}))
    with torch.enable_grad():
        assert launch(
            tmp_path, "--method", "full", "--max_steps", "1", "--learning_rate", "0", "--warmup_steps", "0",
            "--lr_scheduler_type", "constant", "--logging_steps", "1", task="causal_lm",
            steps=("--do_train", "--do_eval"),
        ) == 0  # fmt: skip
    ids = tokenizer(TEXTS[0] + tokenizer.eos_token, return_tensors="pt")["input_ids"]
    outputs = model(input_ids=ids, attention_mask=torch.ones_like(ids), output_router_logits=True, use_cache=False)
    loss = float(functional.cross_entropy(outputs.logits[0, :-1].double(), ids[0, 1:]))
    metrics = json.loads((tmp_path / "out" / "run.json").read_text())["metrics"]
    assert metrics["eval_perplexity"] == pytest.approx(math.exp(loss), rel=1e-4)
    log = json.loads((tmp_path / "out" / "trainer_state.json").read_text())["log_history"]
    trained = next(entry["loss"] for entry in log if "loss" in entry)
    assert trained == pytest.approx(loss + 0.5 * float(outputs.aux_loss), abs=1e-3)


# --- runs that only predict, and evaluations after a pre-pass ------------------------------------------------------


@pytest.mark.parametrize("family", ["gpt2", "t5"])
@torch.no_grad()
def test_a_run_may_only_predict(tmp_path, family):
    save_decoder(tmp_path / "model", family)
    rows = [{"prompt": prompt} for prompt, _ in PAIRS[:2]]  # without completions
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    task = "seq2seq_lm" if family == "t5" else "causal_lm"
    assert launch(tmp_path, "--method", "full", "--max_new_tokens", "3", task=task, steps=("--do_predict",)) == 0
    written = [json.loads(line) for line in (tmp_path / "out" / "predictions.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in written] == [row["prompt"] for row in rows]
    assert all(row["references"] == [] for row in written)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--packing", "--packing True puts training rows together, and this run does not train"),
        ("--assistant_only_loss", "--assistant_only_loss True is about the loss, and this run computes none"),
    ],
)
def test_options_of_the_loss_are_refused_where_there_is_none(tmp_path, capsys, option, message):
    save_decoder(tmp_path / "model", "gpt2")
    (tmp_path / "pairs.jsonl").write_text(json.dumps({"prompt": "a"}))
    assert launch(tmp_path, option, task="causal_lm", steps=("--do_predict",)) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "way",
    [
        ("--method", "fisher", "--fisher_examples", "3"),
        ("--method", "sparse", "--sparse_basis_steps", "2", "--sparse_density", "0.2"),
        ("--method", "full"),
    ],
    ids=["fisher", "sparse", "full"],
)
@torch.no_grad()
def test_trl_s_evaluation_metrics_are_those_of_the_evaluated_rows(tmp_path, way):
    """The accuracy of the validation rows' tokens; a pre-pass runs the model on training rows in evaluation mode."""
    save_decoder(tmp_path / "model", "llama")
    (tmp_path / "pairs.jsonl").write_text("\n".join(json.dumps({"text": p + c}) for p, c in PAIRS))
    with torch.enable_grad():
        assert launch(tmp_path, *way, "--max_steps", "1", "--warmup_steps", "0", "--learning_rate", "1e-3",
                      task="causal_lm", steps=("--do_train", "--do_eval")) == 0  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    tokenizer = subword_tokenizer("llama")
    right = count = 0
    for prompt, completion in PAIRS:
        ids = tokenizer(f"{prompt}{completion}{tokenizer.eos_token}", return_tensors="pt")["input_ids"]
        right += int((model(input_ids=ids).logits[0, :-1].argmax(-1) == ids[0, 1:]).sum())
        count += ids.shape[1] - 1
    metrics = json.loads((tmp_path / "out" / "run.json").read_text())["metrics"]
    assert metrics["eval_mean_token_accuracy"] == pytest.approx(right / count, abs=1e-6)
