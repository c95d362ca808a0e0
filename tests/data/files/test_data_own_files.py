"""Own files: every format, finding columns and labels, and what each fault says."""

import json
import logging

import pytest
from datasets import Dataset

from hf_ft_ext.arguments import DataArguments
from hf_ft_ext.data.loading import load_data
from hf_ft_ext.errors import InputError

ROWS = {"text": ["NA", "it, was", 'said "no"', "None"], "label": ["good", "bad", "good", "good"]}


@pytest.fixture
def load(tmp_path):
    def call(**kwargs):
        paths = {key: str(tmp_path / name) for key, name in kwargs.items() if key.endswith("_file")}
        return load_data(DataArguments(**kwargs | paths), cache_dir=str(tmp_path / "cache"))

    return call


@pytest.fixture
def write(tmp_path):
    def call(name, columns):
        data = Dataset.from_dict(columns)
        path = str(tmp_path / name)
        suffix = name.rsplit(".", 1)[1]
        if suffix in ("csv", "tsv"):
            data.to_csv(path, sep="\t" if suffix == "tsv" else ",")
        elif suffix == "parquet":
            data.to_parquet(path)
        else:
            data.to_json(path, lines=suffix == "jsonl")
        return name

    return call


@pytest.mark.parametrize("suffix", ["csv", "tsv", "json", "jsonl", "parquet"])
def test_every_format(load, write, suffix):
    write(f"train.{suffix}", ROWS)
    write(f"dev.{suffix}", {"label": ["good"], "text": ["x"]})
    write(f"test.{suffix}", {"text": ["x", "y"], "more": [1, 2]})
    data = load(train_file=f"train.{suffix}", validation_file=f"dev.{suffix}", test_file=f"test.{suffix}")
    assert data.train["text"][:] == ROWS["text"]
    assert data.label_names == ["bad", "good"]
    assert data.train["label"][:] == [1, 0, 1, 1]
    assert data.validation["validation"]["label"][:] == [1]
    assert data.test["test"].column_names == ["text"]
    assert data.task.name == "train"


def test_an_edited_file_is_read_anew(load, write):
    for good in ("gut", "fit"):  # same size, written within the same second
        write("train.csv", {"text": ["a", "b"], "label": [good, "bad"]})
        assert load(train_file="train.csv").label_names == sorted([good, "bad"])


@pytest.mark.parametrize(
    ("columns", "found"),
    [
        ({"idx": ["1", "2"], "sentence2": ["a", "b"], "sentence1": ["c", "d"]}, ("sentence1", "sentence2")),
        ({"question": ["a", "b"], "passage": ["c", "d"]}, ("question", "passage")),
        ({"id": ["a", "b"], "Body": ["c", "d"]}, ("Body",)),
        ({"head": ["a", "b"], "tail": ["c", "d"], "more": ["e", "f"]}, ("head", "tail")),
    ],
)
def test_text_columns_are_found(load, write, columns, found):
    write("train.csv", columns | {"labels": [0, 1]})
    assert load(train_file="train.csv").text_columns == found


def test_named_columns(load, write):
    write("train.csv", {"text": ["a", "b"], "note": ["c", "d"], "label": [1, 1], "stars": [10, 9]})
    data = load(train_file="train.csv", text_columns=["note"], label_column="stars")
    assert data.text_columns == ("note",)
    assert data.label_names == ["9", "10"]


def test_labels_of_every_kind(load, write):
    def labels(values, **kwargs):
        write("train.jsonl", {"text": [f"{i}" for i in range(len(values))], "label": values})
        return load(train_file="train.jsonl", **kwargs)

    assert labels([7, 3, 7]).label_names == ["3", "7"]
    assert labels([True, False]).label_names == ["False", "True"]
    floats = labels([0.5, 2.0, 1.25])
    assert (floats.problem_type, floats.label_names, floats.metric) == ("regression", None, "pearson_spearman")
    assert floats.train["label"][:] == [0.5, 2.0, 1.25]
    # Without a task -1 is a class: sentiment is often stored as -1, 0, 1.
    assert labels([-1, 1, 0]).label_names == ["-1", "0", "1"]
    # With one, whole floats are its classes.
    assert labels([0.0, 1.0], task_name="sst2").label_names == ["negative", "positive"]
    assert labels(["Positive", "negative"], task_name="sst2").train["label"][:] == [1, 0]
    assert labels(["yes", "no"], task_name="sst2").label_names == ["no", "yes"]


