"""The features of a whole data set, computed once and kept in a memory-mapped safetensors file."""

import contextlib
import hashlib
import json
import logging
import os
import struct
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import filelock
import numpy as np
import torch
from huggingface_hub.constants import HF_HOME
from safetensors import SafetensorError, safe_open
from torch import nn
from tqdm.auto import tqdm

from hf_ft_ext.errors import InputError, first_line
from hf_ft_ext.features.head import HeadReader, head_parameters
from hf_ft_ext.features.rows import has_plain_columns, inputs_of, only_pads, sample_rows, without_removal
from hf_ft_ext.files import adapters_text, atomic_write, tensor_hash
from hf_ft_ext.offload import input_device, reader_of

logger = logging.getLogger(__name__)

_NAME = "features"
_LABELS = frozenset({"label", "labels", "label_ids"})
_TYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.float64: "F64"}


def default_folder() -> Path:
    """The default folder for features: next to the Hub's cache."""
    return Path(HF_HOME) / "hf_ft_ext" / "features"


def feature_bytes(reader: HeadReader, rows: int) -> int:
    """Size of the features of `rows` rows in bytes."""
    return rows * reader.hidden * next(reader.model.parameters()).element_size()


def encoder_hash(model: nn.Module) -> str:
    """SHA-256 of everything that features depend on: configuration, adapters, weights outside the head."""
    head, digest = head_parameters(model), hashlib.sha256()
    config = {key: value for key, value in model.config.to_dict().items() if key not in _IGNORED_SETTINGS}
    digest.update(json.dumps(config, sort_keys=True, default=str).encode())
    digest.update(adapters_text(model).encode())
    read = reader_of(model)
    for name, tensor in sorted(model.state_dict().items()):
        if name not in head:
            digest.update(f"{name} {tensor_hash(read(name, tensor))}\n".encode())
    return digest.hexdigest()


_IGNORED_SETTINGS = ("_name_or_path", "id2label", "label2id", "problem_type", "transformers_version", "num_labels")


def data_fingerprint(dataset: Any, collate: Callable[[list], dict] | None = None) -> str:
    """SHA-256 of the rows' inputs, without labels.

    Args:
        collate: if it may change rows (it is not a padding collator), each row is hashed as it returns it.
    """
    digest = hashlib.sha256()
    changes = collate is not None and not only_pads(collate)
    if has_plain_columns(dataset) and not changes:
        for name in sorted(set(dataset.column_names) - _LABELS):
            digest.update(name.encode())
            for table in dataset.select_columns(name).with_format("arrow").iter(batch_size=10_000):
                column = table.column(0).combine_chunks()
                while hasattr(column, "value_lengths"):  # a list in each row, or lists of lists
                    digest.update(column.value_lengths().to_numpy(zero_copy_only=False).tobytes())
                    column = column.flatten()
                values = column.to_numpy(zero_copy_only=False)
                digest.update(str(values.tolist()).encode() if values.dtype == object else values.tobytes())
        return digest.hexdigest()
    for i in range(len(dataset)):
        row = dataset[i] if collate is None or not changes else collate([dataset[i]])
        for key in sorted(row.keys() - _LABELS):
            values = np.asarray(row[key])
            digest.update(f"{key} {values.shape} {values.dtype}\n".encode())
            digest.update(str(values.tolist()).encode() if values.dtype == object else values.tobytes())
    return digest.hexdigest()


def cached_features(
    reader: HeadReader,
    dataset: Any,
    parts: Callable[[int], Iterable[torch.Tensor]],
    folder: str | os.PathLike | None = None,
    disable_tqdm: bool = False,
    collate: Callable[[list], dict] | None = None,
    batch_size: int | None = None,
) -> torch.Tensor:
    """Features of every row of `dataset`: `[rows, hidden]`, memory-mapped from a file that later runs reuse.

    Name and header of the file hold the hash of the encoder, the fingerprint of the data, the number of rows, how they
    are padded, the type of mixed precision and, if padding changes the features, the batch size. The file is written
    under a temporary name; after an interruption, the next run continues it.

    Args:
        reader: the model's reader.
        dataset: a data set of known length; its rows are hashed.
        parts: `parts(start)` yields the features of the rows from `start` on, in the data set's order, several rows at
            a time (see `read_in_order`).
        folder: folder of the file; `None` = `default_folder()`.
        collate: the collator that `parts` uses; `None` = one that only pads.
        batch_size: rows of a batch of `parts`; `None` = padding does not change the features.

    Raises:
        InputError: the file is truncated or has other content, or the folder cannot be written to.
    """
    folder = default_folder() if folder is None else Path(folder).expanduser()
    rows, hidden, dtype = len(dataset), reader.hidden, next(reader.model.parameters()).dtype
    about = {
        "encoder": encoder_hash(reader.model),
        "data": data_fingerprint(dataset, collate),
        "rows": str(rows),
        "read": reader.read.__name__.strip("_"),
        "padding": _padding_of(collate),
        "autocast": _autocast_type(reader),
    }
    if batch_size is not None and collate is not None and _padding_changes(reader, dataset, collate):
        about["batch"] = str(batch_size)  # it decides how much a row is padded
    key = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:32]
    path = folder / f"{key}.safetensors"
    if path.exists():
        logger.info("features of %d rows: read from %s", rows, path)
        return _open(path, about, (rows, hidden), dtype)
    try:
        with _partial_file(path) as file:
            done = _complete_rows(file, _header(about, rows, hidden, dtype), hidden * dtype.itemsize)
            if done:
                logger.info("features of %d rows: found from an interrupted run", done)
            with tqdm(total=rows, initial=done, desc="encoding the data once", disable=disable_tqdm) as bar:
                for part in parts(done) if done < rows else ():
                    file.write(part.to("cpu", dtype).contiguous().view(torch.uint8).numpy().tobytes())
                    bar.update(len(part))
                    done += len(part)
            if done != rows:
                raise RuntimeError(f"{done} rows were encoded, the data set has {rows}")
    except OSError as error:
        raise InputError(
            f"features cannot be written to {folder} ({error.strerror or error}); pass --feature_cache_dir with a "
            "folder that is writable and has room, or --feature_cache_gb 0 to encode in every step"
        ) from error
    logger.info("features of %d rows: written to %s", rows, path)
    return _open(path, about, (rows, hidden), dtype)


