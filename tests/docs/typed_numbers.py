"""Numbers with the look of a measurement that stand in the text of a page, outside of what is generated."""

import re
from dataclasses import dataclass
from pathlib import Path

# What is generated, code, the targets of links, and comments: none of it is typed prose.
_LEFT_OUT = re.compile(
    r"<!-- (?:results|arguments|capabilities)[^>]*-->.*?<!-- end of [^>]*-->|^```.*?^```$"
    r"|`[^`\n]*(?:\n[^`\n]+)?`|\]\([^)]*\)|arXiv \d{4}\.\d{5}|\[\d{4}\.\d{5}|<!--.*?-->",
    flags=re.MULTILINE | re.DOTALL,
)
_NUMBER = r"(?<![\w.,-])\d[\d,]*(?:\.\d+)?"
_UNIT = (
    r"(?:%|ms|s|seconds?|minutes?|hours?|[kMGT]i?B|points?|rad)(?![\w-])"
    r"|(?:times|steps?) (?:as|more|less|the|a|faster|slower)\b"
)
_MEASURED = re.compile(
    rf"{_NUMBER}\s+(?:{_UNIT})|{_NUMBER}\s*(?:%|±)|±\s*[\d.]+|(?<![\w.,/-])\d+\.\d+(?![\w.]*\.\d|\d|e-?\d)|(?<![\w/])1/\d+(?:\.\d+)?"
)


@dataclass(frozen=True)
class Typed:
    """One number: where it stands and the text around it."""

    page: str
    line: int
    start: int
    text: str
    around: str


def prose(text: str) -> str:
    """The text with what is no typed prose blanked; places stay the same."""
    return _LEFT_OUT.sub(lambda found: re.sub(r"[^\n]", " ", found[0]), text)


def typed_numbers(page: Path) -> list[Typed]:
    """All of a page."""
    text = page.read_text(encoding="utf-8")
    blank = prose(text)
    found = []
    for match in _MEASURED.finditer(blank):
        line = text.count("\n", 0, match.start()) + 1
        around = text[max(0, match.start() - 60) : match.end() + 40].replace("\n", " ")
        found.append(Typed(page.name, line, match.start(), match[0], around))
    return found
