"""Read the user's own files (csv, tsv, json, jsonl) as data sets, with values exactly as written."""

import hashlib
import logging
import os
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
from datasets import Dataset, Features, IterableDataset, Value

from hf_ft_ext.data.files.dialect import AUTO
from hf_ft_ext.data.files.records import LIST_OF, NESTED, Records, common_kind, open_records
from hf_ft_ext.data.files.tables import INT, MISSING, TEXT, UNKNOWN, Table, converted, open_table
from hf_ft_ext.data.files.text_files import UnreadableFile, data_suffix
from hf_ft_ext.errors import InputError

# Text columns searched for in own data, in this order.
USUAL_TEXT = (
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("question1", "question2"),
    ("question", "sentence"),
    ("question", "passage"),
    ("question", "context"),
    ("question", "answer"),
    ("text1", "text2"),
    ("sentence",),
    ("text",),
)
SUFFIXES = (".csv", ".tsv", ".json", ".jsonl")
_HEAD = 100_000  # rows of a stream from which the dialect and types of its file are inferred
_BATCH = 10_000  # rows written at a time
_READING = 2  # part of the cache key: increase it when a change of this code changes the rows read from a file

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Reading:
    """Options for reading files.

    Attributes:
        quoting: quoting of csv and tsv files: `auto`, `none`, `minimal` or `backslash`.
        names: column names of csv and tsv files without a header line.
        text: columns that are read as text, whatever their values.
        labels: columns of labels.
    """

    quoting: str = AUTO
    names: tuple[str, ...] | None = None
    text: frozenset[str] = frozenset()
    labels: frozenset[str] = frozenset()


def open_own_files(
    files: Mapping[str, Sequence[tuple[str, str]]],
    reading: Reading,
    *,
    cache_dir: str | None = None,
    streamed: Collection[str] = (),
) -> dict[str, Dataset | IterableDataset]:
    """Return the splits of csv, tsv, json and jsonl files.

    The type of a column depends on its values in all files: it is numeric only if every value is a number in standard
    notation (`007` is text).

    Args:
        files: split -> (name for messages, path) of each of its files.
        reading: options for reading.
        cache_dir: where converted rows are kept; `None` = the Hub's cache.
        streamed: splits to read during training. Their first rows decide how the file is read; values of later rows
            that do not fit are missing.

    Raises:
        InputError: a file cannot be read; the message names the file, the cause and the fix.
    """
    opened = {
        split: [_open(name, path, reading, _HEAD if split in streamed else None) for name, path in parts]
        for split, parts in files.items()
    }
    kinds = _joint([kinds for parts in opened.values() for _, kinds in parts])
    result: dict[str, Dataset | IterableDataset] = {}
    for split, parts in opened.items():
        found = {name: kinds for (name, _), (_, kinds) in zip(files[split], parts, strict=True)}
        own = _types_of_split(split, found, reading.text | reading.labels)
        columns = tuple((name, _kind_of(own[name], kinds[name])) for name in own)
        sources = tuple(source for source, _ in parts)
        values = {
            "sources": sources,
            "columns": columns,
            "labels": tuple(sorted(reading.labels)),
            "tolerant": split in streamed,
            "reading": _READING,
        }
        features = Features({name: _feature(kind) for name, kind in columns})
        if split in streamed:
            result[split] = IterableDataset.from_generator(_rows, features=features, gen_kwargs=values)
        else:
            result[split] = _converted(values, features, cache_dir)
    return result


def holds_times(fields: Iterable[pa.Field]) -> bool:
    """Whether one of the fields, or a field inside it, is a point in time, which JSON files cannot contain."""
    return any(
        pa.types.is_temporal(field.type) or holds_times(field.type.field(i) for i in range(field.type.num_fields))
        for field in fields
    )


