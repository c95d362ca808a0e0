"""Result files and the tables that are made from them."""

import functools
import sys
import threading
from types import SimpleNamespace

import pytest
from blocks import ROOT

from hf_ft_ext.compare.process import Outcome

sys.path.insert(0, str(ROOT / "benchmarks"))
import page as whole_page
import quality
import results
import tables

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TIMES = [
    {"what": "ours", "against": "theirs", "quantity": "time", **results.summary([0.5, 0.7, 0.6, 0.9, 0.8])},
    {"what": "ours", "against": "theirs", "quantity": "memory", "value": 0.25},
]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_tables_are_those_of_the_result_files(page):
    text = page.read_text()
    assert text.count("<!-- results:") == text.count("<!-- end of results -->") == len(tables.names_in(text))
    assert tables.rewritten(text, docs=tables.docs_from(page)) == text, "run python benchmarks/tables.py"


def test_the_page_of_all_measurements_is_that_of_the_result_files():
    assert whole_page.PAGE.read_text() == whole_page.page(), "run python benchmarks/tables.py"


def test_every_described_table_stands_on_a_page_and_every_file_is_shown():
    specifications = tables.specifications()
    shown = [name for page in PAGES for name in tables.names_in(page.read_text())]
    assert sorted(set(shown)) == sorted(specifications)
    files = {name for found in specifications.values() for name in tables.as_list(found["rows"]["file"])}
    for section in whole_page.sections():
        files |= {entry["row"]["file"] for entry in section.get("ratios", ())}
        files |= {name for found in section.get("tables", ()) for name in tables.as_list(found["rows"]["file"])}
    assert files >= {path.stem for path in results.FOLDER.glob("*.json")}


def test_lines_of_the_page_appear_once_they_are_measured(tmp_path):
    row = {"what": "gram-eigh", "quantity": "time / stacked SVD", "shape": "4 x 6", "gradients": 30}
    assert "SparseGrad's basis" not in whole_page.page(tmp_path)
    results.save("basis", [{**row, **results.summary([0.25])}], ["basis.py"], tmp_path)
    text = whole_page.page(tmp_path)
    assert "| SparseGrad's basis from Gram sums, 30 gradients of 4 x 6 | 0.250 | stacked SVDs" in text  # one round
    assert "[basis.json](../benchmarks/results/basis.json)" in text and "`python benchmarks/basis.py`" in text
    results.save("basis", [{**row, **results.summary([0.2, 0.25, 0.6])}], ["x"], tmp_path)
    assert "| 0.250 (0.200-0.600) (noisy) |" in whole_page.page(tmp_path)
    results.save("basis", [{**row, "shape": "8 x 6", "value": 0.1}], ["x"], tmp_path)
    with pytest.raises(ValueError, match="2 rows have the entries"):
        whole_page.page(tmp_path)


def test_every_row_says_how_it_was_measured():
    for path in results.FOLDER.glob("*.json"):
        for row in results.read(path.stem):
            assert row["run"]["command"] and row["run"]["date"] and row["run"]["machine"]["cores"]
            assert isinstance(row["value"], int | float)


def test_means_of_kernels_are_those_of_the_rows():
    rows = [row for row in results.read("kernel_regularization") if row["what"] == "regularization"]
    for row in [row for row in rows if row["kernel"] == "mean over kernels"]:
        same = [other for other in rows if all(other[key] == row[key] for key in ("regularization", "quantity"))]
        values = [other["value"] for other in same if other is not row]
        assert len(values) == 23 and row["value"] == pytest.approx(sum(values) / 23)


def test_median_and_quartiles():
    found = results.summary([5.0, 1.0, 2.0, 4.0, 3.0])
    assert (found["value"], found["low"], found["high"]) == (3.0, 2.0, 4.0)
    found = results.summary([3.0, 1.0, 2.0])
    assert (found["value"], found["low"], found["high"]) == (2.0, 1.0, 3.0)
    with pytest.raises(ValueError, match="at least one"):
        results.summary([])


def test_mean_and_deviation_over_seeds():
    found = results.over_seeds({1: 0.8, 2: 0.9})
    assert found["value"] == pytest.approx(0.85) and found["deviation"] == pytest.approx(0.0707107)
    assert results.over_seeds({1: 0.8})["deviation"] is None


