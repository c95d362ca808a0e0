"""Load a prompt model from arguments and data: built from a language model, or a saved one."""

import logging
from dataclasses import fields
from typing import Any

from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from hf_ft_ext.arguments import AUTO, FINETUNE, PROMPT_DEMO, DataArguments, FewShotArguments
from hf_ft_ext.data.few_shot import label_bounds
from hf_ft_ext.data.task_data import TaskData
from hf_ft_ext.errors import InputError
from hf_ft_ext.problem_types import MULTI_LABEL, REGRESSION
from hf_ft_ext.prompts.configuration import PromptConfig
from hf_ft_ext.prompts.model import PromptForSequenceClassification
from hf_ft_ext.prompts.readout import Reading, reading_of
from hf_ft_ext.prompts.templates.defaults import task_prompt
from hf_ft_ext.prompts.templates.encode import answer_context, row_end
from hf_ft_ext.prompts.templates.template import parse_template
from hf_ft_ext.prompts.templates.words import FIRST_TOKEN, check_word_scoring, parse_mapping, word_tokens

_PROMPT_OPTIONS = (
    "template", "mapping", "word_scoring", "calibrate", "first_sent_limit", "other_sent_limit", "truncate_head",
    "untie_words",
)  # fmt: skip
_DEMONSTRATION_OPTIONS = ("num_demo", "num_sample", "demo_filter", "demo_filter_model")

logger = logging.getLogger(__name__)


def check_prompt_options(data_args: DataArguments) -> None:
    """Refuse options of prompts or demonstrations that `few_shot_type` does not use.

    Raises:
        InputError: such an option is set.
    """
    defaults = {f.name: f.default for f in fields(FewShotArguments)}
    unused = {PROMPT_DEMO: ()}.get(data_args.few_shot_type, _DEMONSTRATION_OPTIONS)
    if data_args.few_shot_type == FINETUNE:
        unused = (*_PROMPT_OPTIONS, *unused)
    for name in unused:
        if getattr(data_args, name) != defaults[name]:
            kind = "prompt" if name in _PROMPT_OPTIONS else PROMPT_DEMO
            raise InputError(
                f"--{name} {getattr(data_args, name)} is for prompts, but few_shot_type={data_args.few_shot_type} "
                f"does not use it; pass --few_shot_type {kind}, or leave it out"
            )


def load_prompt_model(
    name: str,
    config: PreTrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
    data: TaskData,
    data_args: DataArguments,
    adapter: str | None = None,
    **hub: Any,
) -> PromptForSequenceClassification:
    """Load a prompt model for the labels of `data`.

    A saved prompt model keeps its template and words unless the arguments give others.

    Args:
        name: Hub id or folder.
        config: configuration of the model in `name`, or of the adapter.
        adapter: folder of an adapter of a prompt model: load its base model, without the adapter.
        hub: arguments for `from_pretrained`.

    Raises:
        InputError: template, mapping, labels and model do not match.
    """
    if data.problem_type == MULTI_LABEL:
        raise InputError(
            "a prompt predicts one label per row, by one word at the mask, but this data has several labels per row; "
            "leave --few_shot_type out, or pass a model with a classification head"
        )
    if isinstance(config, PromptConfig):
        return _load_saved(name, config, tokenizer, data, data_args, adapter, **hub)
    return _load_fresh(name, config, tokenizer, data, data_args, **hub)


def _load_fresh(name, config, tokenizer, data: TaskData, data_args: DataArguments, **hub):
    reading = reading_of(config, name)
    template, mapping = task_prompt(data.task, data_args.template, data_args.mapping, reading)
    # check the template before the weights are loaded
    parse_template(template, len(data.text_columns), reading)
    labels, words = _labels(data), None
    scoring = data_args.word_scoring or FIRST_TOKEN
    check_word_scoring(scoring, reading, data_args.untie_words)
    if data.task.options and data_args.mapping is None:
        if reading is Reading.MASK:
            raise InputError(
                f"each row of task {data.task.name!r} has its own options, which the single mask of a masked language "
                "model cannot hold; pass a causal language model or an encoder-decoder, or leave --few_shot_type out"
            )
        if data_args.few_shot_type == PROMPT_DEMO:
            raise InputError(
                f"each row of task {data.task.name!r} has its own options, but demonstrations need common label "
                "words; pass --few_shot_type prompt"
            )
        logger.info("Prompt: %s, followed by each of the row's options.", template)
    else:
        words = parse_mapping(mapping, labels)
        logger.info("Prompt: %s, label words: %s.", template, ", ".join(words))
    return PromptForSequenceClassification.from_language_model(
        name,
        tokenizer,
        template,
        words,
        labels,
        bounds=label_bounds(data) if labels is None else None,
        untie_words=data_args.untie_words,
        word_scoring=scoring,
        config=config,
        **hub,
    )


def _labels(data: TaskData) -> list[str] | None:
    """Return the label names by id; `None` for a regression."""
    if data.problem_type == REGRESSION:
        return None
    if data.label_names is None:
        raise InputError(
            f"the labels of {data.task.name!r} are unknown, so they cannot be mapped to words; pass --task_name, "
            "labelled data, or a model that was saved with its words"
        )
    return data.label_names


def _load_saved(name, config, tokenizer, data: TaskData, data_args: DataArguments, adapter: str | None, **hub):
    if adapter is None:
        model = PromptForSequenceClassification.from_pretrained(name, config=config, **hub)
    else:
        if hub.get("dtype") == AUTO:  # the trained model's, not that of the base model's files
            hub.pop("dtype")
        model = PromptForSequenceClassification.from_adapter(adapter, **hub)
        config = model.config
    template = config.template if data_args.template is None else data_args.template
    parts = parse_template(template, len(data.text_columns), config.reading)
    if data_args.word_scoring is not None:
        check_word_scoring(data_args.word_scoring, Reading(config.reading), config.untied_words)
        config.word_scoring = data_args.word_scoring
    if (config.problem_type == REGRESSION) != (data.problem_type == REGRESSION):
        raise InputError(f"model {name!r} was saved for {config.problem_type}, but this data is {data.problem_type}")
    if data_args.mapping is not None:
        if config.untied_words:
            raise InputError(
                f"model {name!r} has output rows of its own for the words {', '.join(config.words)}; leave --mapping "
                "out, or start from the masked language model"
            )
        labels = _labels(data)
        config.words = parse_mapping(data_args.mapping, labels)
        if labels is not None:
            config.id2label = dict(enumerate(labels))
            config.label2id = {label: i for i, label in enumerate(labels)}
    elif data.label_names is not None:
        own, names = {str(label).lower() for label in config.label2id}, {n.lower() for n in data.label_names}
        if own != names and not (data.train is None and names < own):  # rows to evaluate may lack some of the labels
            raise InputError(
                f"model {name!r} was saved with words for the labels {', '.join(config.label2id)}, but this data has "
                f"{', '.join(data.label_names)}; pass --mapping, or another model"
            )
    if (data_args.mapping or data_args.word_scoring or data_args.template) and config.words is not None:
        # The tokens of a word depend on the text before it; which words are valid depends on the scoring.
        before = None if config.reading == Reading.MASK else answer_context(parts)
        config.word_sequences = word_tokens(tokenizer, config.words, before, config.word_scoring)
        config.word_ids = [tokens[0] for tokens in config.word_sequences]
        config.word_bias = None
    if data_args.template is not None:
        config.row_end = row_end(tokenizer, template, Reading(config.reading))
    model.config.template = template
    if data_args.untie_words:
        model.untie_label_words()
    return model
