"""Which splits and configurations of a data set are read, from where, and which of their rows."""

import json
import logging
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, Features, Value, load_dataset

from hf_ft_ext.arguments import DataArguments
from hf_ft_ext.data.few_shot import draw_order
from hf_ft_ext.data.loading import load_data
from hf_ft_ext.errors import InputError

FEATURES = Features({"text": Value("string"), "label": ClassLabel(names=["a", "b", "c"])})


@pytest.fixture
def load(tmp_path):
    def call(data_seed=None, **kwargs):
        return load_data(DataArguments(**kwargs), cache_dir=str(tmp_path / "cache"), data_seed=data_seed)

    return call


def write(folder, **splits):
    """Parquet files of a data set, and a README.md with its splits (a name with "/" is configuration and split)."""
    configs: dict[str, list] = {}
    for name, labels in splits.items():
        config, split = name.split("__") if "__" in name else ("default", name)
        rows = {"text": [f"{name} {i}" for i in range(len(labels))], "label": labels}
        (folder / config).mkdir(parents=True, exist_ok=True)
        Dataset.from_dict(rows, features=FEATURES).to_parquet(folder / config / f"{split}.parquet")
        configs.setdefault(config, []).append({"split": split, "path": f"{config}/{split}.parquet"})
    entries = [{"config_name": name, "data_files": files} for name, files in configs.items()]
    entries[-1]["default"] = True
    (folder / "README.md").write_text("---\nconfigs: " + json.dumps(entries) + "\n---\n")
    return str(folder)


@pytest.mark.parametrize("streaming", [False, True])
def test_several_training_splits_need_a_choice(load, tmp_path, streaming):
    splits = {"train_r1": [0, 1], "train_r2": [2], "dev_r1": [0], "dev_r2": [1], "test_r1": [2]}
    path = write(tmp_path / "anli", **splits)
    with pytest.raises(
        InputError, match=r"several training splits: train_r1, train_r2; pass those .* to --train_split"
    ):
        load(dataset_name=path, streaming=streaming)
    data = load(dataset_name=path, streaming=streaming, train_split=["train_r2", "train_r1"])
    assert [row["text"] for row in data.train] == ["train_r2 0", "train_r1 0", "train_r1 1"]
    assert [row["label"] for row in data.train] == [2, 0, 1]
    assert list(data.validation) == ["dev_r1", "dev_r2"] and list(data.test) == ["test_r1"]
    data = load(dataset_name=path, streaming=streaming, train_split=["dev_r2", "dev_r1"])
    assert [row["text"] for row in data.train] == ["dev_r2 0", "dev_r1 0"]
    data = load(dataset_name=path, streaming=streaming, train_split=["train_r1"], validation_split=["train_r2"])
    assert [row["text"] for row in data.train] == ["train_r1 0", "train_r1 1"]
    assert list(data.validation) == ["train_r2"]
    with pytest.raises(InputError, match="train_r3: the data has no such split; its splits are train_r1, train_r2"):
        load(dataset_name=path, streaming=streaming, train_split=["train_r3"])
    with pytest.raises(InputError, match="'train_r1' is named by --train_split and --test_split; choose one"):
        load(dataset_name=path, streaming=streaming, train_split=["train_r1"], test_split=["train_r1"])


def test_a_split_named_train_is_the_training_split(load, tmp_path):
    data = load(dataset_name=write(tmp_path / "set", train=[0, 1], train_small=[0, 1]))
    assert data.train["text"][:] == ["train 0", "train 1"]
    with pytest.raises(InputError, match="--train_split chooses splits of a data set, and --train_file is a file"):
        load(train_file="x.csv", train_split=["train"])


