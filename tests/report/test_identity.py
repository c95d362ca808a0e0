"""Which runs a report takes for the same: not by their task's name alone, and no seed twice."""

import json
import os
from pathlib import Path

import pytest
from run_records import run_record, write_run

from hf_ft_ext.report.__main__ import main
from hf_ft_ext.report.build import write_report
from hf_ft_ext.report.read import checked_record, find_runs
from hf_ft_ext.report.rows import Number, quality_key, sections


@pytest.fixture(autouse=True)
def _no_pictures(monkeypatch):
    monkeypatch.setattr("hf_ft_ext.report.charts.draw", lambda *_: None)  # test_report.py looks at them


def data_of(content: str = "c0", rows: int = 100, train: str = "t0", **source) -> dict:
    """`data` of a record: one set of rows to train on and one to evaluate on."""
    one = {"source_rows": rows, "selection": "all", "drawn": None}
    splits = {
        "train": {"split": "train", "rows": 10, "content": train, **one},
        "eval": {"split": "validation", "rows": rows, "content": content, **one},
    }
    return {
        "hub_id": None,
        "config": None,
        "revision": None,
        "folder": None,
        "files": None,
        **source,
        "splits": splits,
    }


def found(root: Path):
    return sections(find_runs([root]).runs)


def write_all(root: Path, *records: dict) -> Path:
    for number, record in enumerate(records):
        os.utime(write_run(root / f"r{number}", record) / "run.json", (number, number))
    return root


def test_a_repeated_run_is_no_second_seed(tmp_path, capsys):
    write_all(tmp_path, run_record("full", 1, 0.5), run_record("full", 2, 0.7), run_record("full", 1, 0.9))
    (section,) = found(tmp_path)
    (row,) = section.rows
    assert row.seeds == [1, 2] and row.quality == Number(pytest.approx(0.8), pytest.approx(0.1414, abs=1e-4))
    assert row.remarks == (f"seed 1 ran 2 times; only the latest run counts: {tmp_path / 'r2'}",)
    assert main([str(tmp_path), "--output_dir", str(tmp_path / "out")]) == 0
    assert "full: seed 1 ran 2 times; only the latest run counts" in capsys.readouterr().out
    for page in ("report.html", "report.md"):
        assert "seed 1 ran 2 times; only the latest run counts" in (tmp_path / "out" / page).read_text()


def test_the_same_command_twice_has_no_deviation(tmp_path):
    write_all(tmp_path, run_record("full", 1, 0.5), run_record("full", 1, 0.5))
    (row,) = found(tmp_path)[0].rows
    assert row.quality == Number(0.5, None) and row.seeds == [1]


@pytest.mark.parametrize(
    ("first", "second", "told"),
    [
        ({"data": data_of("c0", hub_id="me/a")}, {"data": data_of("c1", hub_id="me/b")}, ("me/a", "me/b")),
        ({"data": data_of("c0", hub_id="me/a", config="x")}, {"data": data_of("c1", hub_id="me/a", config="y")},
         ("me/a, x", "me/a, y")),
        ({"data": data_of("c0", files={"train_file": "/p/t.csv"})},
         {"data": data_of("c1", files={"train_file": "/q/t.csv"})}, ("/p/t.csv", "/q/t.csv")),
        ({"arguments": {"dataset_name": "me/a"}}, {"arguments": {"dataset_name": "me/b"}}, ("me/a", "me/b")),
        ({"arguments": {"train_file": "p/t.csv"}}, {"arguments": {"train_file": "q/t.csv"}}, ("p/t.csv", "q/t.csv")),
        ({"model_source": {"folder": "/p/base"}}, {"model_source": {"folder": "/q/base"}}, ("/p/base", "/q/base")),
        ({"metrics": {"eval_accuracy": 0.5}}, {"metrics": {"eval_pearson": 0.5}}, ("eval_accuracy", "eval_pearson")),
    ],
)  # fmt: skip
def test_other_data_models_and_metrics_are_other_sections_and_the_heading_says_which(tmp_path, first, second, told):
    """One task's name, and yet nothing to average."""
    write_all(tmp_path, run_record("full", 1, 0.9, **first), run_record("full", 2, 0.1, **second))
    one, two = found(tmp_path)
    assert [len(section.rows[0].runs) for section in (one, two)] == [1, 1]
    for section, words in zip((one, two), told, strict=True):
        assert words in section.heading and section.heading.startswith("sst2, tiny")
    write_report([tmp_path], tmp_path / "out")
    assert one.heading in (tmp_path / "out" / "report.md").read_text()


