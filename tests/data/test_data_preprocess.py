"""Tokenising: lengths, padding, presets of tokenizer files, label order, missing text."""

import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Value
from tiny import text_dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    DataCollatorWithPadding,
    PreTrainedTokenizerFast,
)

from hf_ft_ext.arguments import DataArguments
from hf_ft_ext.data.loading import load_data
from hf_ft_ext.data.preprocess import tokenize
from hf_ft_ext.data.task_data import TaskData
from hf_ft_ext.data.tasks import TASKS
from hf_ft_ext.errors import InputError


def task_data(train, names=("no", "yes"), columns=("sentence",), problem_type="single_label_classification", **splits):
    return TaskData(
        task=TASKS["demo"],
        train=train,
        validation=splits.get("validation", {}),
        test=splits.get("test", {}),
        label_names=list(names) if names else None,
        problem_type=problem_type,
        metric="accuracy",
        text_columns=columns,
    )


def arguments(**kwargs):
    return DataArguments(**{"max_seq_length": 16} | kwargs)


def texts(*rows, labels=None, names=("no", "yes")):
    features = {"sentence": Value("string")} | ({"label": ClassLabel(names=list(names))} if labels else {})
    columns = {"sentence": list(rows)} | ({"label": labels} if labels else {})
    return Dataset.from_dict(columns, features=Features(features))


def test_columns_types_and_unlabelled_test(tokenizer):
    data = task_data(
        text_dataset(6).remove_columns("idx"),
        validation={"validation": text_dataset(4)},
        test={"test": texts("a good film")},
    )
    result = tokenize(data, tokenizer, arguments())
    inputs = set(tokenizer("a"))
    assert set(result.train.column_names) == inputs | {"labels"}
    assert set(result.validation["validation"].column_names) == inputs | {"labels"}
    assert set(result.test["test"].column_names) == inputs
    assert result.train["labels"][:] == data.train["label"][:]
    assert result.train.features["labels"] == Value("int64")
    assert data.train.column_names == ["sentence", "label"]  # the raw data stays as it was
    expected = tokenizer(data.train["sentence"][0])["input_ids"]
    assert result.train[0]["input_ids"] == expected
    batch = DataCollatorWithPadding(tokenizer)([result.train[i] for i in range(3)])
    assert batch["labels"].tolist() == data.train["label"][:3]


def test_truncation_and_padding(tokenizer):
    data = task_data(texts("a", "a good film and a good plot", labels=[0, 1]))
    short = tokenize(data, tokenizer, arguments(max_seq_length=5)).train
    assert [len(ids) for ids in short["input_ids"]] == [3, 5]
    padded = tokenize(data, tokenizer, arguments(max_seq_length=12, pad_to_max_length=True)).train
    assert [len(ids) for ids in padded["input_ids"]] == [12, 12]
    assert [sum(mask) for mask in padded["attention_mask"]] == [3, 9]


def test_pairs_pass_both_texts(tokenizer):
    data = task_data(text_dataset(4, pair=True), columns=("sentence1", "sentence2"))
    row = tokenize(data, tokenizer, arguments(max_seq_length=32)).train[0]
    assert row["input_ids"] == tokenizer(data.train[0]["sentence1"], data.train[0]["sentence2"])["input_ids"]
    assert row["input_ids"].count(tokenizer.sep_token_id) == 2


