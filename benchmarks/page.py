"""docs/benchmarks.md as a whole: headings and sentences from `page.yaml`, every number from the result files.

`page.yaml` is a list of sections, each with a heading and any of

    text: ...          # as it is; it holds no measured number
    ratios:            # one line of a table for each, left out as long as its row is not measured
      - {what: "a step, {tokens} tokens", against: LoRA, row: {file: sparse_step, ...}, cell: "{value}", page: ...}
    tables:            # tables of their own, described as in tables.yaml, left out as long as they have no row
      - {text: ..., rows: {file: ...}, ...}
    conditions: true   # a heading for each result file, and its commands: where and when they ran

The entries of `row` must find one row, or none. `tables.py` writes the page.
"""

from pathlib import Path
from typing import Any

import results
import tables
import yaml

PAGE = tables.ROOT / "docs" / "benchmarks.md"
_NOTICE = "<!-- Written by benchmarks/tables.py from benchmarks/page.yaml and the result files: change those. -->"


def sections() -> list[dict[str, Any]]:
    """What `page.yaml` describes."""
    return yaml.safe_load((Path(__file__).parent / "page.yaml").read_text(encoding="utf-8"))


def page(folder: Path = results.FOLDER) -> str:
    """The page as Markdown.

    Raises:
        ValueError: the entries of a `row` find several rows.
    """
    parts = ["# All measurements", _NOTICE]
    for section in sections():
        if "heading" in section:
            parts.append(f"## {section['heading']}")
        if "text" in section:
            parts.append(section["text"].strip())
        if "ratios" in section:
            parts.append("\n".join(_ratios(section["ratios"], folder)))
        for specification in section.get("tables", ()):
            if tables.rows_of(specification, folder):
                parts += [specification["text"].strip(), tables.table(specification, folder).strip()]
        if section.get("conditions"):
            parts.append("\n".join(_conditions(folder)).rstrip())
    return "\n\n".join(parts) + "\n"


def find(wanted: dict[str, Any], folder: Path = results.FOLDER) -> dict[str, Any] | None:
    """The one row that has these entries, `file` among them; `None` if it is not measured."""
    found = tables.rows_of({"rows": wanted}, folder)
    if len(found) > 1:
        raise ValueError(f"{len(found)} rows have the entries {wanted}; name more of them in page.yaml")
    return found[0] if found else None


def _ratios(entries: list[dict[str, Any]], folder: Path) -> list[str]:
    lines = ["| what | measured | against | page |", "| --- | ---: | --- | --- |"]
    for entry in entries:
        row = find(entry["row"], folder)
        if row is not None:
            if len(row.get("values") or ()) == 1:
                row = {**row, "low": None}  # one round has no spread
            target = entry["page"]
            link = f"[{target.partition('.md')[0]}]({target})"
            noisy = " (noisy)" if results.is_noisy(row) else ""
            cell = tables.filled(entry["cell"], row) + noisy
            lines.append(f"| {tables.filled(entry['what'], row)} | {cell} | {entry['against']} | {link} |")
    return lines


def _conditions(folder: Path) -> list[str]:
    """For each result file a heading, and a line for each command."""
    lines = []
    for path in sorted(folder.glob("*.json")):
        runs = []
        for row in results.read(path.stem, folder):
            if row["run"] not in runs:
                runs.append(row["run"])
        lines += [f"### {path.stem}", "", f"Numbers: [{path.name}](../benchmarks/results/{path.name})", ""]
        for run in runs:
            where = f"{run['date']}, {results.machine_text(run['machine'])}, torch {run['versions']['torch']}"
            commit = f", commit {run['commit']}" if run.get("commit") else ""
            lines.append(f"- {where}{commit}: `{results.command_text(run)}`")
        lines.append("")
    return lines


def write(folder: Path = results.FOLDER) -> None:
    """Write docs/benchmarks.md."""
    PAGE.write_text(page(folder), encoding="utf-8")
