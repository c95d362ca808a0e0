"""Read JSON files as rows: one object per line, a list of objects, or one object that holds the rows."""

import json
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

from hf_ft_ext.data.files.text_files import TextFile, UnreadableFile, text_file

LIST_OF, NESTED = "list of ", "nested"
_WIDE = "wide"  # whole numbers that no int64 holds
_LINES, _OBJECTS, _LIST, _FIELD, _COLUMNS = "lines", "objects", "list", "field", "columns"
_NO_SPACE = re.compile(r"\S")
_FIX = 'write one object per line, such as {"text": "good", "label": 0}'


@dataclass(frozen=True)
class Records:
    """A JSON file and the location of its rows.

    Attributes:
        layout: `lines` (one object per line), `objects` (one after the other), `list` (of objects), `field` (an object
            with a field that holds the list) or `columns` (an object with the values of each column).
        field: name of the field that holds the rows, for layout `field`.
        names: names of the columns.
    """

    file: TextFile
    layout: str
    field: str | None = None
    names: tuple[str, ...] = ()

    def records(self, skip_errors: bool = False) -> Iterator[list | None]:
        """Yield the values of the columns `names`, row by row; `None` for missing values.

        Args:
            skip_errors: yield `None` for a line that is not an object, instead of raising.
        """
        for row in self.rows(skip_errors):
            yield None if row is None else [row.get(name) for name in self.names]

    def rows(self, skip_errors: bool = False) -> Iterator[dict[str, Any] | None]:
        """Yield the objects of the file.

        Raises:
            UnreadableFile: the file is not JSON, or its rows are not objects.
        """
        if self.layout == _LINES:
            yield from self._lines(skip_errors)
        else:
            yield from self._parts()

    def _lines(self, skip_errors: bool) -> Iterator[dict | None]:
        for number, line in enumerate(self.file.lines(), 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line, object_pairs_hook=_once)
                if not isinstance(row, dict):
                    raise ValueError(f"{type(row).__name__} instead of an object")
            except ValueError as error:
                if not skip_errors:
                    raise UnreadableFile(f"line {number}: {getattr(error, 'msg', error)}", _FIX) from None
                row = None
            yield row

    def _parts(self) -> Iterator[dict]:
        content: Any = _objects(self.file)
        if self.layout != _OBJECTS:
            content = content[0]
        if self.layout == _FIELD:
            content = content[self.field]
        elif self.layout == _COLUMNS:
            columns = [list(v.values()) if isinstance(v, dict) else v for v in content.values()]
            content = [dict(zip(content, row, strict=True)) for row in zip(*columns, strict=True)]
        for number, row in enumerate(content):
            if not isinstance(row, dict):
                raise UnreadableFile(f"entry {number} of its list is {type(row).__name__} instead of an object", _FIX)
            yield row

    def kinds(self, text: Collection[str], limit: int | None = None) -> dict[str, str]:
        """Return each column's type: a name of `datasets.Value`, `LIST_OF` such a name, `NESTED`, or "" (only nulls).

        A column in `text` that holds texts and numbers is text.
        """
        found: dict[str, set[str]] = {name: set() for name in self.names}
        for fields in islice(self.records(), limit):
            for name, value in zip(self.names, fields or (), strict=False):
                if value is not None:
                    found[name].add(_kind(value))
        return {name: common_kind(kinds, name in text) for name, kinds in found.items()}


def open_records(path: str, limit: int | None = None) -> tuple[Records, list[str]]:
    """Return a JSON file's rows, and what to log about reading it.

    Args:
        path: the file.
        limit: number of rows from which the columns are found; `None` = all.

    Raises:
        UnreadableFile: the file is not JSON, is empty, or has several fields that may hold the rows.
    """
    file = text_file(path)
    first = list(islice((line for line in file.lines() if line.strip()), 2))
    if not first:
        raise UnreadableFile("it is empty", _FIX)
    if len(first) == 2 and _is_object(first[0]):
        layout, field, notes = _LINES, None, []
    else:
        layout, field, notes = _layout(_objects(file))
    found = Records(file, layout, field)
    names: dict[str, None] = {}
    for row in islice(found.rows(), limit):
        names.update(dict.fromkeys(row or ()))
    return Records(file, layout, field, tuple(names)), notes


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"two values are named '{twice}'")
    return row


