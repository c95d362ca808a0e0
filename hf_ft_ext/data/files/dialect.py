"""Detect the dialect of a delimited file (delimiter, quotes, header) from its content.

There are two ways to read a file. Without quotes, every line is a row. With quotes, a field in double quotes may hold
delimiters and line breaks. A reading fits if every row has as many fields as the header. GLUE and LM-BFF distribute
tsv files with texts that begin with an unpaired `"`: read with quotes, such a field includes all lines up to the next
`"`.
"""

import csv
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice

from hf_ft_ext.arguments import QUOTINGS
from hf_ft_ext.data.files.text_files import TextFile, UnreadableFile

AUTO, NONE, MINIMAL, BACKSLASH = QUOTINGS
DEFAULT_DELIMITERS = {".csv": ",", ".tsv": "\t"}
_NAMES = {",": "comma", ";": "semicolon", "\t": "tab", "|": "bar"}
_QUOTING_NAMES = {NONE: "without quotes", MINIMAL: "with quotes", BACKSLASH: 'with quotes, \\" inside them'}
_RETURN_PLACEHOLDER = (
    "\ufdd0"  # replaces a lone "\r", which `csv` takes for a line end; a Unicode noncharacter for internal use
)
_LEAST_EVIDENCE = 5  # the least number of fields or rows from which a convention is inferred
_FIELD_LIMIT = 2**31 - 1  # characters; csv's own limit is 131,072


@dataclass(frozen=True)
class Dialect:
    """How to read a file.

    Attributes:
        delimiter: one character.
        quoting: `none`, `minimal` (quotes are doubled inside quotes) or `backslash`.
        skipped: lines before the header.
        header: whether the first row names the columns.
        names: names of the columns in use.
        start: number of fields in each row before those in use.
        width: number of fields in each row.
    """

    delimiter: str
    quoting: str
    skipped: int
    header: bool
    names: tuple[str, ...] = ()
    start: int = 0
    width: int = 0


def rows(file: TextFile, dialect: Dialect) -> Iterator[tuple[int, list[str]]]:
    """Yield all rows, including the header, each with the number of its last line (from 1).

    Blank lines are skipped, except between rows of a single column, where they are empty fields.

    Raises:
        UnreadableFile: a closing quote is not at the end of a field, or the text does not match its encoding.
    """
    blank = 0
    for number, fields in _split(file, dialect):
        if not fields or (len(fields) == 1 and not fields[0].strip(" ") and dialect.width != 1):
            blank += 1
            continue
        if dialect.width == 1:
            yield from ((number, [""]) for _ in range(blank))
        blank = 0
        yield number, fields


def find_dialect(
    file: TextFile, suffix: str, quoting: str = AUTO, names: Sequence[str] | None = None, limit: int | None = None
) -> tuple[Dialect, list[str]]:
    """Return how to read a file, and what to log about it.

    Args:
        file: the file.
        suffix: `.csv` or `.tsv`, which sets the expected delimiter.
        quoting: `auto` detects the quoting; the other values force a reading.
        names: column names of a file without a header; `None` = the first row.
        limit: number of rows to inspect; `None` = all.

    Raises:
        UnreadableFile: no reading fits, or two readings fit and give different rows.
    """
    first = next((_without_end(line) for line in file.lines() if line.strip()), "")
    if "\0" in first:
        raise UnreadableFile(
            "its first line has NUL characters; it may be UTF-16 without a byte order mark", "save it as UTF-8"
        )
    given = re.fullmatch(r'"?sep=(.)"?[,;]*', first, flags=re.IGNORECASE)  # Excel's
    if given:
        dialect, notes = _quoted_or_not(file, Dialect(given[1], quoting, 1, not names), names, limit)
        return dialect, [f"its first line sets the delimiter {given[1]!r}", *notes]
    expected = DEFAULT_DELIMITERS[suffix]
    base = Dialect(expected, quoting, 0, not names)
    others = [] if expected in first else [other for other in _NAMES if other in first]
    found, errors = [], []
    for other in others:
        try:
            found.append(_quoted_or_not(file, replace(base, delimiter=other), names, limit))
        except UnreadableFile as error:
            errors.append((other, error))
    found = [(dialect, notes) for dialect, notes in found if len(dialect.names) > 1]
    if len(found) == 1:
        dialect, notes = found[0]
        return dialect, [f"the delimiter is a {_NAMES[dialect.delimiter]}, not a {_NAMES[expected]}", *notes]
    if len(found) > 1 or any(other in ";\t" or expected == "\t" for other, _ in errors):
        other, failure = (found[0][0].delimiter, None) if found else errors[0]
        cause = f"it has no {_NAMES[expected]} in its first line, but a {_NAMES[other]}"
        raise UnreadableFile(
            cause + (f"; with that delimiter, {failure.cause}" if failure else ""),
            f"save it with the delimiter of a {suffix} file, or put sep={other} into a line before the first",
        )
    return _quoted_or_not(file, base, names, limit)


