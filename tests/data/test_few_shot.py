"""k-shot splits: balanced, disjoint, the same everywhere, and every way in which they cannot be drawn."""

import hashlib
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, Features, Value

from hf_ft_ext.arguments import DataArguments
from hf_ft_ext.data.few_shot import DEFAULT_SEED, draw_order, few_shot_data, label_bounds
from hf_ft_ext.data.loading import load_data
from hf_ft_ext.errors import InputError

NAMES = ("negative", "positive")


def dataset(labels, names=NAMES):
    label = ClassLabel(names=list(names)) if names else Value("float32")
    features = Features({"sentence": Value("string"), "label": label})
    return Dataset.from_dict({"sentence": [f"row {i}" for i in range(len(labels))], "label": labels}, features)


@pytest.fixture
def load(tmp_path):
    """`load({split: labels}, ...)`: the splits as own parquet files, loaded."""

    def call(splits, names=NAMES, data_seed=None, **options):
        files = {}
        for split, labels in splits.items():
            path = tmp_path / f"{split}.parquet"
            dataset(labels, names).to_parquet(path)
            files[f"{split}_file"] = str(path)
        arguments = DataArguments(**files, **options)
        return load_data(arguments, cache_dir=str(tmp_path / "cache"), data_seed=data_seed)

    return call


def texts(rows):
    return rows["sentence"][:]


LABELS = [0, 1, 1, 0, 1] * 20
GOLDEN = [2, 5, 3, 1, 6, 4, 7, 0]


def test_the_order_is_that_of_hashes_written_out():
    plain = sorted(range(50), key=lambda i: hashlib.sha256(b"42 %d" % i).hexdigest())
    assert draw_order(range(50), 42).tolist() == plain
    # On whatever machine and with whatever versions: these numbers are part of the promise.
    assert draw_order(range(8), 13).tolist() == GOLDEN
    assert draw_order(range(8), 21).tolist() != GOLDEN


@pytest.mark.parametrize("task", [None, "cr"])
@pytest.mark.parametrize("test", [[-1, -1, -1], [0, 1, 0]])
def test_a_test_file_that_is_passed_is_the_test_split(load, test, task, caplog):
    data = load({"train": LABELS, "validation": [0, 1], "test": test}, num_k=4, task_name=task)
    assert {name: len(rows) for name, rows in data.test.items()} == {"test": 3}
    assert ("label" in data.test["test"].column_names) is (test[0] == 0)
    assert data.origins["test", "test"].split == "test" and "--validation_file is not used" in caplog.text


def test_rows_are_balanced_disjoint_and_drawn_in_order(load):
    data = load({"train": LABELS, "validation": [0, 1]}, num_k=4)
    assert Counter(data.train["label"][:]) == Counter(data.validation["dev"]["label"][:]) == {0: 4, 1: 4}
    assert not set(texts(data.train)) & set(texts(data.validation["dev"]))
    order = draw_order(range(len(LABELS)), DEFAULT_SEED)
    first = [f"row {i}" for i in order if LABELS[i] == 1]
    assert [t for t, y in zip(texts(data.train), data.train["label"][:], strict=True) if y == 1] == first[:4]
    assert set(first[4:8]) <= set(texts(data.validation["dev"]))
    assert data.train["label"][:] != sorted(data.train["label"][:])  # not class by class


def test_only_the_data_seed_decides(load):
    base = texts(load({"train": LABELS}, num_k=4).train)
    assert texts(load({"train": LABELS}, num_k=4, data_seed=13).train) == base
    seeds = [tuple(texts(load({"train": LABELS}, num_k=4, data_seed=seed).train)) for seed in (13, 21, 42, 87, 100)]
    assert len(set(seeds)) == 5
    larger = texts(load({"train": LABELS}, num_k=8).train)
    assert set(base) < set(larger)  # more shots contain the fewer


def test_ten_times_as_many_to_evaluate_on(load):
    data = load({"train": LABELS}, num_k=2, few_shot_split="k-shot-10x")
    assert Counter(data.train["label"][:]) == {0: 2, 1: 2}
    assert Counter(data.validation["dev"]["label"][:]) == {0: 20, 1: 20}


def test_the_test_is_what_was_labelled(load):
    splits = {"train": LABELS, "validation": [0, 1, 1], "test": [1] * 5}
    assert len(load(splits, num_k=2).test["test"]) == 5
    assert texts(load({"train": LABELS, "validation": [0, 1, 1]}, num_k=2).test["validation"]) == [
        "row 0", "row 1", "row 2",
    ]  # fmt: skip


def test_glue_is_tested_on_its_validation_split(load, caplog):
    data = load({"train": LABELS, "validation": [0, 1, 1], "test": [1] * 5}, num_k=2, task_name="sst2")
    assert list(data.test) == ["validation"] and len(data.test["validation"]) == 3
    assert "--test_file is not used: with --num_k, GLUE tasks are tested on their validation split" in caplog.text


def test_a_thousand_test_rows_are_the_same_for_every_data_seed(load):
    splits = {"train": LABELS, "test": [0, 1] * 600}
    cut = [load(splits, num_k=2, data_seed=seed, few_shot_split="k-shot-1k-test") for seed in (13, 21)]
    assert len(cut[0].test["test"]) == 1000 and texts(cut[0].test["test"]) == texts(cut[1].test["test"])
    numbers = [int(text.removeprefix("row ")) for text in texts(cut[0].test["test"])]
    assert numbers == sorted(numbers) and numbers[-1] >= 1000  # drawn from all rows, in the order of the file
    assert cut[0].row_numbers["test", "test"].tolist() == numbers


