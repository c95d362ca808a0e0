"""run.json, atomic files and the training plan."""

import importlib.metadata
import json
import os

import pytest
import torch
from tiny import tiny_dataset, tiny_model, tiny_tokenizer
from transformers import Trainer, TrainingArguments

from hf_ft_ext import FisherTrainer, SparseTrainer
from hf_ft_ext.files import write_json, write_text
from hf_ft_ext.training.runs.plan import fold_layer_numbers, training_plan
from hf_ft_ext.training.runs.record import artefact_bytes, write_run_record
from hf_ft_ext.training.runs.resources import ResourceMonitor


def test_record_holds_everything_a_report_needs(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    record = write_run_record(
        tmp_path,
        method="full",
        task="demo",
        model="tiny",
        seed=7,
        metrics={"eval_accuracy": 0.5, "eval_loss": float("nan")},
        command=["run_glue.py", "--seed", "7"],
        monitor=ResourceMonitor(),
        trainable_parameters=12,
    )
    loaded = json.loads((tmp_path / "run.json").read_text())
    assert loaded["metrics"] == {"eval_accuracy": 0.5, "eval_loss": None}  # JSON has no NaN
    assert loaded["train_seconds"] is None  # nothing was trained
    assert loaded["versions"]["torch"] == importlib.metadata.version("torch")
    assert {key: value for key, value in record.items() if key != "metrics"} == {
        key: value for key, value in loaded.items() if key != "metrics"
    }
    weights = (tmp_path / "model.safetensors").stat().st_size
    assert loaded["artefact_bytes"] == artefact_bytes(tmp_path) == weights + (tmp_path / "config.json").stat().st_size


def test_a_failed_write_leaves_the_old_file_and_no_debris(tmp_path, monkeypatch):
    path = tmp_path / "run.json"
    write_text(path, "old")

    def full(*args):
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="no space left"):
        write_text(path, "new")
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
    with pytest.raises(TypeError):
        write_json(path, {"not": object()})
    assert path.read_text() == "old"


@pytest.mark.parametrize(
    "name, kind",
    [
        ("bert.encoder.layer.11.output.dense", "bert.encoder.layer.*.output.dense"),
        ("h.0.mlp.1", "h.*.mlp.*"),
        ("lin1", "lin1"),
        ("block2.dense", "block2.dense"),
    ],
)
def test_layer_numbers_are_folded(name, kind):
    assert fold_layer_numbers(name) == kind


def test_plan_counts_parameters_steps_and_memory(tmp_path):
    model = tiny_model()
    model.bert.embeddings.requires_grad_(False)
    args = TrainingArguments(
        str(tmp_path), report_to="none", use_cpu=True, per_device_train_batch_size=4, gradient_accumulation_steps=2
    )
    trainer = Trainer(model, args, train_dataset=tiny_dataset(32), processing_class=tiny_tokenizer())
    state = torch.get_rng_state()
    plan = training_plan(trainer)
    assert torch.equal(torch.get_rng_state(), state)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert (plan.trainable, plan.steps, plan.batch_size) == (trainable, 12, 8)
    assert plan.memory["gradients"] == 4 * trainable and plan.memory["optimizer state"] == 8 * trainable
    assert plan.memory["activations"] > 4 * 4 * 32 * 4  # at least one hidden state of four rows
    table = plan.table()
    assert "bert.encoder.layer.*.output.dense.weight" in table and f"trainable: {trainable:,} of" in table
    assert "steps: 12 of 8 examples" in table


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        (FisherTrainer, {"fisher_mode": "mask", "fisher_keep_ratio": 0.1, "fisher_examples": 4}),
        (FisherTrainer, {"fisher_mode": "mask", "fisher_mask": "bias"}),
        (SparseTrainer, {"sparse_support": "static", "sparse_basis_steps": 1}),
        (SparseTrainer, {"sparse_train_rest": "all", "sparse_basis_steps": 1}),
        (SparseTrainer, {"sparse_support": "dynamic", "sparse_basis_steps": 1}),
    ],
)
def test_chosen_entries_of_weights_count_once(tmp_path, kind, settings):
    """The values that train stand for entries of weights, which are buffers or lie beside them."""
    model = tiny_model()
    entries = sum(p.numel() for p in model.parameters())
    args = kind.arguments_class(str(tmp_path), report_to="none", use_cpu=True, **settings)
    plan = training_plan(kind(model, args, train_dataset=tiny_dataset(8), processing_class=tiny_tokenizer()))
    assert plan.total_parameters == entries and plan.trainable < entries
    assert plan.memory["weights"] >= 4 * entries  # in float32
