"""Tiny encoder-decoders with language codes, and pairs of texts to train them on."""

import json

import torch
from transformers import AutoModelForSeq2SeqLM, MBart50Tokenizer, MBartTokenizer, NllbTokenizer
from transformers.models.mbart import tokenization_mbart
from transformers.models.mbart50 import tokenization_mbart50

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
