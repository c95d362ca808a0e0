"""Write everything measured in README and docs anew from the result files: python benchmarks/tables.py

That is the page of all measurements (`page.py`), README's picture and table (`overview.py`) and the tables of the
other pages. Such a table stands between `<!-- results: NAME -->` and `<!-- end of results -->`; `tables.yaml` says
which rows of which files it shows and how:

    NAME:
      rows: {file: fisher, quantity: time}     # rows of results/fisher.json whose entries are these
      columns: {what: "{what}", ratio: "{value:.2f} ({low:.2f}-{high:.2f})"}
    OTHER:
      rows: {file: study}
      lines: "{method}"                        # one line per value of it, in the order of the file
      across: "{task}"                         # one column per value of it
      cell: "{value:.1f} ± {deviation:.1f}"
      cells: {mnli: "{value:.2f}"}             # other formats of some columns, if any
      first: method                            # heading of the first column

`methods: true` in place of columns stands for the table of `overview.py`. A value that is missing is an empty cell. A
line below each table says when and on which machine it was measured, and links to the commands in docs/benchmarks.md.
"""

import contextlib
import re
import string
from pathlib import Path
from typing import Any

import overview
import results
import yaml

ROOT = Path(__file__).resolve().parent.parent
PAGES = ("README.md", "docs/*.md")
_BLOCK = re.compile(r"(<!-- results: ([\w-]+) -->\n)(.*?)(<!-- end of results -->)", flags=re.DOTALL)


class _Gaps(string.Formatter):
    """Formats what there is: an empty text for a row that lacks a value."""

    def filled(self, form: str, row: dict[str, Any]) -> str:
        names = [name for _, name, _, _ in self.parse(form) if name is not None]
        if any(row.get(name) is None for name in names):
            short = form.partition(" ")[0]  # the value without its spread
            return self.filled(short, row) if short != form else ""
        return self.format(form, **row)


def specifications() -> dict[str, dict[str, Any]]:
    """The tables that `tables.yaml` describes, by name."""
    return yaml.safe_load((Path(__file__).parent / "tables.yaml").read_text(encoding="utf-8")) or {}


def table(specification: dict[str, Any], folder: Path = results.FOLDER, docs: str = "") -> str:
    """One table as Markdown, and a line about the conditions.

    Args:
        docs: where docs/ is for the page that holds the table.
    """
    if "methods" in specification:
        lines, rows = overview.choice(folder)
    else:
        rows = rows_of(specification, folder)
        lines = _crossed(specification, rows) if "across" in specification else _plain(specification, rows)
    return "\n".join([*lines, "", _conditions(rows, docs), ""])


def rows_of(specification: dict[str, Any], folder: Path = results.FOLDER) -> list[dict[str, Any]]:
    """The rows that a table shows: in its `order`, if it has one, else in that of the files."""
    wanted = dict(specification["rows"])
    rows = []
    for name in as_list(wanted.pop("file")):
        for row in results.read(name, folder):
            if all(row.get(key) in as_list(value) for key, value in wanted.items()):
                rows.append({**row, "file": name})
    orders = {
        key: {value: place for place, value in enumerate(values)}
        for key, values in specification.get("order", {}).items()
    }
    rows.sort(key=lambda row: [places.get(row.get(key), len(places)) for key, places in orders.items()])
    return rows


def filled(form: str, row: dict[str, Any]) -> str:
    """A format with the entries of a row; an empty text where one is missing."""
    return _Gaps().filled(form, row)


def rewritten(text: str, folder: Path = results.FOLDER, docs: str = "") -> str:
    """A page with its tables made anew.

    Args:
        docs: where docs/ is for this page.

    Raises:
        KeyError: a marker names a table that `tables.yaml` does not describe.
    """
    known = specifications()
    return _BLOCK.sub(lambda found: found[1] + table(known[found[2]], folder, docs) + found[4], text)


def docs_from(page: Path) -> str:
    """Where docs/ is for links of a page."""
    return "docs/" if page.parent == ROOT else ""


def names_in(text: str) -> list[str]:
    """Names of the tables that a page has."""
    return [found[2] for found in _BLOCK.finditer(text)]


def as_list(value: Any) -> list:
    return value if isinstance(value, list) else [value]


def _plain(specification: dict[str, Any], rows: list[dict[str, Any]]) -> list[str]:
    columns = specification["columns"]
    lines = [_line(columns), _line(["---", *["---:"] * (len(columns) - 1)])]
    return lines + [_line([filled(form, row) for form in columns.values()]) for row in rows]


def _crossed(specification: dict[str, Any], rows: list[dict[str, Any]]) -> list[str]:
    cells: dict[str, dict[str, str]] = {}
    heads: dict[str, None] = {}
    for row in rows:
        line, head = (filled(specification[key], row) for key in ("lines", "across"))
        heads[head] = None
        cell = specification.get("cells", {}).get(head, specification["cell"])
        cells.setdefault(line, {})[head] = filled(cell, row)
    with contextlib.suppress(ValueError):  # numbers in their order
        heads = dict.fromkeys(sorted(heads, key=float))
    lines = [_line([specification["first"], *heads]), _line(["---", *["---:"] * len(heads)])]
    return lines + [_line([line, *(found.get(head, "") for head in heads)]) for line, found in cells.items()]


def _line(cells: Any) -> str:
    return f"| {' | '.join(cells)} |"


def _conditions(rows: list[dict[str, Any]], docs: str) -> str:
    """When and where the rows were measured, with links to the commands."""
    if not rows:
        return "Not measured yet."
    places: dict[str, tuple[set[str], dict[str, None]]] = {}
    for row in rows:
        run = row["run"]
        place = f"{results.machine_text(run['machine'])}, torch {run['versions']['torch']}"
        days, files = places.setdefault(place, (set(), {}))
        days.add(run["date"])
        files[f"[{row['file']}]({docs}benchmarks.md#{row['file']})"] = None
    texts = []
    for place, (days, files) in places.items():
        when = min(days) if len(days) == 1 else f"{min(days)} to {max(days)}"
        texts.append(f"{when}, {place}, commands: {', '.join(files)}")
    noisy = sum(bool(row.get("noisy")) for row in rows)
    spread = f" Quartiles of {noisy} of the {len(rows)} values are further than 10 % from the median." if noisy else ""
    return "Measured " + "; ".join(texts) + "." + spread


def write() -> None:
    """Write all tables, the page of all measurements and the README's picture."""
    import page  # it uses this module

    page.write()
    overview.write()
    for pattern in PAGES:
        for path in sorted(ROOT.glob(pattern)):
            path.write_text(rewritten(path.read_text(encoding="utf-8"), docs=docs_from(path)), encoding="utf-8")


if __name__ == "__main__":
    write()
