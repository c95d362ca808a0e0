"""`benchmarks/accelerator.py` with tiny sizes on the CPU, and on a GPU where there is one."""

import gc
import sys
import weakref

import pytest
import torch
from blocks import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
import accelerator
import method_steps
import results

QUICK = ["--small", "--repeats", "1"]


def run(monkeypatch, folder, *words: str) -> tuple[int, list[dict]]:
    """The exit status and the rows of the result file."""
    monkeypatch.setattr(sys, "argv", ["accelerator.py", *QUICK, "--results_folder", str(folder), *words])
    return accelerator.main(), results.read("accelerator", folder)


@pytest.mark.slow
def test_every_part_writes_its_rows(monkeypatch, tmp_path):
    methods = ["sparse dynamic", "spsa lozo"]
    status, rows = run(monkeypatch, tmp_path, "--device", "cpu", "--methods", *methods)
    assert status == 0
    found = {(row["what"], row.get("method"), row["quantity"]) for row in rows}
    assert {("correctness", method, "error") for method in methods} <= found
    for method in accelerator.STEP_VARIANTS:
        assert {("step", method, "s"), ("step", method, "peak GiB")} <= found
    assert {("search", method, "time / MeZO") for method in accelerator.SEARCHES} <= found
    assert ("kernel", None, "share of the matrix-product limit") in found
    assert {("projected", None, "gradients / s"), ("fisher", None, "s")} <= found
    for row in rows:
        assert row["value"] > 0 or row["quantity"] in ("error", "CPU's", "peak GiB"), row
        assert row["size"] == "small"  # trials never replace rows of the full sizes


def test_a_wrong_step_is_told(monkeypatch, tmp_path, capsys):
    values = iter([1.0, 1.01, 1.0, 1.0, 1.0])  # reference and device; in bfloat16 reference, the CPU's own and device

    def step(place: method_steps.Place) -> dict[str, torch.Tensor]:
        return {"change": torch.tensor([next(values)], dtype=torch.float64)}

    monkeypatch.setitem(accelerator.STEPS, "full", step)
    status, rows = run(monkeypatch, tmp_path, "--device", "cpu", "--only", "correctness", "--methods", "full")
    assert status == 1
    assert "wrong: full, float32: error 0.01" in capsys.readouterr().out
    assert next(row["value"] for row in rows if row["dtype"] == "float32") == pytest.approx(0.01)


def test_what_a_measurement_built_is_gone_before_the_next_one():
    """The next one's peak is above a level that must not hold an earlier model."""
    left = []

    def measure() -> list[dict]:
        model = torch.nn.Linear(1, 1)
        model.itself = [model]  # a cycle, as that of a search and the hooks of its model
        left.append(weakref.ref(model))
        return []

    gc.disable()
    try:
        accelerator.attempt("one", measure, accelerator.CPU, accelerator.Budget(1))
    finally:
        gc.enable()
    assert left[0]() is None


def test_nothing_begins_after_the_budget(monkeypatch, tmp_path, capsys):
    status, rows = run(monkeypatch, tmp_path, "--device", "cpu", "--budget_minutes", "0")
    assert (status, rows) == (0, [])
    assert "left out, no time: kernel" in capsys.readouterr().out


@pytest.mark.gpu
def test_the_steps_of_all_methods_on_a_gpu(monkeypatch, tmp_path):
    status, rows = run(monkeypatch, tmp_path, "--device", "cuda")
    assert status == 0
    assert {row["method"] for row in rows if row["what"] == "correctness"} == set(method_steps.STEPS)
