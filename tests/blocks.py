"""Code blocks of Markdown pages."""

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
EXAMPLE = ROOT / "docs" / "add-a-method.md"
_FENCE = re.compile(r"^```([^\n`]*)\n(.*?)^```$", flags=re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    """One block: its page, line, language, code, and the file that the line above names (`path/file`:), if any."""

    page: Path
    line: int
    language: str
    code: str
    file: str | None

    @property
    def name(self) -> str:
        return f"{self.page.name}:{self.line}"


def blocks_of(page: Path) -> list[Block]:
    """The fenced blocks of a page, in their order."""
    text = page.read_text(encoding="utf-8")
    found = []
    for match in _FENCE.finditer(text):
        above = text[: match.start()].rstrip().rpartition("\n")[2]
        file = re.fullmatch(r"`([\w./-]+)`:", above)
        line = text.count("\n", 0, match.start()) + 1
        found.append(Block(page, line, match[1].strip(), match[2], file[1] if file else None))
    return found


BLOCKS = [block for page in PAGES for block in blocks_of(page)]
