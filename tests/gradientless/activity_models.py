"""Tiny models in float64 and the losses of their rows, for tests of activity perturbation."""

import functools

import torch
from prompt_models import prompt_model
from torch.nn import functional
from transformers import (
    AlbertConfig,
    AutoModelForSequenceClassification,
    BartConfig,
    BartForSequenceClassification,
    BertConfig,
    ConvNextConfig,
    ConvNextForImageClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    MPNetConfig,
    ResNetConfig,
    ResNetForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

TEXT = {"vocab_size": 11, "hidden_size": 4, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 6,
        "max_position_embeddings": 8}  # fmt: skip
IDS = torch.tensor([[1, 2, 3, 4], [5, 6, 0, 0], [7, 8, 9, 0]])
MASK = (IDS != 0).long()


def text_model(kind):
    if kind == "bert":
        return AutoModelForSequenceClassification.from_config(BertConfig(**TEXT, num_labels=3))
    if kind == "albert":  # one layer that runs twice
        config = AlbertConfig(**{**TEXT, "num_hidden_layers": 2}, embedding_size=4, num_labels=3)
        return AutoModelForSequenceClassification.from_config(config)
    if kind == "mpnet":  # a bias of the attention that all rows share
        return AutoModelForSequenceClassification.from_config(MPNetConfig(**TEXT, num_labels=3))
    if kind == "bart":
        sizes = {f"{side}_{name}": n for side in ("encoder", "decoder") for name, n in BART.items()}
        return BartForSequenceClassification(BartConfig(
            vocab_size=11, d_model=4, max_position_embeddings=8, num_labels=3, pad_token_id=0, eos_token_id=1,
            decoder_start_token_id=2, bos_token_id=2, **sizes,
        ))  # fmt: skip
    config = GPT2Config(vocab_size=11, n_embd=4, n_layer=1, n_head=2, n_positions=8, num_labels=3, pad_token_id=0)
    return GPT2ForSequenceClassification(config)  # Conv1D


IMAGES = "vit", "convnext", "resnet"
BART = {"layers": 1, "attention_heads": 2, "ffn_dim": 6}


def image_model(kind):
    if kind == "convnext":
        sizes = {"num_stages": 2, "hidden_sizes": [4, 6], "depths": [1, 1], "patch_size": 2}
        return ConvNextForImageClassification(ConvNextConfig(num_channels=1, num_labels=3, **sizes))
    if kind == "resnet":
        sizes = {"embedding_size": 4, "hidden_sizes": [4, 6], "depths": [1, 1], "layer_type": "basic"}
        return ResNetForImageClassification(ResNetConfig(num_channels=1, num_labels=3, **sizes))
    sizes = {"hidden_size": 4, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 6}
    return ViTForImageClassification(ViTConfig(**sizes, image_size=4, patch_size=2, num_channels=1, num_labels=3))


class Mixing(torch.nn.Module):
    """A classifier in which each row reads the mean of all rows."""

    def __init__(self):
        super().__init__()
        self.first, self.second = torch.nn.Linear(3, 4), torch.nn.Linear(4, 3)

    def forward(self, x):
        y = self.first(x).tanh()
        return self.second(y - y.mean(0))


def problem(kind):
    """Model in float64 and the losses of its rows."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        labels, images = torch.tensor([0, 2, 1, 1]), torch.randn(3, 1, 4, 4, dtype=torch.double)
        if kind == "mixing":
            model, inputs = Mixing(), {"x": torch.randn(3, 3, dtype=torch.double)}
        elif kind in IMAGES:
            model, inputs = image_model(kind), {"pixel_values": images}
        elif kind in ("mpnet", "altered"):  # as many rows as positions
            model, ids = Altered() if kind == "altered" else text_model(kind), torch.cat([IDS, 11 - IDS[2:]]) % 11
            inputs = {"input_ids": ids, "attention_mask": (ids != 0).long()}
        elif kind == "contexts":  # several rows of the model for each row of the batch
            model = prompt_model(untie=True, num_hidden_layers=1, hidden_size=4, intermediate_size=6)
            ids = Passes(None, 8, 2).ids[:2, :, :4]
            inputs = {"input_ids": ids, "attention_mask": (ids != 0).long()}
            labels = labels.clamp(max=1)
        elif kind == "bart":  # left padding, which its decoder reads
            ids = torch.where(torch.arange(4) == 3, 1, IDS.flip(1))
            model, inputs = text_model(kind), {"input_ids": ids, "attention_mask": MASK.flip(1)}
        else:
            model, inputs = text_model(kind), {"input_ids": IDS, "attention_mask": MASK}
    model = model.double().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.arange(p.numel(), dtype=p.dtype).view(p.shape).sin())

    def losses():
        output = model(**inputs)
        logits = getattr(output, "logits", output)
        return functional.cross_entropy(logits, labels[: len(logits)], reduction="none")

    return model, losses


class Altered(torch.nn.Module):
    """Layers with hooks, a forward of their own, normalized weights, sparse gradients, and a part that mixes rows."""

    def __init__(self):
        super().__init__()
        self.words, self.places = torch.nn.Embedding(11, 4, sparse=True), torch.nn.Embedding(8, 4)
        self.hooked, self.replaced, self.last = (torch.nn.Linear(4, 4) for _ in range(3))
        self.normed = torch.nn.utils.weight_norm(torch.nn.Linear(4, 4))
        self.parametrized = torch.nn.utils.parametrizations.weight_norm(torch.nn.Linear(4, 4))
        self.hooked.register_forward_pre_hook(lambda module, args: (2 * args[0],))
        self.hooked.register_forward_hook(lambda module, args, y: y.sin())
        plain = self.replaced.forward
        self.replaced.forward = lambda x: plain(x).square()

    def forward(self, input_ids, attention_mask=None):
        y = self.words(input_ids) + self.places(torch.arange(input_ids.shape[1]))
        y = self.normed(self.hooked(y).tanh()) + self.parametrized(self.replaced(y))
        return self.last(y).mean(1)[:, :3]


class Passes:
    """The losses of a batch of eight padded rows, in micro-batches of these sizes.

    Args:
        contexts: number of contexts of each row of a prompt model; 0 = a classifier.
        take: which of the micro-batches.
    """

    def __init__(self, model, sizes, contexts=0, take=slice(None)):
        self.model, self.sizes, self.contexts, self.take = model, sizes, contexts, take
        generator = torch.Generator().manual_seed(3)
        shape = (8, contexts, 6) if contexts else (8, 4)
        ids = torch.randint(5 if contexts else 1, 11, shape, generator=generator)
        lengths = 1 + torch.arange(ids[..., 0].numel()).view(*shape[:-1], 1) % (shape[-1] if contexts else 4)
        self.ids = ids * (torch.arange(shape[-1]) < lengths)
        if contexts:
            self.ids[..., 0] = 4  # the mask token

    def row_passes(self):
        parts = self.ids.split(self.sizes)[self.take]
        return [(functools.partial(self.losses, part), float(len(part))) for part in parts]

    def losses(self, ids):
        logits = self.model(input_ids=ids, attention_mask=(ids != 0).long()).logits
        labels = ids.flatten(1)[:, 1 if self.contexts else 0] % logits.shape[-1]
        return functional.cross_entropy(logits, labels, reduction="none")


def searched_layers(model):
    """Parameters of the linear and normalizing layers, whose noise does not depend on the micro-batch."""
    layers = [m for m in model.modules() if isinstance(m, torch.nn.Linear | torch.nn.LayerNorm)]
    return list({id(p): p for module in layers for p in module.parameters()}.values())
