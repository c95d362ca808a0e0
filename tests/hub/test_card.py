"""Model cards: what stands in their metadata, their text and their code."""

import re
import shlex

import pytest
import yaml
from run_records import run_record

from hf_ft_ext.hub.card import model_card
from hf_ft_ext.methods import METHODS, Method
from hf_ft_ext.training.sharing.text import code_span, share_text


def metadata_of(text: str) -> dict:
    return yaml.safe_load(text.split("---\n")[1])


def results_of(text: str) -> dict[tuple[str, str], float]:
    """Values of the model index by split and metric."""
    index = metadata_of(text).get("model-index", [{"results": []}])
    return {
        (result["dataset"]["split"], metric["name"]): metric["value"]
        for result in index[0]["results"]
        for metric in result["metrics"]
    }


@pytest.mark.parametrize("method", ["lora", "sparse", "gradientless", "fisher", "kernel", "linearhead"])
def test_cards_cite_what_they_use(tmp_path, method):
    text = model_card(tmp_path, run_record(method, 1, 0.5), "me/x")
    metadata = yaml.safe_load(text.split("---\n")[1])
    assert metadata["datasets"] == ["nyu-mll/glue"] and metadata["pipeline_tag"] == "text-classification"
    assert "## Paper" in text and text.count("```bibtex") == 1
    assert re.search(r"```bibtex\n@inproceedings\{", text) and "cpu, 2 threads" in text
    assert ("| trained parameters |" in text) == (method != "kernel")  # a kernel changes no weight


def test_cards_of_other_results(tmp_path):
    record = run_record(
        "full", 1, None, task="mnli", labels=["a", "b", "c"], metrics={"eval_accuracy": 0.5, "eval_mm_accuracy": 0.25}
    )
    metadata = yaml.safe_load(model_card(tmp_path, record, "me/x").split("---\n")[1])
    found = {r["dataset"]["split"]: r["metrics"][0]["value"] for r in metadata["model-index"][0]["results"]}
    assert found == {"validation": 0.5, "validation_mismatched": 0.25}
    texts = {"eval_perplexity": 3.0, "eval_entropy": 1.0, "eval_num_tokens": 136.0, "eval_mean_token_accuracy": 0.5}
    record = run_record("lora", 1, None, task_type="causal_lm", metrics=texts, generations=[
        {"prompt": "a film", "prediction": "", "references": ["good"]}
    ])  # fmt: skip
    text = model_card(tmp_path, record, "me/x")
    assert results_of(text) == {("validation", "perplexity"): 3.0}, "trl's are about its batches"
    assert "- `a film`: (empty)" in text
    prompt = "PromptForSequenceClassification.from_pretrained('out')"
    text = model_card(tmp_path, run_record("full", 1, 0.5, load=prompt, output_dir="out"), "me/x")
    assert "from hf_ft_ext import PromptForSequenceClassification" in text
    assert "model = PromptForSequenceClassification.from_pretrained(folder)" in text


