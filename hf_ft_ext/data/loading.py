"""Load a task's or a user's data into a common form: text columns and `label` for each split."""

import logging
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from datasets import ClassLabel, Dataset, IterableDataset, Value

from hf_ft_ext.arguments import PROBLEM_TYPES, QUOTINGS, DataArguments
from hf_ft_ext.data import labels as lb
from hf_ft_ext.data import multi_label as ml
from hf_ft_ext.data.few_shot import few_shot_data, validation_is_test
from hf_ft_ext.data.files.own_files import USUAL_TEXT
from hf_ft_ext.data.origins import final_origins, own_data_name, whole_splits
from hf_ft_ext.data.samples import check_sampling, draw_text, sampled
from hf_ft_ext.data.sources import open_source
from hf_ft_ext.data.splits import find_roles
from hf_ft_ext.data.stream import in_memory, usable_rows
from hf_ft_ext.data.task_data import LABEL, TaskData
from hf_ft_ext.data.tasks import GLUE_ID, Task, get_task
from hf_ft_ext.errors import InputError
from hf_ft_ext.metrics import default_metrics, metric_function
from hf_ft_ext.problem_types import MULTI_LABEL, REGRESSION

_NO_TEXT = {"id", "idx", "index", "guid", "label_text"}
_STRINGS = {"string", "large_string", "string_view"}

CHECKED = 1000  # rows of a stream that are read before training

Split = tuple[str, str, Dataset]  # role (train, validation or test), name, rows

logger = logging.getLogger(__name__)


def load_data(
    data_args: DataArguments, *, cache_dir: str | None = None, token: str | None = None, data_seed: int | None = None
) -> TaskData:
    """Load the data that the arguments name.

    The data comes from own files (`train_file`, ...), else from `dataset_name` (a local folder or a Hub id), else from
    the task's own Hub id. Without any of these it is the demo. A task given together with files or `dataset_name`
    defines their columns, labels and metric.

    - Rows with label -1 are dropped (SNLI marks pairs without a gold label this way). A test split without any label
      keeps its rows and has no `label` column. In own data with whole numbers as labels, -1 is a class.
    - A data set without a validation split is validated on its labelled test split. Own files keep their roles.
    - `num_k` draws few-shot splits (see `few_shot_data`).
    - `max_*_samples` keep at most n of the remaining rows: for training and validation those chosen by `sample`, for a
      test split the first ones.
    - Converted files are cached; a file with a new modification time is read again.
    - `streaming` does not download the training split. All checks use its first rows; later rows without text or
      without a known label are skipped. The other splits are read into memory.
    - Values of csv, tsv and json files are kept as written: see `hf_ft_ext.data.files.own_files`.

    Args:
        data_args: what to load.
        cache_dir: where downloads and converted files are kept; `None` = the Hub's cache.
        token: Hub access token.
        data_seed: seed of `num_k` and `sample`; `None` = 13.

    Raises:
        InputError: the data cannot be found or read, has no usable columns, labels or rows, or does not fit the
            metric. The message says how to fix it.
    """
    _check_options(data_args)
    files = [f for f in (data_args.train_file, data_args.validation_file, data_args.test_file) if f]
    task = _named_task(data_args, files)
    roles = find_roles(open_source(data_args, task, cache_dir=cache_dir, token=token), task, data_args)
    stream = None
    if data_args.streaming:
        stream, roles = _first_rows_of_stream(roles)
    roles = _prepared(roles, task, stream is not None)
    text_columns, label_columns = _find_columns(roles, task, data_args)
    splits, numbers, names, kind, feature = _labelled_splits(roles, text_columns, label_columns, task, data_args)
    metric = data_args.metric or (task.metric if task else default_metrics(kind))
    positive = _positive_label(data_args, task, names, kind, metric)
    train: Any = splits["train"].get("train")
    if stream is not None:
        if data_args.max_train_samples is not None:
            stream = stream.take(data_args.max_train_samples)
        (label_column,) = label_columns  # a training split has labels, and a stream one for each row
        train = usable_rows(stream, text_columns, label_column, roles[0][2].features[label_column], feature, task)
    data = TaskData(
        task=task or _own_task(data_args, text_columns, label_columns, names, kind, metric),
        train=train,
        validation=splits["validation"],
        test=splits["test"],
        label_names=names,
        problem_type=kind,
        metric=metric,
        text_columns=text_columns,
        positive_label=positive,
        row_numbers=numbers,
    )
    data.origins = whole_splits(data)
    if data_args.num_k is not None:
        data = _few_shot(data, data_args.num_k, data_args, data_seed)
    elif not files and not data.validation:
        data.validation = {name: rows for name, rows in data.test.items() if LABEL in rows.column_names}
        if data.validation:
            logger.warning("no validation split: evaluating on %s", ", ".join(data.validation))
    data = replace(
        data,
        train=sampled("train", data.train, data_args, data_seed) if isinstance(data.train, Dataset) else data.train,
        validation={name: sampled(name, rows, data_args, data_seed) for name, rows in data.validation.items()},
        test={name: _first(rows, data_args.max_predict_samples) for name, rows in data.test.items()},
    )
    data.origins = final_origins(data, draw_text(data_args, data_seed), data_args.train_split or ())
    return data