def test_only_test_data(load, write):
    write("test.csv", {"text": ["a", "b"]})
    data = load(test_file="test.csv", max_predict_samples=1)
    assert data.train is None
    assert data.label_names is None
    assert len(data.test["test"]) == 1


@pytest.mark.parametrize(
    ("columns", "options", "match"),
    [
        ({"label": [0, 1], "n": [1, 2]}, {}, "no text column found: the columns are label, n.*--text_columns"),
        (
            {"text": ["a"], "x": [1]},
            {},
            "'train' has no label column 'label'; its columns are text, x.*--label_column",
        ),
        ({"text": ["a"], "label": [1]}, {"label_column": "y"}, "no label column 'y'; its columns are text, label"),
        ({"text": ["a"], "label": [1]}, {"text_columns": ["z"]}, "'train' has no column 'z', only text, label"),
        ({"text": ["a"], "label": [1]}, {"text_columns": ["label"]}, "'label' cannot be both text and label"),
        ({"text": ["a"], "label": [1]}, {"text_columns": ["text", "text"]}, "--text_columns names 'text' twice"),
        ({"text": ["a", "b"], "label": ["0,5", "1"]}, {}, "labels with a decimal comma, such as '0,5'; write a point"),
        (
            {"text": ["a", "b", "c"], "label": ["0.5", "0.25", "NA"]},
            {},
            r"numbers such as '0.25' for labels, but row 2 \(counted from 0\) has 'NA'",
        ),
        (
            {"text": ["a", "b", "c"], "label": ["0.5", "+1", "-1"]},
            {},
            r"numbers such as '0.5' for labels, but '\+1' is read as text; write it without '\+'",
        ),
        (
            {"text": ["a"], "label": [1]},
            {"problem_type": "ranking"},
            "--problem_type 'ranking' is unknown; choose from",
        ),
        (
            {"sentence": ["a"], "label": [1]},
            {"problem_type": "regression", "task_name": "sst2"},
            "task 'sst2' is single_label_classification; leave --task_name or --problem_type out",
        ),
        ({"text": ["a"], "label": [1]}, {"quoting": "all"}, "--quoting 'all' is unknown; choose from: auto, none"),
        ({"text": ["a"], "label": [1]}, {"text_columns": ["a", "b", "c"]}, "takes one or two columns, but got 3"),
        (
            {"text": ["a", "b", "c"], "label": ["x", None, "y"]},
            {},
            r"1 of 3 rows of split 'train' have no label .*row 1",
        ),
        ({"text": ["a", "b", "c"], "label": [1.5, None, 2]}, {}, r"1 of 3 rows of split 'train' have no label"),
        ({"text": ["a", "b"], "label": ["x", "x"]}, {}, r"'train' has only one class \(x\)"),
        ({"text": ["a", "b"], "label": [0.5, 1]}, {"task_name": "sst2"}, r"has the label 0.5, but this is a classif"),
        ({"sentence": ["a", "b"], "label": [0, 1]}, {"task_name": "rte"}, r"expected sentence1\+sentence2"),
        (
            {"sentence1": ["a", "b"], "sentence2": ["a", "b"], "label": ["x", "y"]},
            {"task_name": "stsb"},
            "labels such as 'x', but this is a regression",
        ),
    ],
)
def test_faults_of_columns_and_labels(load, write, columns, options, match):
    write("train.csv", columns)
    with pytest.raises(InputError, match=match):
        load(train_file="train.csv", **options)


def test_faults_between_files(load, write):
    write("train.csv", {"text": ["a", "b"], "label": ["x", "y"]})
    write("dev.csv", {"text": ["a", "b"], "label": ["q", "z"]})
    with pytest.raises(InputError, match=r"'validation' has labels .*'train': 'q', 'z' \(known: x, y\)"):
        load(train_file="train.csv", validation_file="dev.csv")
    write("dev.csv", {"text": ["a", "b"]})
    with pytest.raises(InputError, match=r"'validation' has no label column 'label', only text; only test data"):
        load(train_file="train.csv", validation_file="dev.csv")
    write("dev.csv", {"body": ["a", "b"], "label": ["x", "y"]})
    with pytest.raises(InputError, match=r"'validation' has no column 'text', only body, label; all splits need"):
        load(train_file="train.csv", validation_file="dev.csv")
    write("dev.json", {"text": ["a"], "label": ["x"]})
    with pytest.raises(InputError, match=r"must have the same format, got .*train.csv \(csv\), .*dev.json \(json\)"):
        load(train_file="train.csv", validation_file="dev.json")
    write("test.csv", {"text": ["a", "b"], "label": ["x", None]})
    with pytest.raises(InputError, match="1 of 2 rows of split 'test' have no label"):
        load(train_file="train.csv", test_file="test.csv")
    write("train.jsonl", {"text": ["a", "b"], "label": [["x"], ["y"]]})
    write("dev.jsonl", {"text": ["a", "b"], "label": ["x", "y"]})
    with pytest.raises(InputError, match=r"of split 'validation' holds .*, but lists in other splits"):
        load(train_file="train.jsonl", validation_file="dev.jsonl")


