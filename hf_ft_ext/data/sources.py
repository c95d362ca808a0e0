"""Open the data: a Hub id, a local folder, own files or the demo. All failures become `InputError`."""

import glob
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

import pyarrow as pa
from datasets import (
    Dataset,
    IterableDataset,
    get_dataset_config_names,
    get_dataset_default_config_name,
    load_dataset,
    load_dataset_builder,
)
from datasets.exceptions import DatasetNotFoundError, DatasetsError
from datasets.load import dataset_module_factory
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)

from hf_ft_ext.arguments import DataArguments
from hf_ft_ext.data.files.class_names import check_class_names
from hf_ft_ext.data.files.dialect import AUTO, DEFAULT_DELIMITERS
from hf_ft_ext.data.files.local_folder import FORMATS, cache_for, warn_of_other_formats
from hf_ft_ext.data.files.own_files import SUFFIXES, USUAL_TEXT, Reading, holds_times, open_own_files
from hf_ft_ext.data.files.records import open_records
from hf_ft_ext.data.files.text_files import data_suffix
from hf_ft_ext.data.splits import files_of_task
from hf_ft_ext.data.tasks import Task
from hf_ft_ext.demo.dataset import demo_dataset
from hf_ft_ext.errors import InputError

_FILE_OPTIONS = ("train_file", "validation_file", "test_file")
_FOLDER_ADVICE = "pass a folder of csv, json or parquet files, one whose README.md lists them, or a saved DatasetDict"
_LOCAL_DATA_ADVICE = "pass a local folder to --dataset_name, or own files with --train_file and --validation_file"
_DEFAULT_CONFIG = "default"  # the name that `datasets` gives to the configuration of a data set without configurations
# Errors of `datasets`, and those of its readers that it does not wrap.
READ_ERRORS = (DatasetsError, OSError, ValueError, RuntimeError, StopIteration, KeyError, pa.ArrowException)

# The base error of huggingface_hub's HTTP client, taken from its errors because the client has changed twice.
_HTTP_ERROR = HfHubHTTPError.__bases__[0]
_NOT_FOUND = (GatedRepoError, RepositoryNotFoundError, DatasetNotFoundError, HFValidationError)

logger = logging.getLogger(__name__)


