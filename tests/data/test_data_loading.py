"""Loading data sets: local folders of every form, the Hub's absence, limits, the metric's check."""

import logging
from pathlib import Path

import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Sequence, Value

from hf_ft_ext.arguments import DataArguments
from hf_ft_ext.data import sources
from hf_ft_ext.data.loading import load_data
from hf_ft_ext.data.tasks import TASKS
from hf_ft_ext.errors import InputError


@pytest.fixture
def load(tmp_path):
    def call(**kwargs):
        return load_data(DataArguments(**kwargs), cache_dir=str(tmp_path / "cache"))

    return call


@pytest.fixture
def folder(tmp_path):
    """Write a data set folder: `folder({"train": {"text": [...], "label": [...]}}, names=..., config=...)`."""

    def write(splits, names=None, config=None):
        root = tmp_path / "set"
        where = root / config if config else root
        where.mkdir(parents=True, exist_ok=True)
        for split, columns in splits.items():
            features = None
            if names and "label" in columns:
                features = Features(
                    {c: Value("string") for c in columns if c != "label"} | {"label": ClassLabel(names=names)}
                )
            Dataset.from_dict(columns, features=features).to_parquet(where / f"{split}.parquet")
        if config:
            configs = sorted(path.name for path in root.iterdir() if path.is_dir())
            lines = ["---", "configs:"]
            for name in configs:
                lines += [f"- config_name: {name}", "  data_files:"]
                for path in sorted((root / name).glob("*.parquet")):
                    lines += [f"  - split: {path.stem}", f"    path: {name}/{path.name}"]
            (root / "README.md").write_text("\n".join([*lines, "---", ""]))
        return str(root)

    return write


def rows(labels, column="text"):
    return {column: [f"row {i}" for i in range(len(labels))], "label": labels}


def test_nothing_given_means_the_demo(load):
    data = load()
    assert data.task is TASKS["demo"]
    assert (len(data.train), len(data.validation["validation"])) == (2000, 500)
    assert data.text_columns == ("sentence",)
    assert len(load(max_train_samples=7).train) == 7
    for option in ("train_file", "validation_file", "test_file", "dataset_name"):
        with pytest.raises(InputError, match=f"--{option} is empty; pass a value, or leave it out"):
            load(**{option: ""})


@pytest.mark.parametrize("form", ["{}", "{}-00000-of-00001.parquet", "{}/0000.parquet", "{}.csv"])
def test_mnli_has_two_validation_and_two_unlabelled_test_splits(load, folder, form):
    pair = {"premise": ["a", "b", "c"], "hypothesis": ["d", "e", "f"]}
    splits = {name: {**pair, "label": [0, 1, 2]} for name in ("train", "validation_mismatched", "validation_matched")}
    splits |= {name: {**pair, "label": [-1, -1, -1]} for name in ("test_matched", "test_mismatched")}
    path = folder(splits, list(TASKS["mnli"].label_names), "mnli" if form == "{}" else None)
    for file in Path(path).glob("*.parquet") if form != "{}" else ():  # files whose splits no README.md names
        target = file.parent / form.format(file.stem.replace("validation", "dev") if "csv" in form else file.stem)
        target.parent.mkdir(exist_ok=True)
        if target.suffix == ".csv":
            Dataset.from_parquet(str(file)).to_csv(target)
            file.unlink()
        else:
            file.rename(target)
    data = load(task_name="mnli", dataset_name=path, max_eval_samples=2)
    assert list(data.validation) == ["validation_matched", "validation_mismatched"]
    assert [len(split) for split in data.validation.values()] == [2, 2]
    assert list(data.test) == ["test_matched", "test_mismatched"]
    assert all(split.column_names == ["premise", "hypothesis"] and len(split) == 3 for split in data.test.values())
    assert data.train.column_names == ["premise", "hypothesis", "label"]


@pytest.mark.parametrize("name", ["qnli", "qqp"])
def test_tasks_that_are_only_on_the_hub_load_from_a_folder_of_the_same_form(load, folder, name):
    task = TASKS[name]
    columns = {column: ["a", "b"] for column in task.text_columns[0]} | {"label": [1, 0], "idx": ["0", "1"]}
    path = folder({"train": columns, "validation": columns}, list(task.label_names), name)
    data = load(task_name=name, dataset_name=path)
    assert data.text_columns == task.text_columns[0]
    assert data.train["label"][:] == [1, 0]
    assert data.label_names == list(task.label_names)