def _split(file: TextFile, dialect: Dialect) -> Iterator[tuple[int, list[str]]]:
    lines = islice(file.lines(), dialect.skipped, None)
    if dialect.quoting == NONE:
        for number, line in enumerate(lines, 1 + dialect.skipped):
            line = _without_end(line)
            yield number, line.split(dialect.delimiter) if line else []
        return
    csv.field_size_limit(max(csv.field_size_limit(), _FIELD_LIMIT))
    doubled = dialect.quoting == MINIMAL
    reader = csv.reader(
        (_protected(line, file.newline) for line in lines),
        delimiter=dialect.delimiter,
        strict=True,
        doublequote=doubled,
        escapechar=None if doubled else "\\",
    )
    try:
        for fields in reader:
            yield reader.line_num + dialect.skipped, [f.replace(_RETURN_PLACEHOLDER, "\r") for f in fields]
    except csv.Error as error:
        raise UnreadableFile(
            f"line {reader.line_num + dialect.skipped}: {error}",
            'double every " inside a quoted field, and close the field before its delimiter',
        ) from None


def _without_end(line: str) -> str:
    return line.removesuffix("\n").removesuffix("\r")


def _protected(line: str, newline: str) -> str:
    """Return the line with every "\\r" inside it replaced, so that its only line break is its end."""
    if newline == "\r" or "\r" not in line:
        return line
    end = "\r\n" if line.endswith("\r\n") else ""
    return line.removesuffix("\r\n").replace("\r", _RETURN_PLACEHOLDER) + end


@dataclass
class _FileStatistics:
    """What one way of reading finds in a file."""

    dialect: Dialect
    header: list[str] = field(default_factory=list)
    rows: int = 0
    widths: Counter = field(default_factory=Counter)  # field counts of the rows after the header
    lines: dict[int, int] = field(default_factory=dict)  # width -> first line with it
    last_empty: bool = True  # whether the last field of every row is empty
    counted: bool = True  # whether the first field of every row is its number, from 0 or 1
    repeated: int | None = None  # line of a second header
    multiline: bool = False  # whether a quoted field spans several lines
    error: UnreadableFile | None = None
    # Counts of fields with quotes at their ends, for the reading without quotes.
    opened: int = 0
    closed_too: Counter = field(default_factory=Counter)  # by column
    doubled: int = 0
    commas: tuple[int, int] = (0, 0)  # fields with a comma: quoted, not quoted
    header_quoted: bool = False
    spaced: bool = False  # whether a space precedes an opening quote, which is then part of the text