def test_a_method_of_another_package_cites_its_own_paper(tmp_path, monkeypatch):
    package = tmp_path / "other_method"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "trainer.py").write_text("class T:\n    pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(METHODS, "other", Method("other", "x:Y", "other_method.trainer:T", "does other things"))
    assert "## Paper" not in model_card(tmp_path, run_record("other", 1, 0.5), "me/x")
    (package / "papers.yaml").write_text("- {title: On others, url: https://x}\n")
    assert "- [On others](https://x)" in model_card(tmp_path, run_record("other", 1, 0.5), "me/x")


def split(name: str, rows: int, source_rows: int, selection: str, drawn: str | None = None) -> dict:
    return {"split": name, "rows": rows, "source_rows": source_rows, "selection": selection, "drawn": drawn}


def record_of(splits: dict, metrics: dict, **fields) -> dict:
    data = {"hub_id": "nyu-mll/glue", "config": "sst2", "revision": None, "folder": None, "files": None}
    return run_record("full", 1, None, metrics=metrics, data={**data, "splits": splits}, **fields)


def test_only_results_on_whole_splits_are_metadata_and_the_text_says_which_rows(tmp_path):
    splits = {
        "train": split("train", 8, 67349, "drawn", "4 rows of each class, data_seed 13"),
        "eval": split("train", 8, 67349, "drawn", "4 rows of each class, data_seed 13"),
        "test": split("validation", 872, 872, "all"),
        "test_mm": split("test_mismatched", 5, 9847, "first"),
    }
    metrics = {"eval_accuracy": 1.0, "test_accuracy": 0.75, "test_f1": 0.5, "test_mm_accuracy": 0.2, "test_loss": 0.1,
               "test_runtime": 1.0, "test_samples_per_second": 5.0, "train_loss": 0.1}  # fmt: skip
    text = model_card(tmp_path, record_of(splits, metrics), "me/x")
    assert results_of(text) == {("validation", "accuracy"): 0.75, ("validation", "f1"): 0.5}
    assert metadata_of(text)["model-index"][0]["results"][0]["dataset"]["config"] == "sst2"
    for line in (
        "| train | 8 of 67,349, drawn (4 rows of each class, data_seed 13) | accuracy | 1.0000 |",
        "| validation | all 872 | f1 | 0.5000 |",
        "| test_mismatched | 5 of 9,847, the first ones | accuracy | 0.2000 |",
        "Values on some rows of a split are not in this card's metadata",
        "| training rows | 8 of 67,349, drawn (4 rows of each class, data_seed 13) |",
    ):
        assert line in text
    assert "0.1000" not in text.split("## Load it")[0], "losses and times are no quality"


@pytest.mark.parametrize(
    ("arguments", "kept"),
    [({}, {"validation", "test"}), ({"num_k": 4}, set()), ({"max_eval_samples": 5}, {"test"}),
     ({"max_predict_samples": 5}, {"validation"})],
)  # fmt: skip
def test_records_of_earlier_versions_keep_cut_results_out_as_well(tmp_path, arguments, kept):
    metrics = {"eval_accuracy": 0.5, "test_accuracy": 0.25}
    text = model_card(tmp_path, run_record("full", 1, None, metrics=metrics, arguments=arguments), "me/x")
    assert {name for name, _ in results_of(text)} == kept
    for name, value in arguments.items():
        assert f"some rows ({name}={value})" in text


@pytest.mark.parametrize("missing", [None, float("nan"), "0.5", [0.5]])
def test_metrics_that_are_no_numbers_are_no_results(tmp_path, missing):
    text = model_card(tmp_path, run_record("full", 1, None, metrics={"eval_accuracy": missing}), "me/x")
    assert not results_of(text)


@pytest.mark.parametrize(
    ("part", "whole", "text"),
    [
        (100, 100, "100 %"), (99_999, 100_000, "more than 99.9 %"), (1, 3, "33.3 %"), (1, 100, "1 %"),
        (123, 10_000, "1.23 %"), (3, 10_000, "0.03 %"), (1, 10**9, "less than 0.01 %"), (None, 5, ""), (5, None, ""),
    ],
)  # fmt: skip
def test_shares_read_without_exponents(part, whole, text, tmp_path):
    assert share_text(part, whole) == text
    card = model_card(tmp_path, run_record("full", 1, 0.5, trainable_parameters=part, total_parameters=whole), "me/x")
    assert (f"({text} of all)" in card) == bool(text) and "e+0" not in card and "e-0" not in card


@pytest.mark.parametrize(
    ("size", "text"),
    [(999, "999 B"), (7638, "7.6 kB"), (49_999, "50.0 kB"), (2_340_000, "2.3 MB"), (1.5e9, "1.5 GB"), (None, None)],
)
def test_sizes_and_the_positive_class_are_those_of_the_record(tmp_path, size, text):
    positive = {"labels": ["no", "yes"], "positive_label": "no"} if size else {"labels": ["no", "yes"]}
    card = model_card(tmp_path, run_record("lora", 1, 0.5, artefact_bytes=size, **positive), "me/x")
    assert re.findall(r"\| saved \| (.*) \|", card) == ([text] if text else [])
    labels = "Labels, in the order of the logits: `no`, `yes`."
    assert f"{labels} The metrics' positive class: `no`.\n\n" in card if size else f"{labels}\n\n" in card


def test_names_with_spaces_and_backticks_stay_whole(tmp_path):
    command = [
        "run_glue.py",
        "--method",
        "full",
        "--train_file",
        "my data/a b.csv",
        "--kernel_dir",
        "x",
        "--token",
        "s",
    ]
    record = run_record("full", 1, 0.5, task="a`b", command=command, labels=["plain", "tick`y"], output_dir="my run")
    record["load"] = "AutoModelForSequenceClassification.from_pretrained('my run')"
    text = model_card(tmp_path, record, "me/x")
    line = re.search(r"```bash\n(.*)\n```", text).group(1)
    assert shlex.split(line) == ["python", *command[:-4]], "a folder and a token of this machine are left out"
    assert "`plain`, `` tick`y ``" in text and "fine-tuned on `` a`b ``" in text
    assert "from_pretrained('me/x')" in text and "my run" not in text.split("## How")[0]
    assert code_span("a``b") == "``` a``b ```"


def test_layout_has_no_holes(tmp_path):
    """Tables, lists and code stand apart from text by one blank line, with and without their optional parts."""
    full = run_record("sparse", 1, 0.5, labels=["a"], total_parameters=None)
    bare = run_record("x", 1, None, trainable_parameters=None, train_seconds=None, artefact_bytes=None, world_size=2)
    for record in (full, bare):
        body = model_card(tmp_path, record, "me/x").split("---\n", 2)[2]
        assert "\n\n\n" not in body and "{%" not in body and "None" not in body
        for before, after in zip(body.splitlines(), body.splitlines()[1:], strict=False):
            if after.startswith("|"):
                assert before.startswith("|") or not before, "a table needs an empty line before it"


@pytest.mark.parametrize(
    ("load", "code"),
    [
        ("AutoPeftModelForSequenceClassification.from_pretrained('/r/out')",
         "from peft import AutoPeftModelForSequenceClassification"),
        ("PeftModel.from_pretrained(AutoModelForSequenceClassification.from_pretrained('/r/b', "
         "config=AutoConfig.from_pretrained('/r/out')), '/r/out')",
         "model = PeftModel.from_pretrained(AutoModelForSequenceClassification.from_pretrained('tiny', "
         "config=AutoConfig.from_pretrained('me/x')), 'me/x')"),  # the record's base model
        ("the same command with --flag /r/out --x /r/y", "# the same command with --flag {folder} --x y"),
        ("PromptForSequenceClassification.from_pretrained('/r/out')",
         "model = PromptForSequenceClassification.from_pretrained(folder)"),
    ],
)  # fmt: skip
def test_any_line_that_loads_becomes_code_of_the_hub(tmp_path, load, code):
    text = model_card(tmp_path, run_record("another", 1, 0.5, load=load, output_dir="/r/out"), "me/x")
    snippet = re.search(r"```python\n(.*?)```", text, flags=re.DOTALL).group(1)
    assert code in snippet and "/r/" not in text
    compile(snippet, "snippet", "exec")


@pytest.mark.parametrize(
    ("load", "source", "base"),
    [
        ("AutoModelForCausalLM.from_pretrained('out')", {"hub_id": "o/b", "revision": "main"}, "'o/b', config"),
        ("AutoModelForSequenceClassification.from_pretrained('out', trust_remote_code=True)",
         {"hub_id": "o/b", "revision": "v2"}, "'o/b', revision='v2', trust_remote_code=True, config"),
        ("PromptForSequenceClassification.from_pretrained('out')", {"hub_id": "o/b", "revision": None}, None),
        ("AutoModelForSequenceClassification.from_pretrained('out')", {"hub_id": None, "revision": None}, None),
    ],
)  # fmt: skip
def test_a_delta_is_applied_to_the_model_that_training_started_from(tmp_path, load, source, base):
    """To its class, revision and type of weights; a prompt model is not on the Hub."""
    (tmp_path / "sparse_delta.safetensors").touch()
    text = model_card(tmp_path, run_record("sparse", 1, 0.5, load=load, model_source=source), "me/x")
    codes = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    assert len(codes) == (1 if base is None else 2)
    if base is not None:
        assert f"{load.partition('.')[0]}.from_pretrained(\n    {base}=config, ignore" in codes[1]
        assert "config = AutoConfig.from_pretrained('me/x'" in codes[1]
