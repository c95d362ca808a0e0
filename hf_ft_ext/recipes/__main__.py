"""`hf-ft-ext recipes`: list, filter and print recipes."""

import argparse
import os
import sys
from pathlib import Path
from typing import Any

import yaml

from hf_ft_ext.errors import InputError, did_you_mean
from hf_ft_ext.recipes.reading import read_recipe, read_rows, split_address
from hf_ft_ext.recipes.rows import base_of, expanded_rows
from hf_ft_ext.recipes.yaml_files import load

_CHECKOUT = Path(__file__).resolve().parents[2] / "recipes"  # exists if this package runs from its repository
_DESCRIPTION = """\
Without arguments: list the recipe files and the number of experiments in each.
With words: list the experiments whose address contains all words; argument=value matches a setting instead.
With a file: list its rows. With one experiment, FILE.yaml#ROW: print its settings as a plain recipe to copy.
"""


def main(argv: list[str] | None = None) -> int:
    """List or print recipes; return 0, or 2 if nothing is found."""
    parser = argparse.ArgumentParser(
        prog="hf-ft-ext recipes", description=_DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("words", nargs="*", metavar="WORD", help="for example: kernel sst2 num_k=16")
    parser.add_argument("--folder", type=Path, help="folder of recipes (default: ./recipes, else the repository's)")
    args = parser.parse_args(argv)
    try:
        for line in _lines(args.words, args.folder):
            print(line)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader, such as `head`, has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except InputError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    return 0


def _lines(words: list[str], folder: Path | None) -> list[str]:
    if words and words[0].partition("#")[0].endswith((".yaml", ".yml")):
        return _rows_of_file(words[0], words[1:])
    folder = folder or (Path("recipes") if Path("recipes").is_dir() else _CHECKOUT)
    files = sorted(folder.rglob("*.yaml"))
    if not files:
        raise InputError(f"no recipes in {str(folder)!r}; pass --folder with a folder of YAML files")
    if not words:
        return _table([(str(file), _size(file), _title(file)) for file in files])
    found = [line for file in files for line in _matching(file, words)]
    if not found:
        raise InputError(f"no recipe in {str(folder)!r} matches {' '.join(words)}{_hint(words, files)}")
    return _table(found)


def _rows_of_file(address: str, words: list[str]) -> list[str]:
    path, row = split_address(address)
    if row is None and (found := read_rows(path)):
        lines = _matching(path, words)
        if not lines:
            raise InputError(f"none of the {len(found)} rows of {path} matches {' '.join(words)}")
        return _table(lines)
    settings = {key: value for key, value in read_recipe(address).items() if value is not None}
    return [f"# {address}", yaml.safe_dump(settings, sort_keys=False, allow_unicode=True).rstrip()]


def _matching(file: Path, words: list[str]) -> list[tuple[str, ...]]:
    """Address and row settings of each experiment of a file that matches all words."""
    recipe = load(file)
    base, rows = base_of(recipe, str(file)), expanded_rows(recipe, str(file))
    experiments = {f"{file}#{name}": row for name, row in rows.items()} or {str(file): base}
    found: list[tuple[str, ...]] = []
    for address, settings in experiments.items():
        if all(_matches(word, address, settings) for word in words):
            own = {key: value for key, value in settings.items() if not rows or base.get(key) != value}
            found.append((address, " ".join(f"{key}={_plain(value)}" for key, value in own.items())))
    return found


def _matches(word: str, address: str, settings: dict[str, Any]) -> bool:
    name, equals, value = word.lstrip("-").partition("=")
    if not equals:
        return word in address
    found = _plain(settings.get(name))
    return value in (found, found.rpartition("/")[2])  # a model's name, with or without its owner


def _plain(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value).replace(" ", "")


def _hint(words: list[str], files: list[Path]) -> str:
    """A suggestion for the first unknown argument name among the words."""
    known = {key for file in files for row in (read_rows(file) or {"": load(file)}).values() for key in row}
    names = [word.lstrip("-").partition("=")[0] for word in words if "=" in word]
    return next((did_you_mean(name, known) for name in names if name not in known), "")


def _size(file: Path) -> str:
    recipe = load(file)
    if "variants" in recipe:
        return "comparison"
    rows = expanded_rows(recipe, str(file))
    if not rows:
        return "1 run"
    return f"{len(rows)} rows" if len(rows) > 1 else "1 row"


def _title(file: Path) -> str:
    """The first comment line of a file."""
    first = file.read_text(encoding="utf-8").partition("\n")[0]
    return first.removeprefix("#").strip() if first.startswith("#") else ""


def _table(lines: list[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]


if __name__ == "__main__":
    sys.exit(main())
