"""Several labels per row from every form they are stored in, and what is refused."""

import json

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, Features, Sequence, Value
from tiny import WORDS, tiny_tokenizer

from hf_ft_ext.arguments import DataArguments
from hf_ft_ext.data.loading import load_data
from hf_ft_ext.data.preprocess import tokenize
from hf_ft_ext.errors import InputError

TEXTS = [f"the film was {word}" for word in WORDS[:6]]


def write(path, labels, texts=TEXTS, **columns):
    rows = [
        {"text": text, **({} if labels is None else {"label": label}), **{name: c[i] for name, c in columns.items()}}
        for i, (text, label) in enumerate(zip(texts, labels or texts, strict=False))
    ]
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return str(path)


def matrix(data: Dataset) -> list[list[float]]:
    return data["label"][:]


NAMED = [["b", "a"], ["c"], [], ["a"], ["c", "b"], ["a", "a"]]
VECTORS = [[1, 1, 0], [0, 0, 1], [0, 0, 0], [1, 0, 0], [0, 1, 1], [1, 0, 0]]


@pytest.mark.parametrize(
    "kind",
    [
        "names", "ids", "vectors", "floats", "text", "ids in text", "arrays in text", "vectors in text",
        "sets in text", "classes", "columns", "text columns", "class columns",
    ],
)  # fmt: skip
def test_every_form_gives_the_same_labels(kind, tmp_path):
    ids = [[ord(name) - ord("a") for name in row] for row in NAMED]
    names, path, options = ["a", "b", "c"], tmp_path / "train.jsonl", {}
    if kind == "classes":
        features = Features({"text": Value("string"), "label": Sequence(ClassLabel(names=["a", "b", "c"]))})
        path = tmp_path / "train.parquet"
        Dataset.from_dict({"text": TEXTS, "label": ids}, features=features).to_parquet(path)
    elif kind == "class columns":
        kinds = [ClassLabel(names=["no", "yes"]), ClassLabel(names=["yes", "no"]), ClassLabel(names=["0", "1"])]
        features = Features({"text": Value("string"), **dict(zip(names, kinds, strict=True))})
        columns = {n: [row[i] ^ (i == 1) for row in VECTORS] for i, n in enumerate(names)}  # "no" is id 1 of b
        path = tmp_path / "train.parquet"
        Dataset.from_dict({"text": TEXTS, **columns}, features=features).to_parquet(path)
        options["label_column"] = names
    elif "columns" in kind:
        values = {1: "yes", 0: "no"} if kind == "text columns" else {1: 1, 0: 0}
        write(path, None, **{n: [values[row[i]] for row in VECTORS] for i, n in enumerate(names)})
        options["label_column"] = names
    else:
        floats = [[float(v) for v in row] for row in VECTORS]
        labels = {"names": NAMED, "ids": ids, "vectors": VECTORS, "floats": floats, "text": [str(r) for r in NAMED],
                  "ids in text": [str(row) for row in ids],
                  "arrays in text": [str(np.array(row)) for row in NAMED],
                  "vectors in text": [str(np.array(row)) for row in floats],
                  "sets in text": [str(set(row)) for row in NAMED]}  # fmt: skip
        write(path, labels[kind])
        names = names if kind == "names" or kind.startswith(("text", "arrays", "sets")) else ["0", "1", "2"]
    data = load_data(DataArguments(train_file=str(path), **options), cache_dir=str(tmp_path / "cache"))
    assert (data.label_names, data.problem_type) == (names, "multi_label_classification")
    assert data.metric == ("f1_micro", "f1_macro", "subset_accuracy") and data.text_columns == ("text",)
    assert matrix(data.train) == VECTORS
    args = DataArguments(max_seq_length=16)
    plain = tokenize(data, tiny_tokenizer(), args)
    assert plain.train["labels"][:] == VECTORS
    reversed_order = tokenize(data, tiny_tokenizer(), args, label2id={n.upper(): i for i, n in enumerate(names[::-1])})
    assert reversed_order.label_names == names[::-1]
    assert reversed_order.train["labels"][:] == [row[::-1] for row in VECTORS]
    larger = tokenize(data, tiny_tokenizer(), args, label2id={n: i for i, n in enumerate(["another", *names[::-1]])})
    assert larger.label_names == ["another", *names[::-1]]
    assert larger.train["labels"][:] == [[0, *row[::-1]] for row in VECTORS]


def test_lists_of_single_ids_are_ids(tmp_path):
    path = write(tmp_path / "train.jsonl", [[0], [1], [10], [2], [0], [1]])
    data = load_data(DataArguments(train_file=path), cache_dir=str(tmp_path))
    assert data.label_names == ["0", "1", "2", "10"] and np.sum(matrix(data.train)) == 6
    odd = [["7", "07", "007"], ["+7"], ["0007"], ["1"]]  # equal as numbers; a set has no order of its own
    data = load_data(DataArguments(train_file=write(tmp_path / "odd.jsonl", odd)), cache_dir=str(tmp_path))
    assert data.label_names == ["1", "+7", "0007", "007", "07", "7"]
    wide = [[2**64 + 1], [2**64, 5], [], [5]]  # no int64 holds them
    data = load_data(DataArguments(train_file=write(tmp_path / "wide.jsonl", wide)), cache_dir=str(tmp_path))
    assert data.label_names == ["5", str(2**64), str(2**64 + 1)] and np.sum(matrix(data.train)) == 4


