"""Configurations that ask a model for more than logits: every trainer works, and says what it switched off."""

import pytest
import torch
from tiny import tiny_dataset, tiny_masked_lm, tiny_model, tiny_tokenizer

import hf_ft_ext
from hf_ft_ext import PromptForSequenceClassification

FLAGS = {"output_attentions": True, "output_hidden_states": True, "return_dict": False}
TRAINERS = {
    "Full": {"max_steps": 1},
    "Lora": {"max_steps": 1},
    "Sparse": {"max_steps": 1, "sparse_basis_steps": 1},
    "Fisher": {"max_steps": 1, "fisher_examples": 4},
    "Gradientless": {"max_steps": 1},
    "LinearHead": {"linearhead_folds": 2},
    "Kernel": {},
}


def asking():
    """A model whose configuration asks for all that training has no use for."""
    model = tiny_model(attn_implementation="eager")
    for name, value in FLAGS.items():
        setattr(model.config, name, value)
    return model


@pytest.mark.parametrize(
    ("name", "way"),
    [
        *((name, "model") for name in TRAINERS),
        ("Full", "model_init"),
        ("Fisher", "model_init"),
        ("Kernel", "model_init"),
    ],
)
def test_models_give_logits_and_no_more(tmp_path, caplog, name, way):
    caplog.set_level("INFO", logger="hf_ft_ext")
    arguments = getattr(hf_ft_ext, f"{name}TrainingArguments")(
        str(tmp_path), use_cpu=True, disable_tqdm=True, report_to="none", dataloader_pin_memory=False, **TRAINERS[name]
    )
    source = {"model": asking()} if way == "model" else {"model_init": asking}
    data = tiny_dataset(16)
    trainer = getattr(hf_ft_ext, f"{name}Trainer")(
        args=arguments, train_dataset=data, eval_dataset=data, processing_class=tiny_tokenizer(), **source
    )
    trainer.train()
    assert trainer.predict(data).predictions.shape == (16, 2)
    assert "output_attentions=False, output_hidden_states=False, return_dict=True" in caplog.text
    trainer.save_model()
    config = trainer.model.config
    assert not config.output_attentions and not config.output_hidden_states and config.return_dict


def test_configurations_inside_a_model_count_too(tmp_path):
    model = PromptForSequenceClassification.from_masked_lm(
        tiny_masked_lm(), tiny_tokenizer(), "*cls**sent_0*_it_was*mask**sep+*", ["bad", "good"]
    )
    inner = model.masked_lm.config
    inner._attn_implementation = "eager"  # the only one that gives attention weights
    inner.output_attentions = inner.output_hidden_states = True
    arguments = hf_ft_ext.FullTrainingArguments(str(tmp_path), use_cpu=True, report_to="none")
    trainer = hf_ft_ext.FullTrainer(model, arguments)
    for config in (inner, trainer.model.config.masked_lm):
        assert not config.output_attentions and not config.output_hidden_states
    output = trainer.model(input_ids=torch.tensor([[2, 5, 6, 4, 3]]))
    assert output.hidden_states is None and output.attentions is None
