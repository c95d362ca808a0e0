"""Tiny decoders of several families, tokenizers of the kinds that they have, and folders with both."""

import functools

import torch
from tiny import SPECIAL, WORDS
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    ByT5Tokenizer,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

_SIZE = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "max_position_embeddings": 128}
_LLAMA = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, **_SIZE,
}  # fmt: skip
DECODERS = {
    "opt": {
        "hidden_size": 16, "ffn_dim": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "word_embed_proj_dim": 16,
        "dropout": 0.0, **_SIZE,
    },
    "llama": _LLAMA,
    "qwen3": {**_LLAMA, "head_dim": 8, "tie_word_embeddings": True},
    "gpt2": {
        "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 128, "n_inner": 24, "pad_token_id": 0,
        "bos_token_id": 1, "eos_token_id": 2, "attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0,
    },
    "t5": {
        "d_model": 16, "d_ff": 24, "d_kv": 8, "num_layers": 2, "num_heads": 2, "pad_token_id": 0, "eos_token_id": 2,
        "decoder_start_token_id": 0, "dropout_rate": 0.0,
    },
}  # fmt: skip
_SEQ2SEQ = {
    "d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "dropout": 0.0,
    "forced_eos_token_id": 2, **_SIZE,
}  # fmt: skip
_NEOX = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, **_SIZE,
}  # fmt: skip
# of other ways to know positions, to scale logits and to begin: fewer tests
OTHER_DECODERS = {
    "mixtral": {**_LLAMA, "num_local_experts": 4, "router_aux_loss_coef": 0.0},
    "gemma2": {**_LLAMA, "head_dim": 8, "sliding_window": 64},
    "phi": {**_NEOX, "partial_rotary_factor": 0.5},
    "bloom": {"hidden_size": 16, "n_layer": 2, "n_head": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
    "gpt_neox": {**_NEOX, "rotary_pct": 0.5},
    "modernbert-decoder": {**_NEOX, "local_attention": 32, "cls_token_id": 1, "sep_token_id": 2},
    "mamba2": {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "state_size": 4,
        "num_heads": 4,
        "head_dim": 8,
        "n_groups": 1,
        "chunk_size": 8,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    # the network below the head has another name than in its class
    "llama4_text": {
        **_LLAMA,
        "head_dim": 8,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "intermediate_size_mlp": 24,
        "attention_chunk_size": 64,
    },
    # these read padding on the left: a recurrence or a convolution ignores the attention mask
    "recurrent_gemma": {**_LLAMA, "num_hidden_layers": 3, "lru_width": 16, "attention_window_size": 64, "head_dim": 8},
    "rwkv": {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "attention_hidden_size": 16,
        "intermediate_size": 24,
        "context_length": 128,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    "bart": {**_SEQ2SEQ, "decoder_start_token_id": 2},
    "pegasus": {**_SEQ2SEQ, "decoder_start_token_id": 0},
}
ENCODER_DECODERS = ("t5", "bart", "pegasus")
TEXT = ["a film with a great plot and a brilliant cast: it was great.", "we hated the dull scene, but not the ending!"]
# rows of openassistant: a conversation with two replies to its first message
MESSAGES = [
    {"message_id": "a", "parent_id": None, "role": "prompter", "text": "good film"},
    {"message_id": "b", "parent_id": "a", "role": "assistant", "text": "a great plot"},
    {"message_id": "c", "parent_id": "b", "role": "prompter", "text": "bad film"},
    {"message_id": "d", "parent_id": "c", "role": "assistant", "text": "a dull plot"},
    {"message_id": "e", "parent_id": "a", "role": "assistant", "text": "fine"},
]
_CORPUS = [
    *TEXT,
    " ".join(WORDS),
    "Question: It Suppose does this mean that it is true? Yes, No or Maybe?\nYes\nNo",
] * 20


def decoder(family: str, vocab_size: int = 320, seed: int = 0, **config):
    """A language model of two small layers with biases that are not 0; the same seed gives the same weights."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        sizes = {**DECODERS, **OTHER_DECODERS}[family]
        config = AutoConfig.for_model(family, vocab_size=vocab_size, **{**sizes, **config})
        kind = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
        model = kind.from_config(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn(parameter.shape))
        return model.eval()


@functools.cache
def _trained(kind: str) -> str:
    specials = ["<pad>", "<s>", "</s>", "<unk>", "<extra_id_0>"]
    if kind == "byte-level":  # GPT-2, OPT, Qwen, Llama 3
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=320, special_tokens=specials, initial_alphabet=alphabet)
    elif kind == "llama":  # SentencePiece's BPE: every text gets a space in front, none is taken away
        tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        # no piece holds two words, or a word and a line break
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Split("\n", "isolated"), pre_tokenizers.Metaspace(prepend_scheme="never")]
        )
        tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Strip(" ", 1, 0)])
        trainer = trainers.BpeTrainer(vocab_size=160, special_tokens=specials, initial_alphabet=["\n"])
    else:  # T5: unigram, repeated spaces and line breaks become one space
        tokenizer = Tokenizer(models.Unigram())
        tokenizer.normalizer = normalizers.Sequence([normalizers.Replace(Regex(r"\s+"), " "), normalizers.Strip()])
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        tokenizer.decoder = decoders.Metaspace()
        trainer = trainers.UnigramTrainer(vocab_size=140, special_tokens=specials, unk_token="<unk>")
    tokenizer.train_from_iterator(_CORPUS, trainer)
    start, end = ("<s> ", "") if kind == "llama" else ("", " </s>" if kind == "unigram" else "")
    if start or end:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{start}$A{end}", special_tokens=[("<s>", 1), ("</s>", 2)]
        )
    return tokenizer.to_str()


def subword_tokenizer(kind: str, **settings) -> PreTrainedTokenizerBase:
    """A tokenizer of one of the kinds that decoders have: byte-level, llama, unigram, or bytes (a slow one)."""
    if kind == "bytes":
        return ByT5Tokenizer(extra_ids=0, **settings)
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_trained(kind)), model_max_length=128, **{**special, **settings}
    )


TOKENIZER_OF = {
    "opt": "byte-level", "llama": "llama", "qwen3": "byte-level", "gpt2": "byte-level", "t5": "unigram",
    "gemma2": "llama", "phi": "byte-level", "bloom": "byte-level", "gpt_neox": "byte-level", "bart": "byte-level",
    "modernbert-decoder": "byte-level", "mamba2": "byte-level", "pegasus": "unigram",
    "recurrent_gemma": "llama", "rwkv": "byte-level", "llama4_text": "byte-level",
    "mixtral": "llama",
}  # fmt: skip


def word_tokenizer(more: tuple[str, ...] = (), **settings) -> PreTrainedTokenizerFast:
    """A word-level tokenizer with a start and an end token but no mask, as decoders have them."""
    vocab = {word: i for i, word in enumerate(["[PAD]", "<s>", "</s>", *SPECIAL[1:2], *WORDS, *more])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "bos_token": "<s>", "eos_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=128, **{**special, **settings})


def save_decoder(folder: str, family: str, tokenizer: PreTrainedTokenizerBase | None = None, **config) -> str:
    """A saved decoder with its tokenizer: what `--model_name_or_path` takes."""
    tokenizer = subword_tokenizer(TOKENIZER_OF[family]) if tokenizer is None else tokenizer
    decoder(family, len(tokenizer), **config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)