def _objects(file: TextFile) -> list[Any]:
    """Return all JSON values of a file, in order."""
    text = "".join(file.lines())
    decoder = json.JSONDecoder(object_pairs_hook=_once)
    found, position = [], _after_space(text, 0)
    while position < len(text):
        try:
            value, end = decoder.raw_decode(text, position)
        except ValueError as error:
            line = text.count("\n", 0, getattr(error, "pos", position)) + 1
            raise UnreadableFile(f"line {line}: {getattr(error, 'msg', error)}", f"correct it; {_FIX}") from None
        found.append(value)
        position = _after_space(text, end)
    return found


def _after_space(text: str, start: int) -> int:
    """Return the first position from `start` on that holds no white space, without copying the text."""
    found = _NO_SPACE.search(text, start)
    return len(text) if found is None else found.start()


def _is_object(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False


def _layout(content: list[Any]) -> tuple[str, str | None, list[str]]:
    """Return the layout of a file that does not have one object per line."""
    if len(content) > 1:
        return _OBJECTS, None, []
    (whole,) = content
    if isinstance(whole, list):
        return _LIST, None, []
    if not isinstance(whole, dict):
        raise UnreadableFile(f"it holds one {type(whole).__name__}", _FIX)
    lists = [name for name, v in whole.items() if isinstance(v, list) and v and all(isinstance(e, dict) for e in v)]
    if len(lists) == 1:
        return _FIELD, lists[0], [f"its rows are those of the field '{lists[0]}'"]
    if lists:
        raise UnreadableFile(
            f"its rows may be those of any of the fields {', '.join(lists)}", "write each of them to a file of its own"
        )
    values = list(whole.values())
    shapes = {(type(v), tuple(v) if isinstance(v, dict) else len(v)) for v in values if isinstance(v, list | dict)}
    if len(shapes) == 1 and all(isinstance(v, list | dict) for v in values):
        return _COLUMNS, None, ["it is one object that holds columns"]
    return _OBJECTS, None, []


def _kind(value: Any) -> str:
    if isinstance(value, bool):
        return "bool"
    if isinstance(value, int):
        return "int64" if -(2**63) <= value < 2**63 else _WIDE
    if isinstance(value, float):
        return "float64"
    if isinstance(value, str):
        return "string"
    if isinstance(value, list):
        inner = {_kind(entry) for entry in value if entry is not None}
        if _WIDE in inner and inner <= {"int64", _WIDE}:
            return LIST_OF + _WIDE  # whether it is text depends on the other lists
        return LIST_OF + ("" if not inner else common_kind(inner, False))
    return NESTED


def common_kind(kinds: set[str], text: bool) -> str:
    """Return a common type of all `kinds`, or `NESTED` if there is none; with `text`, texts and numbers are text."""
    lists = {kind for kind in kinds if kind.startswith(LIST_OF)}
    if lists and lists == kinds:
        inner = common_kind({kind.removeprefix(LIST_OF) for kind in lists} - {""}, text)
        return NESTED if inner.startswith((LIST_OF, NESTED)) else LIST_OF + (inner or "string")
    if _WIDE in kinds and kinds <= {"int64", "float64", "string", _WIDE}:
        # As numbers with decimals, different ids would be equal; so they are text, as in a csv file.
        return "float64" if "float64" in kinds and "string" not in kinds else "string"
    if kinds == {"int64", "float64"}:
        return "float64"
    if text and NESTED not in kinds and not lists and "string" in kinds:
        return "string"
    return next(iter(kinds), "") if len(kinds) < 2 else NESTED
