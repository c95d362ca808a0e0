"""Tokenise a `TaskData`: from text columns to `input_ids`, `attention_mask` and `labels`."""

import logging
from dataclasses import replace
from typing import Any, Protocol

from datasets import Dataset, Features, IterableDataset, Sequence, Value
from transformers import PreTrainedTokenizerBase

from hf_ft_ext.arguments import DEFAULT_LENGTH, DataArguments
from hf_ft_ext.data import multi_label as ml
from hf_ft_ext.data.task_data import LABEL, TaskData
from hf_ft_ext.errors import InputError
from hf_ft_ext.problem_types import MULTI_LABEL, REGRESSION

# transformers gives a tokenizer without a length limit a limit of about 1e30.
_NO_LIMIT = 10**9
_STREAMED = 256  # rows of a stream that are tokenised at a time

logger = logging.getLogger(__name__)


class RowEncoder(Protocol):
    """Converts texts into the columns that a model takes."""

    def __call__(self, columns: list[list[str]], split: str, indices: list[int]) -> dict[str, list]:
        """Return the columns of the rows `indices` of `split`; `columns` holds one list for each text of a row."""

    def features(self, split: str) -> dict[str, Any]:
        """Return the names and types of the columns."""

    def report(self, split: str, so_far: bool) -> None:
        """Log about the rows of `split`: after all of them or, with `so_far`, after some rows of a stream."""


def tokenize(
    data: TaskData,
    tokenizer: PreTrainedTokenizerBase,
    data_args: DataArguments,
    label2id: dict[str, int] | None = None,
    model_max_length: int | None = None,
    encoder: RowEncoder | None = None,
) -> TaskData:
    """Return the data with every split tokenised.

    A split then has `input_ids`, `attention_mask`, other columns of the tokenizer (`token_type_ids`), and `labels` if
    it is labelled: class ids (int64), scores (float32), or 0 and 1 for each label (float32). Rows are truncated to
    `max_seq_length` tokens, the longer text of a pair first. They are padded only with `pad_to_max_length`; otherwise
    the data collator pads each batch. Truncation and padding settings saved in a tokenizer file have no effect. The
    result is kept in memory and not cached. The rows of a stream are tokenised when they are read.

    Args:
        data: the result of `load_data`.
        tokenizer: of the model.
        data_args: `max_seq_length` and `pad_to_max_length` are read.
        label2id: the model's own labels. If they contain the data's names (ignoring case), `labels` and `label_names`
            become the model's; otherwise they keep the data's.
        model_max_length: number of positions of the model, special tokens included.
        encoder: tokenises the rows; `None` = as single texts or pairs.

    Raises:
        InputError: `max_seq_length` exceeds the limit of the model or tokenizer or leaves no room for text, the
            padding token is missing, or a text is missing.
    """
    if encoder is None:
        encoder = _PlainEncoder(tokenizer, data_args, model_max_length, len(data.text_columns))
    names, new_ids = _label_order(data.label_names, label2id)

    def convert(split: str, rows: Any) -> Any:
        return _tokenize_split(split, rows, data, encoder, new_ids, len(names or ()))

    return replace(
        data,
        train=None if data.train is None else convert("train", data.train),
        validation={name: convert(name, rows) for name, rows in data.validation.items()},
        test={name: convert(name, rows) for name, rows in data.test.items()},
        label_names=names,
    )


def column_type(name: str) -> Value:
    """Return the type of the entries of a tokenised column."""
    return Value("int32" if name == "input_ids" else "int8")


