"""Formatting numbers, code and commands for pages and model cards."""

import re
import shlex
from collections.abc import Iterable
from typing import Any

from hf_ft_ext.training.sharing.privacy import without_secrets


def share_text(part: float | None, whole: float | None) -> str:
    """`part` of `whole` in percent, at most three digits and no exponent; empty if one of them is unknown or zero.

    A share is never rounded to `100 %` or `0 %`.
    """
    if not part or not whole:
        return ""
    share = 100 * part / whole
    if share < 0.01:
        return "less than 0.01 %"
    if 99.95 <= share < 100:
        return "more than 99.9 %"
    digits = 1 if share >= 10 else 2 if share >= 1 else 3
    return f"{share:.{digits}f}".rstrip("0").rstrip(".") + " %"


def bytes_text(value: float | None) -> str:
    """A number of bytes with a decimal unit, such as `7.6 kB`; `-` if it is not known."""
    if value is None:
        return "-"
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if value >= size:
            return f"{value / size:.1f} {unit}"
    return f"{value:.0f} B"


def code_span(text: Any) -> str:
    """`text` as inline code of Markdown; backticks in it are handled, and an empty one is a word."""
    text = re.sub(r"\s+", " ", str(text))
    if not text:
        return "(empty)"
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    space = " " if "`" in text else ""
    return f"{fence}{space}{text}{space}{fence}"


def prompt_text(prompt: Any) -> str:
    """A prompt on one line: a text, or the turns of a dialogue."""
    if not isinstance(prompt, str):
        prompt = " ".join(f"{turn.get('role')}: {turn.get('content')}" for turn in prompt)
    return " ".join(prompt.split())


def shell_command(words: Iterable[Any]) -> str:
    """A recorded command as a shell command line, without secrets; a Python file is run with `python`."""
    shown = without_secrets([str(word) for word in words])
    return shlex.join(["python", *shown] if shown and shown[0].endswith(".py") else shown)
