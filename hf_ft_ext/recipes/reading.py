"""Read the arguments of a recipe from its address: `FILE.yaml` or `FILE.yaml#ROW`."""

import difflib
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hf_ft_ext.errors import InputError
from hf_ft_ext.recipes.rows import base_of, expanded_rows
from hf_ft_ext.recipes.yaml_files import load

logger = logging.getLogger(__name__)
_SHOWN = 3  # rows that a message names


def read_recipe(address: str | os.PathLike, row: str | None = None) -> dict[str, Any]:
    """Return the arguments that a recipe sets, with values as YAML reads them; a value `None` sets nothing.

    Args:
        address: path of a YAML file; for a table, followed by `#` and the row.
        row: the row, instead of `#ROW`.

    Raises:
        InputError: no such file or row, a table without a row, or a file that is not a valid recipe.
    """
    path, named = split_address(address)
    if named is not None and row is not None and named != row:
        raise InputError(f"{address} selects the row {named!r}, and --recipe_row {row!r}; pass one of the two")
    row = row if named is None else named
    if not path.is_file():
        path, row = _replacement(path, row)
    recipe = load(path)
    rows = expanded_rows(recipe, str(path))
    if row is None and rows:
        raise InputError(
            f"recipe {path} is a table of {len(rows)} rows; choose one, for example {path}#{next(iter(rows))} "
            f"(`hf-ft-ext recipes {path}` lists them)"
        )
    if row is not None and row not in rows:
        raise InputError(_no_such_row(path, row, list(rows)))
    return base_of(recipe, str(path)) if row is None else rows[row]


def read_rows(path: str | os.PathLike) -> dict[str, dict[str, Any]]:
    """Return the arguments of every row of a table, by the row's name; empty if the recipe is not a table.

    Raises:
        InputError: as for `read_recipe`.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(_no_file(path))
    return expanded_rows(load(path), str(path))


def split_address(address: str | os.PathLike) -> tuple[Path, str | None]:
    """Split an address into the file and the row (or `None`). A file with `#` in its own name is supported."""
    text = os.fspath(address)
    file, mark, row = text.rpartition("#")
    if not mark or Path(text).is_file():
        return Path(text), None
    return Path(file), row


def _no_file(path: Path) -> str:
    return f"recipe {str(path)!r} is not a file; pass the path of a YAML file, then the arguments"


def _no_such_row(path: Path, row: str, names: list[str]) -> str:
    if not names:
        return f"recipe {path} is a single experiment without rows; leave #{row} out"
    near = difflib.get_close_matches(row, names, n=_SHOWN, cutoff=0.5)
    shown = ", ".join(near or names[:_SHOWN])
    which = "the nearest are" if near else "the first are"
    return f"recipe {path} has no row {row!r}; {which}: {shown} (`hf-ft-ext recipes {path}` lists all {len(names)})"


def _replacement(path: Path, row: str | None) -> tuple[Path, str]:
    """The table and row that replace a former file `FOLDER/NAME.yaml` (until 0.1, each experiment was a file)."""
    for table in _tables_near(path) if row is None else ():
        try:
            rows = expanded_rows(load(table), str(table))
        except InputError:  # an invalid recipe that was not asked for
            continue
        for name in (path.stem, f"{path.parent.name}-{path.stem}"):
            if name in rows:
                logger.warning("Recipe %s has become a row of a table: pass %s#%s.", path, table, name)
                return table, name
    raise InputError(_no_file(path))


def _tables_near(path: Path) -> Iterator[Path]:
    folder = path.parent
    if Path(f"{folder}.yaml").is_file():
        yield Path(f"{folder}.yaml")
    yield from sorted((folder if folder.is_dir() else folder.parent).glob("*.yaml"))
