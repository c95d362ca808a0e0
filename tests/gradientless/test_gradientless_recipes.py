"""Every experiment of the thesis has a recipe, for its model and, shortened, for the demo encoder."""

from pathlib import Path

import pytest

from hf_ft_ext.recipes.reading import read_rows

FOLDER = Path(__file__).resolve().parents[2] / "recipes" / "gradientless"
STUDIES = ("distilbert-base-cased", "demo")


@pytest.mark.parametrize("study", STUDIES)
def test_recipes_cover_the_experiments_of_the_thesis(study):
    found = read_rows(FOLDER / f"{study}.yaml")
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
    steps = 80_000 if study != "demo" else 4_000
    assert preferred["max_steps"] == steps and found["adam-256"]["max_steps"] == steps // 2


def test_all_rows_have_one_task_and_seed():
    for recipe in [row for study in STUDIES for row in read_rows(FOLDER / f"{study}.yaml").values()]:
        assert (recipe["method"], recipe["task_name"], recipe["seed"]) == ("gradientless", "sst2", 42)
