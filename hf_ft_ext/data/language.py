"""Data of language modelling and instruction tuning: text, prompt and completion, or messages."""

import json
import logging
import reprlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any

from datasets import Dataset

from hf_ft_ext.arguments import STRATIFIED, DataArguments
from hf_ft_ext.data.origins import Origins, final_origins, own_data_name, whole_splits
from hf_ft_ext.data.samples import check_sampling, draw_text, sampled
from hf_ft_ext.data.sources import open_as_stored, open_source
from hf_ft_ext.data.splits import find_roles
from hf_ft_ext.data.tasks import SUPERGLUE_ID, Task
from hf_ft_ext.errors import InputError, did_you_mean

logger = logging.getLogger(__name__)

REFERENCES = "references"  # column of all answers that count as right, where a row has several
TEMPLATE_COLUMNS = ("tools", "chat_template_kwargs")  # of messages, for the chat template, as in trl


class Form(StrEnum):
    """The kind of columns that a row has."""

    TEXT = "text"
    PROMPT = "prompt and completion"
    MESSAGES = "messages"


_COLUMNS = {Form.TEXT: ("text",), Form.PROMPT: ("prompt", "completion"), Form.MESSAGES: ("messages",)}


@dataclass
class LanguageData:
    """The data of a language-modelling run, in trl's columns.

    Attributes:
        task: the known task, or one created for own data.
        form: the form of all rows.
        train: may be `None`; the other splits may be empty.
        validation: by split name, in order.
        test: by split name, in order.
        origins: of every split, by role and name.
        tokenized: tokenised validation rows of an encoder-decoder; trl tokenises those of a causal model itself.
    """

    task: Task
    form: Form
    train: Dataset | None
    validation: dict[str, Dataset]
    test: dict[str, Dataset]
    origins: Origins = field(default_factory=dict)
    tokenized: dict[str, Dataset] = field(default_factory=dict)


@dataclass(frozen=True)
class LanguageTask:
    """A task whose answers are generated, not chosen from classes.

    Attributes:
        hub_id: of the data set.
        prepare: converts its rows to the columns of a form.
        hub_config: configuration of the data set.
    """

    hub_id: str
    prepare: Callable[[Dataset], Dataset]
    hub_config: str | None = None


def _rows_from(convert: Callable[[dict[str, Any]], dict[str, Any]]) -> Callable[[Dataset], Dataset]:
    def prepare(data: Dataset) -> Dataset:
        try:
            return data.map(convert, remove_columns=data.column_names, keep_in_memory=True)
        except KeyError as error:
            raise InputError(
                f"the data has no column {error}, which this task needs; its columns are "
                f"{', '.join(data.column_names)}: leave --task_name out and pass prompt and completion"
            ) from error

    return prepare


def _answered(prompt: str, answers: Sequence[str]) -> dict[str, Any]:
    answers = list(dict.fromkeys(text for text in answers if text.strip()))
    # a test split without answers keeps its prompts
    return {"prompt": prompt, "completion": f" {answers[0]}" if answers else "", REFERENCES: answers}


def _squad(row: dict[str, Any]) -> dict[str, Any]:
    prompt = f"Title: {row['title']}\nContext: {row['context']}\nQuestion: {row['question'].strip()}\nAnswer:"
    return _answered(prompt, row["answers"]["text"])


def _drop(row: dict[str, Any]) -> dict[str, Any]:
    prompt = f"Passage: {row['passage']}\nQuestion: {row['question'].strip()}\nAnswer:"
    return _answered(prompt, row["answers_spans"]["spans"])


def _record(row: dict[str, Any]) -> dict[str, Any]:
    prompt = f'{row["passage"]}\n{row["query"]}\nQuestion: what is the "@placeholder"\nAnswer:'
    return _answered(prompt, row["answers"])


