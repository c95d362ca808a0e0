"""The paper's experiments have recipes. tests/recipes checks that the recipes are valid."""

from pathlib import Path

import pytest

from hf_ft_ext.recipes.reading import read_rows

FOLDER = Path(__file__).resolve().parents[2] / "recipes" / "kernel"
ROWS = [row for path in sorted(FOLDER.rglob("*.yaml")) for row in read_rows(path).values()]
TASKS = {"sst2", "mr", "cr", "mpqa", "subj", "trec", "mnli", "snli", "qnli", "rte", "mrpc", "qqp"}
FORMULAS = {"sgd", "signgd", "asymmetric_signgd"}


@pytest.mark.parametrize("way", ["prompt", "head"])
def test_tasks_shots_and_formulas_are_complete(way):
    found = list(read_rows(FOLDER / f"{way}.yaml").values())
    grid = {(r["task_name"], r["num_k"], r["kernel_formula"]) for r in found}
    assert {(task, k, formula) for task in TASKS for k in (16, 64) for formula in FORMULAS} <= grid
    assert all(r.get("from_linearhead", False) == (way == "head") for r in found)
    assert all((r.get("few_shot_type") == "prompt") == (way == "prompt") for r in found)
    if way == "prompt":
        assert {r["task_name"] for r in found if r["num_k"] == 512} == {"sst2", "mr", "cr", "qnli", "rte", "qqp"}


def test_shots_and_solvers():
    for recipe in ROWS:
        assert recipe["method"] == "kernel" and recipe["num_k"] in (16, 64, 512)
        assert (recipe["kernel_solver"] == "asym") == (recipe["kernel_formula"] == "asymmetric_signgd")