def _check_options(data_args: DataArguments) -> None:
    check_sampling(data_args)
    for option, choices in (("quoting", QUOTINGS), ("problem_type", (None, *PROBLEM_TYPES))):
        if getattr(data_args, option) not in choices:
            allowed = ", ".join(filter(None, choices))
            raise InputError(f"--{option} {getattr(data_args, option)!r} is unknown; choose from: {allowed}")
    _check_few_shot(data_args)


def _named_task(data_args: DataArguments, files: list[str]) -> Task | None:
    """The task that defines columns, labels and metric; `None` for own data without one."""
    if not data_args.task_name and (files or data_args.dataset_name):
        return None
    task = get_task(data_args.task_name or "demo")
    if data_args.problem_type not in (None, task.problem_type):
        raise InputError(
            f"--problem_type {data_args.problem_type}: task '{task.name}' is {task.problem_type}; leave --task_name "
            "or --problem_type out"
        )
    if task.name == "demo" and (files or data_args.dataset_name):
        raise InputError("task 'demo' makes its own data; leave --task_name out to load files or --dataset_name")
    return task


def _check_few_shot(data_args: DataArguments) -> None:
    """Refuse options of few-shot splits that would have no effect or contradict each other."""
    if data_args.num_k is None:
        if data_args.few_shot_split != "k-shot" or data_args.allow_small_classes:
            option = "allow_small_classes" if data_args.allow_small_classes else "few_shot_split"
            raise InputError(f"--{option} is for few-shot splits; pass --num_k with it, or leave it out")
    elif data_args.max_train_samples is not None:
        raise InputError(
            f"--num_k {data_args.num_k} and --max_train_samples {data_args.max_train_samples} both choose the "
            "training rows; pass one of them"
        )
    elif data_args.streaming:
        raise InputError(
            f"--num_k {data_args.num_k} draws from all training rows, which a stream does not hold; leave "
            "--streaming out"
        )


def _first_rows_of_stream(roles: list[tuple]) -> tuple[IterableDataset, list[Split]]:
    """Return the training stream, and all splits in memory, with only the first rows of the training split."""
    if roles[0][0] != "train":
        raise InputError("--streaming reads the training split, and the data has none; leave it out")
    first = ("train", f"train (its first {CHECKED:,} rows)", in_memory("train", roles[0][2], CHECKED))
    others = [(role, name, in_memory(name, data)) for role, name, data in roles[1:]]
    return roles[0][2], [first, *others]


def _prepared(roles: list[Split], task: Task | None, streaming: bool) -> list[Split]:
    """The splits as the task rewrites them; refuses splits without rows."""
    for _, name, data in roles:
        if not len(data):
            raise InputError(f"split '{name}' holds no rows; check the data")
    if task is None or task.prepare is None:
        return roles
    if streaming:
        raise InputError(f"--streaming: task '{task.name}' must rewrite its rows first; leave --streaming out")
    return [(role, name, task.prepare(data)) for role, name, data in roles]


def _find_columns(
    roles: list[Split], task: Task | None, data_args: DataArguments
) -> tuple[tuple[str, ...], list[str]]:
    """Text and label columns, of which all splits have the text. With several label columns, each is one label."""
    named = data_args.label_column
    label_columns = [named] if isinstance(named, str) else list(named or [])
    first = roles[0][2]
    if len(label_columns) > 1:
        other = first.remove_columns([c for c in first.column_names if c in label_columns])
        text_columns = _find_text(other, data_args.text_columns, None, task)
    else:
        label_column = label_columns[0] if label_columns else None
        text_columns = _find_text(first, data_args.text_columns, label_column, task)
        label_column = _find_label(roles, label_column, task)
        label_columns = [label_column] if label_column is not None else []
    for column in label_columns:
        if column in text_columns:
            raise InputError(f"column '{column}' cannot be both text and label; check --text_columns")
    if LABEL in text_columns:
        raise InputError(
            f"the text column '{LABEL}' needs another name, as labels get this one; rename it in the data"
        )
    for _, name, data in roles:
        _check_text(name, data, text_columns)
    return text_columns, label_columns


