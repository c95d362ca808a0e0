"""The thesis's runs are recipes, and its tables are plans that the method reads."""

from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForSequenceClassification

from hf_ft_ext import AdapterPlan
from hf_ft_ext.fisher.arguments import MASKS
from hf_ft_ext.recipes.reading import read_rows

FOLDER = Path(__file__).resolve().parents[2] / "recipes" / "fisher"
SEEDS = {"sst2": ["111", "11", "22"], "mrpc": ["11", "22", "88"], "mnli": ["11", "22", "88"]}
RATES = {"adapter": 1e-4, "lora": 5e-4, "prefix": 2e-4, "fishpal": 5e-4, "published": 5e-4}


@pytest.mark.parametrize("task", SEEDS)
def test_recipes_of_the_thesis_are_complete(task):
    rows, text = read_rows(FOLDER / "roberta-base.yaml"), (FOLDER / "roberta-base.yaml").read_text()
    for name, rate in RATES.items():
        recipe = rows[f"{task}-{name}"]
        assert (recipe["learning_rate"], recipe["num_train_epochs"], recipe["per_device_train_batch_size"]) == (
            rate, 10, 16,
        )  # fmt: skip
        assert (recipe["lr_scheduler_type"], recipe["warmup_steps"], recipe["weight_decay"]) == (
            "polynomial",
            0.06,
            0.1,
        )
        assert recipe["max_seq_length"] == 128 and str(recipe["seed"]) == SEEDS[task][0]
        assert f"{', '.join(SEEDS[task])}" in text
        if name != "published":
            assert f"{task}-{name}" in read_rows(FOLDER / "demo.yaml")
    assert {name.removeprefix(f"{task}-mask-") for name in rows if name.startswith(f"{task}-mask-")} == set(MASKS)
    assert all(rows[f"{task}-mask-{mask}"]["fisher_mask"] == mask for mask in MASKS)


@pytest.mark.parametrize(
    ("task", "table"),
    [("sst2", "p" * 5 + "b" * 5 + "ll"), ("mrpc", "pbll" + "b" * 6 + "ll"), ("mnli", "pbll" + "b" * 6 + "ll")],
)
def test_the_published_tables_are_plans(task, table):
    plan = AdapterPlan.load(FOLDER / "plans" / f"{task}.json")
    assert "".join(name[0] for _, name in sorted(plan.choice.items())) == table
    with torch.device("meta"):
        model = AutoModelForSequenceClassification.from_config(AutoConfig.for_model("roberta"))
    plan.model.pop("weights", None)
    assert (plan.model["model_type"], plan.model["layers"], plan.model["hidden_size"]) == (
        model.config.model_type, model.config.num_hidden_layers, model.config.hidden_size,
    )  # fmt: skip
    config = plan.config()
    assert config.configs["prefix"].projection_size == 512 and config.configs["bottleneck"].bottleneck_size == 48
    assert (config.configs["lora"].r, config.configs["lora"].lora_alpha) == (8, 16)
