"""Read text files as lines: compression, byte order mark, line ends, and errors that name the line."""

import bz2
import codecs
import gzip
import io
import lzma
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

_COMPRESSIONS: dict[str, Any] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
_HEAD = 1 << 20  # bytes from which encoding and line ends are inferred
_MARKS = {codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}


class UnreadableFile(ValueError):
    """A file cannot be read: `cause` says why, `fix` how to fix it."""

    def __init__(self, cause: str, fix: str):
        super().__init__(f"{cause}; {fix}")
        self.cause, self.fix = cause, fix


@dataclass(frozen=True)
class TextFile:
    """The path of a text file and how its bytes are split into lines.

    `state` changes with the file, so caches keyed by these fields are never stale.
    """

    path: str
    encoding: str
    newline: str  # "\n" (also "\r\n"), or "\r" if the file has no other line end
    state: tuple[int, int]  # modification time in ns, bytes

    def lines(self) -> Iterator[str]:
        r"""Yield lines with their ends, split only at `newline`: any other `\r` is part of the text.

        Raises:
            UnreadableFile: the bytes cannot be decoded with `encoding`.
        """
        with (
            open_binary(self.path) as raw,
            io.TextIOWrapper(raw, encoding=self.encoding, newline=self.newline) as text,
        ):
            try:
                yield from text
            except UnicodeDecodeError:
                raise _undecodable(self) from None


def open_binary(path: str | Path) -> IO[bytes]:
    """Open the uncompressed bytes of a file."""
    return _COMPRESSIONS.get(Path(path).suffix.lower(), open)(path, "rb")


def data_suffix(path: str | Path) -> str:
    """Return the suffix of the format in lower case: `.csv` for `a.csv` and for `a.CSV.gz`."""
    suffixes = [suffix.lower() for suffix in Path(path).suffixes]
    if suffixes and suffixes[-1] in _COMPRESSIONS:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def text_file(path: str | Path) -> TextFile:
    """Infer encoding (UTF-8, or UTF-16 with a byte order mark) and line ends from a file's first bytes."""
    status = Path(path).stat()
    with open_binary(path) as raw:
        head = raw.read(_HEAD)
    encoding = next((name for mark, name in _MARKS.items() if head.startswith(mark)), "utf-8-sig")
    newline = "\r" if b"\r" in head and b"\n" not in head else "\n"
    return TextFile(str(path), encoding, newline, (status.st_mtime_ns, status.st_size))


def _undecodable(file: TextFile) -> UnreadableFile:
    """Find the line that is not UTF-8."""
    fix = "save it as UTF-8, for example: iconv -f WINDOWS-1252 -t UTF-8 old > new"
    if file.encoding == "utf-16":
        return UnreadableFile("it starts with the byte order mark of UTF-16, but is not UTF-16", "save it as UTF-8")
    with open_binary(file.path) as raw:
        for number, line in enumerate(raw, 1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError as error:
                return UnreadableFile(f"line {number} has the byte 0x{line[error.start]:02x}, which is not UTF-8", fix)
    return UnreadableFile("it is not UTF-8", fix)
