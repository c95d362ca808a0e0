"""Loading models and tokenizers, in which form their weights are loaded, and wrapping them with a method of peft."""

from hf_ft_ext.models.loading import (
    load_tokenizer_and_language_model,
    load_tokenizer_and_model,
    model_max_length,
    seeded_init,
)
from hf_ft_ext.models.source import model_label, model_source

__all__ = [
    "load_tokenizer_and_language_model",
    "load_tokenizer_and_model",
    "model_label",
    "model_max_length",
    "model_source",
    "seeded_init",
]