@pytest.mark.parametrize(
    ("second", "name"),
    [
        ({"data": data_of(train="t1")}, "train content=t1"),
        ({"data": data_of("c1", 90)}, "eval rows=90"),
        ({"data": None}, "eval content=not recorded"),
        ({"data": data_of(), "world_size": 2}, "processes=2"),
        ({"data": data_of(), "train_seconds": None}, "evaluation only=True"),
        ({"data": data_of(), "arguments": {"learning_rate": 1e-3}}, "learning_rate=0.001"),
        ({"data": data_of(), "arguments": {"model_revision": "v2"}}, "model_revision=v2"),
    ],
)
def test_runs_on_other_rows_or_with_other_settings_are_other_rows(tmp_path, second, name):
    first = run_record("full", 1, 0.9, data=data_of())
    for record in (first, second):
        if record["data"] is not None:
            record["data"] |= {"hub_id": "nyu-mll/glue", "config": "sst2"}
    write_all(tmp_path, first, run_record("full", 2, 0.1, **second))
    (section,) = found(tmp_path)
    assert len(section.rows) == 2 and name in section.rows[1].name
    assert len({row.name for row in section.rows}) == 2


def test_one_data_set_in_two_places_is_one(tmp_path):
    """The rows decide, not the folder that they were read from."""
    here, there = ({"data": data_of(files={"train_file": f"/{p}/t.csv"})} for p in "pq")
    write_all(tmp_path, run_record("full", 1, 0.5, **here), run_record("full", 2, 0.7, **there))
    (section,) = found(tmp_path)
    assert section.rows[0].seeds == [1, 2]


def test_output_options_do_not_split_rows(tmp_path):
    mine = {"output_dir": "a", "kernel_dir": "k", "logging_steps": 3, "hub_model_id": "x", "report_to": "none"}
    theirs = {"output_dir": "b", "save_strategy": "no", "hub_token": "t"}
    write_all(tmp_path, run_record("full", 1, 0.5, arguments=mine), run_record("full", 2, 0.7, arguments=theirs))
    assert found(tmp_path)[0].rows[0].seeds == [1, 2]


