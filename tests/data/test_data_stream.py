"""A training split read as a stream: the same rows as when it is loaded, unusable ones skipped, the rest checked."""

import json
import logging

import pytest
from datasets import ClassLabel, Dataset, Features, IterableDataset, Value

from hf_ft_ext.arguments import DataArguments
from hf_ft_ext.data import loading
from hf_ft_ext.data.loading import load_data
from hf_ft_ext.data.stream import usable_rows
from hf_ft_ext.errors import InputError

FEATURES = Features({"sentence": Value("string"), "label": ClassLabel(names=["negative", "positive"])})


@pytest.fixture
def load(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(loading, "CHECKED", 4)

    def call(**kwargs):
        return load_data(DataArguments(**kwargs), cache_dir=str(tmp_path / "cache"))

    return call


def write(folder, **splits):
    folder.mkdir()
    for name, labels in splits.items():
        rows = {"sentence": [f"{name} {i}" for i in range(len(labels))], "label": labels}
        Dataset.from_dict(rows, features=FEATURES).to_parquet(folder / f"{name}.parquet")


def jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def rows_of(stream):
    return [tuple(row.values()) for row in stream]


@pytest.mark.parametrize("task", ["sst2", None])
def test_the_rows_are_those_of_the_loaded_split(load, tmp_path, task):
    write(tmp_path / "set", train=[0, 1] * 300, validation=[1, 0, 0], test=[-1, -1])
    plain = load(dataset_name="set", task_name=task)
    data = load(dataset_name="set", task_name=task, streaming=True)
    assert isinstance(data.train, IterableDataset) and data.train.features == plain.train.features
    assert rows_of(data.train) == rows_of(plain.train)
    assert rows_of(data.validation["validation"]) == rows_of(plain.validation["validation"])
    assert data.test["test"].column_names == plain.test["test"].column_names == ["sentence"]
    assert data.label_names == plain.label_names == ["negative", "positive"]
    assert (data.metric, data.problem_type) == (plain.metric, plain.problem_type)
    assert len(rows_of(load(dataset_name="set", task_name=task, streaming=True, max_train_samples=5).train)) == 5


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "tsv"])
def test_own_files(load, tmp_path, suffix):
    rows = [{"text": f"row {i}", "label": "bad good fine".split()[i % 3]} for i in range(9)]
    if suffix == "jsonl":
        jsonl(tmp_path / "t.jsonl", rows)
    else:
        Dataset.from_list(rows).to_csv(tmp_path / f"t.{suffix}", sep="," if suffix == "csv" else "\t")
    plain, data = (load(train_file=f"t.{suffix}", streaming=streaming) for streaming in (False, True))
    assert data.label_names == plain.label_names == ["bad", "fine", "good"]
    assert rows_of(data.train) == rows_of(plain.train)


def test_scores(load, tmp_path):
    jsonl(tmp_path / "t.jsonl", [{"text": "a", "label": i / 2} for i in range(6)] + [{"text": "b", "label": None}])
    data = load(train_file="t.jsonl", streaming=True)
    assert data.problem_type == "regression" and [label for _, label in rows_of(data.train)] == [
        0,
        0.5,
        1,
        1.5,
        2,
        2.5,
    ]


def test_the_demo_streams(load):
    assert rows_of(load(task_name="demo", streaming=True).train) == rows_of(load(task_name="demo").train)


def test_unusable_rows_are_skipped_and_counted(load, tmp_path, caplog):
    rows = [{"text": f"row {i}", "label": "ab"[i % 2]} for i in range(6)]
    later = [("x", None), ("x", "c"), (None, "a"), ("x", " "), ("last", "a")]
    jsonl(tmp_path / "t.jsonl", rows + [{"text": text, "label": label} for text, label in later])
    data = load(train_file="t.jsonl", streaming=True)
    with caplog.at_level(logging.WARNING):
        assert [text for text, _ in rows_of(data.train)] == [f"row {i}" for i in range(6)] + ["last"]
    assert "4 rows so far lack a text or a label among a, b; they are skipped" in caplog.text


@pytest.mark.parametrize(
    ("stored", "names", "labels", "found"),
    [
        (Value("int64"), ["0", "1"], [0, 1.0, 0.5, float("nan"), "1", True, 2, -1, None], [0, 1]),
        (Value("int64"), ["-1", "1"], [-1, 1, 0], [0, 1]),
        (Value("string"), ["a", "b"], ["b", 1, None, "", "c", "a"], [1, 0]),
        (Value("bool"), ["False", "True"], [True, False, 1, "True"], [1, 0]),
        (ClassLabel(names=["a", "b"]), ["a", "b"], [1, -1, None, 0], [1, 0]),
        (Value("float64"), None, [0.5, 2, float("inf"), None, "3"], [0.5, 2.0]),
    ],
)
def test_labels_whose_type_changes_in_the_stream(stored, names, labels, found):
    stream = IterableDataset.from_generator(lambda: ({"text": "a", "label": label} for label in labels))
    feature = ClassLabel(names=names) if names else Value("float32")
    rows = usable_rows(stream, ["text"], "label", stored, feature, None)
    assert [row["label"] for row in rows] == found


def test_labels_that_only_validation_shows_are_known(load, tmp_path):
    jsonl(tmp_path / "t.jsonl", [{"text": f"row {i}", "label": "aaaaab"[i]} for i in range(6)])
    jsonl(tmp_path / "v.jsonl", [{"text": "row", "label": label} for label in "ab"])
    data = load(train_file="t.jsonl", validation_file="v.jsonl", streaming=True)
    assert [label for _, label in rows_of(data.train)] == [0] * 5 + [1]


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        ([], {}, "holds no rows|cannot read"),
        ([{"text": "a", "label": None}], {}, r"1 of 1 rows of split 'train \(its first 4 rows\)' have no label"),
        ([{"text": "a", "label": "x"}], {}, "has only one class"),
        ([{"text": "a", "score": 1}], {}, "has no label column 'label'"),
        ([{"text": 3, "label": "x"}], {"text_columns": ["text"]}, "not text"),
        ([{"text": "a", "label": [1]}], {}, "--streaming needs one label per row"),
    ],
)
def test_the_first_rows_are_checked(load, tmp_path, rows, options, message):
    jsonl(tmp_path / "t.jsonl", rows)
    with pytest.raises(InputError, match=message):
        load(train_file="t.jsonl", streaming=True, **options)


def test_a_damaged_file(load, tmp_path):
    (tmp_path / "t.jsonl").write_text("{not json\n")
    with pytest.raises(
        InputError, match=r"cannot read --train_file t.jsonl \(line 1: Expecting property name.*write one object"
    ):
        load(train_file="t.jsonl", streaming=True)


def test_no_training_split(load, tmp_path):
    write(tmp_path / "set", validation=[0, 1])
    with pytest.raises(InputError, match="--streaming reads the training split, and the data has none"):
        load(dataset_name="set", streaming=True)


def test_few_shot_splits_are_refused(load):
    with pytest.raises(InputError, match="--num_k 16 draws from all training rows"):
        load(task_name="demo", streaming=True, num_k=16)
