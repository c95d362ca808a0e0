"""Removing what must not leave the machine: access tokens, and paths that name folders and users."""

import re
from collections.abc import Callable
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any

HIDDEN = "***"
_SECRET_NAMES = re.compile(r"(.*_)?(token|api_key|password|secret)")
_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{16,}\b")  # the format of the Hub's access tokens
_CREDENTIALS = re.compile(r"(?<=://)[^/\s:@]+:[^/\s@]+(?=@)")  # https://user:password@host
# A path that starts at the root or a home folder, at least one folder deep. Not after `:` or `/`, as in a URL.
_PATH_IN_TEXT = re.compile(r"""(?<![\w.:/~<-])(?:~[\w.-]*|/|[A-Za-z]:[\\/])(?:[^\s'"`,;:(){}\[\]<>|/\\]*[\\/])*"""
                           r"""[^\s'"`,;:(){}\[\]<>|/\\]+""")  # fmt: skip


def is_secret(name: str) -> bool:
    """Whether an argument of this name, with or without dashes, holds an access token or a password."""
    return _SECRET_NAMES.fullmatch(name.lstrip("-").replace("-", "_").lower()) is not None


def without_secrets(words: list[str]) -> list[str]:
    """The words of a command line, access tokens replaced by `***`."""
    shown = []
    for name, word in _named(words):
        _, sign, _ = word.partition("=")
        if name is None or not is_secret(name):
            shown.append(hide_tokens(word))
        elif word.startswith("--"):
            shown.append(f"{name}={HIDDEN}" if sign else word)
        else:
            shown.append(HIDDEN)
    return shown


def split_secrets(words: list[str]) -> tuple[list[str], dict[str, str]]:
    """Split a command line into the words without secrets, and the secrets by argument name (`hub_token`)."""
    others, secrets = [], {}
    for name, word in _named(words):
        if name is None or not is_secret(name):
            others.append(word)
            continue
        key = name.lstrip("-").replace("-", "_")
        _, sign, value = word.partition("=") if word.startswith("--") else ("", "=", word)
        if sign:
            secrets[key] = value
    return others, secrets


def hide_tokens(text: str) -> str:
    """`text` with anything like an access token, and the credentials in URLs, replaced by `***`."""
    return _CREDENTIALS.sub(HIDDEN, _TOKEN.sub(HIDDEN, text))


def is_foreign_path(text: str) -> bool:
    """Whether `text` is a path that names folders of this machine: absolute, in a home folder, or with `..`."""
    if "://" in text or "\n" in text:
        return False
    if text.startswith("~") or ".." in PurePosixPath(text).parts:
        return True
    absolute = PurePosixPath(text).is_absolute() or PureWindowsPath(text).is_absolute()
    return absolute and not text.startswith("//")


def last_part(path: str) -> str:
    """The last part of a path: a file or folder name without its location."""
    named = PureWindowsPath(path) if "\\" in path else PurePosixPath(path)
    return named.name if named.name not in ("", "..") else "folder"


def without_paths(value: Any, known: tuple[str, ...] = ()) -> Any:
    """A JSON value with every absolute path, or path into a home folder or through `..`, cut to its last part.

    Args:
        known: further paths to shorten inside longer texts, such as a line of code. Paths in `value` are found by
            themselves.
    """
    paths = sorted({*known, *_paths_in(value)}, key=len, reverse=True)
    return _cut(value, paths)


def _paths_in(value: Any) -> set[str]:
    if isinstance(value, dict):
        return set().union(*map(_paths_in, value.values()))
    if isinstance(value, list | tuple):
        return set().union(*map(_paths_in, value))
    if not isinstance(value, str):
        return set()
    argument = value.partition("=")[2] if value.startswith("--") else value
    return {argument} if is_foreign_path(argument) and len(argument) > 1 else set()


def _cut(value: Any, paths: list[str]) -> Any:
    if isinstance(value, dict):
        return {key: _cut(item, paths) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_cut(item, paths) for item in value]
    if not isinstance(value, str):
        return value
    for path in paths:
        # whole paths only: `/a/b` is not the start of `/a/bc`
        value = re.sub(rf"(?<![\w.~/-]){re.escape(path)}(?![\w-])(?=[^/\\]|$)", _literal(last_part(path)), value)
    return _PATH_IN_TEXT.sub(lambda found: _shortened(found.group()), value)


def _literal(text: str) -> Callable[[re.Match[str]], str]:
    """A replacement for `re.sub` that is not read as a template."""
    return lambda _: text


def _shortened(text: str) -> str:
    return last_part(text) if re.search(r"[\\/].*[\\/]|^~.*[\\/]|:[\\/]", text) else text


def _named(words: list[str]) -> list[tuple[str | None, str]]:
    """Pairs of the argument that a word belongs to and the word; `None` for words before the first argument."""
    pairs: list[tuple[str | None, str]] = []
    name: str | None = None
    for word in words:
        if word.startswith("--"):
            name = word.partition("=")[0]
            pairs.append((name, word))
            if "=" in word:
                name = None
        else:
            pairs.append((name, word))
    return pairs