def check_length(tokenizer: PreTrainedTokenizerBase, data_args: DataArguments, model_max_length: int | None) -> int:
    """Return `max_seq_length` after checking it against the limits of model and tokenizer.

    Without one, the length is the default, or the smaller limit, which is logged.

    Raises:
        InputError: it exceeds one of them.
    """
    length = data_args.max_seq_length
    limits = {"the model": model_max_length, "the tokenizer": tokenizer.model_max_length}
    limits = {who: limit for who, limit in limits.items() if limit is not None and limit < _NO_LIMIT}
    who, limit = min(limits.items(), key=lambda item: item[1], default=("", _NO_LIMIT))
    if length is None and limit < DEFAULT_LENGTH:
        logger.info("Rows are cut to %d tokens, as many as %s can take (--max_seq_length).", limit, who)
        return limit
    length = DEFAULT_LENGTH if length is None else length
    if length > limit:
        raise InputError(
            f"--max_seq_length {length} is more than {who} can take ({limit} tokens); pass "
            f"--max_seq_length {limit} or less"
        )
    return length


def own_special_ids(tokenizer: PreTrainedTokenizerBase, as_target: bool = False) -> tuple[list[int], list[int]]:
    """Return the special tokens that the tokenizer adds before and after a text (GPT-2: none, T5: an end token).

    Args:
        as_target: for a text to generate, where translation models have another language code.
    """
    text = {"text_target" if as_target else "text": "a"}
    whole, bare = tokenizer(**text)["input_ids"], tokenizer(**text, add_special_tokens=False)["input_ids"]
    for start in range(len(whole) - len(bare) + 1):
        if bare and whole[start : start + len(bare)] == bare:
            return list(whole[:start]), list(whole[start + len(bare) :])
    return [], []


def without_beginning(ids: list[int], length: int, start: list[int]) -> list[int]:
    """Return the last tokens of a prompt, at most `length` in all, after the tokenizer's `start` tokens."""
    if len(ids) <= length:
        return ids
    kept = start if ids[: len(start)] == start and len(start) < length else []
    return [*kept, *ids[len(ids) - length + len(kept) :]]


class _PlainEncoder:
    """Tokenises single texts or pairs in the tokenizer's own format."""

    def __init__(self, tokenizer, data_args: DataArguments, model_max_length: int | None, texts: int):
        length = check_length(tokenizer, data_args, model_max_length)
        texts = min(texts, 2)
        least = tokenizer.num_special_tokens_to_add(texts == 2) + texts
        if length < least:
            raise InputError(f"--max_seq_length {length} leaves no room for text; pass {least} or more")
        if data_args.pad_to_max_length and tokenizer.pad_token is None:
            raise InputError("--pad_to_max_length needs a padding token, but the tokenizer has none; leave it out")
        self.tokenizer, self.texts = tokenizer, texts
        padding = "max_length" if data_args.pad_to_max_length else False
        self.options = {"truncation": True, "max_length": length, "padding": padding}
        self.logged: set[str] = set()  # splits

    def __call__(self, columns: list[list[str]], split: str, indices: list[int]) -> dict[str, list]:
        if len(columns) > 2:  # tokenizers take at most two texts: join the others to the second
            columns = [columns[0], [" ".join(texts) for texts in zip(*columns[1:], strict=True)]]
        encoded = dict(self.tokenizer(*columns, **self.options))
        # Models do not accept sequences of length 0, which tokenizers without special tokens (GPT-2) give for "".
        for row, ids in enumerate(encoded["input_ids"]):
            attended = encoded["attention_mask"][row] if "attention_mask" in encoded else [1] * len(ids)
            if not any(attended):
                self._fill(encoded, row, split, indices[row])
        return encoded

    def _fill(self, encoded: dict[str, list], row: int, split: str, index: int) -> None:
        """Give an empty row one token: the end-of-text token, or else a token for the beginning or a separator."""
        name = next((n for n in ("eos_token", "bos_token", "sep_token") if getattr(self.tokenizer, n)), None)
        if name is None:
            raise InputError(
                f"row {index} of split '{split}' (counted from 0 among the rows in use) has no tokens, and the "
                "tokenizer has no end-of-text token to put there; fill or remove the row"
            )
        if split not in self.logged:
            self.logged.add(split)
            logger.warning(
                "split '%s': texts without tokens, such as row %d, are given the tokenizer's %s", split, index, name
            )
        one = {"input_ids": getattr(self.tokenizer, f"{name}_id"), "attention_mask": 1}
        for column, rows in encoded.items():
            value = one.get(column, 0)
            if not rows[row]:
                rows[row] = [value]
            elif column in one:
                position = 0 if self.tokenizer.padding_side == "right" else len(rows[row]) - 1
                rows[row][position] = value

    def features(self, split: str) -> dict[str, Any]:
        # Tokenise one row to find the columns of this tokenizer, so that all column types are known from the start.
        return {name: Sequence(column_type(name)) for name in self.tokenizer(*[["a"]] * self.texts, **self.options)}

    def report(self, split: str, so_far: bool) -> None:
        """Do nothing: texts without tokens are logged as they are tokenised."""


