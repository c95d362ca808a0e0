"""SparseTrainer: what it trains, what it saves, and that splits, processes and resumes change nothing."""

from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from processes import two_ranks
from sparse_trainer import INPUTS, OPTIONS, assert_close, make, reference_gradients, weights
from tiny import CONFIGS, tiny_dataset, tiny_model, tiny_tokenizer
from torch import nn
from transformers import AutoModelForSequenceClassification, TrainingArguments

from hf_ft_ext import (
    InputError,
    LoraTrainingArguments,
    SparseAdamW,
    SparseGradConfig,
    SparseTrainer,
    SparseTrainingArguments,
)
from hf_ft_ext.sparse.basis import ACTIVATIONS, GRADIENT
from hf_ft_ext.sparse.convert import convert_to_sparse, sparse_layers
from hf_ft_ext.sparse.prepare import compute_layer_bases
from hf_ft_ext.training.runs.plan import trained_weights, training_plan


@pytest.mark.parametrize("model_type", CONFIGS)
def test_trains_every_parameter_and_saves_the_plain_model(tmp_path, model_type):
    trainer = make(tmp_path, tiny_model(model_type))
    before = weights(trainer)
    trainer.train()
    still = [name for name, value in weights(trainer).items() if torch.equal(value, before[name])]
    # Tokens, positions and segments that never occur keep their rows, so embeddings move as a whole or not at all.
    assert [name for name in still if "token_type" not in name] == []
    trainer.save_model()
    logits = trainer.model.eval()(**INPUTS).logits
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    assert type(loaded) is type(tiny_model(model_type))
    assert torch.equal(loaded(**INPUTS).logits, logits)
    assert not torch.equal(tiny_model(model_type).eval()(**INPUTS).logits, logits)


def test_learns_on_few_rows(tmp_path):
    trainer = make(tmp_path, num_train_epochs=12, learning_rate=2e-2)
    first = trainer.evaluate(trainer.train_dataset)["eval_loss"]
    trainer.train()
    assert trainer.evaluate(trainer.train_dataset)["eval_loss"] < 0.5 * first


