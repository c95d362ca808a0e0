"""Every kind of shortened recipe runs from end to end, cut further, on a tiny model and data of its task's form."""

import json
import re
from pathlib import Path

import pytest
import torch
from offline import write_classifier, write_glue, write_model
from peft import PeftModel
from quick import SOLVER_METHODS
from test_recipes import COMPARISONS, FILES, FOLDER, experiments
from transformers import AutoConfig, AutoModelForSequenceClassification

import run_glue
from hf_ft_ext import PromptForSequenceClassification, load_kernel
from hf_ft_ext.demo.dataset import demo_dataset
from hf_ft_ext.launch import results


def kind_of(settings: dict) -> tuple:
    """What a recipe has beside its numbers and its task: which arguments, and the words, whatever numbers are in them.

    That every recipe's arguments are valid is tested in `test_recipes.py`.
    """
    words = {name: value for name, value in settings.items() if name not in ("task_name", "output_dir")}
    return tuple(
        sorted(
            (name, "" if _is_number(value) else re.sub(r"\d+", "1", json.dumps(value)))
            for name, value in words.items()
        )
    )


def _is_number(value: object) -> bool:
    try:
        return not isinstance(value, bool) and float(value) is not None
    except (TypeError, ValueError):
        return False


ALL = {
    address: settings
    for file in FILES
    if file.parent != COMPARISONS
    for address, settings in experiments(file).items()
    if file.stem == "demo" or settings["task_name"] == "demo"
}
DEMOS = list({kind_of(settings): address for address, settings in ALL.items()}.values())  # one of each kind
STEPS = 2
# What costs more than the rest on so small a model; the values that matter are the recipe's own.
CUT = {
    "sparse": ("--sparse_basis_steps", "2", "--sparse_n_params", "300"),
    "fisher": (
        "--fisher_examples", "8", "--fisher_keep_ratio", "0.1", "--fisher_candidate_settings",
        '{"prefix": {"projection_size": 8}}',
    ),
    "gradientless": ("--feature_cache_dir", "features"),
    "linearhead": ("--feature_cache_dir", "features"),
    "kernel": ("--num_k", "4"),
}  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def classifier(tmp_path_factory, model) -> str:
    return write_classifier(tmp_path_factory.mktemp("classifier"), model)


@pytest.fixture(scope="module")
def glue(tmp_path_factory) -> str:
    tasks = {ALL[address]["task_name"] for address in DEMOS}
    return write_glue(tmp_path_factory.mktemp("glue"), tasks)


@pytest.fixture
def trainers(monkeypatch) -> list:
    """The trainers of the runs, as they are when their record is written."""
    found = []
    record_run = results.record_run
    monkeypatch.setattr(
        results, "record_run", lambda trainer, *rest: found.append(trainer) or record_run(trainer, *rest)
    )
    return found


def words_of(recipe: str, model: str, glue: str) -> list[str]:
    """The command line that shortens the recipe further."""
    settings = ALL[recipe]
    words = [recipe, "--model_name_or_path", model, "--use_cpu", "--disable_tqdm", "true", "--output_dir", "out"]
    words += ["--do_train", "--do_eval", "--report_to", "none", "--logging_steps", "1"]
    words += () if settings["method"] in SOLVER_METHODS else ("--max_steps", str(STEPS))
    if "num_k" not in settings:
        words += ["--max_train_samples", "64", "--max_eval_samples", "12", "--per_device_train_batch_size", "8"]
    if settings["task_name"] != "demo":
        words += ["--dataset_name", glue, "--do_predict", "--max_predict_samples", "8"]
    if "layer.5" in str(settings.get("search_peft_config")):  # the tiny model's last layer is another one
        words += ["--search_peft_config", json.dumps(settings["search_peft_config"]).replace("5", "1")]
    cut = CUT.get(settings["method"], ())
    for name, value in zip(cut[::2], cut[1::2], strict=True):
        if not _is_refused(name, settings):
            words += [name, value]
    return words


def _is_refused(name: str, settings: dict) -> bool:
    """Whether the recipe's own choice has no use for an argument of `CUT`."""
    if name == "--sparse_basis_steps":
        return settings.get("sparse_basis") == "none"
    if name == "--sparse_n_params":
        return "sparse_n_params" not in settings
    if name.startswith("--fisher_candidate"):
        single = settings.get("fisher_mode") == "single" and settings["fisher_candidates"] != ["prefix"]
        return settings.get("fisher_mode") == "mask" or single
    if name == "--fisher_examples":
        return settings.get("fisher_mode") in ("single", "random") or settings.get("fisher_mask") in ("random", "bias")
    if name == "--fisher_keep_ratio":
        return settings.get("fisher_mode") != "mask" or settings["fisher_mask"] == "bias"
    return False


@pytest.mark.slow
@pytest.mark.parametrize("recipe", DEMOS, ids=lambda address: address.removeprefix(f"{FOLDER}/"))
def test_shortened_recipes_train_evaluate_save_and_load(
    recipe, model, classifier, glue, trainers, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("hf_ft_ext.data.sources.demo_dataset", lambda: demo_dataset(300, 300))
    monkeypatch.setattr(
        "hf_ft_ext.sparse.sparsity.pictures.draw_sparsity", lambda *_: []
    )  # tests/sparse/sparsity draws
    of_a_run = str(ALL[recipe].get("model_name_or_path")).startswith("runs/")  # has a head already
    words = words_of(recipe, classifier if of_a_run else model, glue)
    assert run_glue.main(words) == 0, capsys.readouterr().err
    record = json.loads(Path("out/run.json").read_text())
    method = ALL[recipe]["method"]
    assert record["method"] == method and (record["counted_parameters"] or record["trainable_parameters"]) > 0
    assert {"train_loss", "eval_loss"} <= record["metrics"].keys()
    (trainer,) = trainers
    assert trainer.state.global_step == (1 if method in SOLVER_METHODS else STEPS)
    if "--do_predict" in words:
        assert len(Path("out/predictions.tsv").read_text().splitlines()) == 1 + 8
    if method == "kernel":  # the model is the start; what was solved predicts, and kernels are found again
        predictor = load_kernel("out")
        batch = next(iter(trainer.get_eval_dataloader()))
        found = predictor({key: value for key, value in batch.items() if key != "labels"}).logits
        wanted = trainer.predict(trainer.eval_dataset.select(range(len(found)))).predictions
        torch.testing.assert_close(found, torch.from_numpy(wanted), rtol=1e-4, atol=1e-4)
        assert run_glue.main([*words, "--kernel_dir", "out/kernels", "--output_dir", "again"]) == 0
        again = json.loads(Path("again/run.json").read_text())
        assert again["metrics"]["eval_loss"] == record["metrics"]["eval_loss"]
        return
    names = (AutoConfig, AutoModelForSequenceClassification, PeftModel, PromptForSequenceClassification)
    loaded = eval(record["load"], {name.__name__: name for name in names}).eval()
    batch = next(iter(trainer.get_eval_dataloader()))
    batch.pop("labels")
    with torch.no_grad():
        own, theirs = trainer.model.eval()(**batch).logits, loaded(**batch).logits
    assert torch.isfinite(own).all() and torch.allclose(own, theirs, atol=1e-6)