def reason(error: BaseException) -> str:
    """Return the first line of the innermost cause, which is the reader's own error."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def open_source(
    data_args: DataArguments, task: Task | None, *, cache_dir: str | None = None, token: str | None = None
) -> dict[str, Dataset | IterableDataset]:
    """Return the splits as they are stored, by their own names, `train` first if there is one.

    With `data_args.streaming` nothing is downloaded or converted here. Of own files the training split is a stream, of
    a data set all splits are.

    Args:
        data_args: the location of the data; see `hf_ft_ext.data.loading.load_data`.
        task: the source of Hub id and configuration if `data_args` does not set them.
        cache_dir: where downloads and converted files are kept; `None` = the Hub's cache.
        token: Hub access token.

    Raises:
        InputError: the data cannot be found or read, or two options contradict each other.
    """
    files = check_source(data_args, task)
    reading = _reading(data_args, task)
    if files:
        return _open_files(files, reading, cache_dir, data_args.streaming)
    name = data_args.dataset_name or (task.hub_id if task else None)
    if name is None:
        _check_reading(reading, "the demo")
        splits = dict(demo_dataset())
        return splits | {"train": splits["train"].to_iterable_dataset()} if data_args.streaming else splits
    return _open_dataset(name, data_args, task, reading, cache_dir, token)


def check_source(data_args: DataArguments, task: Task | None) -> dict[str, str]:
    """Return the own files by their options.

    Raises:
        InputError: two options contradict each other, or one does not apply to this source.
    """
    for option in (*_FILE_OPTIONS, "dataset_name"):
        if getattr(data_args, option) == "":  # a shell variable that is not set, say
            raise InputError(f"--{option} is empty; pass a value, or leave it out")
    files = {option: getattr(data_args, option) for option in _FILE_OPTIONS if getattr(data_args, option)}
    if files and data_args.dataset_name:
        raise InputError(
            f"both --dataset_name {data_args.dataset_name} and --{next(iter(files))} are given; pass one of them"
        )
    for option in ("dataset_config_name", "dataset_revision"):
        value = getattr(data_args, option)
        if value and (files or not (data_args.dataset_name or (task and task.hub_id))):
            raise InputError(
                f"--{option} {value} applies only to data sets; pass --dataset_name with it, or leave it out"
            )
    for option in ("train_split", "validation_split", "test_split"):
        if files and getattr(data_args, option):
            raise InputError(
                f"--{option} chooses splits of a data set, and --{next(iter(files))} is a file; leave one of them out"
            )
    return files


def open_as_stored(
    data_args: DataArguments, task: Task | None, cache_dir: str | None = None
) -> dict[str, Dataset] | None:
    """As `open_source` for JSON files and local folders, but with nested columns; `None` for other sources.

    Raises:
        InputError: as for `open_source`.
    """
    files = check_source(data_args, task)
    folder = _local_folder(data_args.dataset_name, data_args.dataset_revision) if data_args.dataset_name else None
    suffixes = [data_suffix(Path(name).expanduser()) for name in files.values()]
    if folder is None and (not files or any(FORMATS.get(suffix) != "json" for suffix in suffixes)):
        return None
    _check_reading(_reading(data_args, task), "in other formats" if files else "read as it is stored")
    if folder is not None:
        with _local_errors(f"data set folder '{data_args.dataset_name}'", _FOLDER_ADVICE):
            config = _choose_config(folder, data_args.dataset_config_name, task, {"cache_dir": cache_dir})
            builder = load_dataset_builder(folder, config, cache_dir=cache_dir)
            return dict(load_dataset(folder, config, cache_dir=cache_for(folder, builder, cache_dir)))
    splits = {}
    for option, name in files.items():
        path = Path(name).expanduser()
        if not path.is_file():
            raise InputError(f"--{option} {name}: there is no such file; check the path")
        with _local_errors(f"--{option} {name}", "pass one JSON object a line"):
            rows = load_dataset(
                "json", data_files={"train": glob.escape(str(path.resolve()))}, split="train", cache_dir=cache_dir
            )
            if holds_times(rows.features.arrow_schema):  # texts such as 2020-01-01, which datasets rewrites
                rows = Dataset.from_list(list(open_records(str(path))[0].rows()))
            splits[option.removesuffix("_file")] = rows
    return splits


@contextmanager
def _local_errors(what: str, advice: str) -> Iterator[None]:
    try:
        yield
    except InputError:
        raise
    except READ_ERRORS as error:
        raise InputError(f"cannot read {what} ({reason(error)}); {advice}") from error


@contextmanager
def _hub_errors(name: str) -> Iterator[None]:
    try:
        yield
    except InputError:
        raise
    except _NOT_FOUND as error:
        raise InputError(
            f"data set '{name}' is neither a local folder nor found on the Hub ({reason(error)}); check the name, "
            f"pass --token if it is private or gated, or {_LOCAL_DATA_ADVICE}"
        ) from error
    except HfHubHTTPError as error:  # the Hub answered, with an error
        raise InputError(
            f"cannot load data set '{name}' from the Hub ({reason(error)}); or {_LOCAL_DATA_ADVICE}"
        ) from error
    except (ConnectionError, LocalEntryNotFoundError, _HTTP_ERROR) as error:
        raise InputError(
            f"data set '{name}' is not a local folder, and the Hub cannot be reached ({reason(error)}); without a "
            f"network {_LOCAL_DATA_ADVICE}"
        ) from error
    except READ_ERRORS as error:
        raise InputError(
            f"cannot load data set '{name}' from the Hub ({reason(error)}); or {_LOCAL_DATA_ADVICE}"
        ) from error


def _reading(data_args: DataArguments, task: Task | None) -> Reading:
    """Return what the arguments define about the columns of own files."""
    wanted = data_args.label_column
    labels = (
        {wanted} if isinstance(wanted, str) else set(wanted or (task.label_columns if task else ("label", "labels")))
    )
    known = (*(task.text_columns if task else ()), *USUAL_TEXT)
    text = set(data_args.text_columns or (column for columns in known for column in columns))
    names = tuple(data_args.column_names) if data_args.column_names else None
    return Reading(data_args.quoting, names, frozenset(text - labels), frozenset(labels))


def _open_files(
    files: dict[str, str], reading: Reading, cache_dir: str | None, streaming: bool
) -> dict[str, Dataset | IterableDataset]:
    kinds = {}
    for option, name in files.items():
        path = Path(name).expanduser()
        suffix = data_suffix(path)
        if path.is_dir():
            raise InputError(f"--{option} {name} is a folder; pass a file, or the folder as --dataset_name")
        if suffix not in FORMATS:
            raise InputError(f"--{option} {name}: unknown file format '{path.suffix}'; use {', '.join(FORMATS)}")
        if not path.is_file():
            raise InputError(f"--{option} {name}: there is no such file; check the path")
        kinds[name] = FORMATS[suffix]
    if len(set(kinds.values())) > 1:
        listed = ", ".join(f"{name} ({kind})" for name, kind in kinds.items())
        raise InputError(f"all files must have the same format, got {listed}; convert them")
    kind = next(iter(kinds.values()))
    _check_reading(reading, kind)
    paths = {option: str(Path(name).expanduser().resolve()) for option, name in files.items()}
    if kind != "parquet":
        named = {
            option.removesuffix("_file"): [(f"--{option} {files[option]}", path)] for option, path in paths.items()
        }
        return open_own_files(named, reading, cache_dir=cache_dir, streamed=("train",) if streaming else ())
    splits = {}
    for option, location in paths.items():
        with _local_errors(f"--{option} {files[option]}", "check that it is valid with rows, and --cache_dir"):
            # One call for each file, because the test file may lack the label column. The cache notices edited files.
            splits[option.removesuffix("_file")] = load_dataset(
                kind,
                data_files={"train": glob.escape(location)},  # a path, not a pattern
                split="train",
                cache_dir=cache_dir,
                streaming=streaming and option == "train_file",
            )
    return splits


def _check_reading(reading: Reading, kind: str) -> None:
    """Refuse settings of delimited files for other formats."""
    if kind != "csv" and (reading.quoting != AUTO or reading.names):
        option = "column_names" if reading.names else "quoting"
        raise InputError(f"--{option} is for csv and tsv files, but this data is {kind}; leave it out")


def _local_folder(dataset_name: str, revision: str | None) -> str | None:
    """Absolute path of `dataset_name`, if that is a folder.

    Raises:
        InputError: it is a file, its name is a pattern, or a revision of it was asked for.
    """
    folder = Path(dataset_name).expanduser()
    if folder.is_file():
        raise InputError(f"--dataset_name {dataset_name} is a file; pass it as --train_file, or pass its folder")
    if not folder.is_dir():
        return None
    if revision is not None:
        raise InputError(
            f"--dataset_revision {revision} is for data sets of the Hub, and {dataset_name} is a local folder; leave "
            "it out"
        )
    name = str(folder.resolve())
    if glob.has_magic(name):
        raise InputError(
            f"data set folder {name}: the data sets library takes * ? [ in a path for a pattern; rename the "
            "folder, or pass its files with --train_file and --validation_file"
        )
    return name


def _open_dataset(
    name: str, data_args: DataArguments, task: Task | None, reading: Reading, cache_dir: str | None, token: str | None
) -> dict[str, Dataset | IterableDataset]:
    local = _local_folder(name, data_args.dataset_revision) if data_args.dataset_name else None
    if local is not None:
        name = local
        errors = _local_errors(f"data set folder '{name}'", _FOLDER_ADVICE)
    elif re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) is None or name.startswith("."):
        raise InputError(f"data set folder '{name}' does not exist; check the path, or pass a Hub id (owner/name)")
    else:
        errors = _hub_errors(name)
    # Pass all of them in every call: without `cache_dir`, for example, an offline run searches the wrong cache.
    options: dict[str, Any] = {"cache_dir": cache_dir, "token": token, "revision": data_args.dataset_revision}
    with errors:
        if task is not None and name == task.hub_id and not data_args.dataset_config_name:
            config = task.hub_config
        else:
            config = _choose_config(name, data_args.dataset_config_name, task, options)
        if local is not None:
            builder = load_dataset_builder(name, config, cache_dir=cache_dir)
            if parts := files_of_task(builder.config.data_files, task):
                options["data_files"] = parts
                builder = load_dataset_builder(name, config, cache_dir=cache_dir, data_files=parts)
            warn_of_other_formats(builder)
            if files := _own_files_of(builder):
                training = data_args.train_split or [split for split in files if split.startswith("train")]
                return open_own_files(
                    files, reading, cache_dir=cache_dir, streamed=training if data_args.streaming else ()
                )
            check_class_names(builder)
            if not data_args.streaming:
                options["cache_dir"] = cache_for(name, builder, cache_dir)
        elif data_args.dataset_revision is not None:
            _check_revision(name, config, options)
        if reading.quoting != AUTO or reading.names:
            _check_reading(reading, "read with its own settings" if local is None else "in other formats")
        splits = load_dataset(name, config, streaming=data_args.streaming, **options)
    if any(rows.info.builder_name == "csv" for rows in splits.values()):
        logger.warning(
            "data set '%s' holds csv files, read with its own settings: with quotes, NA as a missing value; if "
            "rows or texts are missing, download the files and pass them to --train_file and --validation_file",
            data_args.dataset_name or name,
        )
    return dict(splits)


def _own_files_of(builder: Any) -> dict[str, list[tuple[str, str]]] | None:
    """Return the csv and json files of a local folder, unless its README.md sets options for reading them.

    `datasets` would read every csv with quotes, NA as a missing value, and texts that look like dates as dates.
    """
    config = builder.config
    set_apart = {"name", "version", "data_dir", "data_files", "description", "sep"}
    for field in fields(config):
        if field.name not in set_apart and getattr(config, field.name) != field.default:
            return None
    files: dict[str, list[tuple[str, str]]] = {}
    for split, paths in (config.data_files or {}).items():
        for path in paths:
            suffix = data_suffix(path)
            if suffix not in SUFFIXES or not Path(path).is_file():
                return None
            if getattr(config, "sep", ",") not in (",", DEFAULT_DELIMITERS.get(suffix, ",")):
                return None
            files.setdefault(str(split), []).append((f"file '{path}'", str(path)))
    return files


def _choose_config(name: str, wanted: str | None, task: Task | None, options: dict[str, Any]) -> str | None:
    configs = get_dataset_config_names(name, **options)
    if configs == [_DEFAULT_CONFIG] and not Path(name).is_dir() and _is_cached_only(name, options):
        return wanted or _cached_config(name, task, options)
    if wanted is None and len(configs) == 1:
        return configs[0]
    # Check here, because load_dataset's own error comes late and does not name the option.
    chosen = wanted or (task.name if task and task.name in configs else None)
    if chosen is None and task is None:
        chosen = get_dataset_default_config_name(name, **options)
        if chosen is not None:
            logger.info("configuration '%s', the data set's default, of: %s", chosen, ", ".join(configs))
    if chosen in configs:
        return chosen
    wanted = wanted or (task.name if task else None)
    cause = f"has no configuration '{wanted}'" if wanted else "has several configurations"
    raise InputError(f"data set '{name}' {cause}; pass one of these to --dataset_config_name: {', '.join(configs)}")


def _is_cached_only(name: str, options: dict[str, Any]) -> bool:
    """Whether a Hub data set comes from the cache because the Hub cannot be reached."""
    return dataset_module_factory(name, **options).module_path.endswith(".cache.cache")


def _cached_config(name: str, task: Task | None, options: dict[str, Any]) -> str | None:
    """Return the configuration of a cached data set: the only one, or the task's (the cache does not list others)."""
    try:
        load_dataset_builder(name, None, **options)
    except ValueError as error:
        if task is not None:
            return task.name
        raise InputError(f"{reason(error)}; pass one of them to --dataset_config_name") from error
    return None


def _check_revision(name: str, config: str | None, options: dict[str, Any]) -> None:
    """Raise `InputError` if a data set comes from the cache in another revision than `dataset_revision`."""
    wanted = options["revision"]
    if not _is_cached_only(name, options):
        return
    held = load_dataset_builder(name, config, **options).hash or "unknown"
    if len(wanted) < 7 or not held.startswith(wanted):
        raise InputError(
            f"--dataset_revision {wanted}: the Hub cannot be reached, and the cache holds '{name}' of commit {held}; "
            "pass that commit, or go online"
        )