def test_hub_copies_differ_in_columns_and_spelling(load, folder):
    coarse = ["NUM", "DESC", "ABBR"]
    splits = {
        "train": {"text": ["a", "b", "c"], "label": [40, 2, 7], "label_coarse_original": coarse},
        "test": {"text": ["d"], "label": [3], "label_coarse_original": ["HUM"]},
    }
    data = load(task_name="trec", dataset_name=folder(splits))
    assert data.label_names == list(TASKS["trec"].label_names)
    assert data.train["label"][:] == [5, 0, 2]
    assert data.test["test"]["label"][:] == [3]


def test_the_tasks_own_hub_copy_is_asked_for(load, monkeypatch):
    asked = []

    def fake(name, config, **kwargs):
        asked.append((name, config))
        features = Features({"text": Value("string"), "label": ClassLabel(names=["neg", "pos"])})
        made = Dataset.from_dict({"text": ["a", "b"], "label": [0, 1]}, features=features)
        return {"train": made, "validation": made, "test": made}

    monkeypatch.setattr(sources, "load_dataset", fake)
    data = load(task_name="mr")
    assert asked == [("cornell-movie-review-data/rotten_tomatoes", None)]
    assert data.label_names == ["negative", "positive"]


def test_a_class_label_in_another_order_takes_the_tasks_order(load, folder):
    path = folder({"train": rows([0, 1]), "test": rows([1])}, ["objective", "subjective"], "subj")
    data = load(task_name="subj", dataset_name=path)
    assert data.label_names == ["subjective", "objective"]
    assert data.train["label"][:] == [1, 0]


@pytest.mark.parametrize("form", ["parquet", "arrow"])
@pytest.mark.parametrize("inner", [False, True])
def test_files_with_other_class_ids_are_refused(load, tmp_path, form, inner):
    made = {}
    for split, names in (("train", ["b", "a", "c"]), ("validation", ["b", "a"]), ("test", ["a", "b"])):
        label = ClassLabel(names=names)
        features = Features({"text": Value("string"), "label": Sequence(label) if inner else label})
        labels = [[0], [1], [0]] if inner else [0, 1, 0]
        made[split] = Dataset.from_dict({"text": ["x", "y", "z"], "label": labels}, features=features)
    for name, splits in (("good", ("train", "validation")), ("bad", tuple(made))):
        (tmp_path / name).mkdir()
        if form == "arrow":
            DatasetDict({split: made[split] for split in splits}).save_to_disk(tmp_path / name)
        for split in splits if form == "parquet" else ():
            made[split].to_parquet(tmp_path / name / f"{split}.parquet")
    assert load(dataset_name=str(tmp_path / "good")).label_names == ["b", "a", "c"]
    with pytest.raises(InputError, match=r"class 0 of column 'label' is 'b' in .*train.*, but 'a' in .*test"):
        load(dataset_name=str(tmp_path / "bad"))


def test_whole_numbers_take_the_tasks_names(load, folder):
    path = folder({"train": rows([0, 4, 2]), "dev": rows([1])})
    data = load(task_name="sst5", dataset_name=path)
    assert data.label_names == list(TASKS["sst5"].label_names)
    assert data.train["label"][:] == [0, 4, 2]
    assert list(data.validation) == ["validation"]  # what datasets makes of dev


def test_unlabelled_rows_are_dropped_with_one_log_line(load, folder, caplog):
    pair = {"premise": ["a", "b", "c", "d"], "hypothesis": ["e", "f", "g", "h"]}
    splits = {"train": {**pair, "label": [0, -1, 2, -1]}, "validation": {**pair, "label": [0, 1, 2, 1]}}
    data = load(task_name="snli", dataset_name=folder(splits, list(TASKS["snli"].label_names)))
    assert data.train["premise"][:] == ["a", "c"]
    assert data.train["label"][:] == [0, 2]
    lines = [record.message for record in caplog.records if "without a label" in record.message]
    assert lines == ["split 'train': dropped 2 of 4 rows without a label"]
    assert data.row_numbers["train", "train"].tolist() == [0, 2]