def _dialogues(messages: Dataset) -> Dataset:
    """Return one text for each reply of the assistant: all turns from the first prompt to this reply."""
    missing = {"message_id", "parent_id", "role", "text"} - set(messages.column_names)
    if missing:
        raise InputError(
            f"the data has no column '{min(missing)}', only {', '.join(messages.column_names)}; openassistant needs "
            "the message trees of OpenAssistant/oasst1"
        )
    known = {row["message_id"]: row for row in messages}

    def texts() -> Iterator[str]:
        for row in known.values():
            if row["role"] != "assistant":
                continue
            turns = [row]
            while (parent := known.get(turns[0]["parent_id"])) is not None:
                turns.insert(0, parent)
            yield "\n".join(f"{'Assistant' if t['role'] == 'assistant' else 'User'}: {t['text']}" for t in turns)

    return Dataset.from_dict({"text": list(texts())})


# Prompts of MeZO (Malladi et al., NeurIPS 2023, arXiv 2305.17333); dialogues as in SparseGrad's LLaMA-2 experiment.
LANGUAGE_TASKS: dict[str, LanguageTask] = {
    "squad": LanguageTask("rajpurkar/squad", _rows_from(_squad)),
    "drop": LanguageTask("ucinlp/drop", _rows_from(_drop)),
    "record": LanguageTask(SUPERGLUE_ID, _rows_from(_record), "record"),
    "openassistant": LanguageTask("OpenAssistant/oasst1", _dialogues),
}


def load_language_data(
    data_args: DataArguments, *, cache_dir: str | None = None, token: str | None = None, data_seed: int | None = None
) -> LanguageData:
    """Load rows of text, of prompt and completion, or of messages.

    The data comes from own files, `dataset_name` or the Hub id of a task in `LANGUAGE_TASKS`. Only the columns of the
    form and `references` are kept.

    Args:
        data_args: what to load.
        cache_dir: where downloads and converted files are kept; `None` = the Hub's cache.
        token: Hub access token.
        data_seed: seed of `sample`; `None` = 13.

    Raises:
        InputError: the data cannot be read, its columns fit no form or two forms, or a row has no text.
    """
    task = None
    if data_args.task_name is not None:
        if data_args.task_name not in LANGUAGE_TASKS:
            raise InputError(
                f"task {data_args.task_name!r} is not a language-modelling task"
                f"{did_you_mean(data_args.task_name, LANGUAGE_TASKS)}; known: {', '.join(LANGUAGE_TASKS)}. Leave "
                "--task_type or --task_name out"
            )
        task = LANGUAGE_TASKS[data_args.task_name]
    for option in ("label_column", "positive_label", "multi_label_threshold", "problem_type", "num_k", "metric"):
        if getattr(data_args, option) is not None:
            raise InputError(
                f"--{option} {getattr(data_args, option)} is about classes, and a language model writes text; leave "
                "it out, or --task_type"
            )
    if data_args.streaming:
        raise InputError(
            "--streaming: rows of a language model are checked and counted before training, so they cannot be a "
            "stream; leave it out: data sets are read from disk by memory mapping, and need not fit into memory"
        )
    if data_args.pad_to_max_length:
        raise InputError("--pad_to_max_length is not for --task_type causal_lm and seq2seq_lm; leave it out")
    check_sampling(data_args)
    if data_args.sample == STRATIFIED:
        raise InputError("--sample stratified keeps the shares of classes, and rows of text have none; pass random")
    known = _known_task(data_args, task)
    own_files = data_args.train_file or data_args.validation_file or data_args.test_file
    opened = _open(data_args, known if task is not None or own_files else None, cache_dir, token)
    roles = find_roles(opened, known, data_args)
    splits: dict[str, dict[str, Dataset]] = {"train": {}, "validation": {}, "test": {}}
    form: Form | None = None
    for role, name, rows in roles:
        rows = rows if task is None else task.prepare(rows)
        if role == "test":
            rows = _with_completions(rows, data_args.text_columns)
        found, rows = _in_our_columns(name, rows, data_args.text_columns)
        if form not in (None, found):
            raise InputError(f"split '{name}' has {found}, another split has {form}; use the same columns in all")
        form = found
        _check_rows(name, rows, form, answers=role != "test")
        splits[role][name] = rows
    assert form is not None  # `find_roles` returns at least one split
    data = LanguageData(known, form, splits["train"].get("train"), splits["validation"], splits["test"])
    data.origins = whole_splits(data)
    if data.train is not None:
        data.train = sampled("train", data.train, data_args, data_seed)
    data.validation = {n: sampled(n, rows, data_args, data_seed) for n, rows in data.validation.items()}
    limit = data_args.max_predict_samples
    for name, rows in data.test.items():
        data.test[name] = rows if limit is None else rows.select(range(min(limit, len(rows))))
    return replace(data, origins=final_origins(data, draw_text(data_args, data_seed), data_args.train_split or ()))