def test_fewer_than_a_thousand_test_rows_keep_their_order(load):
    splits, options = {"train": LABELS, "test": [0, 1] * 20}, {"num_k": 2, "few_shot_split": "k-shot-1k-test"}
    rows = [f"row {i}" for i in range(40)]
    assert texts(load(splits, **options).test["test"]) == rows
    some = texts(load(splits, **options, max_predict_samples=10).test["test"])  # drawn from all, not the first ones
    assert len(some) == 10 and some == [row for row in rows if row in some] != rows[:10]


def test_a_regression_is_drawn_from_both_halves_of_its_scale(load):
    scores = [i / 20 for i in range(100)]
    data = load({"train": scores}, names=None, num_k=8)
    for rows in (data.train, data.validation["dev"]):
        assert len(rows) == 16 and sum(score < 4.95 / 2 for score in rows["label"][:]) == 8
    task = load({"train": [*scores, 5.0]}, names=None, num_k=8, task_name="stsb", text_columns=["sentence"])
    assert sum(score < 2.5 for score in task.train["label"][:]) == 8


def test_small_classes_give_what_they_have_if_allowed(load, caplog):
    labels = [0] * 10 + [1] * 30
    data = load({"train": labels}, num_k=8, allow_small_classes=True)
    assert Counter(data.train["label"][:]) == {0: 8, 1: 8} and Counter(data.validation["dev"]["label"][:]) == {
        0: 2,
        1: 8,
    }
    assert "class 'negative' has only 10 rows" in caplog.text


def test_cuts_come_after_the_draw(load):
    data = load({"train": LABELS, "test": [0, 1] * 9}, num_k=4, max_eval_samples=3, max_predict_samples=2)
    assert (len(data.train), len(data.validation["dev"]), len(data.test["test"])) == (8, 3, 2)


@pytest.mark.parametrize(
    ("splits", "options", "message"),
    [
        ({"train": LABELS}, {"num_k": 0}, "num_k=0 is out of range; pass 1 or more"),
        ({"train": LABELS}, {"num_k": 50}, r"num_k=50 is more than the 40 rows of class 'negative'; pass --num_k 20"),
        ({"train": LABELS}, {"num_k": 30}, r"needs 60 rows of each class \(30 to .*'negative' has 40"),
        ({"train": [0] * 9}, {"num_k": 3, "task_name": "sst2"}, "the 0 rows of class 'positive'; add rows to it"),
        ({"validation": LABELS}, {"num_k": 2}, "drawn from a training split, and .* has none here; pass one"),
        ({"train": LABELS}, {"num_k": 2, "max_train_samples": 5}, "--num_k 2 and --max_train_samples 5 both choose"),
        ({"train": LABELS}, {"few_shot_split": "k-shot-10x"}, "--few_shot_split is for few-shot .* pass --num_k"),
        ({"train": LABELS}, {"allow_small_classes": True}, "--allow_small_classes is for few-shot splits"),
    ],
)  # fmt: skip
def test_bad_input(load, splits, options, message):
    with pytest.raises(InputError, match=message):
        load(splits, **options)


def test_a_constant_scale_and_an_unknown_split(load):
    with pytest.raises(InputError, match="all labels of 'train' are 1, so the scale has no length"):
        load({"train": [1.0] * 9}, names=None, num_k=2)
    data = load({"train": LABELS})
    with pytest.raises(InputError, match="few_shot_split='all' is unknown; choose from: k-shot, k-shot-10x"):
        few_shot_data(data, 2, split="all")


def test_rows_without_labels_and_streams_are_refused(load):
    data = load({"train": LABELS})
    unlabelled = replace(data, train=data.train.remove_columns("label"), label_names=None)
    with pytest.raises(InputError, match=r"num_k=2 draws rows of each class, .* 'train' have no column 'label'; pass"):
        few_shot_data(unlabelled, 2)
    with pytest.raises(InputError, match="the classes of 'train' have no names; pass data with label_names"):
        few_shot_data(replace(data, label_names=None), 2)
    with pytest.raises(InputError, match="num_k=2 draws from all training rows, which a stream does not hold; load"):
        few_shot_data(replace(data, train=data.train.to_iterable_dataset()), 2)
    scores = load({"train": [i / 20 for i in range(40)]}, names=None)
    assert label_bounds(scores) == (0.0, np.float32(1.95))
    with pytest.raises(InputError, match=r"the scale of 'train' is unknown: .* leave --streaming out"):
        label_bounds(replace(scores, train=scores.train.to_iterable_dataset()))


@pytest.mark.parametrize("task", ["cr", "mpqa"])
def test_tasks_that_spell_their_labels_out(tmp_path, task):
    """The form that cr and mpqa have on the Hub, in a folder."""
    names = ["negative", "positive"]
    for split, count in (("train", 40), ("test", 9)):
        labels = [i % 2 for i in range(count)]
        columns = {"text": [f"row {i}" for i in range(count)], "label": labels}
        Dataset.from_dict({**columns, "label_text": [names[i] for i in labels]}).to_json(tmp_path / f"{split}.jsonl")
    data = load_data(DataArguments(dataset_name=str(tmp_path), task_name=task, num_k=8), cache_dir=str(tmp_path / "c"))
    assert Counter(data.train["label"][:]) == {0: 8, 1: 8} and data.label_names == names
    assert (len(data.validation["dev"]), len(data.test["test"])) == (16, 9)


@pytest.mark.slow
def test_real_tasks_draw_balanced_shots(data_root, tmp_path):
    for folder, task, classes in (("glue", "sst2", 2), ("fewshot", "trec", 6), ("glue", "stsb", 2)):
        arguments = DataArguments(dataset_name=str(data_root / folder), task_name=task, num_k=16)
        data = load_data(arguments, cache_dir=str(tmp_path))
        assert len(data.train) == len(data.validation["dev"]) == 16 * classes and data.test
