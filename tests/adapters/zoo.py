"""Small models and adapters for the tests of the tuners."""

import torch
from peft import LoraConfig
from tiny import CONFIGS, tiny_model
from transformers import AutoConfig, AutoModelForSequenceClassification

from hf_ft_ext import BottleneckConfig, LayerMixtureConfig, LayerPrefixConfig, SparseGradConfig

_SMALL = {"vocab_size": 45, "max_position_embeddings": 64, "pad_token_id": 0}
_SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, **_SMALL}
OTHERS = {
    "electra": {**_SIZES, "embedding_size": 16},
    "llama": {**_SIZES, "num_key_value_heads": 2},
    "gpt2": {"n_embd": 32, "n_inner": 48, "n_layer": 2, "n_head": 4, "n_positions": 64, **_SMALL,
             "bos_token_id": 1, "eos_token_id": 2},
    "modernbert": {**_SIZES, "global_attn_every_n_layers": 2, "local_attention": 8, "bos_token_id": 1,
                   "eos_token_id": 2, "cls_token_id": 3, "sep_token_id": 4},
}  # fmt: skip
MODELS = [*CONFIGS, *OTHERS]
CAUSAL = ("llama", "gpt2")

ADAPTERS = {
    "pfeiffer": lambda **kw: BottleneckConfig(bottleneck_size=5, init_std=0.3, **kw),
    "houlsby": lambda **kw: BottleneckConfig(
        placement="houlsby", reduction_factor=4, init_std=0.3, layer_norm="both", learned_scaling=True, **kw
    ),
    "parallel": lambda **kw: BottleneckConfig(
        placement="parallel", bottleneck_size=5, init_std=0.3, scaling=4.0, **kw
    ),
    "prefix": lambda **kw: LayerPrefixConfig(prefix_length=3, init_std=1.0, **kw),
    "sparse": lambda **kw: SparseGradConfig(density=0.1, init="random", init_std=0.3, **kw),
    "sparse-shared": lambda **kw: SparseGradConfig(n_params=60, init="svd", scope="kind", init_std=0.3, **kw),
    "projected": lambda **kw: LayerPrefixConfig(prefix_length=3, projection_size=6, **kw),
}

MERGEABLE = ("sparse", "sparse-shared")


def small(kind: str, seed: int = 0, **config):
    """A classifier of two small layers, of the tests' three families or of others."""
    if kind in CONFIGS:
        return tiny_model(kind, seed, **config).eval()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        values = AutoConfig.for_model(kind, **{**OTHERS[kind], **config})
        return AutoModelForSequenceClassification.from_config(values).eval()


def mixture(**kw) -> LayerMixtureConfig:
    """A prefix with projection and a bottleneck in layer 0, LoRA and IA3 in layer 1."""
    lora, ia3 = (
        ["query", "q_lin", "q_proj", "c_attn", "Wqkv"],
        ["output.dense", "lin2", "down_proj", "mlp.c_proj", "mlp.Wo"],
    )
    kinds = {
        "prefix": LayerPrefixConfig(prefix_length=3, projection_size=6),
        "bottleneck": BottleneckConfig(bottleneck_size=5, init_std=0.3),
        "lora": LoraConfig(r=3, target_modules=lora, init_lora_weights=False),
        "ia3": {"target_modules": ia3, "feedforward_modules": ia3},
    }
    return LayerMixtureConfig(kinds=kinds, layers={0: ["prefix", "bottleneck"], 1: ["lora", "ia3"]}, **kw)


ALL = {**ADAPTERS, "mixture": mixture}


def inputs(model=None) -> dict[str, torch.Tensor]:
    """Two rows, the second padded on the right."""
    ids = torch.arange(5, 25).view(2, 10)
    mask = torch.ones_like(ids)
    mask[1, 7:] = 0
    return {"input_ids": torch.where(mask == 1, ids, 0), "attention_mask": mask}


def logits(model, **batch) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(**(batch or inputs())).logits