def _labelled_splits(
    roles: list[Split],
    text_columns: tuple[str, ...],
    label_columns: list[str],
    task: Task | None,
    data_args: DataArguments,
) -> tuple[dict[str, dict[str, Dataset]], dict[tuple[str, str], np.ndarray], list[str] | None, str, Any]:
    """Splits of texts and labels by role and name; the numbers of the kept rows, names, problem type, labels' type."""
    splits: dict[str, dict[str, Dataset]] = {"train": {}, "validation": {}, "test": {}}
    numbers: dict[tuple[str, str], np.ndarray] = {}
    if ml.is_multi_label(roles, label_columns):
        if data_args.streaming:
            raise InputError("--streaming needs one label per row, but this data has several; leave --streaming out")
        names, vectors = ml.read_multi_labels(roles, label_columns, task, data_args.problem_type)
        for (role, name, data), values in zip(roles, vectors, strict=True):
            data = data.select_columns(list(text_columns))
            if values is not None:
                data, numbers[role, name] = _with_labels(name, data, values, ml.feature(values.shape[1]), drop=True)
            splits[role][name] = data
        return splits, numbers, names, MULTI_LABEL, None
    label_column = label_columns[0] if label_columns else None
    raws = [_labels_of(role, name, data, label_column) for role, name, data in roles]
    labelled = [raw for raw in raws if raw is not None]
    for found in labelled:
        lb.check_spelling(found, task, data_args.problem_type)
    kind = lb.problem_type(labelled, task, data_args.problem_type)
    names, columns = _convert(labelled, kind, task, any(role == "train" for role, _, _ in roles))
    feature = ClassLabel(names=names) if names else Value("float32")
    for (role, name, data), raw in zip(roles, raws, strict=True):
        data = data.select_columns(list(text_columns))
        if raw is not None:
            data, numbers[role, name] = _with_labels(name, data, next(columns), feature, drop=names is not None)
        splits[role][name] = data
    return splits, numbers, names, kind, feature


def _few_shot(data: TaskData, k: int, data_args: DataArguments, seed: int | None) -> TaskData:
    """Few-shot splits of `data`, with a warning for splits that are given and not used."""
    given = "test_file" if data_args.test_file else "test_split" if data_args.test_split else None
    keep_test = given is not None and data.task.hub_id != GLUE_ID
    if given is not None and not keep_test and data.validation:
        logger.warning("--%s is not used: with --num_k, GLUE tasks are tested on their validation split", given)
    if data_args.validation_file and (keep_test or not validation_is_test(data)):
        logger.warning(
            "--validation_file is not used: --num_k draws evaluation rows from the training file, and the test "
            "split is --test_file"
        )
    few = (k, seed, data_args.few_shot_split, data_args.allow_small_classes)
    return few_shot_data(data, *few, keep_test=keep_test, max_test_rows=data_args.max_predict_samples)


def _find_text(
    data: Dataset, wanted: Sequence[str] | None, label_column: str | None, task: Task | None
) -> tuple[str, ...]:
    if wanted:
        if len(wanted) > 2:
            raise InputError(f"--text_columns takes one or two columns, but got {len(wanted)}: {', '.join(wanted)}")
        if len(set(wanted)) < len(wanted):
            raise InputError(f"--text_columns names '{wanted[0]}' twice; pass it once, or two columns")
        return tuple(wanted)
    columns = data.column_names
    usual = [usual for usual in USUAL_TEXT if task is None or len(usual) == len(task.text_columns[0])]
    for candidate in [*(task.text_columns if task else ()), *usual]:
        if set(candidate) <= set(columns) and label_column not in candidate:
            return candidate
    strings = [
        name
        for name in columns
        if getattr(data.features[name], "dtype", None) in _STRINGS
        and name.lower() not in _NO_TEXT
        and name != label_column
        and name.lower() not in ("label", "labels")
    ]
    if task is not None or not strings:
        expected = " or ".join(
            "+".join(candidate) for candidate in (task.text_columns if task else (("a string column",),))
        )
        raise InputError(
            f"no text column found: the columns are {_listed(columns)}, expected {expected}; name the text with "
            f"--text_columns{_header_hint(data)}"
        )
    logger.warning("taking the text from %s; pass --text_columns for another choice", " and ".join(strings[:2]))
    return tuple(strings[:2])


def _check_text(split: str, data: Dataset, text_columns: tuple[str, ...]) -> None:
    for column in text_columns:
        if column not in data.column_names:
            raise InputError(
                f"split '{split}' has no column '{column}', only {', '.join(data.column_names)}; all splits need the "
                "same text columns: rename it, or pass --text_columns"
            )
        dtype = getattr(data.features[column], "dtype", None)
        if dtype not in _STRINGS and len(data) and dtype != "null":
            raise InputError(
                f"column '{column}' of split '{split}' holds {data.features[column]}, not text; pass other "
                "--text_columns"
            )