def test_files_of_one_split_with_other_types(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    folder = tmp_path / "rows"
    folder.mkdir()

    def load(*files):
        for i, rows in enumerate(files):
            text = "".join(json.dumps({"text": "a"} | row) + "\n" for row in rows)
            (folder / f"train-{i}.jsonl").write_text(text)
        return load_data(DataArguments(dataset_name=str(folder)), cache_dir=str(tmp_path / "cache"))

    for lists, single, kind in [([["x"], ["y"]], ["x", "y"], "string"), ([[1], [2]], [1, 2], "int64")]:
        lists, single = [{"label": label} for label in lists], [{"label": label} for label in single]
        for first, second in [(lists, single), (single, lists)]:
            with pytest.raises(InputError, match=f"column 'label' of split 'train' holds .* types: .*{kind} in .*-1"):
                load(first, second)
    mixed = load([{"label": ["x"]}, {"label": ["y"]}], [{"label": [1]}])
    assert mixed.label_names == ["1", "x", "y"]
    other = load([{"label": "x", "tag": [1]}, {"label": "y", "tag": [2], "more": 1}], [{"label": "x", "tag": 3}])
    assert len(other.train) == 3
    assert "column 'tag' is left out: its files hold values of several types" in caplog.text
    assert "column 'more' is left out: file" in caplog.text


def test_files_of_another_format_in_a_folder_are_named(tmp_path, caplog):
    folder = tmp_path / "rows"
    folder.mkdir()
    for name in ("train-1.jsonl", "train-2.jsonl"):
        (folder / name).write_text("".join(json.dumps({"text": "a", "label": label}) + "\n" for label in "xy"))
    for name in ("dev.csv", "train.tsv.gz", "notes.csv"):  # the last one is of no split
        (folder / name).write_text("text,label\na,x\nb,y\n")
    (folder / "validation.jsonl").write_text(json.dumps({"text": "a", "label": "x"}) + "\n")

    def load():
        return load_data(DataArguments(dataset_name=str(folder)), cache_dir=str(tmp_path / "cache"))

    assert len(load().train) == 4
    assert "only json is read, so these files are left out: dev.csv, train.tsv.gz; convert them" in caplog.text
    caplog.clear()
    (folder / "README.md").write_text("---\nconfigs:\n- config_name: default\n  data_files: train-*.jsonl\n---\n")
    assert len(load().train) == 4 and "left out" not in caplog.text


def test_faults_of_files(load, tmp_path):
    (tmp_path / "rows.csv").mkdir()
    for folder in (".", "rows.csv"):
        with pytest.raises(
            InputError, match=r"--train_file .* is a folder; pass a file, or the folder as --dataset_name"
        ):
            load(train_file=folder)
    with pytest.raises(InputError, match=r"--train_file .*train.xlsx: unknown file format '.xlsx'; use .csv, .tsv"):
        load(train_file="train.xlsx")
    with pytest.raises(InputError, match=r"--train_file .*missing.csv: there is no such file"):
        load(train_file="missing.csv")
    (tmp_path / "half.jsonl").write_text('{"text": "a\\ud83d", "label": 0}\n{"text": "b", "label": 1}\n')
    with pytest.raises(InputError, match=r"the text 'a.ud83d' of .*half.jsonl .* holds '.ud83d', half of a character"):
        load(train_file="half.jsonl")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.parquet", b"not parquet"),
        ("a.csv", b""),
        ("a.json", b""),
    ],
)
def test_malformed_files(load, tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(
        InputError, match=rf"cannot read --train_file .*{name} \(\w+.*(check that it|write one object)"
    ):
        load(train_file=name)
    (tmp_path / "a.csv").write_bytes(b"text,label\n")
    with pytest.raises(InputError, match="split 'train' holds no rows"):
        load(train_file="a.csv")
