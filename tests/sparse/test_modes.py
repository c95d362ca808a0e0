"""Every mode of SparseTrainer: trains what it says, saves a plain model, resumes bit for bit."""

import pytest
import torch
from sparse_trainer import INPUTS, assert_close, make, reference_gradients, weights
from tiny import tiny_dataset, tiny_model
from transformers import AutoModelForSequenceClassification

from hf_ft_ext import (
    InputError,
    SparseTrainingArguments,
    convert_to_sparse,
    merge_sparse,
    prepare_layers,
    sparse_layers,
)
from hf_ft_ext.training.runs.plan import trained_weights, training_plan

MODES = [
    {"sparse_support": support, "sparse_basis": basis}
    for support in ("dynamic", "static", "structured")
    for basis in ("hosvd", "none", "random")
] + [
    {"sparse_basis_scope": "layer", "sparse_support": "structured", "sparse_train_rest": "head"},
    {"sparse_basis_orientation": "published"},
    {"sparse_threshold": 2e-4, "sparse_density": None},
    {"sparse_train_rest": "none", "sparse_support": "structured"},
    {"sparse_basis_refresh_steps": 2},
    {"sparse_basis_refresh_steps": 2, "sparse_basis_orientation": "published", "sparse_moments": "dense"},
    {"sparse_basis_refresh_steps": 2, "sparse_support": "static"},
    {"sparse_basis_refresh_steps": 2, "sparse_support": "structured"},
    {"sparse_train_rest": r"LayerNorm|output\.dense\.bias", "sparse_support": "static"},
]
IDS = ["-".join(str(value) for value in mode.values() if value) for mode in MODES]


@pytest.mark.parametrize("mode", MODES, ids=IDS)
def test_trains_what_the_counts_say_saves_the_plain_model_and_resumes_bit_for_bit(tmp_path, mode):
    counts = {} if "sparse_threshold" in mode else {"sparse_density": None, "sparse_n_params": 20}
    mode = {**counts, **mode, "save_strategy": "steps", "save_steps": 3, "max_steps": 5}
    trainer = make(tmp_path / "a", **mode)
    before = weights(trainer)
    rows = {row.name: row.trained for row in trained_weights(trainer)}
    trainer.train()
    assert_only_counted_entries_changed(trainer, before, rows)
    trainer.save_model()
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "a").eval()
    assert torch.equal(loaded(**INPUTS).logits, trainer.model.eval()(**INPUTS).logits)
    assert set(loaded.state_dict()) == set(tiny_model().state_dict())

    resumed = make(tmp_path / "b", tiny_model(seed=5), **mode)
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-3"))
    for name, value in weights(resumed).items():
        assert torch.equal(value, weights(trainer)[name]), name


def assert_only_counted_entries_changed(trainer, before: dict, rows: dict[str, int]) -> None:
    """Weights of `rows` and no others differ from `before`; of a fixed support, only as many entries as it says."""
    for name, value in weights(trainer).items():
        changed = not torch.equal(value, before[name])
        if not name.endswith("values") and "token_type" not in name:
            assert changed == (name in rows), name
    if trainer.args.sparse_support == "dynamic":
        return
    for name, layer in sparse_layers(trainer.model).items():
        support, change = layer.support, layer.weight.detach() - before[f"{name}.weight"]
        assert rows[f"{name}.weight"] == support.size == layer.values.numel() >= 20
        # All of the change lies in the chosen entries: putting it back leaves the old weight.
        for earlier, values in layer.changes():
            earlier.add_to(change, -values)
        assert change.abs().max() < 1e-6
        torch.testing.assert_close(support.pick(support.block_of(layer.weight)), layer.values, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("support", ["dynamic", "static", "structured"])
@pytest.mark.parametrize("half", ["autocast", "weights"])
def test_bfloat16_keeps_the_trained_entries_in_float32(tmp_path, support, half):
    model = tiny_model() if half == "autocast" else tiny_model().bfloat16()
    trainer = make(tmp_path, model, bf16=half == "autocast", sparse_support=support)
    layers = sparse_layers(trainer.model)
    assert {layer.weight.dtype for layer in layers.values()} == {torch.float32}
    before = {name: layer.weight.detach().clone() for name, layer in layers.items()}
    trainer.train()
    for name, layer in layers.items():
        change = (layer.weight.detach() - before[name]).abs()
        assert 0 < change.max() < 1 and torch.isfinite(change).all()
        assert layer.values is None or layer.values.dtype == torch.float32
    trainer.save_model()
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path, dtype=model.dtype)
    merged = merge_sparse(trainer.model).state_dict()
    assert {value.dtype for value in merged.values()} == {model.dtype}
    assert all(torch.equal(value, merged[name]) for name, value in loaded.state_dict().items())


