"""Compare the class names that parquet and arrow files store, which `datasets` reads from the first file only."""

from pathlib import Path
from typing import Any

import pyarrow as pa
from datasets import ClassLabel, Features

from hf_ft_ext.errors import InputError


def check_class_names(builder: Any) -> None:
    """Refuse local files that give different names to the same class id.

    `datasets` takes the names of all splits from one file and keeps the ids of the others. Names in a README.md apply
    to all files, so they are not compared.

    Args:
        builder: a `datasets.DatasetBuilder` of local files.

    Raises:
        InputError: two files contradict each other.
    """
    if builder.info.features is not None:
        return
    first: dict[str, tuple[str, list[str]]] = {}
    for paths in (builder.config.data_files or {}).values():
        for path in paths:
            for column, names in _class_names(Path(path)).items():
                other, known = first.setdefault(column, (path, names))
                wrong = next((i for i, (a, b) in enumerate(zip(known, names, strict=False)) if a != b), None)
                if wrong is not None:
                    raise InputError(
                        f"class {wrong} of column '{column}' is {known[wrong]!r} in {other}, but {names[wrong]!r} in "
                        f"{path}; save both with the same class names, or pass the files with --train_file and "
                        "--validation_file, which are compared by name"
                    )


def _class_names(path: Path) -> dict[str, list[str]]:
    """Return the class names of each column of a file."""
    if not path.is_file():
        return {}
    if path.suffix == ".parquet":
        from pyarrow.parquet import read_schema

        schema = read_schema(path)
    elif path.suffix == ".arrow":
        with pa.memory_map(str(path)) as source:
            schema = pa.ipc.open_stream(source).schema
    else:
        return {}
    found = {}
    for column, feature in Features.from_arrow_schema(schema).items():
        inner = getattr(feature, "feature", feature)  # of a list
        if isinstance(inner, ClassLabel):
            found[column] = inner.names
    return found