def test_presets_of_a_tokenizer_file_have_no_effect(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    backend = PreTrainedTokenizerFast.from_pretrained(tmp_path).backend_tokenizer
    backend.enable_truncation(max_length=4)
    backend.enable_padding(length=8, pad_token="[PAD]")
    backend.save(str(tmp_path / "tokenizer.json"))
    preset = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    assert preset.backend_tokenizer.truncation is not None
    assert preset.backend_tokenizer.padding is not None
    data = task_data(texts("a", "a good film and a good plot", labels=[0, 1]))
    plain = tokenize(data, tokenizer, arguments()).train
    assert tokenize(data, preset, arguments()).train[:] == plain[:]
    assert [len(ids) for ids in plain["input_ids"]] == [3, 9]


def test_labels_take_the_models_order_if_the_names_agree(tokenizer):
    data = task_data(texts("a", "film", "plot", labels=[0, 1, 2], names=["x", "Y", "z"]), names=["x", "Y", "z"])
    result = tokenize(data, tokenizer, arguments(), label2id={"Z": 0, "X": 1, "y": 2})
    assert result.train["labels"][:] == [1, 2, 0]
    assert result.label_names == ["z", "x", "Y"]
    for other in ({"LABEL_0": 0, "LABEL_1": 1, "LABEL_2": 2}, {"x": 1, "y": 0}, {"x": 0, "y": 2, "z": 4}, None):
        result = tokenize(data, tokenizer, arguments(), label2id=other)
        assert (result.train["labels"][:], result.label_names) == ([0, 1, 2], ["x", "Y", "z"])
    more = tokenize(data, tokenizer, arguments(), label2id={"Z": 0, "W": 1, "X": 2, "y": 3})
    assert (more.train["labels"][:], more.label_names) == ([2, 3, 0], ["z", "W", "x", "Y"])


def test_regression_labels_are_float32(tokenizer):
    rows = Dataset.from_dict(
        {"sentence": ["a", "film"], "label": [0.5, 3.0]},
        features=Features({"sentence": Value("string"), "label": Value("float32")}),
    )
    data = task_data(rows, names=None, problem_type="regression")
    result = tokenize(data, tokenizer, arguments(), label2id={"LABEL_0": 0})
    assert result.train.features["labels"] == Value("float32")
    assert result.train["labels"][:] == [0.5, 3.0]
    assert result.label_names is None


def test_length_limits(tokenizer):
    data = task_data(texts("a", labels=[0]))
    with pytest.raises(
        InputError, match=r"--max_seq_length 65 is more than the tokenizer can take \(64 tokens\); pass .* 64"
    ):
        tokenize(data, tokenizer, arguments(max_seq_length=65))
    with pytest.raises(
        InputError, match=r"--max_seq_length 65 is more than the model can take \(32 tokens\); pass .* 32"
    ):
        tokenize(data, tokenizer, arguments(max_seq_length=65), model_max_length=32)
    with pytest.raises(InputError, match="--max_seq_length 2 leaves no room for text; pass 3 or more"):
        tokenize(data, tokenizer, arguments(max_seq_length=2))
    assert len(tokenize(data, tokenizer, arguments(max_seq_length=64), model_max_length=64).train) == 1


def test_the_default_length_is_the_models_where_that_is_less(tokenizer, caplog):
    caplog.set_level("INFO", logger="hf_ft_ext")
    data = task_data(texts("a " * 100, labels=[0]))
    rows = tokenize(data, tokenizer, arguments(max_seq_length=None), model_max_length=32).train
    assert len(rows["input_ids"][0]) == 32
    assert "cut to 32 tokens, as many as the model can take (--max_seq_length)" in caplog.text


def test_missing_text_names_the_row(tokenizer):
    rows = Dataset.from_dict({"sentence": ["a", None], "label": [0, 1]})
    with pytest.raises(InputError, match="column 'sentence' of split 'train' has no text in row 1"):
        tokenize(task_data(rows), tokenizer, arguments())


def test_padding_needs_a_token(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    bare = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    bare.pad_token = None
    with pytest.raises(InputError, match="--pad_to_max_length needs a padding token"):
        tokenize(task_data(texts("a", labels=[0])), bare, arguments(pad_to_max_length=True))


def test_demo_from_end_to_end(tokenizer):
    data_args = arguments(max_train_samples=20, max_eval_samples=10)
    result = tokenize(load_data(data_args), tokenizer, data_args)
    assert len(result.train) == 20
    assert sum(result.train["labels"][:]) == 10
    assert all(len(ids) <= 16 for ids in result.train["input_ids"])


@pytest.fixture(scope="module")
def bare_tokenizer():
    """GPT-2's kind: no token is added to a text."""
    words = {"<end>": 0, "a": 1, "good": 2, "film": 3}
    backend = Tokenizer(models.WordLevel(words, unk_token="<end>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>", pad_token="<end>")


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("side", ["right", "left"])
def test_a_text_without_tokens_is_given_one(bare_tokenizer, caplog, padded, side):
    bare_tokenizer.padding_side = side
    options = arguments(pad_to_max_length=padded, max_seq_length=3)
    data = tokenize(task_data(texts("", " ", "a film", labels=[0, 1, 0])), bare_tokenizer, options)
    attended = [[i for i, m in zip(row["input_ids"], row["attention_mask"], strict=True) if m] for row in data.train]
    assert attended == [[0], [0], [1, 3]]
    assert [len(row) for row in data.train["input_ids"]] == ([3, 3, 3] if padded else [1, 1, 2])
    lines = [record.message for record in caplog.records if "without tokens" in record.message]
    assert lines == ["split 'train': texts without tokens, such as row 0, are given the tokenizer's eos_token"]


def test_a_batch_of_empty_texts_goes_through_the_model(bare_tokenizer):
    data = tokenize(task_data(texts("", "", labels=[0, 1])), bare_tokenizer, arguments())
    config = AutoConfig.for_model("gpt2", vocab_size=4, n_positions=8, n_embd=8, n_layer=1, n_head=1, pad_token_id=0)
    model = AutoModelForSequenceClassification.from_config(config)
    batch = DataCollatorWithPadding(bare_tokenizer)([data.train[i] for i in range(2)])
    assert torch.isfinite(model(**batch).logits).all()


def test_a_text_without_tokens_and_no_token_for_it(bare_tokenizer):
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bare_tokenizer.backend_tokenizer)
    with pytest.raises(InputError, match=r"row 1 of split 'train' .* has no tokens.*fill or remove the row"):
        tokenize(task_data(texts("a", "", labels=[0, 1])), tokenizer, arguments())
