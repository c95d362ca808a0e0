"""Every experiment of the thesis has a recipe, for its model and, shortened, for the demo encoder."""

import shlex
from pathlib import Path

import pytest

from hf_ft_ext.parsing import parse_arguments
from hf_ft_ext.recipes import read_recipe

FOLDER = Path(__file__).resolve().parents[2] / "recipes" / "gradientless"
RECIPES = sorted(path for path in FOLDER.rglob("*.yaml") if "mezo" not in path.parts)  # see tests/prompts


def settings(folder: str) -> dict[str, dict]:
    return {path.stem: read_recipe(path) for path in (FOLDER / folder).glob("*.yaml")}


@pytest.mark.parametrize("folder", ["distilbert-base-cased", "demo"])
def test_the_thesis_is_complete(folder):
    found = settings(folder)
    values = {key: [recipe.get(key) for recipe in found.values()] for key in ("learning_rate", "search_candidates")}
    assert {2.5e-3, 5e-3, 1e-2, 7.5e-3} <= set(values["learning_rate"])
    assert {1, 5, 9} <= set(values["search_candidates"])
    assert {found[f"batch-{n}"]["per_device_train_batch_size"] for n in (16, 64, 256)} == {16, 64, 256}
    for selection in ("all", "random", "magnitude", "fisher"):
        assert found[f"partition-{selection}"]["search_selection"] == selection
    for k in (1, 5):
        on, off = found[f"schedule-on-k{k}"], found[f"schedule-off-k{k}"]
        assert on["search_candidates"] == off["search_candidates"] == k
        assert on["lr_scheduler_kwargs"]["lr_end"] == pytest.approx(on["learning_rate"] / 10)
        assert off["lr_scheduler_type"] == "constant"
    assert {found[f"decay-{d}"]["weight_decay"] for d in ("0", "0.05", "0.1")} == {0.0, 0.05, 0.1}
    assert {found[f"options-{o}"]["search_options"] for o in ("1x1", "3x1", "2x2", "3x2")} == {
        "1x1",
        "3x1",
        "2x2",
        "3x2",
    }
    preferred = found["preferred"]
    assert (preferred["learning_rate"], preferred["weight_decay"]) == (7.5e-3, 0.05)
    assert {found[f"adam-{n}"]["search_method"] for n in (64, 256)} == {"adam"}
    steps = 80_000 if folder != "demo" else 4_000
    assert preferred["max_steps"] == steps and found["adam-256"]["max_steps"] == steps // 2


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_recipes_parse_as_they_are_and_with_their_override(recipe, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    commands = [line for line in recipe.read_text().splitlines() if "run_glue" in line]
    lines = [shlex.split(line.partition("run_glue.py")[2]) for line in commands]
    assert len(lines) == 2 and "--output_dir" in lines[1]
    for words in lines:
        run_args, _, data_args, args = parse_arguments([str(recipe), *words[1:]])
        assert (run_args.method, data_args.task_name) == ("gradientless", "sst2")
        assert args.seed == 42
