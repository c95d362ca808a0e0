"""Opening the data: a Hub id, a local folder, own files, the demo. All faults become `InputError`."""

import hashlib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import datasets
import pyarrow as pa
from datasets import Dataset, IterableDataset, get_dataset_config_names, load_dataset, load_dataset_builder
from datasets.exceptions import DatasetNotFoundError, DatasetsError
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)

from hf_ft_ext.arguments import DataArguments
from hf_ft_ext.data.tasks import Task
from hf_ft_ext.demo.dataset import demo_dataset
from hf_ft_ext.errors import InputError

FORMATS = {".csv": "csv", ".tsv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}
_FILE_OPTIONS = ("train_file", "validation_file", "test_file")
_INSTEAD = "pass a local folder to --dataset_name, or own files with --train_file and --validation_file"
# What `datasets` lets through from the readers below it, besides its own errors.
READ_ERRORS = (DatasetsError, OSError, ValueError, RuntimeError, StopIteration, KeyError, pa.ArrowException)

# The error base of the HTTP client under huggingface_hub, whichever it is (it has changed twice).
_HTTP_ERROR = HfHubHTTPError.__bases__[0]
_NOT_FOUND = (GatedRepoError, RepositoryNotFoundError, DatasetNotFoundError, HFValidationError)


def reason(error: BaseException) -> str:
    """The first line of the innermost cause: what the reader itself complained of."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


@contextmanager
def _local_faults(what: str, advice: str) -> Iterator[None]:
    try:
        yield
    except InputError:
        raise
    except READ_ERRORS as error:
        raise InputError(f"cannot read {what} ({reason(error)}); {advice}") from error


@contextmanager
def _hub_faults(name: str) -> Iterator[None]:
    try:
        yield
    except InputError:
        raise
    except _NOT_FOUND as error:
        raise InputError(
            f"data set '{name}' is neither a local folder nor found on the Hub ({reason(error)}); check the name, "
            f"pass --token if it is private or gated, or {_INSTEAD}"
        ) from error
    except HfHubHTTPError as error:  # the Hub answered, with an error
        raise InputError(f"cannot load data set '{name}' from the Hub ({reason(error)}); or {_INSTEAD}") from error
    except (ConnectionError, LocalEntryNotFoundError, _HTTP_ERROR) as error:
        raise InputError(
            f"data set '{name}' is not a local folder, and the Hub cannot be reached ({reason(error)}); without a "
            f"network {_INSTEAD}"
        ) from error
    except READ_ERRORS as error:
        raise InputError(f"cannot load data set '{name}' from the Hub ({reason(error)}); or {_INSTEAD}") from error


def open_source(
    data_args: DataArguments, task: Task | None, *, cache_dir: str | None = None, token: str | None = None
) -> dict[str, Dataset | IterableDataset]:
    """Return the splits as they are stored, by their own names, `train` first where there is one.

    With `data_args.streaming` nothing is downloaded or converted yet: the training split, and with a data set all
    splits, are streams.

    Args:
        data_args: says where the data is; see `hf_ft_ext.data.loading.load_data`.
        task: gives the Hub id and configuration that `data_args` leaves open.
        cache_dir: where downloads and converted files are kept; none = the Hub's cache.
        token: Hub access token.

    Raises:
        InputError: the data cannot be found or read, or two options contradict each other.
    """
    files = {option: getattr(data_args, option) for option in _FILE_OPTIONS if getattr(data_args, option)}
    if files and data_args.dataset_name:
        raise InputError(
            f"both --dataset_name {data_args.dataset_name} and --{next(iter(files))} are given; pass one of them"
        )
    if data_args.dataset_config_name and (files or not (data_args.dataset_name or (task and task.hub_id))):
        raise InputError(
            f"--dataset_config_name {data_args.dataset_config_name} has nothing to choose from; pass --dataset_name "
            "with it, or leave it out"
        )
    if files:
        return _open_files(files, cache_dir, data_args.streaming)
    if data_args.dataset_name is None and task is not None and task.hub_id is None:
        splits = dict(demo_dataset())
        return splits | {"train": splits["train"].to_iterable_dataset()} if data_args.streaming else splits
    return _open_dataset(data_args, task, cache_dir, token)


def _open_files(files: dict[str, str], cache_dir: str | None, streaming: bool) -> dict[str, Dataset | IterableDataset]:
    kinds = {}
    for option, name in files.items():
        path = Path(name).expanduser()
        if path.suffix.lower() not in FORMATS:
            raise InputError(f"--{option} {name}: unknown file format '{path.suffix}'; use {', '.join(FORMATS)}")
        if not path.is_file():
            raise InputError(f"--{option} {name}: there is no such file; check the path")
        kinds[name] = FORMATS[path.suffix.lower()]
    if len(set(kinds.values())) > 1:
        listed = ", ".join(f"{name} ({kind})" for name, kind in kinds.items())
        raise InputError(f"own files must all have one format, but got {listed}; convert them to one")

    splits = {}
    for option, name in files.items():
        path = Path(name).expanduser()
        options = {}
        if kinds[name] == "csv":
            # Words such as NA, null or None are text; only empty fields and nan are missing values.
            options = {"keep_default_na": False, "na_values": ["", "nan", "NaN"]}
            options["sep"] = "\t" if path.suffix.lower() == ".tsv" else ","
        with _local_faults(
            f"--{option} {name}", f"check that it holds rows and is a valid {path.suffix} file in UTF-8"
        ):
            # One call for each file: the test file may lack the label column. The cache notices edited files.
            data = load_dataset(
                kinds[name],
                data_files={"train": str(path.resolve())},
                split="train",
                cache_dir=cache_dir,
                streaming=streaming and option == "train_file",
                **options,
            )
        splits[option.removesuffix("_file")] = data
    return splits


def _open_dataset(
    data_args: DataArguments, task: Task | None, cache_dir: str | None, token: str | None
) -> dict[str, Dataset | IterableDataset]:
    name = data_args.dataset_name or task.hub_id
    folder = Path(name).expanduser()
    if folder.is_file():
        raise InputError(f"--dataset_name {name} is a file; pass it as --train_file, or pass the folder that it is in")
    if folder.is_dir():
        name = str(folder.resolve())
        advice = "pass a folder that holds csv, json or parquet files, or whose README.md lists them"
        faults = _local_faults(f"data set folder '{name}'", advice)
    elif re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) is None or name.startswith("."):
        raise InputError(f"data set folder '{name}' does not exist; check the path, or pass a Hub id (owner/name)")
    else:
        faults = _hub_faults(name)
    with faults:
        if name == (task and task.hub_id) and not data_args.dataset_config_name:
            config = task.hub_config
        else:
            config = _choose_config(name, data_args.dataset_config_name, task, token)
        if folder.is_dir() and not data_args.streaming:
            cache_dir = _cache_for(name, config, cache_dir)
        splits = load_dataset(name, config, cache_dir=cache_dir, token=token, streaming=data_args.streaming)
    return dict(splits)


def _cache_for(folder: str, config: str, cache_dir: str | None) -> str:
    """Return a cache folder for the present state of a local data set's files.

    By itself `datasets` does not notice edits of files that a README.md lists.
    """
    state = hashlib.sha256(folder.encode())
    files = load_dataset_builder(folder, config, cache_dir=cache_dir).config.data_files or {}
    for split, paths in files.items():
        for path in filter(Path.is_file, map(Path, paths)):
            status = path.stat()
            state.update(f"{split} {path} {status.st_mtime_ns} {status.st_size}\n".encode())
    return str(Path(cache_dir or datasets.config.HF_DATASETS_CACHE) / "local" / state.hexdigest()[:16])


def _choose_config(name: str, wanted: str | None, task: Task | None, token: str | None) -> str:
    configs = get_dataset_config_names(name, token=token)
    if wanted is None and len(configs) == 1:
        return configs[0]
    # Not load_dataset's own complaint: it comes late and without the option's name.
    wanted = wanted or (task.name if task else None)
    if wanted in configs:
        return wanted
    cause = f"has no configuration '{wanted}'" if wanted else "has several configurations"
    raise InputError(f"data set '{name}' {cause}; pass one of these to --dataset_config_name: {', '.join(configs)}")
