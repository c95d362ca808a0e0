"""Tokenise a `TaskData` by the template of a prompt model."""

from dataclasses import replace
from typing import Any

from datasets import Sequence, Value
from transformers import PreTrainedTokenizerBase

from hf_ft_ext.arguments import PROMPT_DEMO, DataArguments
from hf_ft_ext.data.preprocess import check_length, column_type, tokenize
from hf_ft_ext.data.task_data import TaskData
from hf_ft_ext.errors import InputError
from hf_ft_ext.prompts.configuration import PromptConfig
from hf_ft_ext.prompts.readout import Reading
from hf_ft_ext.prompts.sequences import padded_words
from hf_ft_ext.prompts.templates.defaults import TaskPrompt, known_prompt
from hf_ft_ext.prompts.templates.encode import Ids, PromptEncoder, answer_context
from hf_ft_ext.prompts.templates.template import parse_template
from hf_ft_ext.prompts.templates.words import FIRST_TOKEN, answer_tokens


def tokenize_prompts(
    data: TaskData,
    tokenizer: PreTrainedTokenizerBase,
    data_args: DataArguments,
    config: PromptConfig,
    model_max_length: int | None = None,
    data_seed: int | None = None,
) -> TaskData:
    """As `data.preprocess.tokenize`, but tokenise every row by the model's template.

    Lengths and limits not set by the arguments are the task's own (see `defaults.PROMPTS`).

    Args:
        config: configuration of the model; `template`, `words` and `label2id` are read.
        data_seed: seed of demonstrations.

    Raises:
        InputError: as for `tokenize` and `PromptEncoder`; demonstrations are too long or cannot be drawn.
    """
    encoder = prompt_encoder(data, tokenizer, data_args, config, model_max_length)
    length = encoder.max_length
    options: tuple[int, ...] = ()
    if config.words is None and config.word_scoring != FIRST_TOKEN:
        options = tuple(data.text_columns.index(column) for column in data.task.options)
        if not options:
            raise InputError(
                f"the model was trained on rows with their own options, but {data.task.name!r} has none; pass the "
                "--task_name that it was trained on, or --mapping"
            )
    rows: Any = _PromptRows(encoder, length if data_args.pad_to_max_length else None, options)
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
    """Return the encoder of the model's template, with the limits of the arguments or of the task."""
    task = known_prompt(data.task, Reading(config.reading)) or TaskPrompt(config.template, {})
    length = data_args.max_seq_length
    if length is None:
        length = task.max_seq_length * (2 if data_args.few_shot_type == PROMPT_DEMO else 1)
        length = min(length, model_max_length or length, tokenizer.model_max_length)
    length = check_length(tokenizer, replace(data_args, max_seq_length=length), model_max_length)
    head = task.truncate_head if data_args.truncate_head is None else data_args.truncate_head
    given = data_args.first_sent_limit, data_args.other_sent_limit
    own = task.first_sent_limit, task.other_sent_limit
    first, other = (mine if yours is None else yours for yours, mine in zip(given, own, strict=True))
    encoder = PromptEncoder(
        tokenizer,
        config.template,
        len(data.text_columns),
        length - _room_for_words(config),
        first,
        other,
        head,
        config.reading,
    )
    encoder.check_limits(*given, demonstrations=data_args.few_shot_type == PROMPT_DEMO)
    return encoder


def _room_for_words(config: PromptConfig) -> int:
    """Return how many positions to reserve after a row of a causal model for label words scored as sequences.

    The last token of a word is only predicted, never an input. A row's own options reduce the room of that row only.
    """
    if config.reading != Reading.LAST or config.word_scoring == FIRST_TOKEN or config.word_sequences is None:
        return 0
    return max(map(len, config.word_sequences)) - 1


class _PromptRows:
    """Encodes rows by a template, without demonstrations.

    Args:
        padded: length to which every row is padded; `None` = no padding.
        options: indices of the texts that are the row's answers; they become `option_ids`, padded with `IGNORED`.
    """

    def __init__(self, encoder: PromptEncoder, padded: int | None, options: tuple[int, ...] = ()):
        if padded is not None and encoder.tokenizer.pad_token is None:
            raise InputError("--pad_to_max_length needs a padding token, but the tokenizer has none; leave it out")
        self.encoder, self.padded, self.options = encoder, padded, options
        self.context = answer_context(parse_template(encoder.template)) if options else ""

    def __call__(self, columns: list[list[str]], split: str, indices: list[int]) -> dict[str, list]:
        options: list[list[Ids]] = []
        behind: list[int] | None = None
        if self.options:
            texts = zip(*(columns[i] for i in self.options), strict=True)
            options = [self._option_ids(row, split, i) for row, i in zip(texts, indices, strict=True)]
            if self.encoder.reading is Reading.LAST:  # the options of an encoder-decoder go to its decoder
                behind = [max(map(len, tokens)) - 1 for tokens in options]
        encoded = self.encoder(columns, behind)
        if self.padded is not None:
            encoded = dict(self.encoder.tokenizer.pad(encoded, padding="max_length", max_length=self.padded))
        if self.options:
            encoded["option_ids"] = [padded_words(tokens).tolist() for tokens in options]
        return encoded

    def _option_ids(self, texts: tuple[str, ...], split: str, index: int) -> list[Ids]:
        tokens = [answer_tokens(self.encoder.tokenizer, text, self.context) for text in texts]
        if not all(tokens):
            raise InputError(
                f"row {index} of split '{split}' has an option without tokens: {texts[tokens.index([])]!r}; fill or "
                "remove it"
            )
        # Truncated options could become equal, or score higher because they are shorter.
        longest, encoder = max(map(len, tokens)), self.encoder
        row = encoder.overhead + len(encoder.sentences) if encoder.reading is Reading.LAST else 0
        if row + longest - 1 > encoder.max_length:
            raise InputError(
                f"row {index} of split '{split}' has an option of {longest} tokens, which leaves no room for the row "
                f"in max_seq_length={encoder.max_length}; pass a higher --max_seq_length, or shorten the option"
            )
        return tokens

    def report(self, split: str, so_far: bool) -> None:
        self.encoder.report_cut_rows(split, so_far)

    def features(self, split: str) -> dict[str, Any]:
        columns = {name: Sequence(column_type(name)) for name in self.encoder.columns([[0]], None)}
        return {**columns, "option_ids": Sequence(Sequence(Value("int32")))} if self.options else columns
