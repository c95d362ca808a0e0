"""The few-shot recipes are complete and have the published settings. That they are valid and run: tests/recipes."""

from pathlib import Path

import pytest

from hf_ft_ext.recipes.reading import read_rows

ROOT = Path(__file__).resolve().parents[2]
RECIPES = ROOT / "recipes"
FOLDERS = ("gradientless/mezo", "full", "lora/mezo", "linearhead")
FEW_SHOT = sorted(path for folder in FOLDERS for path in (RECIPES / folder).rglob("*.yaml") if path.stem != "opt")
RULES = {"sgd": "sgd", "adamw_torch_fused": "adam"}  # in the recipes' names
KERNEL_TASKS = {"sst2", "mr", "cr", "mpqa", "subj", "trec", "mnli", "snli", "qnli", "rte", "mrpc", "qqp"}
MEZO_TASKS = {"sst2", "sst5", "snli", "mnli", "rte", "trec"}


def settings(table: str) -> dict[str, dict]:
    return read_rows(RECIPES / f"{table}.yaml")


def test_mezo_is_complete():
    found = settings("gradientless/mezo/roberta-large")
    assert set(found) == {f"{t}-k{k}-{w}" for t in MEZO_TASKS for k in (16, 512) for w in ("all", "lora", "prefix")}
    published = {"all": (1e-6, 1e-3), "lora": (1e-4, 1e-3), "prefix": (1e-2, 1e-1)}
    for name, recipe in found.items():
        way = name.rpartition("-")[2]
        assert (recipe["learning_rate"], recipe["search_eps"]) == published[way]
        assert (recipe["per_device_train_batch_size"], recipe["max_steps"]) == (64, 100_000)
        assert recipe["few_shot_type"] == "prompt" and recipe["num_k"] == int(name.split("-k")[1].split("-")[0])
    beside = {**settings("full/mezo/roberta-large"), **settings("lora/mezo/roberta-large")}
    assert set(beside) == set(found)
    for name, recipe in beside.items():
        rate = {"all": 1e-5, "lora": 1e-4, "prefix": 1e-2}[name.rpartition("-")[2]]
        assert (recipe["learning_rate"], recipe["per_device_train_batch_size"]) == (rate, 8)


def test_linear_heads_and_zero_shot_of_mezo_are_complete():
    heads, zero = settings("linearhead/mezo/roberta-large"), settings("full/mezo/zero-shot")
    assert set(heads) == {f"{task}-k{k}" for task in MEZO_TASKS for k in (16, 512)} and set(zero) == MEZO_TASKS
    assert not any("do_train" in recipe for recipe in zero.values())


@pytest.mark.parametrize("way", ["prompt", "head"])
def test_the_kernel_papers_fine_tuning_is_complete(way):
    found = settings(f"full/kernel-paper/{way}")
    assert set(found) == {f"{t}-{k}-{o}" for t in KERNEL_TASKS for k in (16, 64) for o in ("sgd", "adam")}
    for name, recipe in found.items():
        assert name == f"{recipe['task_name']}-{recipe['num_k']}-{RULES[recipe['optim']]}"
        assert recipe.get("from_linearhead", False) == (way == "head")
        assert (recipe.get("few_shot_type") == "prompt") == (way == "prompt")


def test_shots_and_seeds():
    for recipe in [row for path in FEW_SHOT for row in read_rows(path).values()]:
        assert recipe["num_k"] in (16, 64, 512) and recipe["data_seed"] == 13
