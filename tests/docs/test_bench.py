"""`benchmarks/bench.py`: what it runs, repeats and stops."""

import argparse
import sys
import time

import pytest
from blocks import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
import bench
import results


class Recorded(bench.Run):
    """Writes rows that are noisy until a measurement has 12 repetitions."""

    def __init__(self, folder, minutes: float = 40, data: str | None = None):
        super().__init__(argparse.Namespace(budget_minutes=minutes, data=data, small=False), folder)
        self.commands: list[tuple[str, int]] = []

    def measure(self, name: str, repeats: int) -> bool:
        self.commands.append((name, repeats))
        self.seconds[name], self.repeats[name] = self.time(name, repeats), repeats
        self.end -= self.seconds[name]
        high = 1.2 if name == "basis" and repeats < 12 else 1.05
        for file in bench.MEASUREMENTS[name].files:
            row = {"what": name, "value": 1.0, "low": 0.99, "high": high}
            words = self.command(name, repeats)
            words = ["python", f"benchmarks/{name}.py", *words[2:]]
            results.save(file, [row, {**row, "what": "another"}], words, self.folder)
            results.save(file, [{"what": "old", "value": 1.0, "low": 0.5, "high": 2.0}], ["other"], self.folder)
        return name != "fisher"

    def time(self, name: str, repeats: int) -> float:
        return 1.0


def test_noisy_measurements_run_again_with_more_repetitions(tmp_path):
    run = Recorded(tmp_path)
    assert bench.measure_all(run, ["startup", "kernel", "basis", "fisher"]) == ["fisher"]
    assert run.commands == [("startup", 2), ("basis", 3), ("fisher", 3), ("basis", 6), ("basis", 12)]
    assert run.noisy("basis") == []


def test_what_was_measured_once_runs_again_with_two_repetitions(tmp_path):
    run = Recorded(tmp_path, minutes=10)
    names = ["sparse", "zeroth_order", "gradientless"]
    bench.measure_all(run, names)  # 900 seconds were expected
    first, again = run.commands[:3], run.commands[3:]
    once = [(name, repeats) for name, repeats in first if repeats == 1]
    assert [name for name, _ in first] == names and once == [("sparse", 1)] and again == [("sparse", 2)]


def test_noisy_rows_are_marked(tmp_path):
    run = Recorded(tmp_path, minutes=2.5 / 60)
    bench.measure_all(run, ["basis"])
    assert run.commands == [("basis", 1)]  # 70 seconds were expected, and twice the repetitions would take two more
    assert [row["noisy"] for row in run.noisy("basis")] == [True, True]
    assert [row.get("noisy") for row in results.read("basis", tmp_path)] == [True, True, None]  # not of other commands


@pytest.mark.parametrize(("slower", "most"), [(0.5, [3]), (1.6, [1, 2]), (2.3, [1, 2])])
def test_a_slow_machine_measures_all_with_fewer_repetitions(tmp_path, slower, most):
    class Slow(Recorded):
        def time(self, name: str, repeats: int) -> float:
            return slower * bench.MEASUREMENTS[name].expected * repeats / bench.MEASUREMENTS[name].repeats

    run = Slow(tmp_path, data="glue")
    names = [name for name in bench.MEASUREMENTS if name != "fisher"]
    bench.measure_all(run, names)
    first = dict(reversed(run.commands))  # without those that were repeated
    assert set(first) == set(names) and run.left() > 0
    assert {first[name] for name in ("sparse_published", "gradientless", "kernel")} <= set(most)


def test_a_script_that_takes_too_long_is_stopped_with_its_children(tmp_path, monkeypatch):
    (tmp_path / "slow.py").write_text("import subprocess\nsubprocess.run(['sleep', '60'])\n")
    monkeypatch.setattr(bench, "HERE", tmp_path)
    monkeypatch.setitem(bench.MEASUREMENTS, "slow", bench.Measurement("slow", (), "", "", 1.0))
    run = bench.Run(argparse.Namespace(budget_minutes=0.5 / 60, data=None, small=False), tmp_path)
    start = time.monotonic()
    assert bench.measure_all(run, ["slow"]) == ["slow"]
    assert time.monotonic() - start < 30 and run.seconds == {}
