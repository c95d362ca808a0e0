"""Wrapping with peft: what is saved besides the adapter."""

import pytest
import torch
from classifiers import classifier_rows, tiny_classifier
from other_models import other_batch, other_model
from peft import PeftModel
from tiny import tiny_dataset, tiny_model, tiny_tokenizer

from hf_ft_ext import (
    FisherTrainer,
    FisherTrainingArguments,
    FullTrainer,
    FullTrainingArguments,
    InputError,
    SparseTrainingArguments,
)
from hf_ft_ext.methods import METHODS
from hf_ft_ext.models.peft import wrap_with_peft
from hf_ft_ext.sparse.adapter import add_sparse_grad

SETTINGS = {"target_modules": ["key"], "feedforward_modules": []}


@pytest.mark.parametrize(("asked", "trains"), [(None, True), ([], False), (["pooler"], True)])
def test_untrained_modules_are_always_saved(tmp_path, asked, trains):
    model = tiny_model(seed=1)
    model.fresh_parameters = frozenset(
        name for name, _ in model.named_parameters() if name.startswith(("bert.pooler", "classifier"))
    )
    wrapped = wrap_with_peft(model, "ia3", SETTINGS | ({} if asked is None else {"modules_to_save": asked}), 0).eval()
    trained = {name for name, p in wrapped.named_parameters() if p.requires_grad}
    assert any("pooler" in name for name in trained) == trains
    assert any("classifier" in name for name in trained) and any("ia3" in name for name in trained)
    wrapped.save_pretrained(tmp_path)
    base = tiny_model(seed=1)
    with torch.no_grad():
        for parameter in (*base.bert.pooler.parameters(), *base.classifier.parameters()):
            parameter.normal_()  # another process draws others
    loaded = PeftModel.from_pretrained(base, tmp_path).eval()
    batch = tiny_tokenizer()(["the film was good", "dull"], padding=True, return_tensors="pt")
    with torch.no_grad():
        torch.testing.assert_close(loaded(**batch).logits, wrapped(**batch).logits)


class OverFeatures(torch.nn.BatchNorm1d):
    def forward(self, x):
        return super().forward(x.transpose(1, 2)).transpose(1, 2)


def with_batch_norm():
    model = tiny_model()
    model.bert.encoder.layer[0].output.LayerNorm = OverFeatures(32)
    return model


def prepared(model):
    args = FisherTrainingArguments("unused", fisher_mode="single", fisher_candidates=["lora"])
    trainer = FisherTrainer(model, args, train_dataset=tiny_dataset(2))
    trainer.prepare()
    return trainer.model


@pytest.mark.parametrize(
    "make",
    [
        lambda model: wrap_with_peft(model, "lora", None, 0),
        lambda model: wrap_with_peft(model, "lora", {"modules_to_save": ["classifier"]}, 0),
        lambda model: add_sparse_grad(model, SparseTrainingArguments("unused", sparse_basis="random")),
        prepared,
    ],
)
def test_running_statistics_of_frozen_layers_are_saved(tmp_path, make):
    model = make(with_batch_norm()).train()
    assert not any(p.requires_grad for name, p in model.named_parameters() if ".LayerNorm." in name)
    batch = tiny_tokenizer()(["the film was good", "dull"], padding=True, return_tensors="pt")
    with torch.no_grad():
        model(**batch)
        model.eval().save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(with_batch_norm(), tmp_path).eval()
        assert torch.equal(loaded(**batch).logits, model(**batch).logits)
        assert not torch.equal(loaded(**batch).logits, with_batch_norm().eval()(**batch).logits)


def test_nothing_is_added_where_nothing_came_untrained():
    wrapped = wrap_with_peft(tiny_model(), "ia3", SETTINGS | {"modules_to_save": []}, 0)
    assert set(wrapped.peft_config["default"].modules_to_save) == {"classifier", "score"}


@pytest.mark.parametrize("kind", ["t5", "bart", "deberta", "deberta-v2", "modernbert", "albert", "mpnet"])
def test_prefix_tuning_where_the_model_takes_no_prefix(kind):
    with pytest.raises(InputError, match=r"peft=prefix_tuning does not work with \w+ForSequenceClassification \("):
        wrap_with_peft(tiny_classifier(kind), "prefix_tuning", {"num_virtual_tokens": 3}, 0)


