"""The paper's experiments have recipes. That they are valid: tests/recipes."""

from pathlib import Path

import pytest

from hf_ft_ext.recipes.reading import read_recipe

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


def test_shots_and_solvers():
    for recipe in map(read_recipe, RECIPES):
        assert recipe["method"] == "kernel" and recipe["num_k"] in (16, 64, 512)
        assert (recipe["kernel_solver"] == "asym") == (recipe["kernel_formula"] == "asymmetric_signgd")
