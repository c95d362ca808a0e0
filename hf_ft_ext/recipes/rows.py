"""Expand the rows of a recipe that is a table: each row has the arguments of one experiment.

The other settings of the file are the base of every row. `rows` has one of two forms::

    rows:                                   # a mapping: name of the row -> its settings
      small: {learning_rate: 1.0e-3}

    row_name: "{task}-{k}"                  # a list of rows, named by their cells
    columns:                                # optional: without it, a column sets the argument of the same name
      task: task_name                       # the cell sets another argument, or [several, arguments]
      k: {"16": ..., "64": ...}             # each cell value, as text, stands for several settings
    rows:
      - [sst2, 16]                          # the cells in the order of `columns`
      - {task: [sst2, rte], k: [16, 64]}    # every combination

Later columns override earlier ones, and all override the base; `argument: ~` (null) removes a setting.
"""

import itertools
from collections.abc import Iterator
from typing import Any

from hf_ft_ext.errors import InputError, did_you_mean

TABLE_KEYS = ("rows", "columns", "row_name")


def base_of(recipe: dict[str, Any], where: str) -> dict[str, Any]:
    """The settings of the file outside of the table, by argument name ('-' in a name is read as '_').

    Raises:
        InputError: an argument is set in both spellings.
    """
    found: dict[str, Any] = {}
    for key, value in recipe.items():
        name = _argument(key)
        if name in found:
            raise InputError(f"recipe {where} sets {name!r} twice, spelt with '-' and with '_'; leave one line out")
        if key not in TABLE_KEYS:
            found[name] = value
    return found


def expanded_rows(recipe: dict[str, Any], where: str) -> dict[str, dict[str, Any]]:
    """Return the settings of each row, the base included, by the row's name; empty if the recipe is not a table.

    Args:
        recipe: the content of a file.
        where: the file, for messages.

    Raises:
        InputError: the table does not have the form that this module describes.
    """
    rows, columns = recipe.get("rows"), recipe.get("columns")
    if rows is None:
        if stray := [key for key in TABLE_KEYS if key in recipe]:
            raise InputError(f"recipe {where} has {stray[0]} but no rows; add rows, or leave {stray[0]} out")
        return {}
    base = base_of(recipe, where)
    if isinstance(rows, dict):
        return _named(rows, base, where)
    if not isinstance(rows, list) or not rows:
        raise InputError(f"rows of recipe {where} must be a mapping of names to settings, or a list of rows")
    if not isinstance(columns, dict | None):
        raise InputError(f"columns of recipe {where} must be a mapping of names to what each sets, got {columns!r}")
    if not isinstance(recipe.get("row_name"), str):
        raise InputError(
            f"recipe {where} has a list of rows without names; add for example row_name: '{{task_name}}-{{seed}}'"
        )
    found: dict[str, dict[str, Any]] = {}
    for number, row in enumerate(rows, start=1):
        here = f"row {number} of recipe {where}"
        for cells in _cells(row, columns or {}, here):
            name = _name(recipe["row_name"], cells, here)
            if name in found:
                raise InputError(f"{here} has the same name as another row, {name!r}; make row_name unique")
            found[name] = _settings(cells, columns or {}, base, here)
    return found


def _named(rows: dict[str, Any], base: dict[str, Any], where: str) -> dict[str, dict[str, Any]]:
    if not rows:
        raise InputError(f"rows of recipe {where} are empty; add one, or leave the line out")
    found = {}
    for name, settings in rows.items():
        if not isinstance(settings, dict):
            raise InputError(f"row {name!r} of recipe {where} must be a mapping of arguments, got {settings!r}")
        found[name] = _changed(base, settings, f"row {name!r} of recipe {where}")
    return found


def _cells(row: Any, columns: dict[str, Any], here: str) -> Iterator[dict[str, Any]]:
    """Iterate over the rows of one entry of the list (every combination of its cells), in the order of `columns`."""
    if isinstance(row, list):
        if len(row) != len(columns):
            raise InputError(f"{here} has {len(row)} cells for {len(columns)} columns ({', '.join(columns)})")
        yield dict(zip(columns, row, strict=True))
    elif isinstance(row, dict):
        names = [*(name for name in columns if name in row), *(name for name in row if name not in columns)]
        choices = [row[name] if isinstance(row[name], list) else [row[name]] for name in names]
        for combination in itertools.product(*choices):
            yield dict(zip(names, combination, strict=True))
    else:
        raise InputError(f"{here} must be a list of cells or a mapping of columns to cells, got {row!r}")


def _name(pattern: str, cells: dict[str, Any], here: str) -> str:
    try:
        return pattern.format_map(cells)
    except (KeyError, IndexError, ValueError) as error:
        raise InputError(f"row_name {pattern!r} does not fit {here}, which has: {', '.join(cells)}") from error


def _settings(cells: dict[str, Any], columns: dict[str, Any], base: dict[str, Any], here: str) -> dict[str, Any]:
    settings = base
    for name, cell in cells.items():
        target = columns.get(name)
        if isinstance(target, dict):
            if not isinstance(target.get(str(cell)), dict):
                raise InputError(
                    f"{here}: column {name!r} has no settings for {cell!r}{did_you_mean(cell, target)}; "
                    f"it has: {', '.join(target)}"
                )
            changes = target[str(cell)]
        else:
            changes = dict.fromkeys(target if isinstance(target, list) else [target or name], cell)
        settings = _changed(settings, changes, here)
    return settings


def _changed(settings: dict[str, Any], changes: dict[str, Any], here: str) -> dict[str, Any]:
    """The settings with the changes applied; a value `None` removes a setting."""
    found = dict(settings)
    for key, value in changes.items():
        name = _argument(key)
        if value is not None:
            found[name] = value
        elif name in found:
            del found[name]
        else:
            raise InputError(f"{here}: `{key}: ~` removes a setting that does not exist; leave it out")
    return found


def _argument(key: str) -> str:
    return key.replace("-", "_")