def test_other_devices_and_versions_of_a_rows_seeds_are_named(tmp_path):
    other = {"device": "H200", "versions": {"python": "3.11", "torch": "2.12"}}
    write_all(tmp_path, run_record("full", 1, 0.5), run_record("full", 2, 0.7, **other))
    assert found(tmp_path)[0].rows[0].remarks == (
        "its seeds ran on different devices: H200; cpu, 2 threads",
        "its seeds ran with different versions of torch: 2.12, 2.13",
    )


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("[1, 2]", "it contains a list, not an object"),
        ('"method task model seed metrics command"', "it contains a text, not an object"),
        ("3", "it contains a whole number"),
        ("{}", "it has no 'method'; is it of another program?"),
        ("{", "Expecting property name"),
        ("[" * 100_000, "recursion"),
        (b"\xff\xfe", "codec can't decode"),
        ({"metrics": [1]}, "its 'metrics' is a list, not an object"),
        ({"seed": "42"}, "its 'seed' is a text, not a whole number"),
        ({"seed": None}, "its 'seed' is nothing, not a whole number"),
        ({"seed": 3.0}, "its 'seed' is a number, not a whole number"),
        ({"seed": True}, "its 'seed' is true or false"),
        ({"command": "run_glue.py"}, "its 'command' is a text, not a list"),
        ({"arguments": ["a"]}, "its 'arguments' is a list"),
        ({"artefact_bytes": "12 MB"}, "its 'artefact_bytes' is a text"),
        ({"versions": 3}, "its 'versions' is a whole number"),
        ({"generations": [3]}, "one of its generations contains a whole number, not an object"),
        ({"generations": [{"prompt": "a"}]}, "one of its generations has no 'prediction'"),
    ],
)
def test_unreadable_records_are_reported_in_one_line(tmp_path, capsys, content, reason):
    write_run(tmp_path / "ours", run_record("full", 1, 0.5))
    bad = tmp_path / "theirs"
    bad.mkdir()
    if isinstance(content, dict):
        content = json.dumps(run_record("full", 1, 0.5) | content)
    (bad / "run.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    assert main([str(tmp_path), "--output_dir", str(tmp_path / "out")]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "theirs" in line]
    assert len(lines) == 1 and "unreadable: run.json cannot be read" in lines[0] and reason in lines[0]


_ENTRY = {
    "variant": "full", "seed": 1, "folder": "runs/full-1", "log": "runs/full-1.log", "state": "failed", "reason": "",
    "seconds": 1.0, "command": "run_glue.py",
}  # fmt: skip


@pytest.mark.parametrize(
    "content",
    [
        "[]",
        "{",
        '{"runs": 3, "seconds": 1}',
        '{"runs": [{}], "seconds": 1}',
        '{"a": 1}',
        *(
            json.dumps({"runs": [_ENTRY | wrong], "seconds": 1})
            for wrong in ({"seconds": None}, {"log": None}, {"left_out": ["full"]})
        ),
    ],
)
def test_an_unreadable_comparison_is_reported_in_one_line(tmp_path, content):
    (tmp_path / "comparison.json").write_text(json.dumps({"runs": [_ENTRY], "seconds": 1}))
    assert find_runs([tmp_path]).missing[0].name == "full"
    (tmp_path / "comparison.json").write_text(content)
    (missing,) = find_runs([tmp_path]).missing
    assert "comparison.json cannot be read" in missing.reason
    write_report([tmp_path], tmp_path / "out")


def test_records_with_the_needed_keys_alone_make_a_page(tmp_path):
    needed = ("method", "task", "model", "seed", "metrics", "command")
    bare = {key: value for key, value in run_record("full", 1, 0.5).items() if key in needed}
    assert checked_record(bare)["device"] is None
    write_run(tmp_path / "a", bare)
    write_run(tmp_path / "b", run_record("lora", 1, float("nan"), metrics={"eval_accuracy": float("nan"), "x": [1]}))
    write_run(tmp_path / "c", run_record("sparse", 1, None, metrics={"eval_accuracy": "0.5"}))
    write_report([tmp_path], tmp_path / "out")
    rows = found(tmp_path)[0].rows
    assert [(row.name, row.quality) for row in rows] == [("full", Number(0.5)), ("lora", None), ("sparse", None)]


def test_each_run_counts_once_and_its_comparison_names_it(tmp_path):
    write_run(tmp_path / "runs" / "a-1", run_record("full", 1, 0.5))
    entry = {"variant": "mine", "seed": 1, "folder": "runs/a-1", "log": "x.log", "state": "done", "reason": "",
             "seconds": 2.0, "command": "run_glue.py --token hf_abcdefghijklmnopqrst"}  # fmt: skip
    gone = {**entry, "folder": "runs/b", "state": "failed", "variant": "b"}
    (tmp_path / "comparison.json").write_text(json.dumps({"runs": [entry, gone], "seconds": 3.0}))
    both = find_runs([tmp_path / "runs", tmp_path, tmp_path / "runs" / "a-1"])
    assert [run.variant for run in both.runs] == ["mine"]
    assert both.missing[0].command == "python run_glue.py --token ***"


@pytest.mark.parametrize(
    ("fields", "key"),
    [
        ({"quality": "eval_recall", "metrics": {"eval_accuracy": 1, "eval_recall": 1}}, "eval_recall"),
        ({"quality": "eval_gone", "metrics": {"eval_accuracy": 1}}, "eval_accuracy"),
        ({"metrics": {"eval_loss": 1, "eval_runtime": 2, "eval_samples_per_second": 3, "eval_own_score": 1}},
         "eval_own_score"),
        ({"metrics": {"eval_mm_runtime": 2, "eval_own_score": 1}}, "eval_own_score"),
        ({"metrics": {"eval_loss": 1, "train_loss": 2}}, None),
    ],
)  # fmt: skip
def test_the_metric_that_runs_are_compared_by(tmp_path, fields, key):
    write_run(tmp_path / "a", run_record("full", 1, None, task="own", **fields))
    assert quality_key(find_runs([tmp_path]).runs[0]) == key


def test_runs_with_another_metric_beside_join_the_section_of_the_usual_one(tmp_path):
    both = {"eval_accuracy": 0.7, "eval_f1": 0.6}
    write_all(
        tmp_path,
        run_record("full", 1, 0.5), run_record("full", 2, 0.6), run_record("lora", 1, None),
        run_record("sparse", 1, None, metrics=both, quality="eval_f1"),
        run_record("fisher", 1, None, metrics={"eval_f1": 0.3}, quality="eval_f1"),
    )  # fmt: skip
    one, two = found(tmp_path)
    assert one.metric == "eval_accuracy" and {row.method for row in one.rows} == {"full", "lora", "sparse"}
    assert two.metric == "eval_f1" and [row.method for row in two.rows] == ["fisher"]


def test_commands_are_runnable_and_hold_no_token(tmp_path):
    ours = ["hf-ft-ext", "train", "--train_file", "my data.csv", "--hub_token=hf_x", "--note", "a`b"]
    write_run(tmp_path / "a", run_record("full", 1, 0.5, command=ours))
    write_report([tmp_path], tmp_path / "out")
    line = "hf-ft-ext train --train_file 'my data.csv' '--hub_token=***' --note 'a`b'"
    assert f"`` {line} ``" in (tmp_path / "out" / "report.md").read_text()
    assert "python hf-ft-ext" not in (tmp_path / "out" / "report.html").read_text()
