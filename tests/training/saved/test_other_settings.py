"""Resuming with other settings than the checkpoint's: refused with the reason, never a run with mixed settings."""

import functools

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import tiny_dataset, tiny_model, tiny_tokenizer

import hf_ft_ext
from hf_ft_ext import InputError

PLAIN = {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "dataloader_pin_memory": False}
SPARSE = {"sparse_density": 0.2}
TRAINED = {
    "structured": ("Sparse", {**SPARSE, "sparse_basis": "random"}),
    "dynamic": ("Sparse", {**SPARSE, "sparse_support": "dynamic", "sparse_basis_steps": 1}),
    "static": ("Sparse", {**SPARSE, "sparse_support": "static", "sparse_basis_steps": 1}),
    "select": ("Fisher", {"fisher_mode": "random", "fisher_candidates": ["bottleneck"]}),
    "mask": ("Fisher", {"fisher_mode": "mask", "fisher_mask": "random"}),
    "lora": ("Lora", {}),
    "full": ("Full", {}),
    "signgd": ("Full", {"optim": "sgd", "optim_args": "sign=true"}),
}
# checkpoint, changed arguments (`None` = leave out), model, the reason in the message
CASES = [
    ("structured", {"sparse_density": 0.4}, {}, r"sparse_grad_values\.weight has shape|sparse_grad_values has shape"),
    ("structured", {"sparse_basis_scope": "kind"}, {}, r"this one has no .*sparse_grad_columns"),
    ("structured", {"sparse_support": "static", "sparse_basis": "none"}, {}, "it holds an adapter, and the model"),
    ("structured", {"sparse_target_modules": "query"}, {}, r"it has no .*attention\.self\.query"),
    ("dynamic", {"sparse_moments": "dense"}, {}, "the optimizer state has other moments"),
    ("dynamic", {"sparse_basis_scope": "layer"}, {}, "no basis for"),
    ("dynamic", {"sparse_basis": "none", "sparse_basis_steps": None}, {}, "has a basis for .* to use no basis"),
    ("dynamic", {"sparse_support": "structured"}, {}, "it holds a whole model, and an adapter trains here"),
    ("static", {"sparse_density": 0.4}, {}, "a support of 307 entries for a layer that trains 614"),
    ("static", {"sparse_basis": "none"}, {}, "has a basis for .* to use no basis"),
    ("static", {}, {"model_type": "roberta"}, r"it has no roberta\.|was trained for the labels"),
    ("mask", {}, {"num_labels": 3}, r"its classifier\.weight has shape \(2, 32\), here \(3, 32\)"),
    ("lora", {"lora_r": 4}, {}, r"lora_A\.weight has shape \(8, 32\), here \(4, 32\)"),
    ("lora", {"lora_target_modules": ["key"]}, {}, r"it has no .*\.key\.lora_A"),
    ("full", {}, {"model_type": "distilbert"}, r"it has no distilbert\."),
    ("full", {"optim": "sgd", "optim_args": "sign=true"}, {}, "it belongs to another optimizer"),
    ("signgd", {"optim": None, "optim_args": None}, {}, "it belongs to another optimizer"),
]


def make(way, folder, changed=None, model=None, **more):
    kind, own = TRAINED[way]
    values = {**own, **more, **(changed or {})}
    args = getattr(hf_ft_ext, f"{kind}TrainingArguments")(
        str(folder), max_steps=2, save_steps=1, per_device_train_batch_size=4,
        **PLAIN, **{name: value for name, value in values.items() if value is not None},
    )  # fmt: skip
    return getattr(hf_ft_ext, f"{kind}Trainer")(
        tiny_model(**(model or {})), args, train_dataset=tiny_dataset(8), processing_class=tiny_tokenizer()
    )


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """The checkpoint of a way to train, made once."""

    @functools.cache
    def made(way):
        folder = tmp_path_factory.mktemp(way)
        make(way, folder).train()
        return str(folder / "checkpoint-1")

    return made


@pytest.mark.parametrize(("way", "changed", "model", "reason"), CASES)
def test_a_checkpoint_of_other_settings_is_refused(tmp_path, checkpoint, way, changed, model, reason):
    trainer = make(way, tmp_path, changed, model)
    with pytest.raises(InputError, match=reason) as caught:
        trainer.train(resume_from_checkpoint=checkpoint(way))
    assert "pass the arguments that the run started with" in str(caught.value) or "trained for" in str(caught.value)


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused", "sgd"])
def test_moments_of_other_shapes_are_refused(tmp_path, optim):
    """A fused step would write past their ends: weights of equal names whose optimizer has another order."""
    values = {"optim": optim, "optim_args": "momentum=0.9"} if optim == "sgd" else {"optim": optim}
    first = make("full", tmp_path, values)
    first.train()
    other = make("full", tmp_path / "other", values)
    other.create_optimizer()
    for group in other.optimizer.param_groups:
        group["params"].reverse()
    with pytest.raises(InputError, match=r"(exp_avg|momentum_buffer) has shape \(.*\), and its parameter here \("):
        other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_an_adapter_of_the_user_resumes(tmp_path):
    """The check takes what `save_pretrained` writes, also with a head that peft saves."""
    finals = []
    for resume in (None, "checkpoint-1"):
        model = get_peft_model(tiny_model(), LoraConfig(task_type="SEQ_CLS", target_modules=["query"]))
        args = hf_ft_ext.FullTrainingArguments(str(tmp_path), max_steps=2, save_steps=1, **PLAIN)
        trainer = hf_ft_ext.FullTrainer(model, args, train_dataset=tiny_dataset(8), processing_class=tiny_tokenizer())
        trainer.train(resume_from_checkpoint=resume and str(tmp_path / resume))
        finals.append(trainer.model.state_dict())
    assert finals[0].keys() == finals[1].keys()
    assert all(torch.equal(value, finals[1][name]) for name, value in finals[0].items())
