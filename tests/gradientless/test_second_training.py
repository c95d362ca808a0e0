"""A search that trains again: with other data, another encoder, from the best model, or after a step that failed."""

import copy
import functools
import random

import numpy as np
import pytest
import torch
from tiny import one_layer_model, tiny_dataset, tiny_tokenizer
from torch.testing import assert_close

from hf_ft_ext import SPSA, GradientlessTrainer, GradientlessTrainingArguments, apply_trajectory, save_trajectory

QUIET = {"report_to": "none", "disable_tqdm": True, "use_cpu": True, "save_strategy": "no"}
BEST = {
    "search_target": "all", "search_trajectory": True, "max_steps": 6, "eval_strategy": "steps", "eval_steps": 2,
    "save_strategy": "steps", "save_steps": 2, "load_best_model_at_end": True, "metric_for_best_model": "eval_near",
    "greater_is_better": True,
}  # fmt: skip


def make(folder, kind=GradientlessTrainer, model=None, objective=None, **values):
    values = {"search_method": "spsa", "learning_rate": 1e-3, "max_steps": 4, **QUIET, **values}
    args = GradientlessTrainingArguments(str(folder), per_device_train_batch_size=8, **values)
    data = {"train_dataset": tiny_dataset(32), "eval_dataset": tiny_dataset(8, seed=5)}
    model = one_layer_model() if model is None else model
    return kind(model, args, processing_class=tiny_tokenizer(), objective=objective, **data)


class Watched(GradientlessTrainer):
    """Keeps the features that it trains with."""

    def training_step(self, model, inputs, *positional):
        self.seen = [*getattr(self, "seen", []), inputs["features"]]
        return super().training_step(model, inputs, *positional)


@pytest.mark.parametrize("method", ["gld", "spsa", "node"])
def test_features_are_those_of_the_current_data_and_encoder(tmp_path, method):
    trainer = make(tmp_path, Watched, search_method=method)
    trainer.train()
    trainer.train_dataset = tiny_dataset(32, seed=9)
    with torch.no_grad():
        for parameter in trainer.model.bert.embeddings.parameters():
            parameter += 0.05
    trainer.seen.clear()
    trainer.train()
    fresh = make(tmp_path, Watched, copy.deepcopy(trainer.model), search_method=method)
    fresh.train_dataset = trainer.train_dataset
    fresh.train()
    assert_close(torch.cat(trainer.seen), torch.cat(fresh.seen))


@pytest.mark.parametrize("whole_state", [True, False])
@pytest.mark.parametrize("update", ["sgd", "adam"])
def test_a_trajectory_goes_on_from_the_best_model(tmp_path, caplog, whole_state, update):
    trainer = make(tmp_path, search_update=update, save_only_model=not whole_state, **BEST)
    trainer.compute_metrics = lambda _: {"near": -abs(trainer.state.global_step - 2)}
    base = copy.deepcopy(trainer.model)
    for steps in (2, 4):
        trainer.train()
        trainer.save_model()
        if steps == 4 and update == "adam" and not whole_state:  # the moments of step 2 are lost
            assert "cannot be repeated" in caplog.text
            continue
        again = apply_trajectory(copy.deepcopy(base), tmp_path)
        assert len(trainer.optimizer.optimizer.record) == steps
        for name, value in trainer.model.state_dict().items():
            assert torch.equal(value, again.state_dict()[name]), name


def test_a_step_that_fails_does_not_count(tmp_path):
    model, calls = torch.nn.Linear(3, 2), []
    base, rows = copy.deepcopy(model), torch.randn(5, 3)
    search = SPSA(model.parameters(), model, lr=0.1)

    def loss():
        calls.append(1)
        if len(calls) in (2, 5):
            raise RuntimeError("out of memory")
        return model(rows).square().mean()

    for _ in range(6):
        try:
            search.step_ahead(loss)
            search.step()
        except RuntimeError:
            pass
    assert search.steps == len(search.record) == 4
    again = apply_trajectory(base, save_trajectory(search, model, tmp_path))
    assert torch.equal(again.weight, model.weight)


def noisy(draw):
    class Noisy(GradientlessTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            loss, outputs = super().compute_loss(model, inputs, True)
            loss = loss + draw()
            return (loss, outputs) if return_outputs else loss

    return Noisy


DRAWS = {"torch": functools.partial(torch.randn, ()), "numpy": np.random.randn, "python": random.random}


@pytest.mark.parametrize("method", ["gld", "spsa"])
def test_candidates_are_compared_by_the_same_random_numbers(tmp_path, method):
    found = {}
    for name, draw in {"none": lambda: 0.0, **DRAWS}.items():
        trainer = make(tmp_path, noisy(draw), search_method=method, max_steps=2)
        trainer.train()
        found[name] = trainer.model.state_dict()
    for name in DRAWS:
        assert_close(found[name], found["none"], rtol=0, atol=1e-5, msg=name)


@pytest.mark.parametrize("method", ["gld", "spsa"])
def test_an_objective_that_draws_compares_candidates_by_the_same_numbers(tmp_path, method):
    found = {}
    for name, draw in {"none": lambda: 0.0, **DRAWS}.items():

        def objective(logits, labels, draw=draw):
            return torch.nn.functional.cross_entropy(logits, labels) + draw()

        trainer = make(tmp_path, search_method=method, max_steps=2, objective=objective)
        trainer.train()
        found[name] = trainer.model.state_dict()
    for name in DRAWS:
        assert_close(found[name], found["none"], rtol=0, atol=1e-5, msg=name)


def test_cached_features_have_the_labels_of_the_collator(tmp_path):
    """transformers' collator takes the column `label` where there are both."""
    ends = []
    for cache in (0, 1):
        trainer = make(tmp_path, feature_cache_gb=cache)
        rows = trainer.train_dataset
        trainer.train_dataset = rows.add_column("label", [1 - label for label in rows["labels"]])
        trainer.train()
        ends.append(trainer.model.state_dict())
    assert_close(ends[0], ends[1])
