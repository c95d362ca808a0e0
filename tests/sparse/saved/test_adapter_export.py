"""A trained adapter exported as LoRA: plain peft gives the same logits, and what a smaller rank leaves out."""

import logging

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from sparse_trainer import INPUTS, logits, structured
from test_families import build, inputs
from tiny import tiny_model
from transformers import AutoModelForSequenceClassification

from hf_ft_ext import InputError, LayerMixtureConfig, SparseGradConfig, export_lora
from hf_ft_ext.adapters.sparse_grad.model import sparse_grad_layers


@pytest.mark.parametrize("model_type", ["bert", "gpt2", "llama"])
def test_exported_as_lora_plain_peft_gives_the_same(tmp_path, model_type):
    make_model = tiny_model if model_type == "bert" else lambda: build(model_type)[0]
    rows = INPUTS if model_type == "bert" else inputs(model_type)
    trainer = structured(tmp_path / "run", make_model())
    trainer.train()
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    assert export_lora(trainer.model, tmp_path / "lora") == 0
    assert all(torch.equal(value, before[name]) for name, value in trainer.model.state_dict().items())
    loaded = PeftModel.from_pretrained(make_model(), tmp_path / "lora").eval()
    assert loaded.peft_config["default"].peft_type == "LORA"
    expected = trainer.model.eval()(**rows).logits
    torch.testing.assert_close(loaded(**rows).logits, expected, rtol=1e-4, atol=1e-5)
    assert (expected - make_model().eval()(**rows).logits).abs().max() > 1e-4


def test_a_mixture_with_other_kinds_is_not_exported_in_part(tmp_path):
    kinds = {"sparse": SparseGradConfig(init="random", init_std=0.1), "lora": LoraConfig(r=2)}
    model = get_peft_model(tiny_model(), LayerMixtureConfig(kinds=kinds, layers={0: "sparse", 1: "lora"}))
    with pytest.raises(
        InputError, match=r"adapter also changes bert\.encoder\.layer\.1\.attention\.self\.query by a Lin"
    ):
        export_lora(model, tmp_path)


def test_a_truncated_export_is_the_best_of_its_rank_and_says_its_error(tmp_path, caplog):
    trainer = structured(tmp_path / "run", learning_rate=0.05)
    trainer.train()
    with caplog.at_level(logging.INFO, logger="hf_ft_ext"):
        error = export_lora(trainer.model, tmp_path / "lora", max_rank=2)
    assert "export_lora: rank 2, relative error at most" in caplog.text
    tensors = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    errors = []
    for name, layer in sparse_grad_layers(trainer.model):
        change = layer.get_delta_weight("default").double()
        a, b = (tensors[f"{name}.lora_{side}.weight"].double() for side in "AB")
        assert len(a) == b.shape[1] == 2
        tail = torch.linalg.svdvals(change)[2:].norm()  # Eckart and Young: no matrix of this rank is nearer
        torch.testing.assert_close((change - b @ a).norm(), tail, rtol=1e-4, atol=1e-7)
        errors.append((tail / change.norm()).item())
    assert error == pytest.approx(max(errors), rel=1e-4) and error > 0.01
    assert logits(PeftModel.from_pretrained(tiny_model(), tmp_path / "lora")).isfinite().all()
    with pytest.raises(InputError, match="max_rank must be 1 or more, got 0"):
        export_lora(trainer.model, tmp_path, max_rank=0)


def test_an_export_makes_no_copy_of_the_model(tmp_path, monkeypatch):
    trainer = structured(tmp_path / "run", num_train_epochs=1)
    trainer.train()
    monkeypatch.setattr(
        type(trainer.model), "__deepcopy__", lambda *_: pytest.fail("the model was copied"), raising=False
    )
    base = trainer.model.get_base_model()
    monkeypatch.setattr(type(base), "__deepcopy__", lambda *_: pytest.fail("the model was copied"), raising=False)
    export_lora(trainer.model, tmp_path / "lora")


def test_a_saved_base_makes_the_folder_load_by_itself(tmp_path):
    tiny_model().save_pretrained(tmp_path / "base")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base")
    trainer = structured(tmp_path / "run", model)
    trainer.train()
    trainer.save_model(tmp_path / "adapter")
    export_lora(trainer.model, tmp_path / "lora")
    for folder in ("adapter", "lora"):
        loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / folder)
        torch.testing.assert_close(logits(loaded), logits(trainer.model), rtol=1e-4, atol=1e-5)
