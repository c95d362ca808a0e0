"""Tokenising a `TaskData` by the template of a prompt model."""

from dataclasses import replace
from typing import Any

from datasets import Sequence
from transformers import PreTrainedTokenizerBase

from hf_ft_ext.arguments import PROMPT_DEMO, DataArguments
from hf_ft_ext.data.preprocess import check_length, column_type, tokenize
from hf_ft_ext.data.task_data import TaskData
from hf_ft_ext.errors import InputError
from hf_ft_ext.prompts.configuration import PromptConfig
from hf_ft_ext.prompts.defaults import PROMPTS, TaskPrompt
from hf_ft_ext.prompts.encode import PromptEncoder


def tokenize_prompts(
    data: TaskData,
    tokenizer: PreTrainedTokenizerBase,
    data_args: DataArguments,
    config: PromptConfig,
    model_max_length: int | None = None,
    data_seed: int | None = None,
) -> TaskData:
    """As `data.preprocess.tokenize`, every row by the model's template.

    Lengths and limits that the arguments leave open are the task's own (see `defaults.PROMPTS`).

    Args:
        config: of the model; `template`, `words` and `label2id` are read.
        data_seed: of demonstrations.

    Raises:
        InputError: as `tokenize` and `PromptEncoder`; demonstrations that are too long or cannot be drawn.
    """
    encoder = prompt_encoder(data, tokenizer, data_args, config, model_max_length)
    length = encoder.max_length
    rows: Any = _PromptRows(encoder, length if data_args.pad_to_max_length else None)
    if data_args.few_shot_type == PROMPT_DEMO:
        from hf_ft_ext.prompts.demonstrations import DemonstrationRows

        rows = DemonstrationRows(encoder, data, data_args, config, data_seed)
    return tokenize(data, tokenizer, data_args, label2id=config.label2id, encoder=rows)


def prompt_encoder(
    data: TaskData,
    tokenizer: PreTrainedTokenizerBase,
    data_args: DataArguments,
    config: PromptConfig,
    model_max_length: int | None = None,
) -> PromptEncoder:
    """The encoder of the model's template, with the limits of the arguments or of the task."""
    task = PROMPTS.get(data.task.name) or TaskPrompt(config.template, {})
    length = data_args.max_seq_length
    if length is None:
        length = task.max_seq_length * (2 if data_args.few_shot_type == PROMPT_DEMO else 1)
        length = min(length, model_max_length or length, tokenizer.model_max_length)
    length = check_length(tokenizer, replace(data_args, max_seq_length=length), model_max_length)
    given = data_args.first_sent_limit, data_args.other_sent_limit
    own = task.first_sent_limit, task.other_sent_limit
    first, other = (mine if yours is None else yours for yours, mine in zip(given, own, strict=True))
    encoder = PromptEncoder(
        tokenizer, config.template, len(data.text_columns), length, first, other, data_args.truncate_head
    )
    encoder.check_limits(*given)
    return encoder


class _PromptRows:
    """Rows by a template, without demonstrations."""

    def __init__(self, encoder: PromptEncoder, padded: int | None):
        if padded is not None and encoder.tokenizer.pad_token is None:
            raise InputError("--pad_to_max_length needs a padding token, but the tokenizer has none; leave it out")
        self.encoder, self.padded = encoder, padded

    def __call__(self, columns: list[list[str]], split: str, indices: list[int]) -> dict[str, list]:
        encoded = self.encoder(columns)
        if self.padded is not None:
            encoded = dict(self.encoder.tokenizer.pad(encoded, padding="max_length", max_length=self.padded))
        return encoded

    def features(self, split: str) -> dict[str, Any]:
        return {name: Sequence(column_type(name)) for name in self.encoder.columns([[0]], None)}
