"""The table of docs/scaling.md that says which method works with what, made from capabilities.yaml.

python docs/capabilities.py    # writes the table into the page
"""

from pathlib import Path
from typing import Any

import yaml

FOLDER = Path(__file__).parent
PAGE = FOLDER / "scaling.md"
START, END = "<!-- capabilities -->\n", "<!-- end of capabilities -->"
ANSWERS = ("works", "refused")


def read() -> list[dict[str, Any]]:
    """One dict for each capability: its name, and by method a cell `{answer: test, "but": condition}`."""
    return yaml.safe_load((FOLDER / "capabilities.yaml").read_text(encoding="utf-8"))


def answer(cell: dict[str, str]) -> str:
    """The one of `ANSWERS` that a cell gives."""
    (found,) = (name for name in ANSWERS if name in cell)
    return found


def table(rows: list[dict[str, Any]]) -> str:
    """The table as Markdown: a line for each capability, a column for each method."""
    methods = [key for key in rows[0] if key != "capability"]
    lines = [["", *(f"`{method}`" for method in methods)], ["---"] * (len(methods) + 1)]
    for row in rows:
        lines.append([row["capability"], *(_shown(row[method]) for method in methods)])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _shown(cell: dict[str, str]) -> str:
    return f"{answer(cell)} ({cell['but']})" if cell.get("but") else answer(cell)


def rewritten(page: str) -> str:
    """The page with its table made anew."""
    before, _, rest = page.partition(START)
    return f"{before}{START}{table(read())}{END}{rest.partition(END)[2]}"


if __name__ == "__main__":
    PAGE.write_text(rewritten(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
