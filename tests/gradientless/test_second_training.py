"""A search that trains again: with other data, another encoder, from the best model, or after a step that failed."""

import functools
import random

import numpy as np
import pytest
import torch
from tiny import tiny_dataset, tiny_model, tiny_tokenizer
from torch.testing import assert_close

from hf_ft_ext import GradientlessTrainer, GradientlessTrainingArguments

QUIET = {"report_to": "none", "disable_tqdm": True, "use_cpu": True, "save_strategy": "no"}


def make(folder, kind=GradientlessTrainer, model=None, **values):
    values = {"search_method": "spsa", "learning_rate": 1e-3, "max_steps": 4, **QUIET, **values}
    args = GradientlessTrainingArguments(str(folder), per_device_train_batch_size=8, **values)
    data = {"train_dataset": tiny_dataset(32), "eval_dataset": tiny_dataset(8, seed=5)}
    return kind(tiny_model() if model is None else model, args, processing_class=tiny_tokenizer(), **data)


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
