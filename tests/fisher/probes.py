"""Adapters, rows and a reference Fisher information for the tests."""

import torch
from peft import get_peft_model
from tiny import tiny_model

from hf_ft_ext import BottleneckConfig, LayerMixtureConfig, LayerPrefixConfig

TARGETS = {
    "bert": (["query", "value"], ["output.dense"]),
    "roberta": (["query", "value"], ["output.dense"]),
    "distilbert": (["q_lin", "v_lin"], ["lin2"]),
}
KINDS = {
    "prefix": lambda q, d: LayerPrefixConfig(prefix_length=3, projection_size=6),
    "flat-prefix": lambda q, d: LayerPrefixConfig(prefix_length=3),
    "bottleneck": lambda q, d: BottleneckConfig(bottleneck_size=5, layer_norm="both", learned_scaling=True),
    "houlsby": lambda q, d: BottleneckConfig(placement="houlsby", bottleneck_size=5),
    "lora": lambda q, d: {"peft_type": "LORA", "r": 3, "target_modules": q},
    "dora": lambda q, d: {"peft_type": "LORA", "r": 3, "use_dora": True, "target_modules": q},
    "ia3": lambda q, d: {"peft_type": "IA3", "target_modules": d, "feedforward_modules": d},
    "loha": lambda q, d: {"peft_type": "LOHA", "r": 2, "target_modules": q},
    "lokr": lambda q, d: {"peft_type": "LOKR", "r": 2, "target_modules": q},
}


def adapted(model_type: str, kinds: list[str], **config):
    """A tiny classifier in float64 with these kinds in both layers, everything that trains drawn at random."""
    model = tiny_model(model_type, **config).double()
    settings = {kind: KINDS[kind](*TARGETS[model_type]) for kind in kinds}
    mixture = LayerMixtureConfig(kinds=settings, layers={0: kinds, 1: kinds}, modules_to_save=["classifier"])
    model = get_peft_model(model, mixture)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.normal_(std=0.3)
    return model


def rows(n: int = 6, labels=None) -> list[dict]:
    """Batches of one example each, of different lengths."""
    generator = torch.Generator().manual_seed(0)
    result = []
    for i in range(n):
        ids = torch.randint(5, 40, (1, 4 + i), generator=generator)
        label = torch.tensor([i % 2]) if labels is None else labels[i : i + 1]
        result.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": label})
    return result


def batched(examples: list[dict], size: int) -> list[dict]:
    """The same rows in batches, padded on the right."""
    batches = []
    for i in range(0, len(examples), size):
        part = examples[i : i + size]
        longest = max(row["input_ids"].shape[1] for row in part)
        batches.append({
            key: torch.cat([
                row[key] if key == "labels" else torch.nn.functional.pad(row[key], (0, longest - row[key].shape[1]))
                for row in part
            ])
            for key in part[0]
        })  # fmt: skip
    return batches


def plain_way(model, examples: list[dict], names: list[str], power: int = 2, expected: bool = False) -> dict:
    """One backward pass per example, of the model's own loss; over the model's labels with `expected`."""
    model.eval()
    own = dict(model.named_parameters())
    sums = {name: torch.zeros_like(own[name]) for name in names}
    for row in examples:
        draws = [(1.0, row)]
        if expected:
            shares = model(**row).logits.softmax(-1).detach()[0]
            draws = [(shares[k], {**row, "labels": torch.tensor([k])}) for k in range(len(shares))]
        for weight, draw in draws:
            model.zero_grad()
            model(**draw).loss.backward()
            for name in names:
                if own[name].grad is not None:
                    sums[name] += weight * own[name].grad.abs() ** power
    model.zero_grad()
    return sums
