"""SparseTrainer with structured support: a PEFT adapter, from the pre-pass to resuming, best models and exports."""

import copy
import logging
import re

import pytest
import torch
from classifiers import tiny_classifier
from peft import LoraConfig, PeftModel, get_peft_model
from sparse_trainer import INPUTS, OPTIONS, assert_close, logits, make, structured, weights
from test_families import build
from tiny import CONFIGS, tiny_dataset, tiny_model, tiny_tokenizer
from transformers import AutoModelForCausalLM, TrainingArguments

from hf_ft_ext import (
    InputError,
    SparseGradConfig,
    SparseTrainer,
    SparseTrainingArguments,
    compute_bases,
    convert_to_sparse,
    save_delta,
    sparse_layers,
)
from hf_ft_ext.adapters.sparse_grad.model import sparse_grad_layers
from hf_ft_ext.sparse.adapter import choose_columns, columns_of
from hf_ft_ext.sparse.prepass import own_steps
from hf_ft_ext.training.runs.plan import training_plan

NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


@pytest.mark.parametrize("model_type", CONFIGS)
@pytest.mark.parametrize("basis", ["hosvd", "svd", "random"])
def test_by_default_a_block_and_the_head_train_and_an_adapter_is_saved(tmp_path, model_type, basis):
    args = SparseTrainingArguments(output_dir=str(tmp_path), **{**OPTIONS, "num_train_epochs": 1}, sparse_basis=basis)
    data = {"train_dataset": tiny_dataset(32), "processing_class": tiny_tokenizer()}
    trainer = SparseTrainer(tiny_model(model_type), args, **data)
    before, plain = weights(trainer), logits(tiny_model(model_type))
    trainer.train()
    changed = {name for name, value in weights(trainer).items() if not torch.equal(value, before[name])}
    trains = {name for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert changed == trains
    assert all(".sparse_grad_values." in name or ".modules_to_save." in name for name in trains)
    trainer.save_model()
    expected = logits(trainer.model)
    assert not torch.equal(expected, plain)
    assert torch.equal(logits(PeftModel.from_pretrained(tiny_model(model_type), tmp_path)), expected)


def test_dynamic_with_all_else_is_one_argument_away(tmp_path):
    args = SparseTrainingArguments(output_dir=str(tmp_path), sparse_support="dynamic")
    assert (args.train_rest, args.basis_scope, args.learning_rate) == ("all", "kind", 5e-5)
    args = SparseTrainingArguments(output_dir=str(tmp_path))
    assert (args.sparse_support, args.train_rest, args.basis_scope, args.learning_rate) == (
        "structured", "head", "layer", 1e-3,
    )  # fmt: skip
    given = SparseTrainingArguments(output_dir=str(tmp_path), sparse_support="dynamic", learning_rate=1e-3)
    assert given.learning_rate == 1e-3
    completed = SparseTrainer(tiny_model(), TrainingArguments(str(tmp_path), use_cpu=True)).args
    assert completed.learning_rate == 1e-3


@pytest.mark.parametrize("accumulation", [1, 2])
def test_resumed_run_equals_the_unbroken_one_without_a_pre_pass(tmp_path, accumulation, monkeypatch):
    options = {"save_strategy": "steps", "save_steps": 1, "gradient_accumulation_steps": accumulation}
    unbroken = structured(tmp_path / "a", **options)
    unbroken.train()
    monkeypatch.setattr("hf_ft_ext.sparse.trainer.choose_columns", None)
    resumed = structured(tmp_path / "b", **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-3"))
    for (name, value), other in zip(
        resumed.model.state_dict().items(), unbroken.model.state_dict().values(), strict=True
    ):
        assert torch.equal(value, other), name


def test_accumulation_equals_one_large_batch(tmp_path):
    options = {"adam_epsilon": 1e-2, "sparse_basis": "random"}
    whole = structured(tmp_path, tiny_model(**NO_DROPOUT), per_device_train_batch_size=8, **options)
    split = structured(
        tmp_path, tiny_model(**NO_DROPOUT), per_device_train_batch_size=2, gradient_accumulation_steps=4, **options
    )
    before = weights(whole)
    whole.train()
    split.train()
    assert_close(weights(whole), weights(split), 1e-4)
    assert max((value - before[name]).abs().max() for name, value in weights(whole).items()) > 1e-3


@pytest.mark.parametrize("kind", ["adapter", "converted", "static", "refreshed"])
def test_the_best_model_comes_back_and_is_what_is_saved(tmp_path, kind):
    options = {
        "adapter": {},
        "converted": {"sparse_train_rest": "LayerNorm"},
        "static": {"sparse_support": "static", "sparse_train_rest": "head"},
        "refreshed": {"sparse_basis_refresh_steps": 3},
    }[kind]
    # A rate at which the last epoch is not the best one.
    best = {"eval_strategy": "epoch", "save_strategy": "epoch", "load_best_model_at_end": True, "learning_rate": 0.3}
    trainer = structured(tmp_path, num_train_epochs=4, **options, **best)
    trainer.train()
    assert not trainer.state.best_model_checkpoint.endswith(f"-{trainer.state.global_step}")
    losses = [log["eval_loss"] for log in trainer.state.log_history if "eval_loss" in log]
    assert trainer.evaluate()["eval_loss"] == pytest.approx(min(losses), rel=1e-5)
    expected = logits(trainer.model)
    if kind == "adapter":
        trainer.save_model(tmp_path / "saved")
        found = PeftModel.from_pretrained(tiny_model(), tmp_path / "saved")
        torch.testing.assert_close(logits(found), expected, rtol=0, atol=0)
        return
    from hf_ft_ext import load_delta

    save_delta(trainer.model, tmp_path / "saved")
    torch.testing.assert_close(logits(load_delta(tiny_model(), tmp_path / "saved")), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("support", ["structured", "static", "dynamic"])
def test_a_trained_model_moves_and_is_copied(tmp_path, support):
    trainer = make(tmp_path, sparse_support=support, sparse_train_rest="all", num_train_epochs=1)
    trainer.train()
    expected = logits(trainer.model)
    double = copy.deepcopy(trainer.model).double()
    for layer in sparse_layers(double).values():
        parts = [layer.weight, layer.initial, layer.basis.out_factor]
        parts += [] if layer.support is None else [layer.support.out_columns, layer.support.in_columns]
        assert {part.dtype for part in parts if part is not None} == {torch.float64}
        if layer.support is not None:
            assert layer.support.rows.dtype == torch.int64
    torch.testing.assert_close(logits(double).float(), expected)
    double.train()(**INPUTS, labels=torch.tensor([0, 1])).loss.backward()  # supports and weights are of one kind
    meta = copy.deepcopy(trainer.model).to("meta")
    supports = [layer.support for layer in sparse_layers(meta).values() if layer.support is not None]
    assert all(support.rows.is_meta and support.out_columns.is_meta for support in supports)
    assert torch.equal(logits(trainer.model.cpu()), expected)


def test_nothing_else_trains_with_rest_none(tmp_path):
    trainer = structured(tmp_path, sparse_train_rest="none")
    trainer.train()
    assert all(".sparse_grad_values." in name for name, p in trainer.model.named_parameters() if p.requires_grad)
    trainer.save_model()
    assert torch.equal(logits(PeftModel.from_pretrained(tiny_model(), tmp_path)), logits(trainer.model))


@pytest.mark.parametrize("optim", ["adafactor", "sgd", "adamw_torch"])
def test_any_optimizer_of_transformers_trains_it(tmp_path, optim):
    trainer = structured(tmp_path, optim=optim, num_train_epochs=1)
    before = weights(trainer)
    trainer.train()
    moved = [name for name, value in weights(trainer).items() if not torch.equal(value, before[name])]
    assert any(".sparse_grad_values." in name for name in moved)


def test_an_optimizer_class_is_taken_and_an_optimizer_refused(tmp_path):
    args = SparseTrainingArguments(output_dir=str(tmp_path), sparse_basis="random", **OPTIONS)
    data = {"train_dataset": tiny_dataset(16), "processing_class": tiny_tokenizer()}
    trainer = SparseTrainer(tiny_model(), args, optimizer_cls_and_kwargs=(torch.optim.RMSprop, {"lr": 1e-3}), **data)
    trainer.train()
    assert type(trainer.optimizer.optimizer) is torch.optim.RMSprop
    with pytest.raises(InputError, match="leave `optimizers` out"):
        SparseTrainer(tiny_model(), args, optimizers=(torch.optim.SGD(tiny_model().parameters()), None), **data)


def test_weight_decay_leaves_biases_and_norms_out(tmp_path):
    for options in ({}, {"sparse_support": "structured"}, {"sparse_support": "static"}):
        trainer = make(tmp_path, adapter=True, weight_decay=0.1, **options)
        trainer.create_optimizer()
        names = {id(p): name for name, p in trainer.model.named_parameters()}
        decays = {names[id(p)] for g in trainer.optimizer.param_groups if g["weight_decay"] for p in g["params"]}
        assert decays and not [name for name in decays if "LayerNorm" in name or name.endswith("bias")]


def test_a_bfloat16_base_stays_as_it_is(tmp_path):
    trainer = structured(tmp_path, tiny_model().bfloat16())
    dtypes = {p.dtype for name, p in trainer.model.named_parameters() if not p.requires_grad}
    assert dtypes == {torch.bfloat16}
    assert {p.dtype for p in trainer.model.parameters() if p.requires_grad} == {torch.float32}
    trainer.train()
    trainer.save_model()
    loaded = PeftModel.from_pretrained(tiny_model().bfloat16(), tmp_path)
    torch.testing.assert_close(logits(loaded).float(), logits(trainer.model).float(), rtol=2e-2, atol=2e-2)


def test_a_causal_language_model_with_chosen_layers(tmp_path):
    model, _ = build("llama", AutoModelForCausalLM)
    rows = [{"input_ids": torch.arange(5, 15), "labels": torch.arange(5, 15)}] * 8
    args = SparseTrainingArguments(
        str(tmp_path), sparse_target_modules=r"layers\.0\.mlp\.(up|down)_proj", **{**OPTIONS, "num_train_epochs": 1}
    )
    trainer = SparseTrainer(model, args, train_dataset=rows)
    trainer.train()
    names = [name for name, _ in sparse_grad_layers(trainer.model)]
    assert [name.rpartition(".")[2] for name in names] == ["up_proj", "down_proj"] and len(names) == 2
    assert all(".sparse_grad_values." in n for n, p in trainer.model.named_parameters() if p.requires_grad)
    trainer.save_model()
    loaded = PeftModel.from_pretrained(build("llama", AutoModelForCausalLM)[0], tmp_path)
    batch = {"input_ids": rows[0]["input_ids"][None]}
    assert torch.equal(loaded.eval()(**batch).logits, trainer.model.eval()(**batch).logits)


@pytest.mark.parametrize("scope", ["layer", "kind"])
@pytest.mark.parametrize(("batch", "accumulation"), [(4, 1), (2, 2), (1, 4)])
def test_the_pre_pass_takes_the_batches_of_optimizer_steps(tmp_path, scope, batch, accumulation):
    trainer = structured(
        tmp_path, per_device_train_batch_size=batch, gradient_accumulation_steps=accumulation, sparse_density=0.9,
        sparse_basis_scope=scope,
    )  # fmt: skip
    choose_columns(trainer)
    order = torch.randperm(32, generator=torch.Generator().manual_seed(42)).tolist()
    base = tiny_model().eval()
    sums = {}

    def group_of(name):
        return re.sub(r"\.\d+\.", ".", name) if scope == "kind" else name

    for i in range(3):
        base.zero_grad()
        base(**trainer.data_collator([tiny_dataset(32)[row] for row in order[4 * i : 4 * i + 4]])).loss.backward()
        for name, _ in sparse_grad_layers(trainer.model):
            gradient = base.get_submodule(name.removeprefix("base_model.model.")).weight.grad.double()
            group = group_of(name)
            sums[group] = sums.get(group, 0) + gradient @ gradient.T
    for name, layer in sparse_grad_layers(trainer.model):
        found = layer.sparse_grad_columns["default"].out_columns.double()[:, :3]
        leading = torch.linalg.eigh(sums[group_of(name)]).eigenvectors.flip(1)[:, :3]
        torch.testing.assert_close((leading.T @ found).abs(), torch.eye(3).double(), rtol=0, atol=2e-2)


@pytest.mark.parametrize("column", [False, True])
def test_pre_pass_batches_hold_rows_of_similar_length_where_training_groups_them(tmp_path, column):
    trainer = structured(tmp_path, per_device_train_batch_size=4, train_sampling_strategy="group_by_length")
    rows = torch.randperm(32, generator=torch.Generator().manual_seed(42)).tolist()[:12]
    length = {row: len(trainer.train_dataset[row]["input_ids"]) for row in range(32)}
    if column:
        length = {row: -row for row in range(32)}
        trainer.train_dataset = trainer.train_dataset.add_column("length", list(length.values()))
    wanted = sorted((length[row] for row in rows), reverse=True)
    assert len(set(wanted)) > 3
    seen, collate = [], trainer.data_collator
    trainer.data_collator = lambda examples: seen.extend(examples) or collate(examples)
    assert len(list(own_steps(trainer, 3))) == 3
    if column:  # the collator does not see it
        texts = [trainer.train_dataset[-length]["input_ids"] for length in wanted]
        assert [example["input_ids"] for example in seen] == texts
    else:
        assert [len(example["input_ids"]) for example in seen] == wanted


def test_the_plan_before_the_pre_pass_counts_activations_and_state(tmp_path):
    trainer = structured(tmp_path)
    planned = training_plan(trainer)
    assert not any(columns.ready for columns in columns_of(trainer.model))
    trainer.train()
    assert training_plan(trainer).activation_bytes == pytest.approx(planned.activation_bytes, rel=0.05)
    columns = sum(b.numel() * 4 for c in columns_of(trainer.model) for b in c.buffers())
    trained = sum(p.numel() * 4 for p in trainer.model.parameters() if p.requires_grad)
    assert planned.memory["optimizer state"] == columns + 2 * trained
    assert planned.memory["gradients"] == trained


def test_a_model_with_such_an_adapter_is_taken_as_it_is(tmp_path):
    model = get_peft_model(tiny_model(), SparseGradConfig(n_params=9, task_type="SEQ_CLS"))
    args = SparseTrainingArguments(str(tmp_path), sparse_basis_steps=2, **OPTIONS)
    data = {"train_dataset": tiny_dataset(16), "processing_class": tiny_tokenizer()}
    trainer = SparseTrainer(model, args, **data)
    trainer.train()
    assert trainer.model is model and all(columns.ready for columns in columns_of(model))
    with pytest.raises(InputError, match="SparseGrad adapter, which already fixes sparse_n_params; leave it out"):
        SparseTrainer(model, SparseTrainingArguments(str(tmp_path), sparse_n_params=4, **OPTIONS), **data)
    with pytest.raises(InputError, match="sparse_support=dynamic is for the plain model; leave it out"):
        SparseTrainer(model, SparseTrainingArguments(str(tmp_path), sparse_support="dynamic", **OPTIONS), **data)


@pytest.mark.parametrize(
    "option", [{"sparse_train_rest": "all"}, {"sparse_basis": "none"}, {"sparse_basis_refresh_steps": 5},
               {"sparse_skip_leading": 0.1}, {"sparse_basis_orientation": "published"}],
)  # fmt: skip
def test_settings_that_an_adapter_lacks_convert_layers_and_are_logged(tmp_path, option, caplog):
    with caplog.at_level(logging.INFO, logger="hf_ft_ext"):
        trainer = structured(tmp_path, **option)
    assert sparse_layers(trainer.model) and not isinstance(trainer.model, PeftModel)
    name, value = next(iter(option.items()))
    assert f"{name}={value} converts layers in place" in caplog.text


def test_refusals(tmp_path):
    with pytest.raises(InputError, match=r"select layers with sparse_target_modules, a regular expression"):
        structured(tmp_path, tiny_classifier("squeezebert"))
    with pytest.raises(InputError, match="carries PEFT adapters; pass the base model"):
        structured(tmp_path, get_peft_model(tiny_model(), LoraConfig(task_type="SEQ_CLS")))
    with pytest.raises(InputError, match="matches no layer; linear layers here"):
        structured(tmp_path, sparse_target_modules="no_such_layer")
    with pytest.raises(InputError, match=r"sparse_basis=svd is for structured support .* and sparse_support=dynamic"):
        SparseTrainingArguments(str(tmp_path), sparse_basis="svd", sparse_support="dynamic")
    with pytest.raises(InputError, match="optim='adafactor' has no sparse form for converted layers"):
        structured(tmp_path, sparse_train_rest="all", optim="adafactor")
    model = tiny_model()
    convert_to_sparse(model, support="structured")
    with pytest.raises(InputError, match="optim='adafactor' has no sparse form for converted layers"):
        make(tmp_path, model, sparse_support="structured", optim="adafactor")


# --- trl ---------------------------------------------------------------------------------------------


def test_trls_trainer_takes_the_configuration(tmp_path):
    trl = pytest.importorskip("trl")
    model, _ = build("llama", AutoModelForCausalLM)
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = "[SEP]"
    from datasets import Dataset

    rows = Dataset.from_list([{"text": text} for text in ("good film", "a great plot", "bad film", "a dull plot")])
    args = trl.SFTConfig(
        output_dir=str(tmp_path), max_steps=3, per_device_train_batch_size=2, report_to=[], use_cpu=True, bf16=False,
        learning_rate=1e-2, max_length=16, disable_tqdm=True, eos_token="[SEP]",
    )  # fmt: skip
    trainer = trl.SFTTrainer(
        model, args, train_dataset=rows, processing_class=tokenizer, peft_config=SparseGradConfig(density=0.2)
    )
    with pytest.raises(InputError, match="call compute_bases"):
        trainer.train()
    compute_bases(trainer.model, trainer.get_train_dataloader(), gradients=2)
    trainer.train()
    values = [p for name, p in trainer.model.named_parameters() if "sparse_grad_values" in name]
    assert values and all(p.abs().max() > 0 for p in values)
    trainer.save_model()
    loaded = PeftModel.from_pretrained(build("llama", AutoModelForCausalLM)[0], tmp_path)
    ids = {"input_ids": torch.arange(5, 12)[None]}
    assert torch.equal(loaded.eval()(**ids).logits, trainer.model.eval()(**ids).logits)


# --- export ------------------------------------------------------------------------------------------
