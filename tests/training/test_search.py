"""Hyperparameter search: each trial has its own values, in everything that the method makes from them."""

import pytest
import torch
from quick import SOLVER_METHODS
from tiny import tiny_dataset, tiny_model, tiny_tokenizer

from hf_ft_ext import InputError
from hf_ft_ext.methods import METHODS

optuna = pytest.importorskip("optuna")

PLAIN = {"use_cpu": True, "report_to": "none", "disable_tqdm": True}
LOOP = {"max_steps": 2, "save_strategy": "no", "per_device_train_batch_size": 4, "lr_scheduler_type": "constant"}


def make(name, folder, **options):
    method = METHODS[name]
    arguments = method.arguments_class()(str(folder), **PLAIN, **({} if name in SOLVER_METHODS else LOOP), **options)
    return method.trainer_class()(
        args=arguments, model_init=lambda: tiny_model(), train_dataset=tiny_dataset(24),
        eval_dataset=tiny_dataset(16, seed=1), processing_class=tiny_tokenizer(),
    )  # fmt: skip


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()]).clone()


def search(trainer, grid, look, space=None):
    """Run all of `grid` and return, trial by trial, what `look(trainer)` sees after training, and the best."""
    seen = []
    train = trainer.train

    def and_look(*positional, **kwargs):
        output = train(*positional, **kwargs)
        seen.append(look(trainer))
        return output

    def same_names(trial):
        return {key: trial.suggest_categorical(key, values) for key, values in grid.items()}

    trainer.train = and_look
    best = trainer.hyperparameter_search(
        hp_space=space or same_names, n_trials=len(next(iter(grid.values()))), backend="optuna", direction="minimize",
        sampler=optuna.samplers.GridSampler(grid, seed=0),
    )  # fmt: skip
    return seen, best


# A setting of each method, values for it, what a trial makes of it, and fixed settings.
def rank(trainer):
    return next(p for n, p in trainer.model.named_parameters() if "lora_A" in n).shape[0]


def n_params(trainer):
    return next(p for n, p in trainer.model.named_parameters() if "sparse_grad_values" in n).numel()


CASES = {
    "full": ("fix_layers", [0, 2], lambda t: sum(not p.requires_grad for p in t.model.parameters()), {}),
    "lora": ("lora_r", [1, 3], rank, {}),
    "sparse": ("sparse_n_params", [10, 30], n_params, {"sparse_basis_steps": 2}),
    "gradientless": ("search_candidates", [1, 3], lambda t: t.optimizer.optimizer.evaluations, {
        "feature_cache_gb": 0.0, "search_options": "none", "learning_rate": 0.5}),
    "fisher": ("fisher_budget", [300, 2000], lambda t: sum(
        t.plan.parameters[layer][name] for layer, name in t.plan.choice.items() if name), {
        "fisher_examples": 4, "fisher_candidates": ["lora", "bottleneck"],
        "fisher_candidate_settings": {"lora": {"r": 2}, "bottleneck": {"bottleneck_size": 4}}}),
    "linearhead": ("linearhead_c", [1e-3, 100.0], lambda t: t.fitted.fit.c, {"feature_cache_gb": 0.0}),
    "kernel": ("kernel_regularization", ["0.01", "1.0"], lambda t: t.regularization, {}),
}  # fmt: skip


@pytest.mark.parametrize("name", METHODS)
def test_a_trial_is_a_run_with_its_values(tmp_path, name):
    key, values, look, fixed = CASES[name]
    trainer = make(name, tmp_path, **fixed)
    seen, best = search(
        trainer, {key: values}, lambda t: (getattr(t.args, key), look(t), weights(t.model), t.evaluate()["eval_loss"])
    )
    assert sorted(value for value, *_ in seen) == sorted(values)
    for value, found, state, loss in seen:  # a run of its own, not a search, with this value
        alone = make(name, tmp_path, **{**fixed, key: value})
        alone.train()
        assert look(alone) == found
        assert torch.equal(weights(alone.model), state)
        assert alone.evaluate()["eval_loss"] == loss
    assert len({found for _, found, *_ in seen}) > 1 and len({loss for *_, loss in seen}) > 1, "the trials are equal"
    lowest = min(seen, key=lambda one: one[3])
    assert best.hyperparameters == {key: lowest[0]} and best.objective == lowest[3]


