"""The paper's experiments have recipes, which parse as they are and with their override."""

import shlex
from pathlib import Path

import pytest

from hf_ft_ext.parsing import parse_arguments
from hf_ft_ext.recipes import read_recipe

FOLDER = Path(__file__).resolve().parents[2] / "recipes" / "kernel"
RECIPES = sorted(FOLDER.rglob("*.yaml"))
TASKS = {"sst2", "mr", "cr", "mpqa", "subj", "trec", "mnli", "snli", "qnli", "rte", "mrpc", "qqp"}
FORMULAS = {"sgd", "signgd", "asymmetric_signgd"}


@pytest.mark.parametrize("folder", ["prompt", "head"])
def test_tasks_shots_and_formulas_are_complete(folder):
    found = [read_recipe(path) for path in (FOLDER / folder).glob("*.yaml")]
    grid = {(r["task_name"], r["num_k"], r["kernel_formula"]) for r in found}
    assert {(task, k, formula) for task in TASKS for k in (16, 64) for formula in FORMULAS} <= grid
    assert all(r.get("from_linearhead", False) == (folder == "head") for r in found)
    assert all((r.get("few_shot_type") == "prompt") == (folder == "prompt") for r in found)
    if folder == "prompt":
        assert {r["task_name"] for r in found if r["num_k"] == 512} == {"sst2", "mr", "cr", "qnli", "rte", "qqp"}


@pytest.mark.parametrize("folder", sorted({path.parent.name for path in RECIPES}))
def test_recipes_parse_as_they_are_and_with_their_override(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for recipe in (FOLDER / folder).glob("*.yaml"):
        commands = [line for line in recipe.read_text().splitlines() if "run_glue" in line]
        lines = [shlex.split(line.partition("run_glue.py")[2]) for line in commands]
        assert len(lines) == 2 and "--output_dir" in lines[1], recipe
        for words in lines:
            assert words[0] == str(recipe.relative_to(FOLDER.parents[1]))
            run_args, _, data_args, args = parse_arguments([str(recipe), *words[1:]])
            assert run_args.method == "kernel" and data_args.num_k in (16, 64, 512)
            assert (args.kernel_solver == "asym") == (args.kernel_formula == "asymmetric_signgd")
