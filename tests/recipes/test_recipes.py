"""Every experiment is valid and each file says how to run it. What is there is checked by the tests of the methods."""

import functools
import shlex
from pathlib import Path

import pytest

from hf_ft_ext.compare.settings import read_comparison
from hf_ft_ext.launch.parsing import Parser, arguments_of, parse_arguments
from hf_ft_ext.methods import METHODS, find_method
from hf_ft_ext.recipes.reading import read_recipe, read_rows, split_address

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "recipes"
COMPARISONS = FOLDER / "compare"
FILES = sorted(FOLDER.rglob("*.yaml"))
parser_of = functools.cache(lambda method: Parser(find_method(method)))  # building one takes longer than using it


def name_of(path: Path) -> str:
    return str(path.relative_to(FOLDER))


def experiments(file: Path) -> dict[str, dict]:
    """The settings of each experiment of a file, by its address."""
    return {f"{file}#{name}": row for name, row in read_rows(file).items()} or {str(file): read_recipe(file)}


def commands(file: Path) -> list[list[str]]:
    """The words behind the program of each command in a file's head."""
    head = [line[1:].strip() for line in file.read_text().splitlines() if line.startswith("#")]
    launcher = "hf-ft-ext compare " if file.parent == COMPARISONS else "accelerate launch run_glue.py "
    return [shlex.split(line.removeprefix(launcher)) for line in head if line.startswith(launcher)]


@pytest.mark.parametrize("file", [file for file in FILES if file.parent != COMPARISONS], ids=name_of)
def test_all_experiments_are_valid(file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for address, settings in experiments(file).items():
        run_args, *_, args = arguments_of(parser_of(settings["method"]), ["--use_cpu"], settings)
        assert run_args.method == settings["method"], address
        plan = getattr(args, "adapter_plan", None)
        assert plan is None or (ROOT / plan).is_file()


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_files_say_how_to_run_and_to_change_them(file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    as_it_is, changed = commands(file)
    assert [str(split_address(words[0])[0]) for words in (as_it_is, changed)] == 2 * [str(file.relative_to(ROOT))]
    assert len(as_it_is) == 1 and as_it_is[0] == changed[0]
    assert "--output_dir" in changed and len(changed) > 3, "the override has to change something"
    for words in ([str(ROOT / as_it_is[0])], [str(ROOT / changed[0]), *changed[1:]]):
        if file.parent == COMPARISONS:
            assert len(read_comparison(words).variants) > 1
        else:
            assert parse_arguments(words)[0].method in METHODS


def test_every_method_has_shortened_recipes_and_nothing_else_is_there():
    others = {path.relative_to(FOLDER).as_posix() for path in FOLDER.rglob("*") if path.is_file()}
    others -= {name_of(path) for path in FILES}
    assert others == {f"fisher/plans/{task}.json" for task in ("mnli", "mrpc", "sst2")}
    for method in METHODS:
        assert (FOLDER / method / "demo.yaml").is_file(), f"recipes/{method} has no shortened recipes"


def test_the_papers_are_a_few_tables():
    assert len(FILES) <= 60
    assert sum(len(experiments(file)) for file in FILES if file.parent != COMPARISONS) > 650
