"""`--task_type causal_lm` and `seq2seq_lm`: building a run, additions to trainers, and what encoder-decoders need."""

from hf_ft_ext.launch.language.building import (
    LanguageRun,
    check_language_options,
    load,
    loading_class,
    write_predictions,
)
from hf_ft_ext.launch.language.encoder_decoder import encoder_decoder_rows, token_loss

__all__ = [
    "LanguageRun",
    "check_language_options",
    "encoder_decoder_rows",
    "load",
    "loading_class",
    "token_loss",
    "write_predictions",
]
