"""The recipe and the method of a command, read before slow imports."""

import argparse
from dataclasses import dataclass
from typing import Any, NoReturn

from hf_ft_ext.errors import InputError
from hf_ft_ext.launch.values import checked
from hf_ft_ext.methods import METHODS, Method, find_method
from hf_ft_ext.recipes.reading import read_recipe


@dataclass(frozen=True)
class Choice:
    """The words of a command, and what decides how the rest of them is parsed.

    Attributes:
        argv: the words behind the recipe.
        recipe: the arguments that the recipe sets.
        method: the method that was named, on the command line or in the recipe.
        help: the value of `--help`; `None` if it was not given.
    """

    argv: list[str]
    recipe: dict[str, Any]
    method: Method | None
    help: str | None


def read_choice(argv: list[str]) -> Choice:
    """Read `[recipe.yaml[#ROW]] [--method NAME] [--help]` of the words `argv`; the command line overrides the recipe.

    Raises:
        InputError: there is no such recipe, row or method.
    """
    address = argv[0] if argv and not argv[0].startswith("-") else None
    rest = argv if address is None else argv[1:]
    first, _ = _MethodParser().parse_known_args(rest)
    recipe = _recipe(address, first.recipe_row)
    name = first.method if first.method is not None else recipe.get("method")
    if name is not None and not isinstance(name, str):
        name = checked("method", name, str)
    return Choice(list(rest), recipe, None if name is None else find_method(name), first.help)


class _MethodParser(argparse.ArgumentParser):
    """Reads the method, the recipe's row and `--help`."""

    def __init__(self):
        super().__init__(add_help=False, allow_abbrev=False)
        self.add_argument("--method")
        self.add_argument("--recipe_row")
        self.add_argument("-h", "--help", nargs="?", const="short")

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message.removeprefix('argument ')}; the methods are: {', '.join(METHODS)}")


def _recipe(address: str | None, row: str | None) -> dict[str, Any]:
    if address is None:
        if row is not None:
            raise InputError(f"--recipe_row {row} needs a recipe; pass the path of its YAML file first")
        return {}
    recipe = read_recipe(address, row)
    if "recipe_row" in recipe:
        raise InputError("recipe_row in a recipe chooses nothing; pass recipe.yaml#ROW or --recipe_row ROW")
    return recipe
