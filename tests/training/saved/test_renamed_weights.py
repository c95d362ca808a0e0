"""Models whose weights have other names in files: runs go on from checkpoints, and the best model is loaded whole."""

import pytest
import torch
from datasets import Dataset
from decoders import decoder, subword_tokenizer
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from hf_ft_ext import FullTrainer, FullTrainingArguments, InputError, PromptForSequenceClassification
from hf_ft_ext.training.saved.checkpoints import check_fits

IDS = [[5, 9, 30, 7, 12, 8], [6, 9, 31, 40, 11, 10]] * 4
MIXTRAL = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 1, "num_local_experts": 2, "vocab_size": 64, "max_position_embeddings": 32,
}  # fmt: skip
# the model, and a weight that its file does not have under this name
NAMES = {
    "gpt_neox": "lm_head.weight",
    "mixtral": "model.layers.0.mlp.experts.down_proj",
    "prompt": "masked_lm.lm_head.weight",
}


def model_of(kind):
    if kind == "mixtral":
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(AutoConfig.for_model("mixtral", **MIXTRAL))
    network = decoder("gpt_neox")
    if kind == "gpt_neox":
        return network
    words = ["bad", "great"]
    return PromptForSequenceClassification.from_language_model(
        network, subword_tokenizer("byte-level"), "*cls**sent_0*_It_was*mask*", words, words
    )


def trainer_of(kind, folder, model=None, **values):
    labels = [0, 1] * 4 if kind == "prompt" else IDS
    rows = Dataset.from_dict({"input_ids": IDS, "attention_mask": [[1] * 6] * 8, "labels": labels})
    args = FullTrainingArguments(
        str(folder), max_steps=4, save_steps=2, per_device_train_batch_size=2, learning_rate=1e-2, use_cpu=True,
        report_to="none", disable_tqdm=True, activation_checkpointing=False, **values,
    )  # fmt: skip
    return FullTrainer(model_of(kind) if model is None else model, args, train_dataset=rows)


@pytest.mark.parametrize("kind", NAMES)
def test_a_resumed_run_equals_an_unbroken_one(tmp_path, kind):
    whole = trainer_of(kind, tmp_path / "whole")
    whole.train()
    last = tmp_path / "whole" / "checkpoint-2"
    assert NAMES[kind] not in load_file(last / "model.safetensors")
    resumed = trainer_of(kind, tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=str(last))
    ends = resumed.model.state_dict()
    assert all(torch.equal(weight, ends[name]) for name, weight in whole.model.state_dict().items())


@pytest.mark.parametrize("kind", NAMES)
def test_the_best_model_has_all_weights_of_its_checkpoint(tmp_path, kind):
    trainer = trainer_of(kind, tmp_path)
    trainer.train()
    ended = trainer.model.state_dict()[NAMES[kind]].clone()
    trainer.state.best_model_checkpoint = str(tmp_path / "checkpoint-2")
    trainer._load_best_model()
    best = type(trainer.model).from_pretrained(tmp_path / "checkpoint-2").state_dict()
    loaded = trainer.model.state_dict()
    assert not torch.equal(ended, best[NAMES[kind]])
    assert all(torch.equal(loaded[name], weight) for name, weight in best.items())


@pytest.mark.parametrize("kind", NAMES)
def test_checkpoints_are_compared_in_the_form_of_the_file(tmp_path, kind):
    trainer = trainer_of(kind, tmp_path)
    trainer.train()
    check_fits(tmp_path / "checkpoint-2", model_of(kind), "full")
    with pytest.raises(InputError, match=r"written with another model or other settings|was trained for the labels"):
        check_fits(tmp_path / "checkpoint-2", decoder("gpt2"), "full")
    if kind == "gpt_neox":
        with pytest.raises(InputError, match=r"mlp\.dense.* has shape"):
            check_fits(tmp_path / "checkpoint-2", decoder("gpt_neox", intermediate_size=32), "full")