def test_the_default_configuration_is_taken(load, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    path = write(tmp_path / "set", one__train=[0, 1], two__train=[1, 2])
    assert load(dataset_name=path).train["text"][:] == ["two__train 0", "two__train 1"]
    assert "configuration 'two', the data set's default, of: one, two" in caplog.text
    assert load(dataset_name=path, dataset_config_name="one").train["text"][0] == "one__train 0"
    with pytest.raises(InputError, match=r"has no configuration 'rte'; pass one of these .*: one, two"):
        load(dataset_name=path, task_name="rte")


COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cached(tmp_path):
    """Put data sets into the cache as a download leaves them there: `cached("owner/name", config, labels)`."""

    def call(name, config, labels):
        source = tmp_path / "source.parquet"
        rows = {"text": [f"{config} {i}" for i in range(len(labels))], "label": labels}
        Dataset.from_dict(rows, features=FEATURES).to_parquet(source)
        made = load_dataset("parquet", data_files=str(source), split="train", cache_dir=str(tmp_path / "made"))
        folder = tmp_path / "cache" / name.replace("/", "___") / config / "0.0.0" / COMMIT
        shutil.copytree(Path(made.cache_files[0]["filename"]).parent, folder)
        (folder / "parquet-train.arrow").rename(folder / f"{name.split('/')[1]}-train.arrow")
        info = json.loads((folder / "dataset_info.json").read_text())
        info |= {"config_name": config, "dataset_name": name.split("/")[1]}
        (folder / "dataset_info.json").write_text(json.dumps(info))
        shutil.rmtree(tmp_path / "made")

    return call


def test_a_cached_data_set_loads_without_the_hub(load, cached):
    cached("someone/set", "one", [0, 1])
    assert load(dataset_name="someone/set").train["text"][:] == ["one 0", "one 1"]
    cached("someone/set", "rte", [1, 2])
    assert load(dataset_name="someone/set", dataset_config_name="rte").train["text"][:] == ["rte 0", "rte 1"]
    with pytest.raises(InputError, match=r"multiple 'someone/set' configurations .* one.*--dataset_config_name"):
        load(dataset_name="someone/set")
    with pytest.raises(InputError, match=r"cannot load data set 'someone/set' .*config 'two'"):
        load(dataset_name="someone/set", dataset_config_name="two")
    with pytest.raises(InputError, match="the Hub cannot be reached"):
        load(dataset_name="someone/other")


def test_a_revision_is_never_ignored(load, cached, tmp_path):
    cached("someone/set", "one", [0, 1])
    assert len(load(dataset_name="someone/set", dataset_revision=COMMIT).train) == 2
    with pytest.raises(InputError, match=f"--dataset_revision v2: the Hub cannot .* 'someone/set' of commit {COMMIT}"):
        load(dataset_name="someone/set", dataset_revision="v2")
    with pytest.raises(InputError, match="--dataset_revision v2 is for data sets of the Hub"):
        load(dataset_name=write(tmp_path / "set", train=[0, 1]), dataset_revision="v2")
    with pytest.raises(InputError, match="--dataset_revision v2 applies only to data sets"):
        load(dataset_revision="v2")


def test_every_call_to_the_hub_has_cache_token_and_revision(tmp_path, monkeypatch):
    from hf_ft_ext.data import sources

    asked = []

    def called(name, result):
        def call(*args, cache_dir=None, token=None, revision=None, **kwargs):
            asked.append((name, cache_dir, token, revision))
            return result

        return call

    made = Dataset.from_dict({"text": ["x", "y"], "label": [0, 1]}, features=FEATURES)
    monkeypatch.setattr(sources, "get_dataset_config_names", called("names", ["one", "two"]))
    monkeypatch.setattr(sources, "get_dataset_default_config_name", called("default", "two"))
    monkeypatch.setattr(sources, "dataset_module_factory", called("module", type("Module", (), {"module_path": "x"})))
    monkeypatch.setattr(sources, "load_dataset", called("load", {"train": made}))
    load_data(DataArguments(dataset_name="a/b", dataset_revision="v1"), cache_dir="here", token="secret")
    assert [name for name, *_ in asked] == ["names", "default", "module", "load"]
    assert {rest for _, *rest in map(tuple, asked) for rest in [tuple(rest)]} == {("here", "secret", "v1")}


SORTED = [0] * 60 + [1] * 30 + [2] * 10


def counts(data):
    return dict(sorted(Counter(data["label"][:]).items()))


def test_missing_classes_in_the_first_rows_are_logged(load, tmp_path, caplog):
    path = write(tmp_path / "set", train=SORTED, validation=SORTED)
    data = load(dataset_name=path, max_train_samples=30, max_eval_samples=70)
    assert counts(data.train) == {0: 30} and counts(data.validation["validation"]) == {0: 60, 1: 10}
    lines = [record.message for record in caplog.records if "classes" in record.message]
    assert lines == [
        "--max_train_samples 30: the rows of split 'train' hold 1 of 3 classes, none of: b, c; --sample stratified "
        "draws from all",
        "--max_eval_samples 70: the rows of split 'validation' hold 2 of 3 classes, none of: c; --sample stratified "
        "draws from all",
    ]


def test_stratified_samples_keep_the_shares(load, tmp_path, caplog):
    path = write(tmp_path / "set", train=SORTED, validation=SORTED)
    options = {"dataset_name": path, "sample": "stratified"}
    data = load(**options, max_train_samples=30, max_eval_samples=10)
    assert counts(data.train) == {0: 18, 1: 9, 2: 3} and counts(data.validation["validation"]) == {0: 6, 1: 3, 2: 1}
    order = draw_order(range(100), 13)
    expected = sorted([row for row in order if row < 60][:18] + [row for row in order if 60 <= row < 90][:9]
                      + [row for row in order if row >= 90][:3])  # fmt: skip
    assert data.train["text"][:] == [f"train {row}" for row in expected]
    assert load(**options, max_train_samples=30).train["text"][:] == data.train["text"][:]
    assert load(7, **options, max_train_samples=30).train["text"][:] != data.train["text"][:]
    # Every class keeps a row as long as there are rows for all.
    assert counts(load(**options, max_train_samples=3).train) == {0: 1, 1: 1, 2: 1}
    assert counts(load(**options, max_train_samples=4).train) == {0: 2, 1: 1, 2: 1}
    assert not caplog.records
    load(**options, max_train_samples=2)
    assert "hold 2 of 3 classes, none of: c" in caplog.text
    assert "--sample" not in caplog.text


def test_random_samples_are_drawn_by_the_data_seed(load, tmp_path):
    path = write(tmp_path / "set", train=SORTED)
    data = load(5, dataset_name=path, sample="random", max_train_samples=20)
    assert data.train["text"][:] == [f"train {row}" for row in sorted(draw_order(range(100), 5)[:20])]
    assert len(load(dataset_name=path, sample="random", max_train_samples=200).train) == 100


def test_a_stratified_sample_of_scores_covers_the_scale(load, tmp_path, caplog):
    lines = [json.dumps({"text": str(i), "label": i / 10}) + "\n" for i in range(100)]
    (tmp_path / "t.jsonl").write_text("".join(lines))
    data = load(train_file=str(tmp_path / "t.jsonl"), sample="stratified", max_train_samples=10)
    assert data.train["label"][:] == pytest.approx(np.arange(0.5, 10))
    assert "scores from" not in caplog.text
    load(train_file=str(tmp_path / "t.jsonl"), max_train_samples=10)
    assert "have scores from 0 to 0.9, all rows from 0 to 9.9; --sample stratified draws" in caplog.text


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"sample": "all"}, "--sample 'all' is unknown; choose from: first, random, stratified"),
        ({"sample": "random"}, "--sample random draws the rows of --max_train_samples and --max_eval_samples; pass"),
        ({"sample": "random", "max_train_samples": 5, "streaming": True}, "which a stream does not hold"),
    ],
)
def test_samples_that_cannot_be_drawn(load, options, match):
    with pytest.raises(InputError, match=match):
        load(task_name="demo", **options)


