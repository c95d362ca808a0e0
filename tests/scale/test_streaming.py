"""Streams: data sets without a length, as `load_dataset(..., streaming=True)` gives them, in user code."""

import pytest
import torch
from tiny import tiny_dataset, tiny_model, tiny_tokenizer

from hf_ft_ext.errors import InputError
from hf_ft_ext.methods import METHODS

SETTINGS = {
    "full": {"optim": "sgd", "learning_rate": 0.1},
    "lora": {"optim": "sgd", "learning_rate": 0.1},
    "sparse": {"sparse_basis_steps": 2, "sparse_density": 0.2, "learning_rate": 1e-2},
    "fisher": {"fisher_examples": 8, "fisher_mode": "mask", "fisher_keep_ratio": 0.05, "learning_rate": 1e-2},
    "gradientless": {"learning_rate": 0.1},
}


def trainer_of(method: str, folder, dataset, **options):
    if method in SETTINGS:
        options["per_device_train_batch_size"] = 4
    args = METHODS[method].arguments_class()(
        str(folder), use_cpu=True, report_to="none", save_strategy="no", disable_tqdm=True, **options
    )
    model = tiny_model(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    return METHODS[method].trainer_class()(
        model, args, train_dataset=dataset, eval_dataset=tiny_dataset(8, seed=1).to_iterable_dataset(),
        processing_class=tiny_tokenizer(),
    )  # fmt: skip


@pytest.mark.parametrize("method", SETTINGS)
def test_a_stream_trains_and_evaluates(tmp_path, method):
    trainer = trainer_of(method, tmp_path, tiny_dataset(32).to_iterable_dataset(), max_steps=3, **SETTINGS[method])
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    assert trainer.state.global_step == 3
    after = trainer.model.state_dict()
    assert any(not torch.equal(after[name], p) for name, p in before.items() if name in after)
    assert trainer.evaluate()["eval_loss"] > 0


@pytest.mark.parametrize("method", SETTINGS)
def test_a_stream_needs_max_steps(tmp_path, method):
    with pytest.raises(ValueError, match="max_steps"):
        trainer_of(method, tmp_path, tiny_dataset(32).to_iterable_dataset(), **SETTINGS[method]).train()


@pytest.mark.parametrize("method", ["linearhead", "kernel"])
def test_methods_that_solve_at_once_refuse_streams(tmp_path, method):
    trainer = trainer_of(method, tmp_path, tiny_dataset(32).to_iterable_dataset())
    with pytest.raises(InputError, match="needs a training data set of known length"):
        trainer.train()
