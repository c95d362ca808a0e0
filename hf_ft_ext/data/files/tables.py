"""Read delimited files (csv, tsv) as rows of text, and infer the types of their columns."""

import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

from hf_ft_ext.data.files.dialect import AUTO, Dialect, find_dialect, rows
from hf_ft_ext.data.files.text_files import TextFile, UnreadableFile, data_suffix, text_file

INT, FLOAT, TEXT, UNKNOWN = "int64", "float64", "string", ""
_WIDEST = 18  # digits that always fit an int64
# Integers only in Python's own notation, so that writing them back gives the same text: 007 and +1 stay text.
_INT = re.compile(rf"0|-?[1-9][0-9]{{0,{_WIDEST - 1}}}")
_FLOAT = re.compile(r"[+-]?((0|[1-9][0-9]*)(\.[0-9]*)?|\.[0-9]+)([eE][+-]?[0-9]+)?")
_INFINITE = re.compile(r"[+-]?inf(inity)?", flags=re.IGNORECASE)
MISSING = {"", "nan", "NaN"}  # missing numbers; a text is missing only if it is empty


@dataclass(frozen=True)
class Table:
    """A delimited file and how to read it."""

    file: TextFile
    dialect: Dialect

    @property
    def names(self) -> tuple[str, ...]:
        return self.dialect.names

    def records(self, skip_errors: bool = False) -> Iterator[list[str] | None]:
        """Yield the fields of the columns `names`, row by row.

        Args:
            skip_errors: yield `None` for a row with too many or too few fields, instead of raising.

        Raises:
            UnreadableFile: the file has changed since it was opened.
        """
        dialect = self.dialect
        found = rows(self.file, dialect)
        if dialect.header:
            next(found, None)
        end = dialect.start + len(dialect.names)
        for number, fields in found:
            if len(fields) == dialect.width:
                yield fields[dialect.start : end]
            elif skip_errors:
                yield None
            else:
                raise UnreadableFile(f"line {number} has {len(fields)} fields, not {dialect.width}", "correct it")

    def kinds(self, text: Collection[str], limit: int | None = None) -> dict[str, str]:
        """Return the type of each column: `INT`, `FLOAT`, `TEXT`, or `UNKNOWN` if all values are missing.

        Args:
            text: columns that are text, whatever their values.
            limit: number of rows to inspect; `None` = all.
        """
        kinds = {name: TEXT if name in text else UNKNOWN for name in self.names}
        open_columns = [(i, name) for i, name in enumerate(self.names) if kinds[name] != TEXT]
        for count, fields in enumerate(self.records(skip_errors=limit is not None)):
            if not open_columns or count == limit:
                break
            if fields is None:
                continue
            for i, name in open_columns:
                kinds[name] = _wider(kinds[name], fields[i])
            open_columns = [(i, name) for i, name in open_columns if kinds[name] != TEXT]
        return {name: _FINITE.get(kind, kind) for name, kind in kinds.items()}


_INFINITE_ONLY = "inf"  # only infinite values so far, which may be words too
_FINITE = {_INFINITE_ONLY: TEXT}


def converted(value: str, kind: str) -> str | int | float | None:
    """Convert a field to a value of type `kind`; `None` if it is missing or, in a stream, of another type."""
    if kind == TEXT:
        return value or None
    value = value.strip()
    if value in MISSING:
        return None
    if kind == INT:
        return int(value) if _INT.fullmatch(value) else None
    try:
        return float(value)
    except ValueError:
        return None


def open_table(
    path: str, quoting: str = AUTO, names: Sequence[str] | None = None, limit: int | None = None
) -> tuple[Table, list[str]]:
    """Return a file's table, and what to log about reading it.

    Raises:
        UnreadableFile: see `find_dialect`.
    """
    file = text_file(path)
    dialect, notes = find_dialect(file, data_suffix(path), quoting, names, limit)
    return Table(file, dialect), notes


def _wider(kind: str, value: str) -> str:
    """Return the type of a column of type `kind` after one more value."""
    value = value.strip()
    if value in MISSING:
        return kind
    if kind in (UNKNOWN, INT, _INFINITE_ONLY) and _INT.fullmatch(value):
        return FLOAT if kind == _INFINITE_ONLY else INT
    if _INFINITE.fullmatch(value):
        return _INFINITE_ONLY if kind in (UNKNOWN, _INFINITE_ONLY) else FLOAT
    # A whole number that does not fit into an int64 is text, such as an id.
    if not _FLOAT.fullmatch(value) or (value.lstrip("+-").isdecimal() and not _INT.fullmatch(value)):
        return TEXT
    return FLOAT
