"""Build the parts of a prompt model: the pretrained language model, and the configuration with template and words."""

from collections.abc import Sequence
from typing import Any

from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerBase

from hf_ft_ext.errors import InputError
from hf_ft_ext.problem_types import CLASSIFICATION, REGRESSION
from hf_ft_ext.prompts.configuration import PromptConfig
from hf_ft_ext.prompts.readout import Reading, reading_of
from hf_ft_ext.prompts.templates.encode import answer_context, answer_id, row_end
from hf_ft_ext.prompts.templates.template import parse_template
from hf_ft_ext.prompts.templates.words import FIRST_TOKEN, check_word_scoring, word_tokens


def load_language_model(name: str, **kwargs: Any) -> PreTrainedModel:
    """Load the pretrained language model `name`: masked, causal or encoder-decoder.

    Args:
        name: Hub id or folder.
        kwargs: for `from_pretrained`; `config` if it is already loaded.

    Raises:
        InputError: it is not a language model, or its weights lack the head.
    """
    config = kwargs.pop("config", None) or AutoConfig.from_pretrained(name, **kwargs)
    kind = reading_of(config, name).auto_class
    model, info = kind.from_pretrained(name, config=config, output_loading_info=True, **kwargs)
    tied = set(getattr(model, "all_tied_weights_keys", {}))
    missing = sorted(set(info["missing_keys"]) - tied)
    if missing:
        raise InputError(
            f"the weights of model {name!r} have no language-model head ({missing[0]} is missing); pass the "
            "pretrained language model itself, not a classifier or sentence encoder derived from it"
        )
    return model


def prompt_config(
    language_model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    template: str,
    words: Sequence[str] | None,
    labels: Sequence[str] | None,
    bounds: tuple[float, float] | None,
    untie_words: bool,
    word_scoring: str,
) -> PromptConfig:
    """Return the configuration of a prompt model; arguments and errors as for `from_language_model`."""
    inner, name = language_model.config, language_model.name_or_path or type(language_model).__name__
    reading = reading_of(inner, name)
    if bounds is not None and len(words or ()) != 2:
        passed = f"{len(words)} were passed: {', '.join(words)}" if words else "none were passed"
        raise InputError(f"a regression has two words, but {passed}; pass one for each end of the scale")
    parts = parse_template(template, reading=reading.value)
    check_word_scoring(word_scoring, reading, untie_words)
    if words is None:
        if reading is Reading.MASK or not labels:
            raise InputError(
                "without words each row needs its own options, a causal language model or encoder-decoder, and label "
                "names; pass words"
            )
        tokens, names = None, list(labels)
        word_scoring = word_scoring if word_scoring != FIRST_TOKEN else "sequence"
    else:
        before = None if reading is Reading.MASK else answer_context(parts)
        tokens, names = word_tokens(tokenizer, words, before, word_scoring), list(labels or words)
    return PromptConfig(
        masked_lm=inner,
        template=template,
        reading=reading.value,
        word_scoring=word_scoring,
        words=None if words is None else list(words),
        word_ids=None if tokens is None else [token[0] for token in tokens],
        word_sequences=tokens,
        row_end=row_end(tokenizer, template, reading),
        mask_token_id=answer_id(tokenizer, parts, reading),
        decoder_prefix=_decoder_prefix(inner, tokenizer, parts, name) if reading is Reading.DECODER else None,
        bounds=None if bounds is None else list(bounds),
        pad_token_id=tokenizer.pad_token_id,
        problem_type=CLASSIFICATION if bounds is None else REGRESSION,
        id2label=dict(enumerate(names)) if bounds is None else {0: "LABEL_0"},
        label2id={label: i for i, label in enumerate(names)} if bounds is None else {"LABEL_0": 0},
        dtype=language_model.dtype,
        # without them, the configuration of the language model, which is a part of this one, would lose its own
        attn_implementation=inner._attn_implementation,
        experts_implementation=inner._experts_implementation,
    )


def _decoder_prefix(config: Any, tokenizer: PreTrainedTokenizerBase, parts: list, name: str) -> list[int]:
    """Return the decoder tokens before the answer: the start token, then the sentinel of the template, if any."""
    start = config.decoder_start_token_id
    start = getattr(config, "bos_token_id", None) if start is None else start
    if start is None:
        raise InputError(f"model {name!r} does not say with which token its decoder starts (decoder_start_token_id)")
    sentinel = answer_id(tokenizer, parts, Reading.DECODER)
    return [start] if sentinel is None else [start, sentinel]
