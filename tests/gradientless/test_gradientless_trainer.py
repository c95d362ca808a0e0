"""GradientlessTrainer: what moves, what is saved, and that splits, processes and resumes change nothing."""

from pathlib import Path

import pytest
import torch
from gradientless_ranks import one_process
from heads import FAMILIES, changed, family, make, weights
from peft import PeftModel
from processes import two_ranks
from tiny import CONFIGS, one_layer_model, tiny_dataset, tiny_model, tiny_tokenizer
from transformers import AutoModelForSequenceClassification, DataCollatorWithPadding, TrainingArguments

from hf_ft_ext import GradientlessTrainer, GradientlessTrainingArguments, InputError
from hf_ft_ext.features import head_parameters
from hf_ft_ext.training.runs.plan import trained_weights, training_plan

INPUTS = {"input_ids": torch.arange(5, 25).view(2, 10)}
METHODS = {
    "gld": {},
    "none": {"search_options": "none"},
    "trees": {"search_options": "2x2", "weight_decay": 1e-4, "search_antithetic": True},
    "pool": {"search_pool": True, "search_sampling_size": 100},
    "spsa": {"search_method": "spsa", "search_directions": 2, "learning_rate": 0.01},
    "spsa-adam": {"search_method": "spsa", "search_update": "adam", "learning_rate": 0.01},
    "lozo-m": {
        "search_method": "spsa",
        "search_direction": "lozo",
        "search_update": "momentum",
        "learning_rate": 0.01,
    },
    "fzoo": {
        "search_method": "spsa",
        "search_estimate": "one-sided",
        "search_direction": "rademacher-outer",
        "learning_rate": 0.01,
    },
    "fisher": {"search_selection": "fisher", "search_sampling_size": 20},
    "node": {"search_method": "node", "learning_rate": 0.01},
    "activity": {"search_method": "activity", "learning_rate": 0.01},
    "adam": {"search_method": "adam", "learning_rate": 0.01},
}


WHOLE = {"per_device_train_batch_size": 32}  # all rows in each step: no noise from step to step


def logits(model):
    with torch.no_grad():
        return model.eval()(**INPUTS).logits


@pytest.mark.parametrize("model_type", [*CONFIGS, *FAMILIES])
def test_searches_the_head_and_saves_the_plain_model(tmp_path, model_type):
    trainer = make(tmp_path, family(model_type))
    before = weights(trainer)
    trainer.train()
    assert (tmp_path / "features").is_dir()  # the encoder ran once
    head = set(head_parameters(trainer.model))
    assert changed(trainer, before) <= head and len(changed(trainer, before)) >= len(head) - 1
    trainer.save_model()
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert torch.equal(logits(loaded), logits(trainer.model))
    assert not torch.equal(logits(loaded), logits(family(model_type)))


@pytest.mark.parametrize("method", METHODS)
def test_every_search_method_lowers_the_loss(tmp_path, method):
    options = {"max_steps": 20, **WHOLE, "learning_rate": 0.3, **METHODS[method]}
    options["learning_rate"] = {
        "spsa": 0.1,
        "spsa-adam": 0.01,
        "lozo-m": 0.02,
        "fzoo": 0.1,
        "node": 0.05,
        "activity": 0.05,
    }.get(method, options["learning_rate"])
    trainer = make(tmp_path, **options)
    first = trainer.evaluate(trainer.train_dataset)["eval_loss"]
    trainer.train()
    assert trainer.evaluate(trainer.train_dataset)["eval_loss"] < first - 0.005


@pytest.mark.parametrize("method", METHODS)
def test_resumed_run_equals_the_unbroken_one(tmp_path, method):
    options = {"save_strategy": "steps", "save_steps": 1, "gradient_accumulation_steps": 2, **METHODS[method]}
    unbroken = make(tmp_path / "a", **options)
    unbroken.train()
    resumed = make(tmp_path / "b", one_layer_model(seed=5), **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    for name, value in weights(resumed).items():
        if name in resumed.searched:
            assert torch.equal(value, weights(unbroken)[name]), name


@pytest.mark.parametrize("method", METHODS)
def test_accumulation_equals_one_large_batch(tmp_path, method):
    runs = []
    for size, accumulation in ((8, 1), (2, 4)):
        options = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulation, "max_steps": 4}
        trainer = make(tmp_path, one_layer_model().double(), logging_steps=1, **options, **METHODS[method])
        before = weights(trainer)
        trainer.train()
        assert changed(trainer, before)
        runs.append((weights(trainer), [log["loss"] for log in trainer.state.log_history if "loss" in log]))
    for name, value in runs[0][0].items():
        torch.testing.assert_close(value, runs[1][0][name], rtol=1e-6, atol=1e-8)
    assert runs[0][1] == pytest.approx(runs[1][1], rel=1e-5)


