"""Tiny classifiers of many families, padded batches, and a trainer on them."""

import torch
from tiny import CONFIGS, one_layer_model, tiny_dataset, tiny_model, tiny_tokenizer
from transformers import AutoConfig, AutoModelForSequenceClassification

from hf_ft_ext import GradientlessTrainer, GradientlessTrainingArguments
from hf_ft_ext.features import HeadReader

_ENCODER = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
_DECODER = {**_ENCODER, "num_key_value_heads": 2, "head_dim": 16}
_SHARED = {"vocab_size": len(tiny_tokenizer()), "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}
FAMILIES = {
    "electra": {**_ENCODER, "embedding_size": 32},
    "deberta-v2": {**_ENCODER, "relative_attention": True, "pos_att_type": ["p2c", "c2p"]},
    "albert": {**_ENCODER, "embedding_size": 32},
    "modernbert": {**_ENCODER, "cls_token_id": 2, "sep_token_id": 3, "global_attn_every_n_layers": 2},
    "gpt2": {"n_embd": 32, "n_inner": 48, "n_layer": 2, "n_head": 2, "n_positions": 64},
    "llama": _DECODER,
    "qwen2": _DECODER,
}
READABLE = [*CONFIGS, *FAMILIES]
OPTIONS = {
    "num_train_epochs": 2,
    "learning_rate": 0.05,
    "per_device_train_batch_size": 8,
    "report_to": "none",
    "save_strategy": "no",
    "disable_tqdm": True,
    "dataloader_pin_memory": False,
    "use_cpu": True,
}


def family(model_type: str, seed: int = 0, **config):
    """A tiny classifier in evaluation mode."""
    if model_type in CONFIGS:
        return tiny_model(model_type, seed, **config).eval()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        settings = {**_SHARED, "max_position_embeddings": 64, **FAMILIES[model_type], **config}
        return AutoModelForSequenceClassification.from_config(AutoConfig.for_model(model_type, **settings)).eval()


def padded_batch(rows: int = 6, seed: int = 0) -> dict[str, torch.Tensor]:
    """Rows of different lengths."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, 30, (rows, 12), generator=generator)
    lengths = 4 + torch.arange(rows) % 9
    mask = (torch.arange(12) < lengths[:, None]).long()
    return {"input_ids": ids * mask, "attention_mask": mask}


def reader_of(model) -> HeadReader:
    reader = HeadReader.find(model, padded_batch())
    assert reader is not None
    return reader


def make(folder, model=None, dataset=None, objective=None, **options):
    options = {"feature_cache_dir": str(folder / "features"), **OPTIONS, **options}
    return GradientlessTrainer(
        model or one_layer_model(),
        GradientlessTrainingArguments(output_dir=str(folder), **options),
        train_dataset=tiny_dataset(32) if dataset is None else dataset,
        eval_dataset=tiny_dataset(16, seed=1),
        processing_class=tiny_tokenizer(),
        objective=objective,
    )


def weights(trainer):
    return {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}


def changed(trainer, before):
    return {name for name, value in weights(trainer).items() if not torch.equal(value, before[name])}