def _converted(values: dict[str, Any], features: Features, cache_dir: str | None) -> Dataset:
    """Return all rows from a cache file, written at the first call (faster than `Dataset.from_generator`)."""
    folder = Path(cache_dir or datasets.config.HF_DATASETS_CACHE).expanduser() / "own_files"
    path = folder / f"{hashlib.sha256(repr((values, features)).encode()).hexdigest()[:32]}.arrow"
    schema = features.arrow_schema
    if not path.is_file():
        unfinished = path.with_suffix(f".{os.getpid()}")
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with pa.OSFile(str(unfinished), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
                rows = _rows(**values)
                while batch := list(islice(rows, _BATCH)):
                    writer.write_batch(pa.RecordBatch.from_pylist(batch, schema=schema))
            unfinished.replace(path)
        except UnicodeEncodeError as error:
            wrong = error.object[error.start]
            raise InputError(
                f"the text {error.object[:40]!a} of {values['sources'][0].file.path} (or a file beside it) holds "
                f"{wrong!a}, half of a character; write the character in full, or remove the row"
            ) from error
        except OSError as error:
            raise InputError(
                f"converted data cannot be written to {folder} ({error.strerror or error}); pass --cache_dir with a "
                "folder that has room"
            ) from error
        finally:
            with suppress(OSError):  # there is nothing to delete if the folder could not be made
                unfinished.unlink()
    return Dataset.from_file(str(path))


def _open(name: str, path: str, reading: Reading, limit: int | None) -> tuple[Table | Records, dict[str, str]]:
    """Open a file; return its row reader and the types of its columns."""
    try:
        source: Table | Records
        if data_suffix(path) in (".csv", ".tsv"):
            source, notes = open_table(path, reading.quoting, reading.names, limit)
            kinds = source.kinds(reading.text, limit)
        else:
            source, notes = open_records(path, limit)
            kinds = source.kinds(reading.text | reading.labels, limit)
            kinds, nested = _without_nested(kinds, reading)
            source = replace(source, names=tuple(kinds))
            notes += nested
    except UnreadableFile as error:
        raise InputError(f"cannot read {name} ({error.cause}); {error.fix}") from None
    except (OSError, EOFError) as error:
        raise InputError(f"cannot read {name} ({error}); check the file") from error
    for note in notes:
        logger.info("%s: %s", name, note)
    return source, kinds


def _without_nested(kinds: dict[str, str], reading: Reading) -> tuple[dict[str, str], list[str]]:
    nested = [name for name, kind in kinds.items() if kind == NESTED]
    wanted = [name for name in nested if name in reading.text | reading.labels]
    flat = {name: kind for name, kind in kinds.items() if kind != NESTED}
    if wanted or (nested and not flat):
        raise UnreadableFile(
            f"column '{(wanted or nested)[0]}' is nested or holds values of several types",
            "write one text or number for each row and column",
        )
    return flat, [f"column '{name}' is left out: it is nested or holds values of several types" for name in nested]


def _joint(found: Sequence[dict[str, str]]) -> dict[str, str]:
    """Return the common type of each column over all files: text if any file has text, else a known type."""
    joint: dict[str, str] = {}
    for kinds in found:
        for name, kind in kinds.items():
            if joint.get(name, UNKNOWN) == UNKNOWN or kind == TEXT:
                joint[name] = kind
    return joint


def _types_of_split(
    split: str, found: Mapping[str, Mapping[str, str]], wanted: Collection[str] = ()
) -> dict[str, str]:
    """Return the types of the columns that all files of a split have in common; others are logged.

    Args:
        split: its name.
        found: the types of each file's columns, by the file's name for messages.
        wanted: columns of texts and labels.

    Raises:
        InputError: files give a wanted column types that have nothing in common, such as lists and single labels.
    """
    own = {}
    for column in dict.fromkeys(name for kinds in found.values() for name in kinds):
        lacking = next((file for file, kinds in found.items() if column not in kinds), None)
        if lacking is not None:
            logger.warning("split '%s': column '%s' is left out: %s has none", split, column, lacking)
            continue
        kinds = {file: kinds[column] for file, kinds in found.items() if kinds[column] != UNKNOWN}
        own[column] = common_kind(set(kinds.values()), True)
        if own[column] != NESTED:
            continue
        if column in wanted:
            raise InputError(
                f"column '{column}' of split '{split}' holds values of several types: "
                + ", ".join(f"{kind} in {file}" for file, kind in kinds.items())
                + "; write the same type in all files"
            )
        del own[column]
        logger.info("split '%s': column '%s' is left out: its files hold values of several types", split, column)
    return own


def _kind_of(own: str, joint: str) -> str:
    if own.startswith(LIST_OF):
        return own
    if joint == TEXT or own == UNKNOWN:
        return joint or TEXT
    return own


def _feature(kind: str) -> Any:
    if kind.startswith(LIST_OF):
        return datasets.Sequence(Value(kind.removeprefix(LIST_OF)))
    return Value(kind)


def _rows(
    sources: Sequence[Table | Records],
    columns: Sequence[tuple[str, str]],
    labels: Sequence[str],
    tolerant: bool,
    reading: int,
) -> Iterator[dict[str, Any]]:
    """Yield the rows of all files in order; in a stream, a row that does not fit has only `None` values."""
    kinds = dict(columns)
    for source in sources:
        convert = _field if isinstance(source, Table) else _value
        for values in source.records(skip_errors=tolerant):
            row = dict.fromkeys(kinds)
            for name, value in zip(source.names, values or (), strict=False):
                if name in kinds:
                    row[name] = convert(value, kinds[name], name in labels)
            yield row


def _field(value: str, kind: str, is_label: bool) -> Any:
    """Convert a field of a delimited file; `nan` in a label column (written by pandas) is a missing label."""
    return None if is_label and value.strip() in MISSING else converted(value, kind)


def _value(value: Any, kind: str, is_label: bool) -> Any:
    """Convert a value of a JSON file; in a stream, a value of another type than `kind` becomes `None`."""
    if isinstance(value, list) and kind == LIST_OF + TEXT:
        return [entry if entry is None else str(entry) for entry in value]
    if value is None or kind.startswith(LIST_OF):
        return value
    if kind == TEXT:
        return value if isinstance(value, str) else str(value) if isinstance(value, int | float) else None
    if kind == "bool" or isinstance(value, bool):
        return value if isinstance(value, bool) and kind == "bool" else None
    if not isinstance(value, int | float):
        return None
    if kind == INT:
        return int(value) if value % 1 == 0 else None
    return float(value)