def test_a_row_measured_again_replaces_the_old_one_and_others_stay(tmp_path):
    results.save("some", TIMES, ["first"], tmp_path)
    results.save("some", [{**TIMES[1], "value": 0.2}], ["second"], tmp_path)
    rows = results.read("some", tmp_path)
    assert [row["value"] for row in rows] == [0.7, 0.2]
    assert [row["run"]["command"] for row in rows] == ["first", "second"]
    assert results.read("other", tmp_path) == []
    results.save("some", [{**TIMES[1], "value": 0.2}, {**TIMES[0], "value": 0.6}], ["resumed"], tmp_path, found=True)
    rows = results.read("some", tmp_path)
    assert [(row["value"], row["run"]["command"]) for row in rows] == [(0.6, "resumed"), (0.2, "second")]


def test_rows_that_another_study_saves_meanwhile_stay(tmp_path, monkeypatch):
    read, other = results.read, []

    def slow_read(name, folder):
        rows = read(name, folder)
        if not other:  # another study begins to save, between reading and writing of this one
            other.append(threading.Thread(target=results.save, args=("some", TIMES[1:], ["second"], tmp_path)))
            other[0].start()
            other[0].join(0.5)
        return rows

    monkeypatch.setattr(results, "read", slow_read)
    results.save("some", TIMES[:1], ["first"], tmp_path)
    other[0].join()
    assert len(read("some", tmp_path)) == len(TIMES)


def test_a_list_of_rows_as_a_table(tmp_path):
    results.save("some", TIMES, ["python", "measure.py"], tmp_path)
    columns = {"what": "{what}", "ratio": "{value:.2f} ({low:.2f}-{high:.2f})"}
    text = tables.table({"rows": {"file": "some", "quantity": "time"}, "columns": columns}, tmp_path)
    assert text.startswith("| what | ratio |\n| --- | ---: |\n| ours | 0.70 (0.60-0.80) |\n\nMeasured ")
    assert text.endswith(", commands: [some](benchmarks.md#some).\n")
    text = tables.table({"rows": {"file": "some", "quantity": ["time", "memory"]}, "columns": columns}, tmp_path)
    assert "| ours | 0.25 |" in text  # without a spread
    assert "Not measured yet." in tables.table({"rows": {"file": "none"}, "columns": columns}, tmp_path)


def test_rows_crossed_by_task(tmp_path):
    scores = [
        {"method": "lora", "task": "sst2", **results.over_seeds({1: 84.0, 2: 85.0})},
        {"method": "full", "task": "sst2", **results.over_seeds({1: 86.0})},
        {"method": "lora", "task": "rte", **results.over_seeds({1: 60.0, 2: 62.0})},
    ]
    results.save("study", scores, ["study.py"], tmp_path)
    cell = "{value:.1f} ± {deviation:.1f}"
    specification = {
        "rows": {"file": "study"},
        "lines": "{method}",
        "across": "{task}",
        "first": "method",
        "cell": cell,
    }
    lines = tables.table(specification, tmp_path).splitlines()
    assert lines[:4] == [
        "| method | sst2 | rte |", "| --- | ---: | ---: |", "| lora | 84.5 ± 0.7 | 61.0 ± 1.4 |", "| full | 86.0 |  |",
    ]  # fmt: skip
    lines = tables.table({**specification, "cells": {"rte": "{value:.0f}"}}, tmp_path).splitlines()
    assert lines[2] == "| lora | 84.5 ± 0.7 | 61 |"
    ordered = {**specification, "order": {"method": ["other", "full"], "task": ["rte"]}}
    lines = tables.table(ordered, tmp_path).splitlines()
    assert [line.split(" ", 2)[1] for line in (lines[0], *lines[2:4])] == ["method", "full", "lora"]
    assert lines[3] == "| lora | 84.5 ± 0.7 | 61.0 ± 1.4 |"  # one order of columns for all lines


def test_a_command_can_be_repeated_and_names_no_folder_of_this_machine(tmp_path, monkeypatch):
    words = [str(tmp_path / "sparse.py"), "--data", str(tmp_path / "glue"), "--rate", "1e-3"]
    monkeypatch.setattr(sys, "argv", words)
    run = results.conditions()
    assert run["command"] == "python benchmarks/sparse.py --data glue --rate 1e-3"
    assert results.command_text(run) == run["command"]
    assert results.command_text({"command": "sparse.py --save"}) == "python benchmarks/sparse.py --save"


