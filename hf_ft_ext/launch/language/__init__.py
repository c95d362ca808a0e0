"""`--task_type causal_lm` and `seq2seq_lm`: building a run (`building`) and its additions to trainers (`trainers`)."""

from hf_ft_ext.launch.language.building import (
    LanguageRun,
    check_language_options,
    encoder_decoder_rows,
    load,
    loading_class,
    token_loss,
    write_predictions,
)

__all__ = [
    "LanguageRun",
    "check_language_options",
    "encoder_decoder_rows",
    "load",
    "loading_class",
    "token_loss",
    "write_predictions",
]
