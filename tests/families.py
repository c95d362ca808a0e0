"""Tiny classifiers of many families, and batches for them."""

import torch
from transformers import AutoConfig, AutoModelForSequenceClassification

_SIZE = {"vocab_size": 60, "pad_token_id": 0, "max_position_embeddings": 64}
_BERT = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, **_SIZE}
# fmt: off
FAMILIES = {
    "bert": _BERT,
    "roberta": _BERT,
    "distilbert": {"dim": 16, "hidden_dim": 24, "n_layers": 2, "n_heads": 2, **_SIZE},
    "electra": {**_BERT, "embedding_size": 8},
    "deberta-v2": {  # version 3 is this model type with these settings
        **_BERT, "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 8,
        "share_att_key": True, "norm_rel_ebd": "layer_norm", "max_relative_positions": -1,
        "position_biased_input": False,
    },
    "albert": {**_BERT, "embedding_size": 8},
    "modernbert": {**_BERT, "cls_token_id": 2, "sep_token_id": 3, "bos_token_id": 2, "eos_token_id": 3},
    "gpt2": {
        "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64, "n_inner": 24, "vocab_size": 60,
        "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3,
    },
    "llama": {**_BERT, "num_key_value_heads": 1},
}
# fmt: on


def family(model_type: str, seed: int = 0, **config) -> torch.nn.Module:
    """A classifier of two small layers; the same seed gives the same weights. Biases are not 0, norms not 1."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = AutoConfig.for_model(model_type, **{**FAMILIES[model_type], **config})
        model = AutoModelForSequenceClassification.from_config(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn(parameter.shape))
    return model


def batch(n: int = 5, length: int = 9, seed: int = 0) -> dict[str, torch.Tensor]:
    """Rows of different lengths, padded at the end."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, 60, (n, length), generator=generator)
    lengths = torch.arange(n) % (length - 3) + 4
    mask = (torch.arange(length) < lengths[:, None]).long()
    return {"input_ids": ids * mask, "attention_mask": mask}