@pytest.mark.parametrize(
    ("labels", "wanted", "kind", "said"),
    [
        ([0.0, 1.0], None, "regression", "written with a decimal point (0.0, 1.0): this is a regression"),
        ([0.5, 1.0], None, "regression", "numbers with decimals: this is a regression"),
        ([0.0, 1.0], "single_label_classification", "single_label_classification", ""),
        ([1, 5, 3], "regression", "regression", ""),
        ([1, 5, 3], None, "single_label_classification", ""),
    ],
)
@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
def test_the_problem_type_is_logged_and_can_be_chosen(load, tmp_path, caplog, labels, wanted, kind, said, suffix):
    caplog.set_level(logging.INFO)
    path = tmp_path / f"t.{suffix}"
    if suffix == "csv":
        path.write_text("text,label\n" + "".join(f"text {i},{label}\n" for i, label in enumerate(labels)))
    else:
        path.write_text("".join(json.dumps({"text": f"{i}", "label": label}) + "\n" for i, label in enumerate(labels)))
    data = load(train_file=str(path), problem_type=wanted)
    assert data.problem_type == kind
    assert said in caplog.text and ("regression" in caplog.text) == bool(said)
    if kind == "regression":
        assert data.train["label"][:] == labels
    else:
        assert data.label_names == [str(int(label)) for label in sorted(labels)]


@pytest.mark.parametrize("labels", [["0,5", "1"], ["1.5", "2.0", "beta"]])
def test_numbers_may_be_names_of_classes(load, tmp_path, labels):
    rows = [json.dumps({"text": str(i), "label": label}) + "\n" for i, label in enumerate(labels)]
    (tmp_path / "t.jsonl").write_text("".join(rows))
    with pytest.raises(InputError, match=r"--problem_type single_label_classification if these are names of classes"):
        load(train_file=str(tmp_path / "t.jsonl"))
    data = load(train_file=str(tmp_path / "t.jsonl"), problem_type="single_label_classification")
    assert data.label_names == labels


def test_labels_that_look_alike_are_said(load, tmp_path, caplog):
    rows = "a,good\nb,good \nc,Good\nd,bad\n"
    (tmp_path / "t.csv").write_text("text,label\n" + rows)
    assert len(load(train_file=str(tmp_path / "t.csv")).label_names) == 4
    assert "differ only in spaces or case" in caplog.text
    (tmp_path / "t.csv").write_text("text,label\na,caf\u00e9\nb,cafe\u0301\nc,caf\u00e9\u200b\n", encoding="utf-8")
    assert len(load(train_file=str(tmp_path / "t.csv")).label_names) == 3
    assert r"labels 'cafe\u0301' and 'caf\xe9' look alike: they are two classes" in caplog.text
    (tmp_path / "t.csv").write_text("text,label\na,0\nb,1\nc,NA\n")
    assert load(train_file=str(tmp_path / "t.csv")).label_names == ["0", "1", "NA"]
    assert "label 'NA' among numbers is taken as a class; remove these rows if it marks missing" in caplog.text
    caplog.clear()
    (tmp_path / "t.csv").write_text("sentence,label\na,negative\nb,Positive\nc,NEGATIVE\n")
    assert load(train_file=str(tmp_path / "t.csv"), task_name="sst2").label_names == ["negative", "positive"]
    assert "two classes" not in caplog.text  # the task's names in any case