def test_a_variant_of_a_study_goes_before_its_task_and_the_task_before_all(tmp_path):
    study = tmp_path / "study.yaml"
    study.write_text(
        "all: {warmup_steps: 1, max_seq_length: 8, logging_steps: 5}\n"
        "tasks: {sst2: {learning_rate: 1e-3, max_seq_length: 16}}\n"
        "plain: {method: lora}\n"
        "own: {method: lora, learning_rate: ['1e-4', '3e-4'], logging_steps: null}\n"
    )
    args = SimpleNamespace(
        study=study,
        rates=None,
        only=None,
        task_name=["sst2"],
        output_dir=tmp_path,
        report=None,
        few_shot=False,
        known=None,
        rates_of=None,
    )
    plain, own = quality.variants_of(args)
    assert plain.rates == ["1e-3"] and own.rates == ["1e-4", "3e-4"]
    assert plain.settings == {"method": "lora", "warmup_steps": 1, "max_seq_length": 16, "logging_steps": 5}
    assert own.settings == {"method": "lora", "warmup_steps": 1, "max_seq_length": 16}


def test_result_rows_hold_the_scores_that_chose_the_rate(tmp_path):
    variant = quality.Variant("v", "sst2", {}, ["1e-4", "1e-3"], tmp_path, "eval_accuracy", "eval_accuracy")
    variant.tried = {rate: {"metrics": {"eval_accuracy": score}} for rate, score in (("1e-4", 0.5), ("1e-3", 0.75))}
    rows = [row for row in quality.measured(variant) if row["quantity"] == "tuning score"]
    assert [(row["rate"], row["value"]) for row in rows] == [("1e-4", 0.5), ("1e-3", 0.75)]
    assert len({row["what"] for row in rows}) == 2


def test_rows_of_few_shots_hold_the_rate_of_each_seed(tmp_path):
    variant = quality.Variant("v", "sst2", {}, ["1e-4", "1e-3"], tmp_path, "eval_accuracy", "test_accuracy")
    costs = {
        "train_seconds": 1.0, "preparation_seconds": 0.0, "peak_memory_bytes": None, "trainable_parameters": 7,
        "artefact_bytes": 9,
    }  # fmt: skip
    for seed, scores in ((1, (0.5, 0.7)), (2, (0.8, 0.6))):
        for rate, score in zip(variant.rates, scores, strict=True):
            metrics = {"eval_accuracy": score, "test_accuracy": score}
            variant.tried[rate, seed] = {"metrics": metrics, **costs}
        variant.records[seed] = variant.tried[variant.best(seed), seed]
    rates = next(row for row in quality.measured(variant) if row["quantity"] == "rate")
    assert rates["seeds"] == [1, 2] and rates["values"] == [1e-3, 1e-4]


def test_runs_without_a_finite_score_are_left_out_and_named(tmp_path):
    """A rate that diverged is not chosen; without any other the variant does not run."""
    settings = SimpleNamespace(
        few_shot=False, data_seeds=False, seeds=[1], epochs=2.0, tune_epochs=1.0, tune_steps=None,
    )  # fmt: skip
    variant = quality.Variant("v", "sst2", {}, ["1", "2", "3"], tmp_path, "eval_accuracy", "eval_accuracy")
    stages = quality.stages([variant], settings, [])
    scores = {"1": (None, None), "2": (0.5, None), "3": (0.5, 1.0)}  # run.json has null for NaN
    for job in next(stages):
        score, loss = scores[job.rate]
        quality._accept(job, Outcome("done", {"metrics": {"eval_accuracy": score, "eval_loss": loss}}), settings)
    assert variant.best() == "3" and "tune-1: no finite eval_accuracy among" in variant.failed[0]
    assert [job.rate for stage in stages for job in stage] == ["3"]
    variant.rates = []
    assert not [job for stage in quality.stages([variant], settings, []) for job in stage]