def _find_label(roles: list[Split], wanted: str | None, task: Task | None) -> str | None:
    """Return the label column, required in train and validation; `None` if there is only a test split without it."""
    needy = [(name, data) for role, name, data in roles if role != "test"]
    candidates = (wanted,) if wanted else task.label_columns if task else ("label", "labels")
    for candidate in candidates:
        if any(candidate in data.column_names for _, data in needy or [(name, data) for _, name, data in roles]):
            for name, data in needy:
                if candidate not in data.column_names:
                    raise InputError(
                        f"split '{name}' has no label column '{candidate}', only {', '.join(data.column_names)}; only "
                        "test data may be without labels"
                    )
            return candidate
    if not needy and not wanted:
        return None
    name, data = needy[0] if needy else roles[0][1:]
    raise InputError(
        f"split '{name}' has no label column '{candidates[0]}'; its columns are {_listed(data.column_names)}: name "
        f"the labels with --label_column{_header_hint(data)}"
    )


def _listed(columns: Sequence[str]) -> str:
    """List column names and shorten long ones, which may be the first row of a file without a header."""
    return ", ".join(name if len(name) < 60 else name[:57] + "..." for name in columns)


def _header_hint(data: Dataset) -> str:
    """Return advice if the column names look like a row of data."""
    names = data.column_names
    like_data = [name for name in names if re.fullmatch(r"-?[0-9]+([.,][0-9]+)?", name) or len(name.split()) > 4]
    if not like_data:
        return ""
    return f"; '{like_data[0]}' looks like data: if a csv or tsv file has no header line, name all with --column_names"


def _labels_of(role: str, name: str, data: Dataset, column: str | None) -> lb.RawLabels | None:
    """Read one split's labels; `None` for a test split without any."""
    if column is None or (role == "test" and column not in data.column_names):
        return None
    raw = lb.read_labels(name, data, column)
    if role == "test" and raw.empty:
        logger.info("split '%s' has no labels: it can be used for prediction, not for evaluation", name)
        return None
    lb.check_missing(raw)
    return raw


def _convert(labelled: list[lb.RawLabels], kind: str, task: Task | None, trains: bool):
    """Return the label names (`None` for a regression) and an iterator over the splits' label arrays."""
    if kind == REGRESSION:
        return None, iter([lb.scores(raw) for raw in labelled])
    if not labelled:
        return list(task.label_names) if task and task.label_names else None, iter([])
    names, arrays = lb.class_ids(labelled, task, trains)
    return names, iter(arrays)


def _with_labels(name: str, data: Dataset, values: np.ndarray, feature, drop: bool) -> tuple[Dataset, np.ndarray]:
    """Add the labels `values`, `[rows]` or `[rows, labels]`; `drop` removes rows without one. Also what stays."""
    data = data.add_column(LABEL, values.tolist() if values.ndim > 1 else values, feature=feature)
    labelled = (values != lb.UNLABELLED).reshape(len(values), -1 if len(values) else 1).all(axis=1)
    keep = np.flatnonzero(labelled) if drop else np.arange(len(values))
    if len(keep) < len(values):
        logger.warning("split '%s': dropped %d of %d rows without a label", name, len(values) - len(keep), len(values))
        if not len(keep):
            raise InputError(f"split '{name}' holds no labelled row: all {len(values)} labels are -1; pass other data")
        data = data.select(keep)
    return data, keep


def _first(data: Dataset, limit: int | None) -> Dataset:
    return data if limit is None or limit >= len(data) else data.select(range(limit))


def _positive_label(data_args: DataArguments, task: Task | None, names, kind: str, metric) -> str | None:
    """Check the metrics and return the positive class: the given one, the task's, or one evident from the names."""
    wanted = data_args.positive_label
    if wanted is None and task is not None and task.positive_label in (names or ()):
        wanted = task.positive_label if kind != REGRESSION else None
    if names is not None and len(names) == 1:  # the model has further labels
        metric_function(metric, problem_type=kind)
        return wanted
    function = metric_function(metric, names, positive_label=wanted, problem_type=kind)
    return names[function.positive] if names and function.positive is not None else None


def _own_task(data_args: DataArguments, text_columns, label_columns, names, kind: str, metric) -> Task:
    return Task(
        name=own_data_name(data_args),
        text_columns=(text_columns,),
        label_names=tuple(names) if names else None,
        label_columns=tuple(label_columns),
        metric=metric if isinstance(metric, str) else metric[0],
        problem_type=kind,
    )