def template_values(row: dict[str, Any]) -> dict[str, Any]:
    """Return what a row of messages passes to the chat template besides the messages: tools, settings (as in trl)."""
    tools = row.get("tools")
    tools = json.loads(tools) if isinstance(tools, str) else tools
    return {**({} if tools is None else {"tools": tools}), **(row.get("chat_template_kwargs") or {})}


def prompt_and_references(row: dict[str, Any], form: Form) -> tuple[Any, list[str]]:
    """Return the prompt of a generation and the accepted texts; no texts if they are unknown.

    The prompt of messages is all turns before the assistant's last one.
    """
    if form is Form.PROMPT:
        completion = row["completion"]
        if isinstance(completion, list):  # conversational
            completion = completion[-1]["content"]
        accepted = row.get(REFERENCES) or ([completion] if completion else [])
        return row["prompt"], [text.strip() for text in accepted]
    messages = list(row["messages"])
    if messages[-1]["role"] == "assistant":
        answer = messages[-1].get("content")
        return messages[:-1], [answer.strip()] if answer else []
    return messages, []


def _known_task(data_args: DataArguments, task: LanguageTask | None) -> Task:
    file = data_args.train_file or data_args.validation_file or data_args.test_file
    name = own_data_name(data_args)
    hub_id = config = None
    if task is not None and data_args.task_name is not None:
        name, hub_id, config = data_args.task_name, task.hub_id, task.hub_config
    elif not file and data_args.dataset_name is None:
        raise InputError(
            "language modelling needs data: pass --train_file, --dataset_name, or --task_name "
            f"({', '.join(LANGUAGE_TASKS)})"
        )
    # these columns of csv files are text also where they look like numbers
    columns = (_COLUMNS[Form.TEXT], _COLUMNS[Form.PROMPT])
    return Task(name, columns, None, hub_id=hub_id, hub_config=config, metric="perplexity")


def _open(data_args: DataArguments, task: Task | None, cache_dir: str | None, token: str | None) -> dict[str, Dataset]:
    """As `open_source`, but read JSON files and local folders unchanged, because messages and answers are nested."""
    splits = open_as_stored(data_args, task, cache_dir)
    return open_source(data_args, task, cache_dir=cache_dir, token=token) if splits is None else splits


def _with_completions(rows: Dataset, wanted: Sequence[str] | None) -> Dataset:
    """Add empty completions to prompts that have none, as a test split may: they are continued, not scored."""
    if wanted and len(wanted) == 1:
        return rows
    prompt, completion = wanted if wanted and len(wanted) == 2 else _COLUMNS[Form.PROMPT]
    others = {completion} if wanted else {completion, "text", "messages"}
    if prompt not in rows.column_names or others & set(rows.column_names):
        return rows
    return rows.add_column(completion, [""] * len(rows))