@pytest.mark.parametrize("few_shot", [False, True])
def test_a_study_goes_on_from_its_result_file(tmp_path, monkeypatch, few_shot):
    """Known seeds and rates do not run again; all that was known stands in the rows beside what is new."""

    def record(score: float) -> dict:
        metrics = {"eval_accuracy": score, "test_accuracy": score, "eval_loss": 1.0}
        return {
            "metrics": metrics, "train_seconds": 2.0, "preparation_seconds": 0.0, "peak_memory_bytes": None,
            "trainable_parameters": 7, "artefact_bytes": 10**6,
        }  # fmt: skip

    study = tmp_path / "study.yaml"
    study.write_text("v: {method: lora, learning_rate: ['1e-4', '1e-3']}\nw: {method: lora, learning_rate: '1e-3'}\n")
    args = SimpleNamespace(
        study=study, rates=None, only=None, task_name=["sst2"], output_dir=tmp_path / "runs", report=None,
        few_shot=few_shot, known=None, rates_of=None, data_seeds=False, seeds=[1, 2], epochs=2.0, tune_epochs=1.0,
        tune_steps=None, result="study",
    )  # fmt: skip
    read, save = results.read, results.save
    monkeypatch.setattr(results, "read", lambda name, folder=tmp_path: read(name, folder))
    monkeypatch.setattr(results, "save", functools.partial(save, folder=tmp_path))
    first = quality.variants_of(args)[:1]
    if not few_shot:
        first[0].tried = {"1e-4": record(0.5), "1e-3": record(0.75)}
    first[0].records = {1: record(0.8)}
    quality.write(first, args)

    args.known = "study"
    later = quality.variants_of(args)
    jobs = [(job.variant.name, job.rate, job.seed) for stage in quality.stages(later, args, []) for job in stage]
    both = [("v", "1e-4", 2), ("v", "1e-3", 2)] if few_shot else [("v", "1e-3", 2)]  # the best known rate
    assert jobs == [("w", "1e-3", 1), *both, ("w", "1e-3", 2)]
    later[0].records = {2: record(0.6)}
    quality.write(later, args)
    rows = {(row["variant"], row["quantity"], row.get("rate")): row for row in results.read("study")}
    assert rows["v", "score", None]["values"] == [0.8, 0.6] and rows["v", "score", None]["seeds"] == [1, 2]
    assert few_shot or rows["v", "tuning score", "1e-4"]["value"] == 0.5


def test_a_study_has_whole_rows_early(tmp_path):
    """A variant runs before the next one is tuned, those with nothing to tune first; then comes the next seed."""
    study = tmp_path / "study.yaml"
    rates = "learning_rate: ['1e-4', '1e-3']"
    study.write_text(
        f"v: {{method: lora, {rates}}}\nw: {{method: lora, learning_rate: '5'}}\nx: {{method: full, {rates}}}"
    )
    args = SimpleNamespace(
        study=study, rates=None, only=None, task_name=["cola"], output_dir=tmp_path / "runs", report=None,
        few_shot=False, known=None, rates_of=None, data_seeds=False, seeds=[1, 2], epochs=2.0, tune_epochs=1.0,
        tune_steps=None,
    )  # fmt: skip
    found = quality.stages(quality.variants_of(args), args, [])
    jobs = [[f"{job.variant.name}{job.seed}{'?' * job.tuning}" for job in stage] for stage in found]
    assert jobs == [["w1", "v1?", "v1?"], ["v1", "x1?", "x1?"], ["x1"], ["v2", "w2", "x2"]]


@pytest.mark.parametrize("task, known, rates_of", [("cola", "study", "sst2"), ("sst2", None, "study:sst2")])
def test_a_study_takes_the_rates_of_another(tmp_path, monkeypatch, task, known, rates_of):
    """No rate is tried, the other study's scores count for nothing here, and a variant without tries is refused."""
    study = tmp_path / "study.yaml"
    rates = "['1e-4', '1e-3', '1e-2']"
    study.write_text(f"v: {{method: lora, learning_rate: {rates}}}\nw: {{method: lora, learning_rate: '5'}}\n")
    rows = [
        {"task": "sst2", "variant": "v", "quantity": "tuning score", "rate": rate, "value": value}
        for rate, value in (("1e-4", 0.5), ("1e-3", 0.7), ("3e-2", 0.9))  # the last rate is not in the study
    ]
    rows.append({"task": "sst2", "variant": "v", "quantity": "score", "seeds": [1], "values": [0.8]})
    monkeypatch.setattr(results, "read", {"study": rows}.get)
    args = SimpleNamespace(
        study=study, rates=None, only=None, task_name=[task], output_dir=tmp_path / "runs", report=None,
        few_shot=False, known=known, rates_of=rates_of, data_seeds=False, seeds=[1], epochs=2.0, tune_epochs=1.0,
        tune_steps=None,
    )  # fmt: skip
    found = quality.variants_of(args)
    jobs = [(job.variant.name, job.rate, job.tuning) for stage in quality.stages(found, args, []) for job in stage]
    assert jobs == [("v", "1e-3", False), ("w", "5", False)]
    assert list(quality.measured(found[0])) == []
    args.rates_of = rates_of.replace("sst2", "mrpc")
    expected = r"v has no tuning score on 'mrpc'.*1e-4, 1e-3, 1e-2; tune it on 'mrpc' first"
    with pytest.raises(SystemExit, match=expected):
        quality.variants_of(args)
