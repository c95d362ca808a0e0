"""Structured support exported as LoRA: plain peft gives the trained model's logits."""

import pytest
import torch
from peft import PeftModel
from sparse_trainer import INPUTS, make
from test_families import build, inputs
from tiny import tiny_model

from hf_ft_ext import InputError, export_lora, sparse_layers


@pytest.mark.parametrize("resumed", [False, True])
@pytest.mark.parametrize("basis", ["hosvd", "none"])
def test_plain_peft_gives_equal_logits(tmp_path, basis, resumed):
    options = {
        "sparse_support": "structured",
        "sparse_basis": basis,
        "sparse_train_rest": "head",
        "save_strategy": "epoch",
    }
    trainer = make(tmp_path / "run", **options)
    trainer.train()
    if resumed:  # the values before training are part of the checkpoint
        trainer = make(tmp_path / "run", **options, num_train_epochs=3)
        trainer.train(resume_from_checkpoint=True)
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    export_lora(trainer.model, tmp_path / "lora")
    assert sparse_layers(trainer.model)
    assert all(torch.equal(value, before[name]) for name, value in trainer.model.state_dict().items())
    trained = trainer.model.eval()(**INPUTS).logits
    adapted = PeftModel.from_pretrained(tiny_model(), tmp_path / "lora").eval()
    torch.testing.assert_close(adapted(**INPUTS).logits, trained, rtol=1e-5, atol=1e-6)
    assert (trained - tiny_model().eval()(**INPUTS).logits).abs().max() > 1e-3
    with adapted.disable_adapter():
        torch.testing.assert_close(adapted(**INPUTS).logits, tiny_model().eval()(**INPUTS).logits)


@pytest.mark.parametrize("model_type", ["gpt2", "llama"])
def test_other_families(tmp_path, model_type):
    model, _ = build(model_type)
    trainer = make(tmp_path / "run", model, sparse_support="structured", sparse_train_rest="head")
    trainer.train()
    export_lora(trainer.model, tmp_path / "lora")
    adapted = PeftModel.from_pretrained(build(model_type)[0], tmp_path / "lora").eval()
    trained = trainer.model.eval()(**inputs(model_type)).logits
    torch.testing.assert_close(adapted(**inputs(model_type)).logits, trained, rtol=1e-4, atol=1e-5)


def test_refusals(tmp_path):
    with pytest.raises(InputError, match="has no converted layers"):
        export_lora(tiny_model(), tmp_path)
    trainer = make(tmp_path, sparse_support="static", sparse_train_rest="head")
    trainer.train()
    with pytest.raises(InputError, match="has no structured support, and only that is of low rank"):
        export_lora(trainer.model, tmp_path)
    trainer = make(tmp_path, sparse_support="structured", sparse_train_rest="head")
    trainer.train()
    trainer.model.bert.encoder.layer[0].scale = torch.nn.Parameter(torch.ones(1))  # as in BEiT
    with pytest.raises(
        InputError, match=r"a parameter of bert\.encoder\.layer\.0 trained, which has converted layers"
    ):
        export_lora(trainer.model, tmp_path)
    trainer = make(tmp_path, sparse_support="structured")
    trainer.train()
    with pytest.raises(InputError, match=r"the bias of .*intermediate\.dense trained.*sparse_train_rest='head'"):
        export_lora(trainer.model, tmp_path)
