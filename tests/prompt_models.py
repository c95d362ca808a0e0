"""Tiny prompt models of several families, and rows for them."""

import torch
from tiny import CONFIGS, SPECIAL, WORDS, tiny_masked_lm, tiny_tokenizer
from torch import nn
from transformers import AutoConfig, AutoModelForMaskedLM

from hf_ft_ext import PromptEncoder, PromptForSequenceClassification

TEMPLATE = "*cls**sent_0*_it_was*mask*.*sep+*"
TEXTS = ["a great film", "the plot was dull and very long and awful indeed", "good"]
_SIZES = {
    "vocab_size": len(SPECIAL) + len(WORDS), "max_position_embeddings": 64, "pad_token_id": 0, "hidden_size": 32,
    "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
}  # fmt: skip
FAMILIES = {
    **CONFIGS,
    "albert": {**_SIZES, "embedding_size": 16},
    "electra": {**_SIZES, "embedding_size": 16},
    "deberta-v2": {**_SIZES, "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 8},
    "modernbert": {**_SIZES, "global_attn_every_n_layers": 2, "cls_token_id": 2, "sep_token_id": 3},
    "mpnet": _SIZES,
    "xlm-roberta": _SIZES,
}


def masked_lm(family: str = "bert", seed: int = 0, **config) -> nn.Module:
    """A masked language model whose output bias is not zero, so that leaving it out shows."""
    if family in CONFIGS:
        model = tiny_masked_lm(family, seed, **config)
    else:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = AutoModelForMaskedLM.from_config(AutoConfig.for_model(family, **{**FAMILIES[family], **config}))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                nn.init.normal_(parameter, std=0.1)
    return model.eval()


def prompt_model(family: str = "bert", words=("bad", "good"), seed: int = 0, bounds=None, untie=False, **config):
    """A prompt model of a tiny masked language model."""
    labels = None if bounds is not None else [f"label {word}" for word in words]
    return PromptForSequenceClassification.from_masked_lm(
        masked_lm(family, seed, **config), tiny_tokenizer(), TEMPLATE, list(words), labels, bounds, untie
    )


def batch(texts=None, family: str = "bert") -> dict[str, torch.Tensor]:
    """Encoded and padded rows."""
    tokenizer = tiny_tokenizer()
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    rows = PromptEncoder(tokenizer, TEMPLATE, 1, 60)([list(texts or TEXTS)])
    return dict(tokenizer.pad(rows, return_tensors="pt"))