@pytest.mark.parametrize("accumulation", [1, 2])
def test_resumed_run_equals_the_unbroken_one(tmp_path, accumulation):
    options = {"save_strategy": "steps", "save_steps": 1, "gradient_accumulation_steps": accumulation}
    unbroken = make(tmp_path / "a", **options)
    unbroken.train()
    resumed = make(tmp_path / "b", tiny_model(seed=5), **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-3"))
    for name, value in weights(resumed).items():
        assert torch.equal(value, weights(unbroken)[name]), name


def test_resume_true_takes_the_last_checkpoint_without_a_pre_pass(tmp_path, monkeypatch):
    make(tmp_path, save_strategy="epoch", num_train_epochs=1).train()
    monkeypatch.setattr("hf_ft_ext.sparse.trainer.prepare_layers", None)
    trainer = make(tmp_path, save_strategy="epoch")
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 8


def test_checkpoint_without_optimizer_computes_the_basis_anew(tmp_path):
    make(tmp_path, save_strategy="epoch", save_only_model=True, num_train_epochs=1).train()
    trainer = make(tmp_path, save_strategy="epoch")
    trainer.train(resume_from_checkpoint=True)
    assert all(layer.basis.ready for layer in sparse_layers(trainer.model).values())


def test_accumulation_equals_one_large_batch(tmp_path):
    model = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    # A large epsilon: AdamW turns gradients that are zero up to rounding into steps of full size.
    whole, split = (
        make(
            tmp_path,
            tiny_model(**model),
            per_device_train_batch_size=size,
            gradient_accumulation_steps=steps,
            adam_epsilon=1e-2,
        )
        for size, steps in ((8, 1), (2, 4))
    )
    before = weights(whole)
    whole.train()
    split.train()
    assert_close(weights(whole), weights(split), 1e-4)
    assert max((value - before[name]).abs().max() for name, value in weights(whole).items()) > 1e-3


@pytest.mark.parametrize("support", ["dynamic", "static", "structured"])
def test_weight_decay_leaves_biases_and_norms_out(tmp_path, support):
    adapter = support == "structured"
    trainer = make(tmp_path, sparse_support=support, sparse_basis="random", adapter=adapter, weight_decay=0.1)
    if adapter:
        trainer.model.get_base_model().bert.embeddings.requires_grad_(True)
    groups = trainer.create_optimizer().param_groups
    names = {id(p): name for name, p in trainer.model.named_parameters()}
    decays = {names[id(p)]: group["weight_decay"] == 0.1 for group in groups for p in group["params"]}
    assert decays == {name: not ("bias" in name or "LayerNorm" in name) for name in decays}
    assert {True, False} == set(decays.values())


def test_best_model_is_loaded_at_the_end(tmp_path):
    trainer = make(tmp_path, save_strategy="epoch", eval_strategy="epoch", load_best_model_at_end=True)
    trainer.train()
    best = min(log["eval_loss"] for log in trainer.state.log_history if "eval_loss" in log)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(best, rel=1e-6)


def test_gradient_clipping_bounds_what_the_optimizer_sees(tmp_path):
    norms = []

    class Watch(SparseAdamW):
        def step(self, closure=None):
            gradients = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
            norms.append(torch.stack([g.norm() for g in gradients]).norm().item())
            return super().step(closure)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hf_ft_ext.sparse.trainer.SparseAdamW", Watch)
        make(tmp_path, max_grad_norm=0.01).train()
    assert len(norms) == 8 and max(norms) <= 0.0101


def test_bf16_autocast_trains(tmp_path):
    trainer = make(tmp_path, bf16=True)
    before = weights(trainer)
    trainer.train()
    layer = next(iter(sparse_layers(trainer.model)))
    assert not torch.equal(weights(trainer)[f"{layer}.weight"], before[f"{layer}.weight"])


def test_plain_arguments_are_completed_and_foreign_ones_refused(tmp_path):
    trainer = SparseTrainer(tiny_model(), TrainingArguments(output_dir=str(tmp_path), **OPTIONS))
    assert isinstance(trainer.args, SparseTrainingArguments) and trainer.args.learning_rate == 5e-3
    with pytest.raises(InputError, match="LoraTrainingArguments, which belongs to another method"):
        SparseTrainer(tiny_model(), LoraTrainingArguments(output_dir=str(tmp_path), **OPTIONS))


def test_model_init_converts_each_new_model(tmp_path):
    args = SparseTrainingArguments(output_dir=str(tmp_path), sparse_support="dynamic", sparse_basis_steps=2, **OPTIONS)
    trainer = SparseTrainer(
        args=args, model_init=lambda: tiny_model(), train_dataset=tiny_dataset(16), processing_class=tiny_tokenizer()
    )
    trainer.train()
    first = weights(trainer)
    trainer.train()
    assert sparse_layers(trainer.model)
    for name, value in weights(trainer).items():
        assert torch.equal(value, first[name])


def test_counts_name_the_trained_entries(tmp_path):
    trainer = make(tmp_path, sparse_density=None, sparse_n_params=50)
    rows = {row.name: row for row in trained_weights(trainer)}
    assert rows["bert.encoder.layer.0.output.dense.weight"].trained == 50
    plan = training_plan(trainer)
    dense = sum(p.numel() for n, p in trainer.model.named_parameters())
    assert plan.trainable == dense - 4 * (48 * 32 - 50)
    assert plan.steps == 8


@pytest.mark.slow
def test_two_processes_hold_the_same_weights_supports_and_bases(tmp_path):
    two_ranks(Path(__file__).with_name("two_ranks.py"), str(tmp_path))


# --- the pre-pass ----------------------------------------------------------------------------------


def test_pre_pass_sums_the_gradients_of_its_batches(tmp_path):
    trainer = make(tmp_path)
    layers = sparse_layers(trainer.model)
    before = weights(trainer)
    state = torch.get_rng_state()
    compute_layer_bases(trainer, layers, steps=3)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in weights(trainer).items())
    assert all(parameter.grad is None for parameter in trainer.model.parameters())
    expected = {}
    for gradients in reference_gradients(trainer, 3):
        for name, gradient in gradients.items():
            kind = layers[name].kind
            expected[kind] = expected.get(kind, 0) + gradient @ gradient.T
    for layer in layers.values():
        rotated = layer.basis.out_factor.T @ expected[layer.kind] @ layer.basis.out_factor
        off_diagonal = rotated - rotated.diag().diag()
        assert off_diagonal.abs().max() < 1e-5 * rotated.max()
        assert (rotated.diag().diff() <= 1e-5 * rotated.max()).all()  # falling energy