@pytest.mark.parametrize("support", ["static", "adapter"])
def test_compiled_model_trains_to_the_same_weights(tmp_path, support):
    adapter = support == "adapter"
    options = {"sparse_support": "structured" if adapter else support, "adapter": adapter}
    options |= {"max_steps": 2, "adam_epsilon": 1e-2}
    plain = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "num_hidden_layers": 1}
    eager = make(tmp_path, tiny_model(**plain), **options)
    compiled = make(tmp_path, tiny_model(**plain), torch_compile=True, torch_compile_backend="eager", **options)
    for trainer in (eager, compiled):
        trainer.train()
    assert_close(weights(eager), weights(compiled), 1e-5)


@pytest.mark.parametrize("basis", ["hosvd", "none"])
def test_the_plan_before_the_pre_pass_counts_activations_and_state(tmp_path, basis):
    planned = {}
    for support in ("dynamic", "static", "structured"):
        trainer = make(tmp_path, sparse_support=support, sparse_basis=basis, sparse_train_rest="head")
        before = training_plan(trainer)
        assert all(layer.support is None for layer in sparse_layers(trainer.model).values())
        trainer.train()
        measured = training_plan(trainer).activation_bytes
        if support == "static":  # its entries may lie in fewer columns than there are
            assert measured <= before.activation_bytes <= 1.3 * measured
        else:
            assert before.activation_bytes == pytest.approx(measured, rel=0.05)
        planned[support] = before.memory
    assert planned["structured"]["activations"] < planned["dynamic"]["activations"]
    assert planned["structured"]["gradients"] < planned["dynamic"]["gradients"] / 5
    assert planned["structured"]["optimizer state"] < planned["dynamic"]["optimizer state"]


@pytest.mark.parametrize("support", ["static", "structured"])
def test_accumulation_equals_one_large_batch(tmp_path, support):
    plain = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    options = {"adam_epsilon": 1e-2, "sparse_support": support, "sparse_basis": "none", "sparse_train_rest": "head"}
    whole = make(tmp_path, tiny_model(**plain), per_device_train_batch_size=8, **options)
    split = make(
        tmp_path, tiny_model(**plain), per_device_train_batch_size=2, gradient_accumulation_steps=4, **options
    )
    whole.train()
    split.train()
    assert_close(weights(whole), weights(split), 1e-5)


@pytest.mark.parametrize("basis", ["none", "random", "hosvd"])
def test_static_entries_have_the_largest_mean_energy(tmp_path, basis):
    # Batches of one row: short enough that the backward pass would rotate activations.
    options = {"per_device_train_batch_size": 1, "sparse_support": "static", "sparse_density": 0.05}
    rows = tiny_dataset(32, length=5)
    trainer = make(tmp_path, sparse_basis=basis, dataset=rows, **options)
    layers = sparse_layers(trainer.model)
    prepare_layers(trainer, layers, trainer.args)
    factors = {}
    if basis != "none":  # the trainer keeps only the columns that it needs
        other = make(tmp_path, sparse_basis=basis, dataset=rows, **options | {"sparse_support": "dynamic"})
        prepare_layers(other, sparse_layers(other.model), other.args)
        factors = {name: layer.basis for name, layer in sparse_layers(other.model).items()}
    energy = dict.fromkeys(layers, 0)
    for gradients in reference_gradients(trainer, 3, batch_size=1):
        for name, gradient in gradients.items():
            rotated = factors[name].rotate(gradient) if factors else gradient
            energy[name] = energy[name] + rotated.square()
    for name, layer in layers.items():
        support = layer.support
        block = torch.zeros(len(support.rows) * len(support.columns), dtype=torch.bool)
        block[support.entries] = True
        chosen = torch.zeros_like(energy[name], dtype=torch.bool)
        chosen[support.rows[:, None], support.columns] = block.view(len(support.rows), -1)
        assert chosen.sum() == layer.n_params
        assert energy[name][chosen].min() >= energy[name][~chosen].max() * (1 - 1e-4)


@pytest.mark.parametrize("support", ["dynamic", "structured"])
def test_preparing_twice_gives_the_same(tmp_path, support):
    trainer = make(tmp_path, per_device_train_batch_size=1, dataset=tiny_dataset(32, length=5), sparse_support=support)
    layers, found = sparse_layers(trainer.model), []
    for _ in range(2):
        prepare_layers(trainer, layers, trainer.args)
        layer = next(iter(layers.values()))
        found.append((layer.basis.out_factor if support == "dynamic" else layer.support.out_columns).clone())
        assert support == "structured" or layer.basis.rotates == "activations"
    assert torch.equal(*found)


def test_structured_rows_and_columns_have_the_largest_energy(tmp_path):
    trainer = make(tmp_path, sparse_support="structured", sparse_basis="none", sparse_density=0.05)
    layers = sparse_layers(trainer.model)
    prepare_layers(trainer, layers, trainer.args)
    energy = {layer.kind: 0 for layer in layers.values()}
    for gradients in reference_gradients(trainer, 3):
        for name, gradient in gradients.items():
            energy[layers[name].kind] = energy[layers[name].kind] + gradient.square()
    for layer in layers.values():
        for chosen, sums in zip(
            (layer.support.rows, layer.support.columns),
            (energy[layer.kind].sum(1), energy[layer.kind].sum(0)),
            strict=True,
        ):
            assert set(chosen.tolist()) == set(sums.topk(len(chosen)).indices.tolist())


