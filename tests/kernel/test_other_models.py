"""Kernels of further texts, images, sounds and a user's modules: products of gradients, one backward pass each."""

import pytest
import torch
from classifiers import ragged_rows, tiny_classifier
from torch import nn
from torch.nn import functional
from transformers import AutoConfig, AutoModelForAudioClassification, AutoModelForImageClassification

from hf_ft_ext import empirical_ntk

_TALL = {"hidden_sizes": [8, 8, 8, 8], "depths": [1, 1, 1, 1]}
_LAYERS = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
# the first four have batch normalization
IMAGES = {
    "resnet": {"embedding_size": 8, "hidden_sizes": [8, 12], "depths": [1, 1], "layer_type": "basic"},
    "regnet": {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "groups_width": 8},
    "mobilenet_v2": {"depth_multiplier": 0.1, "depth_divisible_by": 4, "min_depth": 4},
    "segformer": {**_TALL, "num_attention_heads": [1, 1, 1, 1]},
    "poolformer": _TALL,
    "dinov2": {**_LAYERS, "patch_size": 14, "image_size": 28},
    "beit": {**_LAYERS, "patch_size": 8, "image_size": 32},
    "convnextv2": {"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2, "patch_size": 4},
    "focalnet": {"image_size": 32, "embed_dim": 8, "depths": [1, 1], "hidden_sizes": [8, 16],
                 "focal_levels": [2, 2], "focal_windows": [3, 3]},
}  # fmt: skip
_SOUND = {**_LAYERS, "conv_dim": [8, 8], "conv_stride": [4, 4], "conv_kernel": [8, 4], "num_feat_extract_layers": 2,
          "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, "classifier_proj_size": 8}  # fmt: skip
SOUNDS = ("hubert", "wavlm", "sew", "unispeech", "data2vec-audio")


# beside those of `tests/per_example/test_example_families.py`; computed in double precision throughout
TEXTS = ("big_bird", "biogpt", "data2vec-text", "ibert", "mbart", "megatron-bert", "mvp", "nystromformer",
         "openai-gpt", "plbart", "roberta-prelayernorm", "tapas")  # fmt: skip


def kernel_by_hand(model, batch):
    """`[N, C, N, C]`, by one backward pass for each logit of each example."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    rows = []
    for i in range(len(next(iter(batch.values())))):
        logits = model(**{key: value[i : i + 1] for key, value in batch.items()})["logits"][0]
        for logit in logits:
            found = torch.autograd.grad(logit, parameters, retain_graph=True, allow_unused=True)
            parts = [torch.zeros_like(p) if g is None else g for g, p in zip(found, parameters, strict=True)]
            rows.append(torch.cat([part.flatten() for part in parts]))
    gradients = torch.stack(rows).view(-1, len(logits), len(rows[0]))
    return torch.einsum("ncp,mdp->ncmd", gradients, gradients)


def check(model, batch):
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(1)
        for parameter in model.parameters():  # no bias is 0, no norm is 1
            parameter.add_(0.1 * torch.randn(parameter.shape))
    model = model.double().eval()
    expected = kernel_by_hand(model, batch)
    for given in (model, model.train()):  # dropout and running statistics are off in either mode
        found = empirical_ntk(given, batch)
        assert float((found - expected).norm() / expected.norm()) <= 1e-9
    assert model.training


@pytest.mark.parametrize("kind", TEXTS)
def test_texts(kind):
    """Rows of three lengths, padded."""
    batch = {key: value for key, value in ragged_rows().items() if key != "labels"}
    check(tiny_classifier(kind, num_labels=3), batch)


@pytest.mark.parametrize("kind", IMAGES)
def test_images(kind):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = AutoConfig.for_model(kind, num_labels=3, **IMAGES[kind])
        pixels = torch.randn(3, 3, *[28 if kind == "dinov2" else 32] * 2).double()
        check(AutoModelForImageClassification.from_config(config), {"pixel_values": pixels})


@pytest.mark.parametrize("kind", SOUNDS)
def test_sounds(kind):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForAudioClassification.from_config(AutoConfig.for_model(kind, num_labels=3, **_SOUND))
        check(model, {"input_values": torch.randn(3, 400).double()})


class Product(torch.autograd.Function):
    """`2 x W` with a backward pass of its own."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return 2 * x @ weight

    @staticmethod
    def backward(ctx, grad_output):
        x, weight = ctx.saved_tensors
        return 2 * grad_output @ weight.T, 2 * torch.einsum("bti,bto->io", x, grad_output)


def over_tokens(module):
    """A module that takes features before tokens."""
    return module, lambda model, x: model.part(x.transpose(1, 2)).transpose(1, 2)


# a module and what is computed with it; `model.layer` is a linear layer of 8 features
PARTS = {
    "used twice": (lambda: nn.Tanh(), lambda model, x: model.part(model.layer(model.part(model.layer(x))))),
    # dropout returns its input itself: the calls have one input, as in heads with several dropout samples
    "used for one input": (
        lambda: nn.Dropout(),
        lambda model, x: sum((k * model.layer(model.part(x))).tanh() for k in (1, 2, 3)),
    ),
    "read without a call": (
        lambda: nn.Linear(8, 8),
        lambda model, x: functional.linear(x, model.part.weight.T, model.part.bias) * model.part.weight.sum(),
    ),
    "tied to the embedding": (
        lambda: nn.Tanh(),
        lambda model, x: functional.linear(model.part(x @ model.table.weight.T), model.table.weight.T),
    ),
    "own backward pass": (lambda: nn.Linear(8, 8), lambda model, x: Product.apply(x, model.part.weight)),
    "batch norm": lambda: over_tokens(nn.BatchNorm1d(8)),
    "group norm": lambda: over_tokens(nn.GroupNorm(2, 8)),
    "instance norm": lambda: over_tokens(nn.InstanceNorm1d(8, affine=True)),
    "convolution": lambda: over_tokens(nn.Conv1d(8, 8, 3, groups=2, dilation=2, padding=2)),
    "transposed convolution": lambda: over_tokens(nn.ConvTranspose1d(8, 8, 3)),
    "LSTM": (lambda: nn.LSTM(8, 8, batch_first=True), lambda model, x: model.part(x)[0]),
    "attention": (lambda: nn.MultiheadAttention(8, 2, batch_first=True), lambda model, x: model.part(x, x, x)[0]),
    "bilinear": (lambda: nn.Bilinear(8, 8, 8), lambda model, x: model.part(x, x)),
    "weight norm": (
        lambda: nn.utils.parametrizations.weight_norm(nn.Linear(8, 8)),
        lambda model, x: model.part(x),
    ),
    "vectors": (lambda: nn.Sequential(nn.RMSNorm(8), nn.PReLU(7)), lambda model, x: model.part(x)),
    "checkpointed": (
        lambda: nn.Linear(8, 8),
        lambda model, x: torch.utils.checkpoint.checkpoint(model.part, x, use_reentrant=False),
    ),
}


class Own(nn.Module):
    def __init__(self, part, compute):
        super().__init__()
        self.table, self.layer, self.part = nn.Embedding(60, 8), nn.Linear(8, 8), part
        self.head, self.compute = nn.Linear(8, 3), compute

    def forward(self, input_ids, **kwargs):
        return {"logits": self.head(self.compute(self, self.layer(self.table(input_ids))).mean(1))}


@pytest.mark.parametrize("name", PARTS)
def test_modules_of_a_user(name):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        part, compute = PARTS[name]() if callable(PARTS[name]) else (PARTS[name][0](), PARTS[name][1])
        check(Own(part, compute), {"input_ids": torch.randint(0, 60, (4, 7))})
