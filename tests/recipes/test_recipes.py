"""Every recipe is valid and says how to run it: one test walks the folders. Tests of a method check what is there."""

import shlex
from pathlib import Path

import pytest

from hf_ft_ext.compare.settings import read_comparison
from hf_ft_ext.launch.parsing import parse_arguments
from hf_ft_ext.launch.recipes import read_recipe
from hf_ft_ext.methods import METHODS

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "recipes"
COMPARISONS = FOLDER / "compare"
RECIPES = sorted(FOLDER.rglob("*.yaml"))


def name_of(path: Path) -> str:
    return str(path.relative_to(FOLDER))


def commands(recipe: Path) -> list[list[str]]:
    """The words behind the program of each command in the recipe's head."""
    head = [line[1:].strip() for line in recipe.read_text().splitlines() if line.startswith("#")]
    launcher = "hf-ft-ext compare " if recipe.parent == COMPARISONS else "accelerate launch run_glue.py "
    return [shlex.split(line.removeprefix(launcher)) for line in head if line.startswith(launcher)]


@pytest.mark.parametrize("recipe", RECIPES, ids=name_of)
def test_recipes_are_valid_and_say_how_to_run_them(recipe, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    as_it_is, changed = commands(recipe)
    path = str(recipe.relative_to(ROOT))
    assert as_it_is == [path]
    assert changed[0] == path and "--output_dir" in changed and len(changed) > 3, (
        "the override has to change something"
    )
    if recipe.parent == COMPARISONS:
        assert all(len(read_comparison([str(recipe), *words[1:]]).variants) > 1 for words in (as_it_is, changed))
        return
    for words in (as_it_is, changed):
        run_args, *_, args = parse_arguments([str(recipe), *words[1:]])
        assert run_args.method == read_recipe(recipe)["method"] and run_args.method in METHODS
        plan = getattr(args, "adapter_plan", None)
        assert plan is None or (ROOT / plan).is_file()


def test_every_folder_has_shortened_recipes_and_nothing_else_is_there():
    others = {path.relative_to(FOLDER).as_posix() for path in FOLDER.rglob("*") if path.is_file()} - {
        name_of(path) for path in RECIPES
    }
    assert others == {
        *(f"fisher/plans/{task}.json" for task in ("mnli", "mrpc", "sst2")),
    }
    for method in METHODS:
        assert list((FOLDER / method).rglob("demo/*.yaml")), f"recipes/{method} has no shortened recipe"
