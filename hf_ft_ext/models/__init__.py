"""Loading models and tokenizers, with number format and placement of the weights, and wrapping models with peft."""

from hf_ft_ext.models.loading import (
    decoder_max_length,
    load_tokenizer_and_language_model,
    load_tokenizer_and_model,
    model_max_length,
    seeded_init,
)
from hf_ft_ext.models.source import model_label, model_source

__all__ = [
    "decoder_max_length",
    "load_tokenizer_and_language_model",
    "load_tokenizer_and_model",
    "model_label",
    "model_max_length",
    "model_source",
    "seeded_init",
]