# What `Trainer` takes from the arguments once, when it is made, or before it knows the trial.
@pytest.mark.parametrize(
    ("name", "key", "values", "fixed"),
    [
        ("full", "learning_rate", [1e-4, 1e-2], {"optimizer": "signgd"}),
        ("full", "optimizer", ["sgd", "adam"], {"learning_rate": 1e-2}),
        ("full", "l2_loss", [False, True], {}),
        ("full", "label_smoothing_factor", [0.0, 0.4], {"learning_rate": 1e-2}),
        ("lora", "seed", [1, 2], {}),
        ("sparse", "sparse_basis_refresh_steps", [0, 1], {
            "sparse_basis_steps": 2, "sparse_density": 0.1, "sparse_support": "static", "learning_rate": 1e-2}),
        # each support has a default rate of its own
        ("sparse", "sparse_support", ["structured", "dynamic"], {"sparse_basis_steps": 2, "sparse_density": 0.1}),
        ("gradientless", "search_method", ["gld", "adam"], {"feature_cache_gb": 0.0}),
    ],
)  # fmt: skip
def test_each_trial_equals_a_run_with_its_values(tmp_path, name, key, values, fixed):
    trainer = make(name, tmp_path, **fixed)
    seen, _ = search(trainer, {key: values}, lambda t: (getattr(t.args, key), weights(t.model)))
    for value, state in seen:
        alone = make(name, tmp_path, **{**fixed, key: value})
        alone.train()
        assert torch.equal(weights(alone.model), state), value
    assert not torch.equal(seen[0][1], seen[1][1])


def test_rates_of_adapters_follow_the_trial(tmp_path):
    fixed = {"fisher_mode": "single", "fisher_candidates": ["lora"]}

    def space(trial):
        return {"fisher_learning_rates": {"head": trial.suggest_categorical("rate", [0.1, 0.001])}}

    seen, _ = search(
        make("fisher", tmp_path, **fixed), {"rate": [0.1, 0.001]},
        lambda t: (t.args.fisher_learning_rates, weights(t.model)), space,
    )  # fmt: skip
    for rates, state in seen:
        alone = make("fisher", tmp_path, **fixed, fisher_learning_rates=rates)
        alone.train()
        assert torch.equal(weights(alone.model), state)
    assert not torch.equal(seen[0][1], seen[1][1])


@pytest.mark.parametrize("name", SOLVER_METHODS)
def test_a_search_over_a_loop_is_refused_where_there_is_none(tmp_path, name):
    message = f"a search over learning_rate would compare equal trials: .* method {name} has none"
    with pytest.raises(InputError, match=message):
        search(make(name, tmp_path), {"learning_rate": [1e-3, 1e-2]}, lambda t: None)


def test_a_search_over_what_an_optimizer_class_brings_is_refused(tmp_path):
    trainer = make("lora", tmp_path)
    trainer.optimizer_cls_and_kwargs = (torch.optim.SGD, {"lr": 0.1})
    with pytest.raises(InputError, match="a search over learning_rate would compare equal trials: optimizer_cls_and"):
        search(trainer, {"learning_rate": [1e-3, 1e-2]}, lambda t: None)


@pytest.mark.parametrize("name", METHODS)
def test_searches_over_nothing_and_over_bad_values_are_refused(tmp_path, name):
    with pytest.raises(InputError, match=r"hp_space searches over 'no_such_name', and \w+ has no such argument"):
        search(make(name, tmp_path), {"no_such_name": [1, 2]}, lambda t: None)
    key, bad = {
        "full": ("fix_layers", -1), "lora": ("lora_r", 0), "sparse": ("sparse_n_params", 0),
        "gradientless": ("search_candidates", 0), "fisher": ("fisher_budget", 0),
        "linearhead": ("linearhead_folds", 1), "kernel": ("kernel_regularization", "much"),
    }[name]  # fmt: skip
    with pytest.raises(InputError, match=f"{key}(=| must be )"):
        search(make(name, tmp_path), {key: [bad, bad]}, lambda t: None)
