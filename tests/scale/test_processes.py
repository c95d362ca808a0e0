"""Two processes give what one gives, for every variant of every method; and what crosses between them, counted.

The byte counts are those of the table in `docs/scaling.md`.
"""

import json
from pathlib import Path

import pytest
import torch
from processes import two_ranks
from rank_runs import ROWS, STEPS, VARIANTS, make, result, run_all
from safetensors.torch import load_file
from spans import principal_angle, with_changes

from hf_ft_ext.methods import METHODS
from hf_ft_ext.training.runs.plan import trained_weights

pytestmark = pytest.mark.slow
DDP = [name for name, (method, _) in VARIANTS.items() if method in ("full", "lora", "sparse", "fisher")]
HIDDEN, INNER, LAYERS, HEAD = 32, 48, 2, 66  # of the tiny model


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """`one(name)`: the variant's trainer after its run in this process."""
    folder, made = tmp_path_factory.mktemp("one"), {}

    def _one(name: str):
        if name not in made:
            made[name] = make(folder, name, 1)
            made[name].train()
        return made[name]

    return _one


@pytest.fixture(scope="module")
def two(tmp_path_factory, one) -> Path:
    """The folder that a run of all variants on two processes leaves; what they import, this process has imported."""
    folder = tmp_path_factory.mktemp("two")
    for name in VARIANTS:
        one(name)
    two_ranks(run_all, str(folder), seconds=300)
    return folder


def carried(two: Path, name: str) -> dict[str, dict[str, int]]:
    return json.loads((two / "carried.json").read_text())[name]


def test_every_method_has_a_variant():
    assert {method for method, _ in VARIANTS.values()} == set(METHODS)


@pytest.mark.parametrize("name", VARIANTS)
def test_two_processes_end_where_one_does(two, one, name):
    theirs, ours = with_changes(load_file(two / f"{name}.safetensors")), with_changes(result(one(name)))
    assert ours.keys() == theirs.keys()
    tolerances = {"gradientless": {"rtol": 1e-7, "atol": 1e-9}, "kernel": {"atol": 1e-7}}
    exact = tolerances.get(VARIANTS[name][0], {"atol": 2e-6})
    for key, value in theirs.items():
        if "_columns." in key:  # eigenvectors of sums in another order may turn within their span
            assert principal_angle(ours[key], value) < 1e-3, key
            continue
        assert torch.allclose(ours[key], value, **exact), f"{key}: {(ours[key] - value).abs().max():.2g}"
    if "predictions" not in ours:
        trainer = make(two / "start", name, 1)
        getattr(trainer, "prepare", lambda: None)()
        start = with_changes(trainer.model.state_dict())
        there = [key for key in ours if key in start and "_columns." not in key]
        assert any(not torch.allclose(ours[key], start[key], atol=1e-3) for key in there)


@pytest.mark.parametrize("name", DDP)
def test_a_step_carries_the_gradients_of_what_trains(two, one, name):
    """All-reduce: gradients, and one int32 per tensor that says which were used. Broadcast: the position buffers.

    A support that is chosen in each step goes from the first process to the others: an int32 per entry and its size.
    """
    weights = trained_weights(one(name))
    gradients = sum(weight.gradient_bytes for weight in weights)
    sent = {"all_reduce": gradients + 4 * len(weights), "broadcast": 2 * 64 * 8}
    if name == "sparse-dynamic":
        sent["broadcast"] += 4 * 2 * LAYERS * HIDDEN * INNER + 8 * 2 * LAYERS
    assert carried(two, name)["step"] == sent


def test_a_fixed_support_carries_its_entries_only(two, one):
    mlp = 2 * LAYERS * HIDDEN * INNER
    sent = {name: carried(two, f"sparse-{name}")["step"]["all_reduce"] for name in ("dynamic", "static", "structured")}
    flags = 4 * (2 * LAYERS + 2)
    assert sent["dynamic"] == 4 * (mlp + HEAD) + flags
    for name in ("static", "structured"):
        entries = sum(weight.trained for weight in trained_weights(one(f"sparse-{name}")))
        assert sent[name] == 4 * entries + flags and entries < 0.12 * mlp + HEAD


@pytest.mark.parametrize(("name", "calls"), [("search", 5), ("spsa", 1)])
def test_a_search_carries_losses_only(two, one, name, calls):
    """A float64 per loss; with the batch shared out, the number of rows goes with each all-reduce too."""
    optimizer = one(f"{name}-data").optimizer
    losses = getattr(optimizer, "optimizer", optimizer).evaluations / STEPS
    assert carried(two, f"{name}-candidates")["step"] == {"all_reduce": 8 * losses}
    assert carried(two, f"{name}-data")["step"] == {"all_reduce": 8 * (losses + calls)}
    model = one(f"{name}-data").model
    start = sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))
    # the weights, so that all start alike, and whether a process finds another loss than the usual one
    once = {"broadcast": start, "all_gather": 8}
    if name == "spsa":  # a flag per tensor: read outside of the model, in another module, in the first step
        once["all_reduce"] = 3 * 8 * len(one(f"{name}-data").searched)
    assert carried(two, f"{name}-data")["once"] == once


def test_bytes_exchanged_once_per_run(two, one):
    grams = 4 * 2 * (HIDDEN**2 + INNER**2)  # two kinds of layer, two factors each
    counts = 4 * 3  # of a pre-pass: tokens by kind, labels
    assert carried(two, "sparse-dynamic")["once"]["all_reduce"] == grams + counts
    energies = 4 * 2 * LAYERS * HIDDEN * INNER
    assert carried(two, "sparse-static")["once"]["all_reduce"] == grams + energies + 2 * counts
    total = sum(p.numel() for p in one("full").model.parameters())
    assert carried(two, "fisher-mask")["once"]["all_reduce"] == 4 * (total - HEAD) + 8
    candidates = sum(sum(by_layer.values()) for by_layer in one("fisher-select").plan.parameters.values())
    assert carried(two, "fisher-select")["once"]["all_reduce"] >= 4 * candidates > 0
    assert 4 * total <= carried(two, "full")["once"]["broadcast"] <= 4 * total + 2048  # DDP's start: the weights
    # block by block, of a symmetric kernel one of each pair
    assert 4 * ROWS**2 < carried(two, "kernel")["once"]["broadcast"] < 8 * ROWS**2
    assert 4 * HEAD < carried(two, "linearhead")["once"]["broadcast"] < 4 * HEAD + 2048