def _label_order(
    names: list[str] | None, label2id: dict[str, int] | None
) -> tuple[list[str] | None, list[int] | None]:
    """Return the label names in the model's order and the new id of each old one (`None`: unchanged).

    The model may have labels that the data lacks; their names are the model's own.
    """
    if not names or not label2id:
        return names, None
    model_ids = {str(name).lower(): int(i) for name, i in label2id.items()}
    ids = sorted(model_ids.values())
    old_ids = {name.lower(): i for i, name in enumerate(names)}
    if len(old_ids) < len(names) or not set(old_ids) <= set(model_ids) or ids != list(range(len(label2id))):
        return names, None
    new_ids = [model_ids[name.lower()] for name in names]
    if new_ids == ids:
        return names, None
    by_id = sorted((int(i), str(name)) for name, i in label2id.items())
    ordered = [names[old_ids[name.lower()]] if name.lower() in old_ids else name for _, name in by_id]
    logger.info("labels take the model's order: %s", ", ".join(ordered))
    return ordered, new_ids


def _moved(row: list[float], new_ids: list[int], count: int) -> list[float]:
    """Return 0 or 1 for each of the model's `count` labels; labels that the data lacks are 0."""
    moved = [0.0] * count
    for i, value in zip(new_ids, row, strict=True):
        moved[i] = value
    return moved


def _tokenize_split(
    split: str, rows: Dataset | IterableDataset, data: TaskData, encoder: RowEncoder, new_ids, count: int
) -> Dataset | IterableDataset:
    has_labels = LABEL in rows.column_names
    regression, several = data.problem_type == REGRESSION, data.problem_type == MULTI_LABEL

    streamed = isinstance(rows, IterableDataset)

    def convert(batch: dict[str, list], indices: list[int]) -> dict[str, list]:
        texts = [batch[column] for column in data.text_columns]
        for column, values in zip(data.text_columns, texts, strict=True):
            if None in values:
                row = indices[values.index(None)]
                raise InputError(
                    f"column '{column}' of split '{split}' has no text in row {row} (counted from 0 among the rows in "
                    "use); fill or remove it"
                )
        encoded = encoder(texts, split, indices)
        if has_labels:
            labels = batch[LABEL]
            if several and new_ids:
                encoded["labels"] = [_moved(row, new_ids, count) for row in labels]
            else:
                encoded["labels"] = [new_ids[label] for label in labels] if new_ids and not regression else labels
        if streamed:
            encoder.report(split, so_far=True)
        return encoded

    features = encoder.features(split)
    if has_labels:
        features["labels"] = ml.feature(count) if several else Value("float32" if regression else "int64")
    options = {"batched": True, "with_indices": True, "remove_columns": rows.column_names}
    if streamed:
        return rows.map(convert, batch_size=_STREAMED, features=Features(features), **options)
    made = rows.map(convert, features=Features(features), keep_in_memory=True, desc=f"Tokenizing {split}", **options)
    encoder.report(split, so_far=False)
    return made
