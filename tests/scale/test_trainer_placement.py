"""Whole trainers keep their tensors on their device: pre-pass, steps, evaluation, files, resume; no mix passes."""

import contextlib
from collections.abc import Iterator

import pytest
import torch
from accelerate.state import AcceleratorState
from pretend import pretend_accelerator
from tiny import one_layer_model, tiny_dataset, tiny_tokenizer

from hf_ft_ext import load_kernel
from hf_ft_ext.methods import METHODS

_PLAIN = {"optim": "adamw_torch"}  # torch has no fused AdamW for the pretended device
_MASK = {"fisher_mode": "mask", "fisher_mask": "expect-square", "fisher_keep_ratio": 0.1}
_SPARSE = {**_PLAIN, "sparse_density": 0.2, "sparse_basis_steps": 2}
# By name: the method, and settings that take other paths than its defaults.
TRAINERS = {
    "full": ("full", _PLAIN),
    "lora": ("lora", _PLAIN),
    "sparse": ("sparse", {**_SPARSE, "sparse_basis_refresh_steps": 1}),
    "sparse dynamic": ("sparse", {**_SPARSE, "sparse_support": "dynamic", "sparse_basis_refresh_steps": 2}),
    "sparse static": ("sparse", {**_SPARSE, "sparse_support": "static"}),
    "fisher": ("fisher", _PLAIN),
    "fisher mask": ("fisher", {**_PLAIN, **_MASK}),
    "direct search": ("gradientless", {"search_selection": "fisher", "search_options": "2x2"}),
    "spsa": ("gradientless", {"search_method": "spsa", "search_target": "all", "search_update": "momentum",
                              "search_moments": "buffer", "search_small": 0.5, "search_trajectory": True}),
    "node": ("gradientless", {"search_method": "node"}),
    "activity": ("gradientless", {"search_method": "activity", "search_target": "encoder"}),
}  # fmt: skip
KERNELS = {
    "from the model's own outputs": {"adjust_for_init": True},
    "projected": {"kernel_engine": "projected", "kernel_dimension": 16},
}


@contextlib.contextmanager
def accelerator_for_trainers(monkeypatch) -> Iterator[torch.device]:
    """Within, trainers find the pretended accelerator."""
    with pretend_accelerator() as device, monkeypatch.context() as patch:
        AcceleratorState._reset_state(reset_partial_state=True)
        patch.setenv("ACCELERATE_TORCH_DEVICE", str(device))
        yield device
    AcceleratorState._reset_state(reset_partial_state=True)


def make(method: str, folder, **settings):
    args = METHODS[method].arguments_class()(
        str(folder), report_to="none", disable_tqdm=True, bf16=False, logging_strategy="no", **settings
    )
    return METHODS[method].trainer_class()(
        one_layer_model(), args, train_dataset=tiny_dataset(8), processing_class=tiny_tokenizer()
    )


@pytest.mark.parametrize("name", TRAINERS)
def test_a_trainer_mixes_no_devices_and_resumes(name, tmp_path, monkeypatch):
    method, settings = TRAINERS[name]
    rows = {"per_device_train_batch_size": 4, "max_steps": 2, "save_steps": 1}
    with accelerator_for_trainers(monkeypatch) as device:
        trainer = make(method, tmp_path, **rows, **settings)
        trainer.train()
        assert {parameter.device for parameter in trainer.model.parameters()} == {device}
        assert torch.isfinite(torch.tensor(trainer.evaluate(tiny_dataset(3))["eval_loss"]))
        trainer.save_model()
        resumed = make(method, tmp_path, **rows, **settings)
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
        after = resumed.model.state_dict()
        assert all(torch.equal(value, after[key]) for key, value in trainer.model.state_dict().items())


@pytest.mark.parametrize("name", KERNELS)
def test_a_kernel_mixes_no_devices_and_predicts_from_its_folder(name, tmp_path, monkeypatch):
    with accelerator_for_trainers(monkeypatch) as device:
        trainer = make("kernel", tmp_path, **KERNELS[name])
        trainer.train()
        logits = trainer.predict(tiny_dataset(3)).predictions
        trainer.save_model()
        rows = [{key: row[key] for key in ("input_ids", "attention_mask")} for row in tiny_dataset(3)]
        batch = tiny_tokenizer().pad(rows, return_tensors="pt").to(device)
        found = load_kernel(tmp_path, device=device)(batch).logits
        assert torch.allclose(found, torch.tensor(logits, dtype=torch.float64), atol=1e-6)


def test_a_linear_head_mixes_no_devices(tmp_path, monkeypatch):
    with accelerator_for_trainers(monkeypatch) as device:
        trainer = make("linearhead", tmp_path, feature_cache_dir=str(tmp_path / "features"))
        trainer.train()
        assert trainer.model.classifier.weight.device == device
        assert trainer.evaluate(tiny_dataset(3))["eval_loss"] > 0
