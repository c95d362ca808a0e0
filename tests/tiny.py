"""Tiny models, a tiny tokenizer and tiny data, built in memory: the suite downloads nothing."""

from pathlib import Path
from types import SimpleNamespace

import torch
from datasets import ClassLabel, Dataset, Features, Value
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import (
    AutoConfig,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    PreTrainedTokenizerFast,
)

WORDS = (
    "the a film plot cast music was is felt seemed good bad great awful dull brilliant not never but and very "
    "rather on monday in paris . , it they we saw expected liked hated really ending scene whole part"
).split()
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]

# Sizes that keep one training step at a few milliseconds.
_SMALL = {"vocab_size": len(SPECIAL) + len(WORDS), "max_position_embeddings": 64, "pad_token_id": 0}
CONFIGS = {
    "bert": {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, **_SMALL},
    "roberta": {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        **_SMALL,
    },
    "distilbert": {"dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 2, **_SMALL},
}


def tiny_model(model_type: str = "bert", seed: int = 0, **config):
    """A sequence classifier of two small layers; the same seed gives the same weights."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = AutoConfig.for_model(model_type, **{**CONFIGS[model_type], **config})
        return AutoModelForSequenceClassification.from_config(config)


def one_layer_model(model_type: str = "bert", seed: int = 0, **config):
    """`tiny_model` with one layer, for tests of what does not depend on the number of layers: most are of trainers."""
    return tiny_model(model_type, seed, num_hidden_layers=1, **config)


def tiny_masked_lm(model_type: str = "bert", seed: int = 0, **config):
    """A masked language model of two small layers over the tiny tokenizer's vocabulary."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = AutoConfig.for_model(model_type, **{**CONFIGS[model_type], **config})
        return AutoModelForMaskedLM.from_config(config)


def tiny_tokenizer(more: tuple[str, ...] = ()) -> PreTrainedTokenizerFast:
    """A word-level tokenizer over `WORDS`, and `more` behind them, with BERT's special tokens."""
    vocab = {word: i for i, word in enumerate([*SPECIAL, *WORDS, *more])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", vocab["[CLS]"]), ("[SEP]", vocab["[SEP]"])],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        model_max_length=64,
    )


def tiny_dataset(
    n: int = 32, length: int = 12, num_labels: int = 2, seed: int = 0, regression: bool = False
) -> Dataset:
    """Tokenised rows whose label depends on the tokens: `input_ids`, `attention_mask`, `labels`."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(4, length + 1, (n,), generator=generator).tolist()
    ids = [torch.randint(len(SPECIAL), len(SPECIAL) + len(WORDS), (k,), generator=generator).tolist() for k in lengths]
    labels = [float(sum(row) % 11) / 2 if regression else sum(row) % num_labels for row in ids]
    return Dataset.from_dict({"input_ids": ids, "attention_mask": [[1] * k for k in lengths], "labels": labels})


def text_dataset(n: int = 40, pair: bool = False, seed: int = 0) -> Dataset:
    """Untokenised two-class rows in GLUE's form (`sentence` or `sentence1`/`sentence2`, `label`, `idx`)."""
    generator = torch.Generator().manual_seed(seed)
    picks = torch.randint(0, len(WORDS), (n, 8), generator=generator).tolist()
    rows = [" ".join(WORDS[i] for i in row) for row in picks]
    labels = [sum(row) % 2 for row in picks]
    text = {"sentence1": rows, "sentence2": rows[::-1]} if pair else {"sentence": rows}
    features = Features(
        {**dict.fromkeys(text, Value("string")), "label": ClassLabel(names=["no", "yes"]), "idx": Value("int32")}
    )
    return Dataset.from_dict({**text, "label": labels, "idx": list(range(n))}, features=features)


def write_texts(name: str | Path, n: int, seed: int = 0) -> None:
    """Write rows of `text_dataset` to a csv file with the columns sentence and label."""
    text_dataset(n, seed=seed).select_columns(["sentence", "label"]).to_csv(name)


def save_masked_lm(folder: str) -> None:
    """A saved masked language model with its tokenizer: what `--model_name_or_path` takes."""
    tiny_masked_lm().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)


def labels_only(*names: str, regression: bool = False):
    """What loading a model reads of a run's data: names of labels, or that it is a regression."""
    return SimpleNamespace(
        label_names=None if regression or not names else list(names),
        problem_type="regression" if regression else "single_label_classification",
    )