def test_rows_without_labels(tmp_path, caplog):
    train = {"x": [1, 0, -1, 0, 1, 1], "y": [0, 0, -1, 1, 1, 0]}
    options = {
        "train_file": write(tmp_path / "train.jsonl", None, **train),
        "validation_file": write(tmp_path / "dev.jsonl", None, **{k: np.abs(v).tolist() for k, v in train.items()}),
        "label_column": ["x", "y"],
    }
    test = write(tmp_path / "test.jsonl", None, **train)
    data = load_data(DataArguments(**options, test_file=test), cache_dir=str(tmp_path))
    assert len(data.train) == 5 and len(data.validation["validation"]) == 6
    assert len(data.test["test"]) == 6 and "label" not in data.test["test"].column_names  # each row gets a prediction
    assert "dropped 1 of 6 rows" in caplog.text
    bare = write(tmp_path / "bare.jsonl", None)
    data = load_data(DataArguments(**options, test_file=bare), cache_dir=str(tmp_path))
    assert data.test["test"].column_names == ["text"]


def test_labels_of_a_cut_keep_all_names_and_say_what_has_no_rows(tmp_path, caplog):
    train = write(tmp_path / "train.jsonl", None, x=[1, 0, 1, 0, 1, 0], y=[0] * 6)
    data = load_data(DataArguments(train_file=train, label_column=["x", "y"]), cache_dir=str(tmp_path))
    assert data.label_names == ["x", "y"] and "no training row has the label y" in caplog.text


@pytest.mark.parametrize(
    ("labels", "columns", "options", "message"),
    [
        ([["a"]] * 6, {}, {}, r"two labels or more, but there is 1 \(a\)"),
        ([["a"], None, ["b"], ["a"], [], ["b"]], {}, {}, "1 of 6 rows of split 'train' have no label in 'label'"),
        ([["a"], ["b", ""]] * 3, {}, {}, "holds '' in the list of row 1"),
        ([[0.5, 0.2], [0.1, 0.9]] * 3, {}, {}, "holds 0.5 in the list of row 0"),
        (None, {"x": [0, 1, 2, 0, 1, 0], "y": [1] * 6}, {"label_column": ["x", "y"]}, "column 'x'.*holds 2 in row 2"),
        (None, {"x": [0, 1] * 3, "y": [1, -1] * 3}, {"label_column": ["x", "y"]}, "3 of 6 rows.*'y'.*first: row 1"),
        (None, {"x": [0, 1] * 3, "y": [1, None] * 3}, {"label_column": ["x", "y"]}, "have no label in 'y'"),
        (None, {"x": [0, 1] * 3}, {"label_column": ["x", "y"]}, "has no label column 'y', only text, x"),
        (None, {"x": [0, 1] * 3}, {"label_column": ["x", "x"]}, "names 'x' twice"),
        (None, {"x": [0, 1] * 3}, {"label_column": ["x", "text"], "text_columns": ["text"]}, "both text and label"),
        ([["a"], ["b"]] * 3, {}, {"num_k": 1}, "draws rows of each class, but rows with several labels"),
        ([["a"], ["b"]] * 3, {}, {"metric": "matthews"}, "'matthews' is not for multi_label"),
    ],
)
def test_unusable_labels_are_refused(labels, columns, options, message, tmp_path):
    path = write(tmp_path / "train.jsonl", labels, **columns)
    with pytest.raises(InputError, match=message):
        load_data(DataArguments(train_file=path, **options), cache_dir=str(tmp_path))


def test_columns_of_classes_without_an_evident_yes_are_refused(tmp_path):
    kinds = {"x": ClassLabel(names=["ham", "spam"]), "y": ClassLabel(names=["no", "yes"])}
    rows = Dataset.from_dict({"text": TEXTS, "x": [0, 1] * 3, "y": [1, 0] * 3})
    rows.cast(Features({"text": Value("string"), **kinds})).to_parquet(tmp_path / "train.parquet")
    args = DataArguments(train_file=str(tmp_path / "train.parquet"), label_column=["x", "y"])
    with pytest.raises(InputError, match="'x' of split 'train' has the classes ham, spam; with several label columns"):
        load_data(args, cache_dir=str(tmp_path))


def test_labels_that_training_lacks_are_refused(tmp_path):
    train = write(tmp_path / "train.jsonl", NAMED)
    dev = write(tmp_path / "dev.jsonl", [["a"], ["z"], [], ["a"], ["b"], ["c"]])
    with pytest.raises(InputError, match=r"split 'validation' has the label 'z' in row 1.*'train' \(a, b, c\)"):
        load_data(DataArguments(train_file=train, validation_file=dev), cache_dir=str(tmp_path))
