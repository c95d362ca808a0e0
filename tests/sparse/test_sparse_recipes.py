"""The source's experiments have recipes, with its settings. That they are valid and run: tests/recipes."""

from pathlib import Path

import pytest

from hf_ft_ext.recipes.reading import read_recipe, read_rows

FOLDER = Path(__file__).resolve().parents[2] / "recipes" / "sparse"
TASKS = {"cola", "mnli", "mrpc", "qnli", "qqp", "rte", "sst2", "stsb", "wnli"}
WAYS = {"ft": "full", "lora": "lora", "meprop": "sparse", "sparse": "sparse"}
SIZES = {"bert-base-uncased": (28_000, 7), "roberta-base": (28_000, 7), "roberta-large": (50_000, 10)}


@pytest.mark.parametrize("model", SIZES)
def test_the_glue_benchmark_is_complete(model):
    rows = read_rows(FOLDER / "glue.yaml")
    assert len(rows) == len(SIZES) * len(TASKS) * len(WAYS) == 108
    found = {name.removeprefix(f"{model}-"): row for name, row in rows.items() if name.startswith(model)}
    assert set(found) == {f"{task}-{way}" for task in TASKS for way in WAYS}
    entries, rank = SIZES[model]
    for name, recipe in found.items():
        task, way = name.split("-")
        assert (recipe["task_name"], recipe["method"]) == (task, WAYS[way])
        assert recipe["model_name_or_path"].endswith(model)
        assert recipe.get("sparse_n_params") == (entries if WAYS[way] == "sparse" else None)
        assert recipe.get("lora_r") == (rank if way == "lora" else None)
        assert (recipe.get("sparse_basis") == "none") == (way == "meprop")


def test_quick_starts_and_the_search():
    found = read_rows(FOLDER / "cola.yaml")
    for model in ("bert", "roberta"):
        assert found[f"quickstart-{model}-cola"]["sparse_threshold"] == 1e-3
        assert found[f"optimize-{model}-base{'-uncased' if model == 'bert' else ''}-cola"]["hp_search"] == 40
    assert read_recipe(FOLDER / "llama2-openassistant.yaml")["sparse_support"] == "dynamic"  # run by tests/language