@pytest.mark.parametrize(("method", "other"), [
    *((method, {"feature_cache_gb": 0.0}) for method in ("trees", "spsa", "fisher", "node", "adam")),
    *((method, {"whole": True}) for method in ("trees", "spsa")),
])  # fmt: skip
def test_features_in_each_step_equal_forward_passes_of_the_whole_model(tmp_path, method, other, monkeypatch):
    results = []
    for settings in ({}, dict(other)):
        if settings.pop("whole", False):
            monkeypatch.setattr("hf_ft_ext.gradientless.trainer.HeadReader.find", lambda *_: None)
        folder = tmp_path / str(len(results))
        trainer = make(folder, one_layer_model().double(), max_steps=3, **METHODS[method], **settings)
        trainer.train()
        assert (folder / "features").exists() == (not results)
        results.append(weights(trainer))
    for name, value in results[0].items():
        torch.testing.assert_close(value, results[1][name], rtol=1e-6, atol=1e-8)


def test_node_perturbation_needs_a_head_that_reads_one_vector_per_row(tmp_path, monkeypatch):
    monkeypatch.setattr("hf_ft_ext.gradientless.trainer.HeadReader.find", lambda *_: None)
    with pytest.raises(InputError, match="node perturbation needs a search of head tensors only"):
        make(tmp_path, **METHODS["node"]).train()


def test_cached_features_have_no_lengths_to_balance(tmp_path):
    with pytest.raises(InputError, match="divides rows among processes by their lengths, and cached features have"):
        make(tmp_path, train_sampling_strategy="batch_rebalance").train()
    make(tmp_path, train_sampling_strategy="batch_rebalance", search_target="all", max_steps=1).train()


@pytest.mark.parametrize(("method", "message"), [
    ("adam", "search_method=adam is a baseline for one process; start one process"),
    ("node", "search_method=node estimates a gradient for each row, .* start one process, or use search_method=activ"),
])  # fmt: skip
def test_searches_of_one_process_are_refused_in_two(tmp_path, monkeypatch, method, message):
    monkeypatch.setattr(GradientlessTrainingArguments, "world_size", 2)
    monkeypatch.setattr("hf_ft_ext.training.first_process.broadcast", lambda tensor: None)
    with pytest.raises(InputError, match=message):
        make(tmp_path, **METHODS[method]).create_optimizer()


def test_encoder_tensors_are_searched_by_name(tmp_path):
    target = r"layer\.1\.output\.dense\.weight|classifier\.weight"
    trainer = make(tmp_path, tiny_model(), search_target=target, learning_rate=0.1)
    before = weights(trainer)
    trainer.train()
    assert not (tmp_path / "features").exists()
    assert changed(trainer, before) == {"bert.encoder.layer.1.output.dense.weight", "classifier.weight"}


def test_all_weights_are_searched_by_spsa_and_come_back_trainable(tmp_path):
    trainer = make(tmp_path, search_target="all", **METHODS["spsa"])
    before = weights(trainer)
    trainer.train()
    still = set(before) - changed(trainer, before)
    assert not still
    assert all(p.requires_grad and p.grad is None for p in trainer.model.parameters())


@pytest.mark.parametrize("kind", ["lora", "ia3"])
@pytest.mark.parametrize("method", ["gld", "spsa"])
def test_a_peft_subspace_is_saved_as_an_adapter(tmp_path, kind, method):
    one_layer_model().save_pretrained(tmp_path / "base")
    base = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base")
    trainer = make(tmp_path / "out", base, search_peft=kind, max_steps=4, **METHODS[method])
    before = weights(trainer)
    trainer.train()
    moved = changed(trainer, before)
    assert moved and moved <= set(trainer.searched)
    assert any(kind in name for name in moved) and any("classifier.modules_to_save" in name for name in moved)
    trainer.save_model()
    fresh = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base")
    loaded = PeftModel.from_pretrained(fresh, tmp_path / "out")
    torch.testing.assert_close(logits(loaded), logits(trainer.model), rtol=0, atol=0)
    assert not torch.allclose(
        logits(loaded), logits(AutoModelForSequenceClassification.from_pretrained(tmp_path / "base"))
    )


