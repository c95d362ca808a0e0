"""Every script of examples/ runs offline on a tiny model; what each is about comes out."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
from offline import write_model
from transformers import AutoModelForSequenceClassification

from hf_ft_ext.demo.dataset import demo_dataset

FOLDER = Path(__file__).resolve().parents[2] / "examples"
TESTED = {
    "csv_to_pipeline", "trainer_with_callbacks", "sparse_in_trl", "search_without_gradients", "kernel_analysis",
}  # fmt: skip


@pytest.fixture(scope="module")
def encoder(tmp_path_factory) -> str:
    return write_model(tmp_path_factory.mktemp("demo"))


@pytest.fixture
def script(encoder, monkeypatch):
    """Loads a script, with a tiny model and few rows in place of the demo encoder and its data."""
    rows = demo_dataset(train_rows=64, validation_rows=24)
    for name, value in (("demo_encoder", lambda: encoder), ("demo_dataset", lambda: rows)):
        monkeypatch.setattr(f"hf_ft_ext.{name}", value)
    monkeypatch.setattr("hf_ft_ext.models.loading.demo_encoder", lambda: encoder)

    def load(name: str):
        spec = importlib.util.spec_from_file_location(f"example_{name}", FOLDER / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return load


def test_all_scripts_are_tested():
    assert {path.stem for path in FOLDER.glob("*.py")} == TESTED


def test_csv_to_pipeline(script, tmp_path):
    answer = script("csv_to_pipeline").main(["--output_dir", str(tmp_path)])
    assert answer["label"] in ("negative", "positive") and 0.5 <= answer["score"] <= 1
    record = json.loads((tmp_path / "model" / "run.json").read_text())
    assert record["method"] == "lora" and record["metrics"]["eval_accuracy"] > 0


def test_trainer_with_callbacks(script, tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", "")  # the script sets it; taken back afterwards
    metrics = script("trainer_with_callbacks").main(["--output_dir", str(tmp_path), "--rows", "40"])
    assert 0 <= metrics["eval_accuracy"] <= 1
    assert list((tmp_path / "logs").rglob("events.out.tfevents.*"))
    state = json.loads(next(tmp_path.glob("checkpoint-*/trainer_state.json")).read_text())
    best = max(entry["eval_accuracy"] for entry in state["log_history"] if "eval_accuracy" in entry)
    assert metrics["eval_accuracy"] == best  # the model that was kept, not the last one
    AutoModelForSequenceClassification.from_pretrained(tmp_path)


def test_sparse_in_trl(script, tmp_path, capsys):
    pytest.importorskip("trl")
    before, after = script("sparse_in_trl").main(["--output_dir", str(tmp_path)])
    assert after < before - 0.5
    assert "how was the film ? the film was" in capsys.readouterr().out


def test_search_without_gradients(script, tmp_path):
    example = script("search_without_gradients")
    before, after = example.main(["--output_dir", str(tmp_path), "--steps", "20"])
    highest = float(example.COSTS.max())
    assert 0 <= after <= highest and 0 <= before <= highest
    AutoModelForSequenceClassification.from_pretrained(tmp_path)


def test_kernel_analysis(script, tmp_path):
    found = script("kernel_analysis").main(["--output_dir", str(tmp_path)])
    assert (tmp_path / "kernel.png").stat().st_size > 10_000
    assert 0 < found["largest_eigenvalue_share"] <= 1 and np.isfinite(list(found.values())).all()