@pytest.mark.parametrize("kind", ["bert", "roberta", "gpt2", "llama"])
def test_prefix_tuning_where_it_does(kind):
    wrapped = wrap_with_peft(tiny_classifier(kind), "prefix_tuning", {"num_virtual_tokens": 3}, 0)
    wrapped(**classifier_rows()).loss.backward()
    assert wrapped.prompt_encoder["default"].embedding.weight.grad.abs().sum() > 0


def test_prefix_tuning_and_gradient_checkpointing(tmp_path):
    args = FullTrainingArguments(str(tmp_path), peft="prefix_tuning", gradient_checkpointing=True, use_cpu=True)
    with pytest.raises(
        InputError, match="passes keys and values to the layers, and gradient_checkpointing drops them"
    ):
        FullTrainer(tiny_model(), args)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("prefix_tuning", r'needs a number of virtual tokens; pass it in peft_config, such as \{"num_virtual_tokens"'),
        ("p_tuning", "needs a number of virtual tokens"),
        ("adalora", "moves ranks between layers by a call after each step"),
    ],
)
def test_methods_that_lack_something(kind, message):
    with pytest.raises(InputError, match=f"peft={kind} {message}"):
        wrap_with_peft(tiny_model(), kind, None, 0)


@pytest.mark.parametrize("kind", ["prompt_tuning", "prefix_tuning", "p_tuning"])
def test_virtual_tokens_are_for_texts(kind):
    with pytest.raises(InputError, match=f"peft={kind} puts virtual tokens in front of texts, and ViTForImageClassi"):
        wrap_with_peft(other_model("vit"), kind, {"num_virtual_tokens": 2}, 0)


def test_a_method_without_a_table_chooses_its_own_targets():
    wrapped = wrap_with_peft(tiny_classifier("llama"), "shadow", None, 0).eval()
    adapted = [
        name.removeprefix("base_model.model.model.") for name, m in wrapped.named_modules() if "shadow_up" in dir(m)
    ]
    assert adapted == ["layers.0", "layers.1"]
    assert wrapped(**classifier_rows()).logits.isfinite().all()
    with pytest.raises(InputError, match="peft=shadow with peft_config=None does not work: Unable to automatically"):
        wrap_with_peft(other_model("wav2vec2"), "shadow", None, 0)


def test_ia3_without_an_entry_in_its_table():
    wrapped = wrap_with_peft(tiny_classifier("mpnet"), "ia3", None, 0)
    config = wrapped.peft_config["default"]
    assert (set(config.target_modules), set(config.feedforward_modules)) == (
        {"k", "v", "output.dense"},
        {"output.dense"},
    )


@pytest.mark.parametrize(("method", "options"), [("lora", {}), ("sparse", {"sparse_basis_steps": 2})])
def test_a_model_whose_first_input_is_sound_trains_and_loads(tmp_path, method, options):
    """peft's class for text to text passes on `input_ids`, which Whisper's forward does not take."""
    batch = {key: v.float() if v.is_floating_point() else v for key, v in other_batch("whisper").items()}
    rows = [{key: value[i] for key, value in batch.items()} for i in range(3)] * 4
    args = METHODS[method].arguments_class()(
        str(tmp_path), report_to="none", use_cpu=True, disable_tqdm=True, max_steps=2, save_strategy="no",
        learning_rate=1e-2, **options,
    )  # fmt: skip
    trainer = METHODS[method].trainer_class()(other_model("whisper").float(), args, train_dataset=rows)
    trainer.train()
    trainer.save_model()
    loaded = PeftModel.from_pretrained(other_model("whisper").float(), tmp_path).eval()
    with torch.no_grad():
        logits = trainer.model.eval()(**batch).logits
        torch.testing.assert_close(loaded(**batch).logits, logits, rtol=1e-5, atol=1e-6)
        assert not torch.allclose(logits, other_model("whisper").float()(**batch).logits, atol=1e-3)