@pytest.mark.parametrize("objective", ["accuracy", "f1", "matthews"])
def test_metrics_are_objectives(tmp_path, objective):
    trainer = make(tmp_path, search_objective=objective, max_steps=40, learning_rate=1.0, logging_steps=1, **WHOLE)
    trainer.train()
    losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    assert all(0 <= loss <= 2 for loss in losses) and losses[-1] < losses[0]


def test_a_function_of_the_user_is_the_objective(tmp_path):
    seen = []

    def margin(logits, labels):
        seen.append((tuple(logits.shape), tuple(labels.shape)))
        return float((logits[..., 0] - logits[..., 1]).mean())

    trainer = make(tmp_path, objective=margin, gradient_accumulation_steps=2, max_steps=20, learning_rate=0.3)
    trainer.train()
    assert set(seen) == {((16, 2), (16,))}
    assert (logits(trainer.model)[:, 1] > logits(trainer.model)[:, 0]).all()


def test_dropout_draws_one_mask_for_all_candidates_of_a_step(tmp_path):
    still = {"learning_rate": 1e-12, "max_steps": 3, "search_selection": "all", "search_options": "none"}
    trainer = make(tmp_path, search_dropout=True, **still)
    losses = []

    def watch(optimizer, closure, evaluate=None):
        losses.append([float(closure()) for _ in range(3)])
        return original(closure, evaluate)

    trainer.create_optimizer()
    original = trainer.optimizer.step_ahead
    trainer.optimizer.step_ahead = lambda closure, evaluate=None: watch(trainer.optimizer, closure, evaluate)
    batch = next(iter(trainer.get_train_dataloader()))
    for step in range(2):
        trainer.state.global_step = step
        trainer.training_step(trainer.model, batch)
    assert trainer.model.training and all(len(set(found)) == 1 for found in losses)
    assert losses[0][0] != losses[1][0]  # the next step has another mask: the weights have hardly moved


def test_bf16_and_regression_and_streams_and_plain_datasets(tmp_path):
    trainer = make(tmp_path, bf16=True)
    before = weights(trainer)
    trainer.train()
    assert changed(trainer, before)
    model = one_layer_model(num_labels=1, problem_type="regression")
    trainer = make(tmp_path, model, tiny_dataset(32, regression=True), num_train_epochs=6)
    first = trainer.evaluate(trainer.train_dataset)["eval_loss"]
    trainer.train()
    assert trainer.evaluate(trainer.train_dataset)["eval_loss"] < first
    trainer = make(tmp_path / "stream", dataset=tiny_dataset(32).to_iterable_dataset(), max_steps=2)
    trainer.train()
    assert not (tmp_path / "stream" / "features").exists() and trainer.state.global_step == 2
    trainer = make(tmp_path / "list", dataset=list(tiny_dataset(32)))
    trainer.train()
    assert (tmp_path / "list" / "features").is_dir()


def test_a_loss_of_the_user_runs_the_whole_model(tmp_path):
    calls = []

    def loss(outputs, labels, num_items_in_batch=None):
        calls.append(len(labels))
        return torch.nn.functional.cross_entropy(outputs.logits, labels)

    args = GradientlessTrainingArguments(
        str(tmp_path), max_steps=2, use_cpu=True, report_to="none", save_strategy="no"
    )
    trainer = GradientlessTrainer(
        one_layer_model(),
        args,
        train_dataset=tiny_dataset(16),
        processing_class=tiny_tokenizer(),
        compute_loss_func=loss,
    )
    trainer.train()
    assert len(calls) == trainer.optimizer.optimizer.evaluations


@pytest.mark.parametrize("search_target", ["head", "all"])
def test_a_classifier_with_a_loss_of_its_own_keeps_it(tmp_path, search_target):
    class WeighingForSequenceClassification(type(one_layer_model())):
        def forward(self, input_ids=None, attention_mask=None, labels=None, **kwargs):
            output = super().forward(input_ids, attention_mask, **kwargs)
            if labels is not None:
                weight = torch.tensor([1.0, 20.0])
                output.loss = torch.nn.functional.cross_entropy(output.logits, labels, weight)
            return output

    model = one_layer_model()
    model.__class__ = WeighingForSequenceClassification
    with torch.no_grad():
        model.classifier.weight.mul_(50)  # the two losses differ
        rows = tiny_dataset(32)
        output = model.eval()(**DataCollatorWithPadding(tiny_tokenizer())([rows[i] for i in range(32)]))
    usual = torch.nn.functional.cross_entropy(output.logits, torch.tensor(rows["labels"]))
    assert abs(usual - output.loss) > 0.1
    settings = {"search_method": "spsa", "learning_rate": 1e-9, "max_steps": 1, "search_target": search_target}
    assert make(tmp_path, model, **WHOLE, **settings).train().training_loss == pytest.approx(
        float(output.loss), rel=1e-2
    )


