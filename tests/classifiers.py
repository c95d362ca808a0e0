"""Every sequence classifier of transformers, as small as its configuration lets it be."""

import copy
import functools
from collections.abc import Iterator

import torch
from transformers import CONFIG_MAPPING, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING as CLASSIFIERS

_VALUES = {
    32: "hidden_size d_model dim n_embd embedding_size moe_intermediate_size shared_expert_intermediate_size "
    "word_embed_proj_dim",
    2: "num_hidden_layers n_layers n_layer num_layers encoder_layers decoder_layers num_decoder_layers "
    "num_attention_heads num_heads n_heads n_head encoder_attention_heads decoder_attention_heads num_key_value_heads "
    "num_experts num_local_experts n_routed_experts type_vocab_size expand eos_token_id",
    64: "intermediate_size ffn_dim d_ff dff hidden_dim n_inner encoder_ffn_dim decoder_ffn_dim ffn_hidden_size "
    "d_inner max_position_embeddings n_positions n_ctx",
    16: "d_kv head_dim d_head v_head_dim query_pre_attn_scalar sliding_window",
    8: "state_size block_size kv_lora_rank q_lora_rank qk_rope_head_dim qk_nope_head_dim",
    1: "num_experts_per_tok n_shared_experts n_group topk_group first_k_dense_replace num_global_layers bos_token_id",
    0: "pad_token_id",
    120: "vocab_size",
}
_SMALL = {name: value for value, names in _VALUES.items() for name in names.split()} | {
    "attention_window": [8, 8], "axial_pos_shape": [8, 8], "axial_pos_embds_dim": [16, 16],
    "attn_implementation": "eager",
}  # fmt: skip
_OWN = {
    "deberta-v3": {  # no model type of its own: version 2 with these settings
        "relative_attention": True,
        "pos_att_type": ["p2c", "c2p"],
        "position_buckets": 4,
        "share_att_key": True,
        "norm_rel_ebd": "layer_norm",
        "max_relative_positions": -1,
        "position_biased_input": False,
    },
    "funnel": {"block_sizes": [1, 1], "num_decoder_layers": 1},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "gptj": {"rotary_dim": 8},
    **{kind: {"decoder_start_token_id": 0} for kind in ("t5", "umt5", "mt5")},
}
# Chosen to differ: post- and pre-norm, fused, gated, shared, parallel lists, two stacks, experts, no attention, ...
DIFFERENT = (
    "bert", "albert", "bart", "bloom", "canine", "convbert", "deberta", "deberta-v2", "deepseek_v2", "distilbert",
    "falcon", "fnet", "funnel", "gpt2", "jetmoe", "llama", "longformer", "mixtral", "mobilebert", "modernbert",
    "mpnet", "phi3", "qwen2_moe", "squeezebert", "t5", "xlm", "xlnet", "yoso",
)  # fmt: skip


def tiny_classifier(kind: str | type[PreTrainedConfig], seed: int = 0, **config) -> torch.nn.Module:
    """A classifier of one family: two layers of 32 features, 120 words, two labels."""
    config_class, chosen = _settings(kind)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return CLASSIFIERS[config_class](config_class(**copy.deepcopy(chosen) | config)).eval()


@functools.cache
def _settings(kind: str | type[PreTrainedConfig]) -> tuple[type[PreTrainedConfig], dict]:
    config_class = CONFIG_MAPPING["deberta-v2" if kind == "deberta-v3" else kind] if isinstance(kind, str) else kind
    plain = config_class()
    fixed = {name for name in dir(config_class) if isinstance(getattr(config_class, name, None), property)}
    chosen = {
        name: value
        for name, value in _SMALL.items()
        if (hasattr(plain, name) or name in ("attn_implementation", "pad_token_id")) and name not in fixed
    } | _OWN.get(kind if isinstance(kind, str) else kind.model_type, {})
    if config_class.model_type == "funnel":
        chosen.pop("num_hidden_layers", None)
    if getattr(plain, "layer_types", None):
        chosen["layer_types"] = list(plain.layer_types)[:2]
    return config_class, chosen


def perturb(model: torch.nn.Module, seed: int = 0, size: float = 0.1) -> torch.nn.Module:
    """Add noise to every parameter, so that none is 0 and no norm is 1; the model itself is returned."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(size * torch.randn(parameter.shape, generator=generator))
    return model


def classifier_rows(n: int = 4, length: int = 16) -> dict[str, torch.Tensor]:
    """Rows for any of them: ordinary tokens, an end token last, labels 0 and 1 in turn."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, 100, (n, length), generator=generator)
    ids[:, -1] = 2
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.arange(n) % 2}


def ragged_rows(lengths: tuple[int, ...] = (12, 5, 9), labels: int = 3) -> dict[str, torch.Tensor]:
    """Rows of these lengths padded at the right with 0: other tokens in each, an end token last."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.zeros(len(lengths), max(lengths), dtype=torch.long)
    for row, length in zip(ids, lengths, strict=True):
        row[:length] = torch.randint(5, 100, (length,), generator=generator)
        row[length - 1] = 2
    return {"input_ids": ids, "attention_mask": (ids != 0).long(), "labels": torch.arange(len(lengths)) % labels}


def runnable() -> Iterator[tuple[str, torch.nn.Module, torch.Tensor]]:
    """Families that can be made this small and take such rows: name, model, and its logits without labels."""
    found = set()
    rows = {name: value for name, value in classifier_rows().items() if name != "labels"}
    for config_class in CLASSIFIERS:
        try:
            with torch.device("meta"):
                size = sum(p.numel() for p in tiny_classifier(config_class).parameters())
            if size > 5e6 or config_class.model_type in found:
                continue
            model = tiny_classifier(config_class)
            with torch.no_grad():
                logits = model(**rows).logits
        except Exception:  # a configuration that wants more than sizes, or a package that is not there
            continue
        found.add(config_class.model_type)
        yield config_class.model_type, model, logits