def _collect(file: TextFile, dialect: Dialect, names: Sequence[str] | None, limit: int | None) -> _FileStatistics:
    stats = _FileStatistics(dialect)
    before = dialect.skipped
    try:
        for number, fields in islice(rows(file, dialect), limit):
            stats.multiline |= dialect.quoting != NONE and number > before + 1 and _spans(fields)
            before = number
            if dialect.quoting == NONE:
                _count_quotes(stats, fields)
            if not stats.header:
                stats.header_quoted = dialect.header and stats.opened == stats.closed_too.total() == len(fields)
                if names and [name.strip() for name in fields] == list(names):
                    raise UnreadableFile("its first line is a header line", "leave --column_names out")
                stats.header = list(names) if names else [name.strip() for name in fields]
                if not names:
                    continue
            _count_row(stats, number, fields)
    except UnreadableFile as error:
        stats.error = error
    return stats


def _spans(fields: list[str]) -> bool:
    return any("\n" in value for value in fields)


def _count_row(stats: _FileStatistics, number: int, fields: list[str]) -> None:
    width = len(fields)
    stats.widths[width] += 1
    stats.lines.setdefault(width, number)
    stats.last_empty &= not fields[-1]
    if stats.counted:
        stats.counted = fields[0] in (str(stats.rows), str(stats.rows + 1))
    stats.rows += 1
    if stats.repeated is None and stats.dialect.header and fields == stats.header:
        stats.repeated = number


def _count_quotes(stats: _FileStatistics, fields: list[str]) -> None:
    inside, outside = stats.commas
    for column, value in enumerate(fields):
        quoted = value.startswith('"')
        stats.spaced |= value.startswith(" ") and value.lstrip(" ").startswith('"')
        if quoted:
            stats.opened += 1
            if len(value) > 1 and value.endswith('"'):
                stats.closed_too[column] += 1
                stats.doubled += '""' in value[1:-1]
        if "," in value:
            inside, outside = inside + quoted, outside + (not quoted)
    stats.commas = inside, outside


def _quoted_or_not(
    file: TextFile, base: Dialect, names: Sequence[str] | None, limit: int | None
) -> tuple[Dialect, list[str]]:
    """Return the dialect of the reading that fits, and what to log."""
    if base.quoting != AUTO:
        return _fitted(_collect(file, base, names, limit))
    plain = _collect(file, replace(base, quoting=NONE), names, limit)
    if not plain.opened or plain.error:
        return _fitted(plain)
    quoted = _collect(file, replace(base, quoting=MINIMAL), names, limit)
    fits = {}
    errors = {}
    for stats in (plain, quoted):
        try:
            fits[stats.dialect.quoting] = _fitted(stats)
        except UnreadableFile as error:
            errors[stats.dialect.quoting] = error
    if not fits or (MINIMAL not in fits and plain.header_quoted):  # R and databases write backslashes
        try:
            return _with_reading(
                _fitted(_collect(file, replace(base, quoting=BACKSLASH), names, limit)), "the only reading that fits"
            )
        except UnreadableFile:
            pass
    if not fits:
        likely, other = (NONE, MINIMAL) if base.delimiter == "\t" else (MINIMAL, NONE)
        raise UnreadableFile(
            f"{_QUOTING_NAMES[likely]}: {errors[likely].cause}; {_QUOTING_NAMES[other]}: {errors[other].cause}",
            f"{errors[likely].fix}, or pass --quoting {NONE} or {MINIMAL} to see that reading's errors alone",
        )
    if len(fits) == 1:
        (found,) = fits.values()
        return _with_reading(found, "only this way all rows have the header's number of fields")
    if quoted.multiline and base.delimiter != "\t" and not _written_with_quotes(plain):
        raise UnreadableFile(
            f"it can be read in two ways: {plain.rows:,} rows without quotes, {quoted.rows:,} with quotes",
            f"pass --quoting {NONE} or --quoting {MINIMAL}",
        )
    if base.delimiter != "\t":
        return _with_reading(fits[MINIMAL], "the default for csv")
    if _written_with_quotes(plain):
        return _with_reading(fits[MINIMAL], "its quotes look written by a program")
    return _with_reading(fits[NONE], "its quotes are part of the texts")