def _in_our_columns(split: str, rows: Dataset, wanted: Sequence[str] | None) -> tuple[Form, Dataset]:
    """Return the form of the rows, and the rows with only the columns of this form.

    Args:
        wanted: `text_columns`: one column of text or messages, or the two columns of prompt and completion.
    """
    columns = rows.column_names
    if wanted:
        for column in wanted:
            if column not in columns:
                raise InputError(
                    f"split '{split}' has no column '{column}', only {', '.join(columns)}; check --text_columns"
                )
        if len(wanted) > 2 or len(set(wanted)) < len(wanted):
            raise InputError(
                f"--text_columns {' '.join(wanted)}: pass one column of text or messages, or those of prompt and "
                "completion"
            )
        form = Form.PROMPT if len(wanted) == 2 else Form.TEXT
        if len(wanted) == 1 and len(rows) and isinstance(rows[0][wanted[0]], list):
            form = Form.MESSAGES
    else:
        found = [form for form, names in _COLUMNS.items() if set(names) <= set(columns)]
        if not found:
            raise InputError(
                f"split '{split}' has the columns {', '.join(columns)}, and language modelling needs text, prompt and "
                "completion, or messages; rename them, or pass --text_columns"
            )
        if len(found) > 1:
            ways = " or ".join(f"--text_columns {' '.join(_COLUMNS[form])}" for form in found)
            raise InputError(
                f"split '{split}' has columns of two forms, {found[0]} and {found[1]}; choose one: {ways}"
            )
        form, wanted = found[0], _COLUMNS[found[0]]
    kept = [*wanted, *(name for name in (REFERENCES, *TEMPLATE_COLUMNS) if name in columns and name not in wanted)]
    if form is Form.TEXT or (len(rows) and isinstance(rows[0][wanted[0]], str)):  # no chat template
        kept = [name for name in kept if name not in TEMPLATE_COLUMNS or name in wanted]
    rows = rows.select_columns(kept)
    renamed = {old: new for old, new in zip(wanted, _COLUMNS[form], strict=True) if old != new}
    return form, rows.rename_columns(renamed) if renamed else rows


def _check_rows(split: str, rows: Dataset, form: Form, answers: bool) -> None:
    if not len(rows):
        raise InputError(f"split '{split}' holds no rows; check the data")
    needed = [name for name in _COLUMNS[form] if answers or name != "completion"]
    for name in needed:
        for number, value in enumerate(rows[name]):
            _check_value(f"column '{name}' of split '{split}'", number, value, form)
    if form is Form.PROMPT and answers and len({isinstance(rows[0][name], str) for name in needed}) > 1:
        raise InputError(
            f"split '{split}' has text in one of prompt and completion and messages in the other; pass both as text, "
            "or both as messages"
        )
    for number, value in enumerate(rows[REFERENCES] if REFERENCES in rows.column_names else ()):
        if value is not None and not (isinstance(value, list) and all(isinstance(text, str) for text in value)):
            raise InputError(
                f"column '{REFERENCES}' of split '{split}' holds lists of texts, and row {number} has "
                f"{reprlib.repr(value)}; pass ['an answer', 'another'], or leave the column out"
            )


def _check_value(column: str, number: int, value: Any, form: Form) -> None:
    """Raise `InputError` unless the value is text or messages, as the form requires."""
    if value is None or (isinstance(value, str | list) and not value):
        raise InputError(f"{column} is empty in row {number}; fill or remove it")
    if isinstance(value, str) and form is not Form.MESSAGES:
        return
    if not isinstance(value, list) or form is Form.TEXT:
        wanted = "messages" if form is Form.MESSAGES else "text"
        raise InputError(
            f"{column} needs {wanted}, and row {number} has {reprlib.repr(value)}; convert it, or choose another "
            "column (--text_columns)"
        )
    if not all(map(_is_message, value)):
        raise InputError(
            f"{column}: row {number} has a message without the texts role and content; rename or fill its keys, such "
            "as {'role': 'user', 'content': 'a question'}"
        )


def _is_message(message: Any) -> bool:
    """Whether chat templates accept the message: a message with tool calls may have no content."""
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        return False
    return isinstance(message.get("content"), str) or bool(message.get("tool_calls"))