def test_without_validation_the_labelled_test_split_takes_its_place(load, folder, caplog):
    path = folder({"train": rows([0, 1, 1]), "test": rows([1, 0])}, ["negative", "positive"])
    with caplog.at_level(logging.WARNING):
        data = load(task_name="mr", dataset_name=path, max_eval_samples=1)
    assert len(data.validation["test"]) == 1
    assert len(data.test["test"]) == 2
    assert [r.message for r in caplog.records if "evaluating" in r.message] == [
        "no validation split: evaluating on test"
    ]


def test_no_train_split_is_fine(load, folder):
    data = load(
        task_name="ag_news", dataset_name=folder({"validation": rows([0, 3])}, list(TASKS["ag_news"].label_names))
    )
    assert data.train is None
    assert len(data.label_names) == 4


def test_regression_task(load, folder):
    pair = {"sentence1": ["a", "b"], "sentence2": ["c", "d"]}
    path = folder({"train": {**pair, "label": [3, 5]}, "test": {**pair, "label": [-1.0, -1.0]}})
    data = load(task_name="stsb", dataset_name=path)
    assert data.problem_type == "regression"
    assert data.label_names is None
    assert data.train.features["label"] == Value("float32")
    assert data.test["test"].column_names == ["sentence1", "sentence2"]
    assert data.validation == {}


def test_own_data_set_without_a_task(load, folder):
    path = folder(
        {"train": {"body": ["a", "b"], "label": [0, 1]}, "test": {"body": ["c"], "label": [1]}}, ["ham", "spam"]
    )
    data = load(dataset_name=path)
    assert data.task.name == "set"
    assert data.label_names == ["ham", "spam"]
    assert data.metric == "accuracy"
    assert list(data.validation) == ["test"]


def test_columns_named_like_labels_are_no_text(load, tmp_path):
    lines = "review,labels,score\na film,good,0.5\na plot,bad,0.25\n"
    (tmp_path / "a.csv").write_text(lines)
    (tmp_path / "b.csv").write_text(lines.replace("review", "label"))
    data = load(train_file=str(tmp_path / "a.csv"), label_column="score")
    assert data.text_columns == ("review",) and data.train["label"][:] == [0.5, 0.25]
    with pytest.raises(InputError, match="the text column 'label' needs another name, as labels get this one"):
        load(train_file=str(tmp_path / "b.csv"), label_column="score", text_columns=["label"])


def test_metric_override_is_checked(load, folder):
    path = folder({"train": rows([0, 1])}, ["a", "b"])
    assert load(dataset_name=path, metric="matthews").metric == "matthews"
    with pytest.raises(InputError, match=r"'pearson_spearman' is for regression"):
        load(dataset_name=path, metric="pearson_spearman")
    with pytest.raises(InputError, match="unknown metric 'f2'"):
        load(dataset_name=path, metric="f2")


def test_an_edited_folder_is_read_anew(load, folder):
    assert load(dataset_name=folder({"train": rows(["x", "y"])})).label_names == ["x", "y"]
    assert load(dataset_name=folder({"train": rows(["x", "z"])})).label_names == ["x", "z"]


@pytest.mark.parametrize("labels", [["x", "y"], ["x", "z"]])
def test_an_edited_configuration_is_read_anew(load, folder, labels):
    load(dataset_name=folder({"train": rows(["a", "b"])}, config="c"))
    assert load(dataset_name=folder({"train": rows(labels)}, config="c")).label_names == labels