@pytest.mark.parametrize("skip", [0.25, 0.99])
def test_skipped_directions_are_the_leading_ones(tmp_path, skip):
    dynamic = make(tmp_path)
    prepare_layers(dynamic, sparse_layers(dynamic.model), dynamic.args)
    trainer = make(tmp_path, sparse_support="structured", sparse_skip_leading=skip)
    prepare_layers(trainer, sparse_layers(trainer.model), trainer.args)
    for layer, whole in zip(*(sparse_layers(t.model).values() for t in (trainer, dynamic)), strict=True):
        for columns, factor, chosen in (
            (layer.support.out_columns, whole.basis.out_factor, layer.block[0]),
            (layer.support.in_columns, whole.basis.in_factor, layer.block[1]),
        ):
            first = min(round(skip * len(factor)), len(factor) - chosen)
            assert first > 0 and torch.equal(columns, factor[:, first : first + chosen])


def test_layers_of_one_kind_share_basis_and_block(tmp_path):
    trainer = make(tmp_path, sparse_support="structured")
    layers = list(sparse_layers(trainer.model).values())
    prepare_layers(trainer, sparse_layers(trainer.model), trainer.args)
    assert len({id(layer.support) for layer in layers}) == 2
    assert all(layer.basis.out_factor is None for layer in layers)  # nothing of size out x out is kept
    per_layer = convert_to_sparse(tiny_model(), basis_scope="layer")
    assert len({id(layer.basis) for layer in per_layer.values()}) == 4


def test_layers_of_another_support_are_refused(tmp_path):
    trainers = {name: make(tmp_path, sparse_support=name) for name in ("dynamic", "static", "structured")}
    for own, trainer in trainers.items():
        for wanted in trainers.keys() - {own}:
            with pytest.raises(InputError, match=f"converted with support='{own}', but sparse_support is '{wanted}'"):
                prepare_layers(trainer, sparse_layers(trainer.model), trainers[wanted].args)


def test_published_orientation_transposes_the_input_factor(tmp_path):
    tucker, published = make(tmp_path), make(tmp_path, sparse_basis_orientation="published")
    for trainer in (tucker, published):
        prepare_layers(trainer, sparse_layers(trainer.model), trainer.args)
    for a, b in zip(sparse_layers(tucker.model).values(), sparse_layers(published.model).values(), strict=True):
        assert torch.equal(a.basis.out_factor, b.basis.out_factor)
        assert torch.equal(a.basis.in_factor.T, b.basis.in_factor)


def test_random_bases_are_orthonormal_and_seeded(tmp_path):
    factors = []
    for seed in (1, 1, 2):
        trainer = make(tmp_path, sparse_basis="random", seed=seed)
        prepare_layers(trainer, sparse_layers(trainer.model), trainer.args)
        factors.append(next(iter(sparse_layers(trainer.model).values())).basis.out_factor)
    torch.testing.assert_close(factors[0].T @ factors[0], torch.eye(48), rtol=0, atol=1e-5)
    assert torch.equal(factors[0], factors[1]) and not torch.equal(factors[0], factors[2])


def test_state_of_another_support_is_refused(tmp_path):
    make(tmp_path, sparse_support="structured", save_strategy="epoch", num_train_epochs=1).train()
    trainer = make(tmp_path, save_strategy="epoch")
    with pytest.raises(ValueError, match=r"doesn't match|no basis for|fixed supports"):
        trainer.train(resume_from_checkpoint=True)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"sparse_support": "dynamik"}, "sparse_support='dynamik' is unknown; choose from: dynamic, static"),
        ({"sparse_basis": "pca"}, "sparse_basis='pca' is unknown"),
        ({"sparse_basis_scope": "all"}, "sparse_basis_scope='all' is unknown"),
        ({"sparse_basis_orientation": "published", "sparse_basis": "random"}, "is about the hosvd basis"),
        (
            {"sparse_basis": "none", "sparse_support": "dynamic", "sparse_basis_steps": 5},
            "needs no gradients before training; leave sparse_basis",
        ),
        (
            {"sparse_basis": "none", "sparse_support": "dynamic", "sparse_basis_scope": "layer"},
            "has nothing that layers could share",
        ),
        ({"sparse_threshold": 0.0}, "sparse_threshold=0.0 is out of range"),
        ({"sparse_threshold": 1e-3, "sparse_n_params": 5}, "says which entries a step updates"),
        ({"sparse_threshold": 1e-3, "sparse_support": "static"}, "is for sparse_support=dynamic, not static"),
    ],
)
def test_bad_modes(tmp_path, options, message):
    with pytest.raises(InputError, match=message):
        SparseTrainingArguments(output_dir=str(tmp_path), **options)


@pytest.mark.parametrize(
    "rest, message",
    [("no_such", "'no_such' matches no parameter; pass all, head, none"), ("(", "is no regular expression")],
)
def test_bad_train_rest(tmp_path, rest, message):
    with pytest.raises(InputError, match=message):
        make(tmp_path, sparse_train_rest=rest)