def _padding_of(collate: Any) -> str:
    """Side and token of padding: models without an attention mask, or with absolute positions, depend on them."""
    tokenizer = getattr(without_removal(collate), "tokenizer", None)
    return f"{getattr(tokenizer, 'padding_side', '')} {getattr(tokenizer, 'pad_token_id', '')}".strip()


def _padding_changes(reader: HeadReader, dataset: Any, collate: Callable[[list], dict]) -> bool:
    """Whether a row's features depend on its padding: the encoder ignores the attention mask, at least in part."""
    rows = sorted(sample_rows(dataset), key=lambda row: len(row.get("input_ids", ())))
    device = input_device(reader.model)
    alone, padded = (reader.features(inputs_of(collate(part), device))[0] for part in (rows[:1], [rows[0], rows[-1]]))
    bound = 1e-3 if alone.dtype.itemsize > 2 and not _autocast_type(reader) else 5e-2
    return bool((padded - alone).abs().max() > bound * alone.abs().max())


def _autocast_type(reader: HeadReader) -> str:
    """The type of mixed precision that the encoder runs in, or the empty string."""
    kind = input_device(reader.model).type
    with reader.autocast():
        return str(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else ""


@contextlib.contextmanager
def _partial_file(path: Path) -> Iterator[BinaryIO]:
    """Open a partial file that survives an interruption and is renamed to `path` when the block succeeds.

    A second process that writes the same file at the same time gets a file of its own, which does not survive one.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.stem}.partial")
    lock = filelock.FileLock(f"{partial}.lock")
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        with atomic_write(path) as temporary, open(temporary, "w+b") as file:
            yield file
        return
    try:
        with open(partial, "a+b") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
        Path(lock.lock_file).unlink(missing_ok=True)
    finally:
        lock.release()


def _complete_rows(file: BinaryIO, header: bytes, width: int) -> int:
    """Number of complete rows in `file`; truncate an incomplete last row, or all rows under another header."""
    file.seek(0)
    done = 0
    if file.read(len(header)) == header:
        done = (os.fstat(file.fileno()).st_size - len(header)) // width
    file.truncate(len(header) + done * width if done else 0)
    file.seek(0, os.SEEK_END)
    if not done:
        file.write(header)
    return done


def _header(about: dict[str, str], rows: int, hidden: int, dtype: torch.dtype) -> bytes:
    size = rows * hidden * dtype.itemsize
    entry = {"dtype": _TYPES[dtype], "shape": [rows, hidden], "data_offsets": [0, size]}
    text = json.dumps({"__metadata__": about, _NAME: entry}, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # aligns the data in the mapped file
    return struct.pack("<Q", len(text)) + text


def _open(path: Path, about: dict[str, str], shape: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
    try:
        with safe_open(path, framework="pt") as file:
            found = file.metadata() or {}
            other = [name for name, value in about.items() if found.get(name) != value]
            if other or _NAME not in file.keys():  # noqa: SIM118
                raise InputError(
                    f"the feature cache {path} was made from another {' and other '.join(other) or 'source'}; delete "
                    "the file, or pass another --feature_cache_dir"
                )
            features = file.get_tensor(_NAME)
    except (SafetensorError, OSError) as error:
        raise InputError(
            f"the feature cache {path} cannot be read ({first_line(error)}): it is truncated or not "
            "a feature cache; delete the file and run again"
        ) from error
    if tuple(features.shape) != shape or features.dtype != dtype:
        raise InputError(
            f"the feature cache {path} holds a table of shape {tuple(features.shape)} and {features.dtype}, expected "
            f"{shape} and {dtype}; delete it"
        )
    return features