def test_faults_of_folders(load, folder, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file.csv").write_text("text,label\na,1\n")
    Dataset.from_dict(rows([0, 1])).save_to_disk(tmp_path / "saved")
    with pytest.raises(InputError, match=r"saved using `save_to_disk`.*pass a folder of .*, or a saved DatasetDict"):
        load(dataset_name=str(tmp_path / "saved"))
    path = folder({"train": rows([0, 1])}, ["a", "b"], "one")
    folder({"train": rows([0, 1])}, ["a", "b"], "two")
    with pytest.raises(
        InputError, match=r"has no configuration 'rte'; pass one of these to --dataset_config_name: one, two"
    ):
        load(task_name="rte", dataset_name=path)
    with pytest.raises(InputError, match=r"has no configuration 'three'; pass one of these .*: one, two"):
        load(dataset_name=path, dataset_config_name="three")
    with pytest.raises(InputError, match=r"has several configurations; pass one of these .*: one, two"):
        load(dataset_name=path)
    assert len(load(dataset_name=path, dataset_config_name="two").train) == 2
    with pytest.raises(InputError, match=r"folder '.*/missing' does not exist; check the path"):
        load(dataset_name=str(tmp_path / "missing"))
    with pytest.raises(
        InputError, match=r"cannot read data set folder '.*/empty' \(EmptyDatasetError.*pass a folder of"
    ):
        load(dataset_name=str(tmp_path / "empty"))
    with pytest.raises(InputError, match="is a file; pass it as --train_file"):
        load(dataset_name=str(tmp_path / "file.csv"))
    with pytest.raises(InputError, match="all 2 labels are -1"):
        load(
            task_name="sst2",
            dataset_name=folder({"train": rows([-1, -1], "sentence")}, ["negative", "positive"], "sst2"),
        )


def test_odd_splits(load, folder, monkeypatch):
    monkeypatch.setattr(sources, "load_dataset", lambda *args, **kwargs: {"train": Dataset.from_dict(rows([]))})
    with pytest.raises(InputError, match="split 'train' holds no rows"):
        load(task_name="sst2")
    monkeypatch.undo()
    with pytest.raises(InputError, match=r"none of the splits train, validation and test, only part"):
        load(dataset_name=folder({"part": rows([0, 1])}, config="c"))


@pytest.mark.parametrize("name", ["nyu-mll/glue", "someone/no-such-data-set"])
def test_without_a_network_the_message_says_what_to_pass(load, name):
    with pytest.raises(
        InputError, match=rf"'{name}' is not a local folder, and the Hub cannot be reached .*--dataset_name"
    ):
        load(task_name="sst2", dataset_name=name)


def test_faults_of_the_hub(load, monkeypatch):
    from datasets.exceptions import DatasetNotFoundError

    def missing(*args, **kwargs):
        raise DatasetNotFoundError("Dataset 'a/b' doesn't exist on the Hub or cannot be accessed.")

    def script(*args, **kwargs):
        raise RuntimeError("Dataset scripts are no longer supported, but found b.py")

    monkeypatch.setattr(sources, "get_dataset_config_names", missing)
    with pytest.raises(InputError, match=r"'a/b' is neither a local folder nor found on the Hub.*--token"):
        load(dataset_name="a/b")
    monkeypatch.setattr(sources, "get_dataset_config_names", script)
    with pytest.raises(InputError, match=r"cannot load data set 'a/b' from the Hub \(RuntimeError: Dataset scripts"):
        load(dataset_name="a/b")


def test_contradicting_options(load):
    with pytest.raises(InputError, match=r"both --dataset_name x/y and --train_file are given"):
        load(dataset_name="x/y", train_file="a.csv")
    with pytest.raises(InputError, match=r"--dataset_config_name c applies only to data sets"):
        load(dataset_config_name="c")
    with pytest.raises(InputError, match="task 'demo' makes its own data"):
        load(task_name="demo", train_file="a.csv")
    for option in ("max_train_samples", "max_eval_samples", "max_predict_samples"):
        with pytest.raises(InputError, match=f"--{option} 0 must be 1 or more"):
            load(**{option: 0})


@pytest.mark.parametrize(
    ("root", "name", "train", "validation"),
    [
        ("glue", "cola", 8551, {"validation": 1043}),
        ("glue", "rte", 2490, {"validation": 277}),
        ("glue", "stsb", 5749, {"validation": 1500}),
        ("fewshot", "trec", 5452, {"test": 500}),
        ("fewshot", "snli", None, {"validation": 9842}),
    ],
)
def test_real_data(load, data_root, root, name, train, validation):
    data = load(task_name=name, dataset_name=str(data_root / root))
    assert (data.train and len(data.train)) == train
    assert {split: len(kept) for split, kept in data.validation.items()} == validation
    names = TASKS[name].label_names
    assert data.label_names == (list(names) if names else None)