def test_data_that_differ_each_time_are_encoded_in_each_step(tmp_path, caplog):
    class Noisy(list):
        def __getitem__(self, i):
            row = super().__getitem__(i)
            return {**row, "input_ids": [int(torch.randint(5, 40, ())) for _ in row["input_ids"]]}

    caplog.set_level("INFO", logger="hf_ft_ext")
    trainer = make(tmp_path, dataset=Noisy(tiny_dataset(32)))
    trainer.train()
    assert "the training data gives other rows each time" in caplog.text
    assert not (tmp_path / "features").exists() and "features of 32 rows" not in caplog.text


def test_features_of_an_earlier_run_are_used_again(tmp_path, caplog):
    caplog.set_level("INFO", logger="hf_ft_ext")
    make(tmp_path).train()
    assert "features of 32 rows: written to" in caplog.text
    make(tmp_path, seed=1).train()
    assert "features of 32 rows: read from" in caplog.text


def test_features_that_are_too_large_are_made_in_each_step(tmp_path, caplog):
    caplog.set_level("INFO", logger="hf_ft_ext")
    trainer = make(tmp_path, feature_cache_gb=1e-6)
    trainer.train()
    assert "features would take 4.1e-06 GB, more than feature_cache_gb=1e-06: the encoder runs in every" in caplog.text
    assert not (tmp_path / "features").exists()


def test_the_schedule_drives_the_radius_and_evaluations_are_logged(tmp_path):
    schedule = {"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": {"power": 1.0, "lr_end": 0.005}}
    trainer = make(tmp_path, logging_steps=1, **schedule)
    trainer.train()
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert [log["learning_rate"] for log in logs] == pytest.approx([0.05 - 0.045 * i / 8 for i in range(8)])
    assert [log["evaluations"] for log in logs] == [25 * (i + 1) for i in range(8)]
    assert "grad_norm" not in logs[0] and logs[0]["rejected_candidates"] == 0


def test_best_model_is_loaded_at_the_end(tmp_path):
    trainer = make(tmp_path, save_strategy="epoch", eval_strategy="epoch", load_best_model_at_end=True)
    trainer.train()
    best = min(log["eval_loss"] for log in trainer.state.log_history if "eval_loss" in log)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(best, rel=1e-6)


def test_model_init_gives_each_run_its_own_model(tmp_path):
    args = GradientlessTrainingArguments(
        str(tmp_path), max_steps=4, use_cpu=True, report_to="none", save_strategy="no", learning_rate=0.1,
        feature_cache_dir=str(tmp_path / "features"),
    )  # fmt: skip
    trainer = GradientlessTrainer(
        args=args,
        model_init=lambda: one_layer_model(),
        train_dataset=tiny_dataset(16),
        processing_class=tiny_tokenizer(),
    )
    trainer.train()
    first = weights(trainer)
    trainer.train()
    assert not changed(trainer, first)


def test_plain_arguments_are_completed(tmp_path, caplog):
    caplog.set_level("INFO", logger="hf_ft_ext")
    plain = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none")
    trainer = GradientlessTrainer(one_layer_model(), plain, data_collator=DataCollatorWithPadding(tiny_tokenizer()))
    assert (trainer.args.learning_rate, trainer.args.max_grad_norm) == (5e-3, 0.0)
    assert "learning_rate" in caplog.text and "max_grad_norm=0.0" in caplog.text


def test_the_memory_plan_counts_no_gradients(tmp_path):
    trainer = make(tmp_path)
    plan = training_plan(trainer)
    assert plan.trainable == sum(p.numel() for p in head_parameters(trainer.model).values())
    assert plan.memory["gradients"] == plan.memory["optimizer state"] == plan.memory["activations"] == 0
    assert plan.steps == 8 and not (tmp_path / "features").exists()
    assert [row.name for row in trained_weights(trainer)] == list(trainer.searched)


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path):
    one_process(tmp_path)
    two_ranks(Path(__file__).with_name("gradientless_ranks.py"), str(tmp_path))
