"""Local folders of data files: formats, a warning for files that are not read, and a cache for the present state."""

import hashlib
import logging
import re
from pathlib import Path
from typing import Any

import datasets
from datasets.data_files import SPLIT_KEYWORDS

from hf_ft_ext.data.files.text_files import data_suffix

FORMATS = {".csv": "csv", ".tsv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}
_SPLIT = re.compile(rf"(?<![a-z])({'|'.join(word for words in SPLIT_KEYWORDS.values() for word in words)})(?![a-z])")

logger = logging.getLogger(__name__)


def warn_of_other_formats(builder: Any) -> None:
    """Name the files of splits that lie beside those of a local data set in another format.

    Of a folder without a README.md that lists files, `datasets` reads the most frequent format only, without a word.

    Args:
        builder: a `datasets.DatasetBuilder` of local files.
    """
    used = {Path(path) for paths in (builder.config.data_files or {}).values() for path in paths}
    formats = {FORMATS.get(data_suffix(path)) for path in used}
    for folder in sorted({path.parent for path in used if path.is_file()}):
        if (folder / "README.md").is_file():
            continue
        others = [
            path.name
            for path in sorted(folder.iterdir())
            if path not in used
            and FORMATS.get(data_suffix(path)) not in {None, *formats}
            and _SPLIT.search(path.name.lower())
        ]
        if others:
            logger.warning(
                "data set folder '%s': of several formats only %s is read, so these files are left out: %s; "
                "convert them",
                folder,
                builder.name,
                ", ".join(others),
            )


def cache_for(folder: str, builder: Any, cache_dir: str | None) -> str:
    """Return a cache folder for the current state of a local data set's files.

    `datasets` itself does not notice changes of files that a README.md lists.
    """
    state = hashlib.sha256(folder.encode())
    files = builder.config.data_files or {}
    for split, paths in files.items():
        for path in filter(Path.is_file, map(Path, paths)):
            status = path.stat()
            state.update(f"{split} {path} {status.st_mtime_ns} {status.st_size}\n".encode())
    return str(Path(cache_dir or datasets.config.HF_DATASETS_CACHE) / "local" / state.hexdigest()[:16])