def _written_with_quotes(plain: _FileStatistics) -> bool:
    """Whether the quotes of a file that fits both readings look written by a program.

    Programs quote the header, double quotes inside quotes, quote whole columns, or (Excel) quote every field that
    contains a comma.
    """
    whole = plain.rows in plain.closed_too.values() and plain.rows >= _LEAST_EVIDENCE
    inside, outside = plain.commas
    excel = inside >= _LEAST_EVIDENCE and not outside and inside == plain.opened
    likely = plain.header_quoted or plain.doubled > 0 or whole or excel
    return likely and plain.opened == plain.closed_too.total()


def _with_reading(found: tuple[Dialect, list[str]], why: str) -> tuple[Dialect, list[str]]:
    dialect, notes = found
    return dialect, [f"read {_QUOTING_NAMES[dialect.quoting]} ({why}; --quoting forces another reading)", *notes]


def _fitted(stats: _FileStatistics) -> tuple[Dialect, list[str]]:
    """Return the dialect of a reading, with the columns that all rows have.

    Raises:
        UnreadableFile: the rows do not match the header.
    """
    if stats.error:
        raise stats.error
    header, widths = stats.header, set(stats.widths)
    if not header:
        raise UnreadableFile("it is empty", "check that it holds a header line and rows")
    named, width, start, notes = len(header), len(header), 0, []
    trailing = named > 1 and not header[-1] and stats.dialect.header
    if trailing and widths == {named} and stats.last_empty:
        named -= 1
        notes.append("the empty column at the end is left out")
    elif trailing and widths == {named - 1}:
        named, width = named - 1, named - 1
    elif widths == {named + 1} and stats.last_empty:
        width += 1
        notes.append("the empty field at the end of every row is left out")
    elif widths == {named + 1} and stats.counted and stats.rows >= _LEAST_EVIDENCE and stats.dialect.header:
        start, width = 1, width + 1
        notes.append("the row numbers before the first column are left out")
    elif widths - {named}:
        raise _ragged(stats)
    names = [name or f"Unnamed: {i}" for i, name in enumerate(header[:named])]
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise UnreadableFile(f"{Counter(names)[twice[0]]} of its columns are named '{twice[0]}'", "rename all but one")
    if stats.repeated is not None:
        raise UnreadableFile(
            f"line {stats.repeated} repeats the first line, its header",
            "remove that line, or if the file has no header line, name its columns with --column_names",
        )
    return replace(stats.dialect, names=tuple(names), start=start, width=width), notes


def _ragged(stats: _FileStatistics) -> UnreadableFile:
    named, delimiter = (
        len(stats.header),
        _NAMES.get(stats.dialect.delimiter, repr(stats.dialect.delimiter)),
    )
    listed = ", ".join(stats.header[:5]) + (", ..." if named > 5 else "")
    wrong = {width: line for width, line in stats.lines.items() if width != named}
    width, line = min(wrong.items(), key=lambda item: item[1])
    count = stats.rows - stats.widths[named]
    header = f"the header has {named} ({listed})"
    if stats.spaced:
        return UnreadableFile(
            f"line {line} has {width} fields, but {header}: a space before a double quote makes it part of the text",
            "remove the spaces before double quotes",
        )
    if set(stats.widths) == {named + 1}:
        return UnreadableFile(
            f"every row has {named + 1} fields, but {header}: a {delimiter} too many in each, perhaps inside a text",
            f"put texts that hold a {delimiter} into double quotes, or name all columns in the header",
        )
    cause = f"{count:,} of {stats.rows:,} rows do not fit: line {line} has {width} field{'s' * (width != 1)}, {header}"
    if width > named:
        return UnreadableFile(
            f"{cause}; perhaps a {delimiter} inside a text", f"put texts that hold a {delimiter} into double quotes"
        )
    return UnreadableFile(
        f"{cause}; perhaps a line break inside a text",
        "put texts that hold a line break into double quotes, and write every delimiter of a row",
    )