@pytest.mark.parametrize("options", [{"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}])
def test_pre_pass_is_the_same_in_micro_batches(tmp_path, options):
    whole, split = make(tmp_path), make(tmp_path, **options)
    for trainer in (whole, split):
        compute_layer_bases(trainer, sparse_layers(trainer.model), steps=3)
    for a, b in zip(sparse_layers(whole.model).values(), sparse_layers(split.model).values(), strict=True):
        overlap = (a.basis.out_factor[:, :3].T @ b.basis.out_factor[:, :3]).abs()
        torch.testing.assert_close(overlap, torch.eye(3), rtol=0, atol=1e-3)


def test_pre_pass_chooses_where_to_rotate_from_the_tokens(tmp_path):
    short = make(tmp_path, per_device_train_batch_size=1, dataset=tiny_dataset(32, length=5))
    long = make(tmp_path, per_device_train_batch_size=16)
    for trainer, expected in ((short, ACTIVATIONS), (long, GRADIENT)):
        compute_layer_bases(trainer, sparse_layers(trainer.model), steps=2)
        assert {layer.basis.rotates for layer in sparse_layers(trainer.model).values()} == {expected}


def test_pre_pass_longer_than_the_data_repeats_them_and_says_so(tmp_path, caplog):
    trainer = make(tmp_path, dataset=tiny_dataset(12))
    with caplog.at_level("INFO", logger="hf_ft_ext"):
        compute_layer_bases(trainer, sparse_layers(trainer.model), steps=5)
    assert "5 pre-pass batches of 8 rows use the 12 training rows more than once" in caplog.text


def test_pre_pass_reads_a_stream(tmp_path):
    stream = tiny_dataset(12).to_iterable_dataset()
    trainer = make(tmp_path, dataset=stream, max_steps=3)
    trainer.train()
    assert trainer.state.global_step == 3


def test_pre_pass_stops_at_a_gradient_that_is_not_finite(tmp_path):
    trainer = make(tmp_path)
    with torch.no_grad():
        trainer.model.get_submodule("bert.encoder.layer.1.output.dense").weight[0, 0] = float("nan")
    with pytest.raises(InputError, match=r"gradient of bert\.encoder\.layer\.\d\..* is not finite in batch 0"):
        trainer.train()


# --- refusals --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, message",
    [
        ({"sparse_density": 0.0}, r"sparse_density=0.0 is out of range; pass a number in \(0, 1\]"),
        ({"sparse_density": 1.5}, "sparse_density=1.5 is out of range"),
        ({"sparse_n_params": 0}, "sparse_n_params=0 leaves nothing to train"),
        ({"sparse_n_params": 5, "sparse_density": 0.1}, "both say how many entries"),
        ({"sparse_basis_steps": 0}, "sparse_basis_steps=0 gives no gradient"),
        ({"sparse_target_modules": ["dense"]}, r"one regular expression, .* got \['dense'\]; join several by \|"),
    ],
)
def test_bad_arguments(tmp_path, options, message):
    with pytest.raises(InputError, match=message):
        SparseTrainingArguments(output_dir=str(tmp_path), **options)


def test_refused_options(tmp_path):
    with pytest.raises(InputError, match="optim='adafactor' has no sparse form for converted layers; use adamw_torch"):
        make(tmp_path, optim="adafactor")
    args = SparseTrainingArguments(output_dir=str(tmp_path), **OPTIONS)
    model = tiny_model()
    optimizers = (torch.optim.SGD(model.parameters()), None)
    with pytest.raises(InputError, match="makes its own optimizer"):
        SparseTrainer(model, args, optimizers=optimizers)
    model.peft_config = {}
    with pytest.raises(InputError, match="carries PEFT adapters"):
        SparseTrainer(model, args)
    with pytest.raises(InputError, match="needs a train_dataset"):
        trainer = make(tmp_path)
        trainer.train_dataset = None
        compute_layer_bases(trainer, sparse_layers(trainer.model), 1)


def test_user_converted_model_is_taken_as_it_is(tmp_path):
    model = tiny_model()
    convert_to_sparse(model, n_params=3, target_modules=r"pooler\.dense")
    trainer = make(tmp_path, model)
    linear = [name for name, module in trainer.model.named_modules() if type(module) is nn.Linear]
    assert list(sparse_layers(trainer.model)) == ["bert.pooler.dense"] and "bert.pooler.dense" not in linear
    before = weights(trainer)
    trainer.train()
    changed = (trainer.model.bert.pooler.dense.weight - before["bert.pooler.dense.weight"]).abs() > 0
    assert 0 < changed.sum() <= 32 * 32
    assert not torch.equal(trainer.model.classifier.weight, before["classifier.weight"])


@pytest.mark.parametrize("options", [{"support": "structured"}, {"basis": "none"}])
def test_user_converted_model_must_fit_the_arguments(tmp_path, options):
    model = tiny_model()
    convert_to_sparse(model, **options)
    with pytest.raises(InputError, match=r"was converted with .* but the arguments say sparse_support=dynamic"):
        make(tmp_path, model)


def test_arguments_that_a_converted_model_fixes_are_refused(tmp_path):
    model = tiny_model()
    convert_to_sparse(model, n_params=3)
    with pytest.raises(InputError, match=r"converted already, which already fixes sparse_density; leave it out"):
        make(tmp_path, model, sparse_density=0.5)
    with pytest.raises(InputError, match=r"with another basis_scope than sparse_basis_scope=layer; pass the same"):
        make(tmp_path, model, sparse_density=None, sparse_basis_scope="layer")
    make(tmp_path, model, sparse_density=None, sparse_basis_scope="kind")


@pytest.mark.parametrize(
    ("init", "option", "message"),
    [("gradient", {"sparse_basis": "svd"}, r"sparse_basis \(init='gradient', not svd\)"),
     ("svd", {"sparse_basis": "random"}, r"sparse_basis \(init='svd', not random\)"),
     ("random", {"sparse_basis_steps": 3}, "the basis, so that sparse_basis_steps=3 would have no effect")],
)  # fmt: skip
def test_arguments_that_an_adapter_fixes_are_refused(tmp_path, init, option, message):
    model = get_peft_model(tiny_model(), SparseGradConfig(n_params=9, init=init, task_type="SEQ_CLS"))
    args = SparseTrainingArguments(str(tmp_path), **option)
    with pytest.raises(InputError, match=f"SparseGrad adapter, which already fixes {message}; leave it out"):
        SparseTrainer(model, args, train_dataset=tiny_dataset(16))


def test_an_optimizer_passed_by_position_is_refused(tmp_path):
    model = tiny_model()
    args = SparseTrainingArguments(output_dir=str(tmp_path), **OPTIONS)
    optimizers = (torch.optim.SGD(model.parameters()), None)
    with pytest.raises(InputError, match="makes its own optimizer"):
        SparseTrainer(model, args, None, None, None, None, None, None, None, None, optimizers)
