"""Select the files of a run folder to push, and remove machine-specific values from their content."""

import fnmatch
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import transformers
from transformers.dynamic_module_utils import get_relative_import_files
from transformers.tokenization_utils_base import (
    ADDED_TOKENS_FILE,
    CHAT_TEMPLATE_DIR,
    CHAT_TEMPLATE_FILE,
    FULL_TOKENIZER_FILE,
    SPECIAL_TOKENS_MAP_FILE,
    TOKENIZER_CONFIG_FILE,
)

from hf_ft_ext.adapters.folder import local_files
from hf_ft_ext.methods import hooks_of
from hf_ft_ext.prompts.configuration import PROMPT_FILE
from hf_ft_ext.training.runs.record import RUN_RECORD, TRAINER_STATE
from hf_ft_ext.training.sharing import matching
from hf_ft_ext.training.sharing.privacy import hide_tokens, is_foreign_path, last_part, without_paths

CARD = "README.md"
ADAPTER_CONFIG = "adapter_config.json"
CONFIG = "config.json"
_WEIGHTS = (
    "model.safetensors",
    "model-*-of-*.safetensors",
    "model.safetensors.index.json",
    "adapter_model.safetensors",
)
_CONFIGS = (CONFIG, "generation_config.json", ADAPTER_CONFIG, PROMPT_FILE)
_TOKENIZER = (
    TOKENIZER_CONFIG_FILE, FULL_TOKENIZER_FILE, SPECIAL_TOKENS_MAP_FILE, ADDED_TOKENS_FILE, CHAT_TEMPLATE_FILE,
    f"{CHAT_TEMPLATE_DIR}/*.jinja", "vocab.txt", "vocab.json", "merges.txt", "tokenizer.model", "spiece.model",
    "sentencepiece.bpe.model", "spm.model",
)  # fmt: skip
_EXCLUDED = (
    ".*",
    "_*",
    "checkpoint-*",
    "run-*",
    "training_args.bin",
    "predictions*.tsv",
    "predictions*.jsonl",
    "hp_search.json",
)
_RUN = (CARD, RUN_RECORD, TRAINER_STATE)
# Files in which every path is replaced. In other files, only values of keys for file names are, as a configuration
# also contains label names, which may look like paths.
_RUN_RECORDS = (RUN_RECORD, TRAINER_STATE)
_FILE_KEYS = ("name_or_path", "_path", "_file", "_dir", "_folder", "checkpoint")


def shared_files(
    folder: str | os.PathLike, record: dict[str, Any] | None = None, include: Iterable[str] = ()
) -> list[Path]:
    """Return the files of a run to push to the Hub.

    These are weights, configurations, tokenizer, card, record and trainer state, the code files of a model with its
    own code, and the files in `shared_files` of the method's trainer.

    Args:
        record: the content of its `run.json`, for the method; `None` = read it.
        include: patterns of further files, in the form of `pathlib.Path.glob`.
    """
    record = _read(Path(folder) / RUN_RECORD) if record is None else record
    trainer = hooks_of(str(record.get("method")))
    patterns = (*_WEIGHTS, *_CONFIGS, *_TOKENIZER, *_vocabulary(Path(folder)), *_RUN)
    own = tuple(getattr(trainer, "shared_files", ()))
    found = {*matching(folder, (*patterns, *own, *include)), *_code(Path(folder))}
    return sorted(found - set(local_files(folder)))


def left_out(folder: str | os.PathLike, shared: Iterable[Path]) -> list[str]:
    """Names in `folder` that are not pushed, except hidden files and those that every run has (checkpoints, ...)."""
    folder = Path(folder)
    kept = {path.relative_to(folder).parts[0] for path in shared}
    names = {path.name for path in folder.iterdir()} - kept
    return sorted(name for name in names if not any(fnmatch.fnmatch(name, pattern) for pattern in _EXCLUDED))


def public_record(record: dict[str, Any]) -> dict[str, Any]:
    """The record without paths of this machine and access tokens; label names are kept unchanged."""
    cleaned = {key: value for key, value in record.items() if key != "labels"}
    cleaned = json.loads(hide_tokens(json.dumps(cleaned)))
    return without_paths(cleaned) | ({"labels": record["labels"]} if "labels" in record else {})


def public_content(path: Path, folder: Path, replaced: dict[str, str]) -> bytes | None:
    """The content to push instead of the file's own; `None` to push the file unchanged.

    Args:
        replaced: new values for keys of the file, such as a Hub id for the base model of an adapter.
    """
    name = path.relative_to(folder).as_posix()
    if path.suffix != ".json" or name in (FULL_TOKENIZER_FILE, "vocab.json", ADDED_TOKENS_FILE) or "index" in name:
        return None
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return None
    if name == RUN_RECORD:
        public = public_record(value)
    elif name in _RUN_RECORDS:
        public = without_paths(value)
    else:
        public = _named_files_cut(value)
    if isinstance(public, dict):
        public |= {key: text for key, text in replaced.items() if key in public}
    return None if public == value else (json.dumps(public, indent=2, ensure_ascii=False) + "\n").encode()


def _named_files_cut(value: Any, key: str = "") -> Any:
    """A JSON value in which paths of this machine are reduced to their last part, for keys of file names."""
    if isinstance(value, dict):
        return {name: _named_files_cut(item, name) for name, item in value.items()}
    if isinstance(value, list):
        return [_named_files_cut(item, key) for item in value]
    named = isinstance(value, str) and key.endswith(_FILE_KEYS) and is_foreign_path(value)
    return last_part(value) if named else value


def _read(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _vocabulary(folder: Path) -> tuple[str, ...]:
    """Names of the vocabulary files of the folder's tokenizer class."""
    kind = getattr(transformers, str(_read(folder / TOKENIZER_CONFIG_FILE).get("tokenizer_class")), None)
    return tuple(name for name in (getattr(kind, "vocab_files_names", None) or {}).values() if name)


def _code(folder: Path) -> set[Path]:
    """The Python files of a model with its own code: those in `auto_map` of a configuration, and what they import."""
    files: set[Path] = set()
    for name in (CONFIG, TOKENIZER_CONFIG_FILE, ADAPTER_CONFIG):
        for value in (_read(folder / name).get("auto_map") or {}).values():
            for reference in value if isinstance(value, list) else [value]:
                module = str(reference or "").rpartition("--")[2].partition(".")[0]
                path = folder / f"{module}.py"
                if path.is_file():
                    files |= {path, *map(Path, get_relative_import_files(path))}
    return {path for path in files if path.is_file() and path.resolve().is_relative_to(folder.resolve())}
