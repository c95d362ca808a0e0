"""Encoder-decoders with language codes (mBART, mBART-50, NLLB), and padding on the left, through the launcher.

The loss is that of the bare model for each row's labels, as the tokenizer gives them; texts are generated row by row.
"""

import json
import math

import pytest
import torch
from decoders import subword_tokenizer
from transformers import (
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    BlenderbotConfig,
    FSMTConfig,
    M2M100Config,
    MBart50Tokenizer,
    MBartConfig,
    MBartTokenizer,
    NllbTokenizer,
    T5Config,
)
from transformers.models.mbart import tokenization_mbart
from transformers.models.mbart50 import tokenization_mbart50

import run_glue

_SPECIAL = ["<s>", "<pad>", "</s>", "<unk>"]
_PIECES = ["▁", *"abcdefghijklmnopqrstuvwxyz,", "▁the", "▁film", "▁was", "▁a"]
_CODES = {
    MBartTokenizer: tokenization_mbart.FAIRSEQ_LANGUAGE_CODES,
    MBart50Tokenizer: tokenization_mbart50.FAIRSEQ_LANGUAGE_CODES,
}
SIZE = {
    "d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "dropout": 0.0,
    "max_position_embeddings": 128,
}  # fmt: skip
FAIRSEQ = {"bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2, **SIZE}
PAIRS = [
    ("the film was", " great"), ("a dull plot, and", " not the ending"), ("we hated it and really", " bad"),
    ("it was", " a great plot and a brilliant cast"),
]  # fmt: skip
_OURS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def with_codes(kind, side="right"):
    """A tokenizer from English to Romanian, or French for NLLB, of single letters and a few words."""
    if kind is NllbTokenizer:
        vocab = {piece: i for i, piece in enumerate([*_SPECIAL, *_PIECES])}
        return kind(vocab=vocab, merges=[], src_lang="eng_Latn", tgt_lang="fra_Latn", padding_side=side)
    scores = [(token, 0.0) for token in _SPECIAL] + [(piece, -2.0) for piece in _PIECES]
    scores += [(code, 0.0) for code in _CODES[kind]] + [("<mask>", 0.0)]
    return kind(vocab=scores, src_lang="en_XX", tgt_lang="ro_RO", padding_side=side)


def save_model_and_pairs(folder, tokenizer, config) -> None:
    """Write a random model with large weights and its tokenizer into `folder/model`, `PAIRS` into `pairs.jsonl`."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForSeq2SeqLM.from_config(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.4 * torch.randn(parameter.shape))
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    rows = [{"prompt": prompt, "completion": completion} for prompt, completion in PAIRS]
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))


def built(name: str):
    """A tokenizer and the configuration of its model."""
    side = "left" if name.endswith("left") else "right"
    if name.startswith(("mbart", "nllb")):
        kind = NllbTokenizer if name == "nllb" else MBart50Tokenizer if name == "mbart50" else MBartTokenizer
        tokenizer = with_codes(kind, side)
        code = tokenizer.convert_tokens_to_ids("fra_Latn" if name == "nllb" else "ro_RO")
        if name == "nllb":
            more = {"decoder_start_token_id": 2, "forced_bos_token_id": code}
            return tokenizer, M2M100Config(vocab_size=len(tokenizer), **FAIRSEQ, **more)
        start = {"mbart": code, "mbart-left": code, "mbart50": 2}.get(name)
        more = {"forced_bos_token_id": code} if name == "mbart50" else {}
        return tokenizer, MBartConfig(vocab_size=len(tokenizer), decoder_start_token_id=start, **FAIRSEQ, **more)
    tokenizer = subword_tokenizer("unigram", padding_side=side)
    if name == "t5-left":
        return tokenizer, T5Config(
            vocab_size=len(tokenizer), d_model=16, d_ff=24, d_kv=8, num_layers=2, num_heads=2, dropout_rate=0.0,
            decoder_start_token_id=0, **_OURS,
        )  # fmt: skip
    if name == "fsmt":
        sizes = {"src_vocab_size": len(tokenizer), "tgt_vocab_size": len(tokenizer), "langs": ["en", "de"]}
        no_dropout = {"attention_dropout": 0.0, "activation_dropout": 0.0}
        return tokenizer, FSMTConfig(decoder_start_token_id=2, **sizes, **no_dropout, **SIZE, **_OURS)
    kind = BlenderbotConfig if name.startswith("blenderbot") else M2M100Config
    start = None if name == "m2m-without-start" else 1
    return tokenizer, kind(vocab_size=len(tokenizer), decoder_start_token_id=start, **SIZE, **_OURS)


def run(folder, name, trains=True):
    save_model_and_pairs(folder, *built(name))
    file = str(folder / "pairs.jsonl")
    return run_glue.main(
        [
            "--model_name_or_path", str(folder / "model"), "--method", "full", "--task_type", "seq2seq_lm",
            *(("--train_file", file, "--do_train") if trains else ()), "--validation_file", file, "--test_file", file,
            "--do_eval",
            "--do_predict", "--max_steps", "2", "--warmup_steps", "0", "--learning_rate", "1e-3",
            "--predict_with_generate", "--max_new_tokens", "8", "--per_device_eval_batch_size", "3", "--use_cpu",
            "--disable_tqdm", "true", "--output_dir", str(folder / "out"),
        ]
    )  # fmt: skip


@pytest.mark.parametrize(
    "name",
    ["mbart", "mbart-without-start", "mbart50", "nllb", "mbart-left", "m2m-left", "blenderbot-left", "t5-left"],
)
@torch.no_grad()
def test_perplexity_and_texts_are_those_of_each_row_alone(tmp_path, name):
    with torch.enable_grad():
        assert run(tmp_path, name) == 0
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    model = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "out").eval()
    total, count, texts = 0.0, 0, []
    for prompt, completion in PAIRS:
        ids = torch.tensor([tokenizer(prompt)["input_ids"]])
        labels = torch.tensor([tokenizer(text_target=completion.strip())["input_ids"]])
        total += float(model(input_ids=ids, labels=labels).loss) * labels.numel()
        count += labels.numel()
        # mBART begins with the last label, a language code
        start = labels[0, -1] if name.startswith("mbart") else model.config.decoder_start_token_id
        new = model.generate(input_ids=ids, max_new_tokens=8, decoder_start_token_id=int(start))
        texts.append(tokenizer.decode(new[0], skip_special_tokens=True).strip())
    metrics = json.loads((tmp_path / "out" / "run.json").read_text())["metrics"]
    assert metrics["eval_perplexity"] == pytest.approx(math.exp(total / count), rel=1e-5)
    (file,) = (tmp_path / "out").glob("predictions*.jsonl")
    assert [json.loads(line)["prediction"] for line in file.read_text().splitlines()] == texts


@pytest.mark.parametrize("trains", [True, False])
@torch.no_grad()
def test_losses_of_fsmt_are_those_of_the_completions_tokens_alone(tmp_path, trains):
    with torch.enable_grad():
        assert run(tmp_path, "fsmt", trains) == 0
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    model = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / ("out" if trains else "model")).eval()
    total, count = 0.0, 0
    for prompt, completion in PAIRS:
        ids = torch.tensor([tokenizer(prompt)["input_ids"]])
        labels = tokenizer(completion.strip())["input_ids"]
        for i, token in enumerate(labels):  # it is given the earlier tokens alone
            fed = torch.tensor([[2, *labels[:i]]])
            logits = model(input_ids=ids, decoder_input_ids=fed, use_cache=False).logits[0, -1]
            total -= float(logits.double().log_softmax(-1)[token])
        count += len(labels)
    metrics = json.loads((tmp_path / "out" / "run.json").read_text())["metrics"]
    assert metrics["eval_perplexity"] == pytest.approx(math.exp(total / count), rel=1e-5)


def test_a_model_without_a_first_decoder_token_is_refused(tmp_path, capsys):
    assert run(tmp_path, "m2m-without-start") == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "has decoder_start_token_id=None, so its decoder has no first token; set decoder_start_token_id in" in error
    assert not (tmp_path / "out" / "run.json").exists()
