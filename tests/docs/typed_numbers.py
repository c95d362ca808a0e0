"""Numbers with the look of a measurement that stand in the text of a page, outside of what is generated."""

import re
from dataclasses import dataclass

# What is generated, code, the targets of links, and comments: none of it is typed prose.
_LEFT_OUT = re.compile(
    r"<!-- (?:results|arguments|capabilities)[^>]*-->.*?<!-- end of [^>]*-->|^```.*?^```$"
    r"|`[^`\n]*(?:\n[^`\n]+)?`|\]\([^)]*\)|arXiv \d{4}\.\d{5}|\[\d{4}\.\d{5}|<!--.*?-->",
    flags=re.MULTILINE | re.DOTALL,
)
_NUMBER = r"(?<![\w.,-])\d[\d,]*(?:\.\d+)?"
_UNIT = (
    r"(?:ms|s|seconds?|minutes?|hours?|[kMGT]i?B|points?|rad)(?![\w-])"
    r"|(?:times|steps?) (?:as|more|less|the|a|faster|slower)\b"
)
_MEASURED = re.compile(
    rf"{_NUMBER}\s+(?:{_UNIT})|{_NUMBER}\s*(?:%|±)|±\s*[\d.]+"
    r"|(?<![\w.,/-])\d+\.\d+(?![\w.]*\.\d|\d|e-?\d)"  # no version such as 1.2.3, no rate such as 7.5e-4
    r"|(?<![\w/])1/\d+(?:\.\d+)?"
)


@dataclass(frozen=True)
class Typed:
    """One number: the heading of its section, its line, its place in the text, and the text around it."""

    section: str
    line: int
    start: int
    end: int
    around: str


def prose(text: str) -> str:
    """The text with all that is no typed prose blanked; places stay the same."""
    return _LEFT_OUT.sub(lambda found: re.sub(r"[^\n]", " ", found[0]), text)


def typed_numbers(text: str) -> list[Typed]:
    """All of a page, in their order."""
    blank = prose(text)
    headings = [(match.start(), match[1]) for match in re.finditer(r"^#+ (.*)$", blank, flags=re.MULTILINE)]
    found = []
    for match in _MEASURED.finditer(blank):
        section = next((heading for start, heading in reversed(headings) if start < match.start()), "")
        around = " ".join(text[max(0, match.start() - 60) : match.end() + 40].split())
        found.append(Typed(section, text.count("\n", 0, match.start()) + 1, match.start(), match.end(), around))
    return found
