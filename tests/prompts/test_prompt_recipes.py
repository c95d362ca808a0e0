"""The few-shot recipes: complete, with the published settings, and the shortened ones run."""

import json
import shlex
from pathlib import Path

import pytest

import run_glue
from hf_ft_ext.parsing import parse_arguments
from hf_ft_ext.recipes import read_recipe

ROOT = Path(__file__).resolve().parents[2]
RECIPES = ROOT / "recipes"
FOLDERS = ("gradientless/mezo", "full", "lora/mezo", "linearhead")
FEW_SHOT = sorted(path for folder in FOLDERS for path in (RECIPES / folder).rglob("*.yaml"))
DEMO = [path for path in FEW_SHOT if path.parent.name == "demo"]
MEZO_TASKS = {"sst2", "sst5", "snli", "mnli", "rte", "trec"}


def settings(folder: str) -> dict[str, dict]:
    return {path.stem: read_recipe(path) for path in (RECIPES / folder).glob("*.yaml")}


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


@pytest.mark.parametrize("recipe", FEW_SHOT, ids=lambda path: str(path.relative_to(RECIPES)))
def test_recipes_parse_with_their_override(recipe, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    commands = [line for line in recipe.read_text().splitlines() if "run_glue" in line]
    assert len(commands) == 2 and "--output_dir" in commands[1]
    words = shlex.split(commands[1].partition("run_glue.py")[2])  # without it: tests/test_readme.py
    assert words[0] == str(recipe.relative_to(ROOT)) and "--output_dir" in words
    _, _, data_args, args = parse_arguments([str(recipe), *words[1:]])
    assert data_args.num_k in (16, 64, 512) and args.data_seed in (13, 21)
    assert args.do_train


@pytest.mark.slow
@pytest.mark.parametrize("recipe", DEMO, ids=lambda path: str(path.relative_to(RECIPES)))
def test_shortened_recipes_run(recipe, tmp_path, monkeypatch, data_root):
    model = data_root.parent / "models" / "minilm-mlm"
    if not model.is_dir():
        pytest.skip(f"no masked language model at {model}")
    monkeypatch.chdir(tmp_path)
    settings = read_recipe(recipe)
    words = ["--model_name_or_path", str(model), "--use_cpu", "--disable_tqdm", "true", "--output_dir", "out"]
    if settings["task_name"] != "demo":
        words += ["--dataset_name", str(data_root / "glue"), "--max_predict_samples", "8"]
    if settings["method"] != "linearhead":
        words += ["--max_steps", "1"]
    assert run_glue.main([str(recipe), *words]) == 0
    assert json.loads(Path("out/run.json").read_text())["method"] == settings["method"]
