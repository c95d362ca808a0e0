"""What is recorded about the rows of a split: where they come from, how many they are, how they were chosen."""

import hashlib

import pytest
from datasets import ClassLabel, Dataset, Features, Value

from hf_ft_ext.arguments import DataArguments
from hf_ft_ext.data.loading import load_data
from hf_ft_ext.data.origins import content_hash, data_source


@pytest.fixture
def load(tmp_path):
    """`load({split: labels}, ...)`: the splits as own parquet files, loaded; the recorded origins by role and name."""

    def call(splits, data_seed=None, **options):
        files = {}
        for split, labels in splits.items():
            path = tmp_path / f"{split}.parquet"
            Dataset.from_dict({"text": [f"{split} {i}" for i in range(len(labels))], "label": labels}).to_parquet(path)
            files[f"{split}_file"] = str(path)
        data = load_data(DataArguments(**files, **options), cache_dir=str(tmp_path / "cache"), data_seed=data_seed)
        return {key: origin.record() for key, origin in data.origins.items()}

    return call


def shown(records):
    return {key: tuple(r[k] for k in ("split", "rows", "source_rows", "selection")) for key, r in records.items()}


SPLITS = {"train": [0, 1] * 20, "validation": [0, 1] * 5, "test": [0, 1] * 4}


@pytest.mark.parametrize(
    ("options", "train", "validation", "test"),
    [
        ({}, ("train", 40, 40, "all"), ("validation", 10, 10, "all"), ("test", 8, 8, "all")),
        ({"max_train_samples": 9, "max_eval_samples": 5, "max_predict_samples": 80},
         ("train", 9, 40, "first"), ("validation", 5, 10, "first"), ("test", 8, 8, "all")),
    ],
)  # fmt: skip
def test_whole_and_cut_splits(load, options, train, validation, test):
    expected = {("train", "train"): train, ("validation", "validation"): validation, ("test", "test"): test}
    assert shown(load(SPLITS, **options)) == expected


def test_few_shots_are_drawn_from_train_and_the_test_keeps_its_own_name(load):
    records = load(SPLITS, num_k=4, data_seed=21, max_eval_samples=3)
    assert shown(records) == {
        ("train", "train"): ("train", 8, 40, "drawn"),
        ("validation", "dev"): ("train", 3, 40, "drawn"),
        ("test", "test"): ("test", 8, 8, "all"),
    }
    assert records["validation", "dev"]["drawn"] == "4 rows of each class, data_seed 21"
    without_test = {name: labels for name, labels in SPLITS.items() if name != "test"}
    assert shown(load(without_test, num_k=4))["test", "validation"] == ("validation", 10, 10, "all")
    long = {**SPLITS, "test": [0, 1] * 600}
    sample = load(long, max_train_samples=7, sample="stratified", data_seed=5)["train", "train"]
    assert (sample["rows"], sample["selection"], sample["drawn"]) == (7, "drawn", "stratified, data_seed 5")
    drawn = load(long, num_k=4, few_shot_split="k-shot-1k-test")["test", "test"]
    assert (drawn["rows"], drawn["source_rows"], drawn["selection"]) == (1000, 1200, "drawn")


def test_a_validation_that_is_the_test_split_says_so(tmp_path):
    (tmp_path / "data").mkdir()
    for split in ("train", "test"):
        rows = {"text": [f"{split} {i}" for i in range(len(SPLITS[split]))], "label": SPLITS[split]}
        Dataset.from_dict(rows).to_csv(tmp_path / "data" / f"{split}.csv")
    args = DataArguments(dataset_name=str(tmp_path / "data"), max_eval_samples=3)
    data = load_data(args, cache_dir=str(tmp_path / "cache"))
    assert shown({k: o.record() for k, o in data.origins.items()})["validation", "test"] == ("test", 3, 8, "first")
    source = data_source(args, data.task)
    assert source["folder"] == str((tmp_path / "data").resolve()) and source["hub_id"] is None


def test_unlabelled_rows_are_no_part_of_a_split_and_a_stream_has_no_length(load, tmp_path):
    rows = {"text": list("abcdef"), "label": ["x", "y", "x", "y", "x", "y"]}
    path = tmp_path / "s.csv"
    Dataset.from_dict(rows).to_csv(path)
    args = DataArguments(train_file=str(path), validation_file=str(path), streaming=True)
    data = load_data(args, cache_dir=str(tmp_path / "cache"))
    train = data.origins["train", "train"].record()
    assert (train["rows"], train["selection"], train["content"]) == (None, "stream", None)
    assert data.origins["validation", "validation"].rows == 6


def test_content_depends_on_every_cell_and_on_nothing_else(tmp_path):
    def rows(labels=(0, 1), names=("a", "b"), texts=("p", "q")):
        features = Features({"label": ClassLabel(names=list(names)), "text": Value("string")})
        return Dataset.from_dict({"label": list(labels), "text": list(texts)}, features)

    parts = "\0".join(["label", "'a'", "'b'"]), "\0".join(["text", "'p'", "'q'"])
    assert content_hash(rows()) == hashlib.sha256("".join(parts).encode()).hexdigest()[:16]
    same = [rows(labels=(1, 0), names=("b", "a")), rows((0, 1, 1), texts=("p", "q", "x")).select([0, 1])]
    rows().to_parquet(tmp_path / "r.parquet")
    assert {content_hash(r) for r in same} == {content_hash(rows())}
    others = [
        rows((1, 1)),
        rows(texts=("p", "r")),
        rows(texts=("q", "p")),
        rows(names=("a", "c")),
        rows((0,), texts=("p",)),
    ]
    assert len({content_hash(r) for r in (rows(), *others)}) == 1 + len(others)
    assert content_hash(rows().to_iterable_dataset()) is None


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"task_name": "sst2"}, ("nyu-mll/glue", "sst2")),
        ({"task_name": "sst2", "dataset_name": "me/copy"}, ("me/copy", None)),
        ({"task_name": "sst2", "dataset_name": "me/copy", "dataset_config_name": "x"}, ("me/copy", "x")),
        ({"task_name": "sst2", "train_file": "a.csv"}, (None, None)),
        ({"task_name": "demo"}, (None, None)),
    ],
)
def test_sources(options, expected, tmp_path, monkeypatch):
    from hf_ft_ext.data.tasks import get_task

    monkeypatch.chdir(tmp_path)
    source = data_source(DataArguments(**options), get_task(options["task_name"]))
    assert (source["hub_id"], source["config"]) == expected
    file = options.get("train_file")
    assert source["files"] == ({"train_file": str(tmp_path / file)} if file else None)
