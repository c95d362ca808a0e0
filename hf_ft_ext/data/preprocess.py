"""Tokenising a `TaskData`: from text columns to `input_ids`, `attention_mask`, `labels`."""

import logging
from dataclasses import replace

from datasets import Dataset, Features, Sequence, Value
from transformers import PreTrainedTokenizerBase

from hf_ft_ext.arguments import DataArguments
from hf_ft_ext.data.loading import LABEL, TaskData
from hf_ft_ext.errors import InputError
from hf_ft_ext.metrics import REGRESSION

# transformers' mark for a tokenizer that sets no limit is about 1e30.
_NO_LIMIT = 10**9

logger = logging.getLogger(__name__)


def tokenize(
    data: TaskData,
    tokenizer: PreTrainedTokenizerBase,
    data_args: DataArguments,
    label2id: dict[str, int] | None = None,
    model_max_length: int | None = None,
) -> TaskData:
    """Return the data with every split tokenised.

    A split then has `input_ids`, `attention_mask`, what else the tokenizer returns
    (`token_type_ids`), and `labels` unless it has none: class ids (int64) or scores (float32). Rows
    are truncated to `max_seq_length` tokens, the longer text of a pair first, and padded only with
    `pad_to_max_length`; else the data collator pads each batch. Truncation and padding settings
    saved in a tokenizer file have no effect. The result is kept in memory: nothing is cached, so
    nothing can be stale.

    Args:
        data: what `load_data` returns.
        tokenizer: of the model.
        data_args: `max_seq_length` and `pad_to_max_length` are read.
        label2id: the model's own labels. If they are the data's names, case aside, in another order,
            the labels and `label_names` take the model's order; else they keep the data's.
        model_max_length: tokens that the model has positions for, special tokens included.

    Raises:
        InputError: `max_seq_length` is beyond the model's or tokenizer's limit or leaves no room for
            text, there is no token to pad with, or a text is missing.
    """
    length = _check_length(tokenizer, data_args, model_max_length, pair=len(data.text_columns) == 2)
    if data_args.pad_to_max_length and tokenizer.pad_token is None:
        raise InputError("--pad_to_max_length needs a padding token, but the tokenizer has none; leave it out")
    names, new_ids = _label_order(data.label_names, label2id)

    def convert(split: str, rows: Dataset) -> Dataset:
        return _tokenize_split(split, rows, data, tokenizer, length, data_args.pad_to_max_length, new_ids)

    return replace(
        data,
        train=None if data.train is None else convert("train", data.train),
        validation={name: convert(name, rows) for name, rows in data.validation.items()},
        test={name: convert(name, rows) for name, rows in data.test.items()},
        label_names=names,
    )


def _check_length(tokenizer, data_args: DataArguments, model_max_length: int | None, pair: bool) -> int:
    length = data_args.max_seq_length
    limits = {"the model": model_max_length, "the tokenizer": tokenizer.model_max_length}
    limits = {who: limit for who, limit in limits.items() if limit is not None and limit < _NO_LIMIT}
    if limits:
        who, limit = min(limits.items(), key=lambda item: item[1])
        if length > limit:
            raise InputError(
                f"--max_seq_length {length} is more than {who} can take ({limit} tokens); pass "
                f"--max_seq_length {limit} or less"
            )
    least = tokenizer.num_special_tokens_to_add(pair) + (2 if pair else 1)
    if length < least:
        raise InputError(f"--max_seq_length {length} leaves no room for text; pass {least} or more")
    return length


def _label_order(
    names: list[str] | None, label2id: dict[str, int] | None
) -> tuple[list[str] | None, list[int] | None]:
    """Return the label names in the model's order and the new id of each old one (`None`: as they are)."""
    if not names or not label2id:
        return names, None
    model_ids = {str(name).lower(): int(i) for name, i in label2id.items()}
    lowered = [name.lower() for name in names]
    same = set(lowered) == set(model_ids) and len(set(lowered)) == len(names) == len(label2id)
    if not same or sorted(model_ids.values()) != list(range(len(names))):
        return names, None
    new_ids = [model_ids[name] for name in lowered]
    if new_ids == list(range(len(names))):
        return names, None
    ordered = [name for _, name in sorted(zip(new_ids, names, strict=True))]
    logger.info("labels take the model's order: %s", ", ".join(ordered))
    return ordered, new_ids


def _tokenize_split(split, rows, data: TaskData, tokenizer, length, pad, new_ids) -> Dataset:
    has_labels = LABEL in rows.column_names
    regression = data.problem_type == REGRESSION

    def convert(batch: dict[str, list], indices: list[int]) -> dict[str, list]:
        texts = [batch[column] for column in data.text_columns]
        for column, values in zip(data.text_columns, texts, strict=True):
            if None in values:
                row = indices[values.index(None)]
                raise InputError(
                    f"column '{column}' of split '{split}' has no text in row {row} (counted from 0 among the rows in "
                    "use); fill or remove it"
                )
        encoded = dict(tokenizer(*texts, truncation=True, max_length=length, padding="max_length" if pad else False))
        if has_labels:
            labels = batch[LABEL]
            encoded["labels"] = [new_ids[label] for label in labels] if new_ids and not regression else labels
        return encoded

    # Probing one row tells which columns this tokenizer returns, so that labels get their type from the start.
    columns = list(tokenizer(*[["a"] for _ in data.text_columns], truncation=True, max_length=length))
    features = {column: Sequence(Value("int32" if column == "input_ids" else "int8")) for column in columns}
    if has_labels:
        features["labels"] = Value("float32" if regression else "int64")
    return rows.map(
        convert,
        batched=True,
        with_indices=True,
        remove_columns=rows.column_names,
        features=Features(features),
        keep_in_memory=True,
        desc=f"Tokenizing {split}",
    )
