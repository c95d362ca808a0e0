"""Structured SparseGrad adapters: the subspace, the pre-pass that chooses their columns, training, refusals."""

import copy

import pytest
import torch
from classifiers import classifier_rows, tiny_classifier
from families import FAMILIES, batch, family
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from safetensors.torch import load_file
from spans import principal_angle
from transformers.pytorch_utils import Conv1D
from zoo import inputs, logits, small

from hf_ft_ext import SparseGradConfig, compute_bases
from hf_ft_ext.adapters.sparse_grad.bases import bases_from_steps
from hf_ft_ext.adapters.sparse_grad.layer import singular_vectors
from hf_ft_ext.adapters.sparse_grad.model import sparse_grad_layers
from hf_ft_ext.adapters.sparse_grad.subspace import Sketch, random_columns, random_test_matrix
from hf_ft_ext.errors import InputError


def adapted(kind="bert", seed=0, dtype=torch.float64, **config):
    """A tiny classifier with an adapter, in float64; its blocks take most of each weight unless told otherwise."""
    if "n_params" not in config:
        config = {"density": 0.5, **config}
    config = {"task_type": "SEQ_CLS", **config}
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return get_peft_model(family(kind, seed).to(dtype), SparseGradConfig(**config))


def labelled(n=5, seed=0):
    return {**batch(n, seed=seed), "labels": torch.arange(n) % 2}


# --- the subspace ------------------------------------------------------------------------------------


@pytest.mark.parametrize("n, k, decay", [(96, 12, 0.7), (200, 1, 0.7), (300, 20, 0.6), (64, 60, 0.95), (40, 40, 0.99)])
def test_sketch_finds_the_leading_eigenvectors_of_a_spectrum_with_decay(n, k, decay):
    torch.manual_seed(0)
    vectors = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64)).Q
    scales = decay ** torch.arange(n).double()[:, None]
    sketch = Sketch(random_test_matrix(n, k, 3, torch.float64, torch.device("cpu")), k)
    total = torch.zeros(n, n, dtype=torch.float64)
    for _ in range(20):
        gradient = vectors @ (scales * torch.randn(n, 40, dtype=torch.float64))
        total += gradient @ gradient.T
        sketch.add(gradient @ (gradient.T @ sketch.omega))
    leading = torch.linalg.eigh(total).eigenvectors.flip(1)[:, :k]
    found = sketch.leading(seed=0)
    torch.testing.assert_close(found.T @ found, torch.eye(k, dtype=torch.float64), rtol=0, atol=1e-10)
    assert principal_angle(leading, found) < 1e-2


def test_sketch_keeps_the_energy_of_a_spectrum_without_decay():
    torch.manual_seed(0)
    n, k = 200, 40
    total, sketch = 0, Sketch(random_test_matrix(n, k, 3, torch.float64, torch.device("cpu")), k)
    for _ in range(20):
        gradient = (1 / (1 + torch.arange(n).double()))[:, None] * torch.randn(n, 40, dtype=torch.float64)
        total = total + gradient @ gradient.T
        sketch.add(gradient @ (gradient.T @ sketch.omega))
    found = sketch.leading(seed=0)
    kept = (found.T @ total @ found).trace() / total.trace()
    assert kept > torch.linalg.eigvalsh(total).flip(0)[:k].sum() / total.trace() - 0.005


def test_directions_without_energy_are_orthonormal_too():
    low_rank = random_columns(40, 2, 0, torch.float32)
    for gradients in ([], [low_rank]):
        sketch = Sketch(random_test_matrix(40, 9, 3, torch.float32, torch.device("cpu")), 9)
        for gradient in gradients:
            sketch.add(gradient @ (gradient.T @ sketch.omega))
        found = sketch.leading(seed=0)
        torch.testing.assert_close(found.T @ found, torch.eye(9), rtol=0, atol=1e-5)
        if gradients:
            assert principal_angle(found[:, :2], low_rank) < 1e-2


@pytest.mark.parametrize("accumulated", [False, True])
@pytest.mark.parametrize("kind", FAMILIES)
def test_bfloat16_gradients_keep_the_energy_of_float64_ones(kind, accumulated):
    batches = [labelled(8, seed=seed) for seed in range(4)]
    model = adapted(kind, density=0.25, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        if accumulated:
            bases_from_steps(model, [batches[:2], batches[2:]], None, True)
        else:
            compute_bases(model, batches)
    layers = {name.removeprefix("base_model.model."): layer for name, layer in sparse_grad_layers(model)}
    exact = list(gradients_of_the_base(kind, layers, batches))
    if accumulated:
        exact = [{name: a[name] + b[name] for name in a} for a, b in (exact[:2], exact[2:])]
    for name, layer in layers.items():
        columns = layer.sparse_grad_columns["default"]
        for found, gram in (
            (columns.out_columns, sum(g[name] @ g[name].T for g in exact)),
            (columns.in_columns, sum(g[name].T @ g[name] for g in exact)),
        ):
            found, k = found.double(), found.shape[1]
            torch.testing.assert_close(found.T @ found, torch.eye(k, dtype=torch.float64), rtol=0, atol=1e-5)
            kept = (found.T @ gram @ found).trace() / gram.trace()
            assert kept > torch.linalg.eigvalsh(gram).flip(0)[:k].sum() / gram.trace() - 0.01


def test_svd_columns_are_those_of_the_weight():
    torch.manual_seed(0)
    weight = torch.randn(60, 40, dtype=torch.float64) @ torch.diag(0.8 ** torch.arange(40).double())
    out_columns, in_columns = singular_vectors([weight], (5, 7), seed=0)
    u, _, vt = torch.linalg.svd(weight)
    assert principal_angle(u[:, :5], out_columns) < 1e-2 and principal_angle(vt[:7].T, in_columns) < 1e-2


# --- the pre-pass ------------------------------------------------------------------------------------


def gradients_of_the_base(kind, names, batches):
    """Weight gradients by one plain backward pass for each batch, (out, in)."""
    model = family(kind).double().eval()
    for rows in batches:
        model.zero_grad()
        model(**rows).loss.backward()
        found = {name: model.get_submodule(name) for name in names}
        yield {n: m.weight.grad.T if isinstance(m, Conv1D) else m.weight.grad.clone() for n, m in found.items()}


@pytest.mark.parametrize("scope", ["layer", "kind"])
@pytest.mark.parametrize("kind", FAMILIES)
def test_columns_are_the_leading_hosvd_factors(kind, scope):
    model = adapted(kind, scope=scope, density=0.9)  # so many columns that the sketches are exact
    batches = [labelled(seed=seed) for seed in range(3)]
    compute_bases(model, batches)
    layers = {name.removeprefix("base_model.model."): layer for name, layer in sparse_grad_layers(model)}
    sums = {}
    for gradients in gradients_of_the_base(kind, layers, batches):
        for name, g in gradients.items():
            key = id(layers[name].sparse_grad_columns["default"])
            out, inp = sums.get(key, (0, 0))
            sums[key] = (out + g @ g.T, inp + g.T @ g)
    shared = len(layers) > 2 and scope == "kind"
    assert len(sums) == (len(layers) // 2 if shared else len(layers))
    for layer in layers.values():
        columns = layer.sparse_grad_columns["default"]
        for gram, found in zip(sums[id(columns)], (columns.out_columns, columns.in_columns), strict=True):
            values, vectors = torch.linalg.eigh(gram)
            k = min(found.shape[1], int((values > 1e-9 * values[-1]).sum()))
            gap = values.flip(0)
            if k < len(gap) and gap[k - 1] - gap[k] < 1e-6 * gap[0]:
                continue  # two directions of equal energy: either may come first
            assert principal_angle(found, vectors.flip(1)[:, :k]) < 1e-2


@pytest.mark.parametrize("tokens", [1, 3, 8, 40])
@pytest.mark.parametrize(("n_out", "n_in", "width"), [(7, 5, 4), (5, 9, 5), (30, 4, 2)])
def test_products_of_a_gradient_in_factors_are_those_of_the_gradient(tokens, n_out, n_in, width):
    from hf_ft_ext.adapters.sparse_grad.sketches import _FactoredGradient

    generator = torch.Generator().manual_seed(tokens)
    x, g, left, right = (
        torch.randn(*shape, generator=generator, dtype=torch.float64)
        for shape in ((tokens, n_in), (tokens, n_out), (n_out, width), (n_in, width))
    )
    gradient = sum(torch.outer(row, inputs) for row, inputs in zip(g, x, strict=True))
    found = _FactoredGradient(x, g)
    torch.testing.assert_close(found.gram_times(left), gradient @ gradient.T @ left, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(
        found.transposed_gram_times(right), gradient.T @ gradient @ right, rtol=1e-10, atol=1e-10
    )


@pytest.mark.parametrize("tokens", ["rows", "gradient"])
def test_both_ways_to_the_sums_agree(monkeypatch, tokens):
    from hf_ft_ext.adapters.sparse_grad.sketches import Sketches

    monkeypatch.setattr(Sketches, "rows_are_cheaper", lambda self, n: tokens == "rows")
    model = adapted("bert", n_params=4)
    batches = [labelled(seed=seed) for seed in range(3)]
    compute_bases(model, batches)
    reference = adapted("bert", n_params=4)
    monkeypatch.undo()
    compute_bases(reference, batches)
    for (_, a), (_, b) in zip(sparse_grad_layers(model), sparse_grad_layers(reference), strict=True):
        for side in ("out_columns", "in_columns"):
            one, two = (getattr(layer.sparse_grad_columns["default"], side) for layer in (a, b))
            torch.testing.assert_close(one.abs(), two.abs(), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("runs", [1, 2])
@pytest.mark.parametrize("rows", [True, False])
def test_a_float16_gradient_may_exceed_the_range_of_float16(monkeypatch, rows, runs):
    from hf_ft_ext.adapters.sparse_grad.sketches import Sketches

    monkeypatch.setattr(Sketches, "rows_are_cheaper", lambda self, n: rows)
    x, g = torch.full((40, 6), 100.0, dtype=torch.half), torch.full((40, 5), 100.0, dtype=torch.half)
    sides = [Sketch(random_test_matrix(n, n, 0, torch.float32, torch.device("cpu")), n) for n in (5, 6)]
    sketches = Sketches(None, [], *sides)
    sketches.begin_step(accumulated=False)
    sketches.runs["layer"] = runs
    for _ in range(runs):
        sketches.observer("layer")(x, g)
    sketches.end_step()
    gradient = runs * g.double().T @ x.double()  # entries of 400,000 a run
    for sketch, gram in zip(sides, (gradient @ gradient.T, gradient.T @ gradient), strict=True):
        torch.testing.assert_close(sketch.sum.double(), gram, rtol=1e-5, atol=0)


def test_the_pre_pass_changes_nothing_but_columns():
    model = adapted("bert").train()
    before = {name: value.clone() for name, value in model.state_dict().items() if "columns" not in name}
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    state = torch.get_rng_state()
    compute_bases(model, [labelled()])
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items() if name in before)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    assert all(p.grad is None for p in model.parameters()) and all(m.training for m in model.modules())
    assert all(layer.sparse_grad_columns["default"].ready for _, layer in sparse_grad_layers(model))


def count_runs(module):
    runs = []
    module.register_forward_pre_hook(lambda *_: runs.append(1))
    return runs


def test_checkpointing_and_an_own_loss_give_the_same_columns():
    batches = [labelled(seed=seed) for seed in range(2)]
    found = []
    for checkpointed in (False, True):
        model = adapted("bert", n_params=6)
        runs = count_runs(model.base_model.model.bert.encoder.layer[0].attention)
        if checkpointed:
            model.gradient_checkpointing_enable()
        loss = None if not checkpointed else lambda model, rows: 3 * model(**rows).loss
        compute_bases(model, batches, loss)
        assert len(runs) == (4 if checkpointed else 2)  # checkpointing recomputes each forward pass
        found.append([layer.sparse_grad_columns["default"].out_columns for _, layer in sparse_grad_layers(model)])
    for one, two in zip(*found, strict=True):
        torch.testing.assert_close(one.abs(), two.abs(), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(("kind", "rates"), [("bart", {}), ("falcon", {"hidden_dropout": 0.3})])
def test_checkpointed_layers_with_dropout_of_their_own_give_the_same_columns(kind, rates):
    """These layers call the dropout function with rates of their own (BART) or of the configuration (Falcon)."""
    found = []
    for checkpointed in (False, True):
        model = get_peft_model(tiny_classifier(kind, **rates).double(), SparseGradConfig(density=0.5)).train()
        if checkpointed:
            model.gradient_checkpointing_enable()
        before = dropout_rates(model)
        compute_bases(model, [classifier_rows()])
        assert dropout_rates(model) == before and any(before)
        found.append([layer.sparse_grad_columns["default"].in_columns for _, layer in sparse_grad_layers(model)])
    for one, two in zip(*found, strict=True):
        torch.testing.assert_close(one.abs(), two.abs(), rtol=1e-6, atol=1e-8)


def dropout_rates(model):
    owners = [*model.modules(), model.get_base_model().config]
    values = [value for owner in owners for name, value in vars(owner).items() if "drop" in name]
    return [value for value in values if isinstance(value, float)]


def test_so_many_gradients_are_read_and_no_more():
    read = []

    def stream():
        for seed in range(10):
            read.append(seed)
            yield labelled(seed=seed)

    compute_bases(adapted(), stream(), gradients=4)
    assert read == [0, 1, 2, 3]


def test_a_bfloat16_base_keeps_its_format():
    model = adapted(dtype=torch.bfloat16)
    compute_bases(model, [labelled()])
    for _, layer in sparse_grad_layers(model):
        assert (
            layer.base_layer.weight.dtype == layer.sparse_grad_columns["default"].out_columns.dtype == torch.bfloat16
        )
        assert layer.sparse_grad_values["default"].dtype == torch.float32


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adafactor, torch.optim.AdamW])
def test_any_loop_and_optimizer_train_it(tmp_path, optimizer):
    model = adapted(density=0.2, scope="kind")
    compute_bases(model, [labelled(seed=seed) for seed in range(3)])
    base = {name: p.clone() for name, p in model.named_parameters() if "base_layer" in name}
    rows = labelled()
    rate = 0.5 if optimizer is torch.optim.SGD else 0.02
    steps = optimizer((p for p in model.parameters() if p.requires_grad), lr=rate)
    model.eval()  # without dropout
    losses = []
    for _ in range(15):
        loss = model(**rows).loss
        losses.append(loss.item())
        loss.backward()
        steps.step()
        steps.zero_grad()
    assert losses[-1] < 0.95 * losses[0]
    assert all(torch.equal(p, base[name]) for name, p in model.named_parameters() if name in base)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(family("bert").double(), tmp_path)
    assert torch.equal(logits(loaded, **batch()), logits(model, **batch()))


def test_shared_columns_are_saved_once(tmp_path):
    sizes = {}
    for scope in ("kind", "layer"):
        model = adapted(scope=scope, init="random")
        model.save_pretrained(tmp_path / scope)
        sizes[scope] = sum("columns" in key for key in load_file(tmp_path / scope / "adapter_model.safetensors"))
    assert sizes == {"kind": 4, "layer": 8}
    sharing = adapted(scope="kind", init="random")
    with pytest.raises(InputError, match=r"the file holds columns of its own for .*layer\.1.*, which shares those of"):
        set_peft_model_state_dict(sharing, load_file(tmp_path / "layer" / "adapter_model.safetensors"))
    loaded = PeftModel.from_pretrained(family("bert").double(), tmp_path / "kind")
    shared = {id(layer.sparse_grad_columns["default"]) for _, layer in sparse_grad_layers(loaded.to("cpu").float())}
    assert len(shared) == 2
    assert (
        len({id(layer.sparse_grad_columns["default"]) for _, layer in sparse_grad_layers(copy.deepcopy(loaded))}) == 2
    )


def test_random_columns_depend_on_seed_and_layer_alone():
    def columns(seed):
        model = get_peft_model(family("bert"), SparseGradConfig(density=0.1, init="random", seed=seed))
        return [layer.sparse_grad_columns["default"].out_columns for _, layer in sparse_grad_layers(model)]

    one, same, other = columns(1), columns(1), columns(2)
    assert all(torch.equal(a, b) for a, b in zip(one, same, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    assert not torch.equal(one[0], one[2])  # two layers of one shape


def test_beside_another_adapter_of_peft():
    model = small("bert")
    lora = get_peft_model(model, LoraConfig(target_modules=["intermediate.dense"], init_lora_weights=False))
    alone = logits(lora)
    both = get_peft_model(lora.base_model.model, SparseGradConfig(n_params=30, init="random"), adapter_name="block")
    assert torch.equal(logits(both), alone)


# --- refusals ----------------------------------------------------------------------------------------


def test_training_before_the_columns_are_chosen_is_refused():
    model = adapted().train()
    with pytest.raises(InputError, match=r"no columns yet, so nothing would train; call compute_bases\(model, batch"):
        model(**labelled())
    assert torch.equal(logits(model, **batch()), logits(family("bert").double(), **batch()))  # evaluation is fine


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.disable_adapter_layers(), r"'default' is not in use in .*\(disabled, merged"),
        (lambda m: m.merge_adapter(), r"not in use in .*; call model.set_adapter\('default'\) first"),
        (lambda m: m.unload(), "the model has no SparseGrad adapters; make it with get_peft_model"),
    ],
)
def test_adapters_that_are_not_in_use(change, message):
    model = adapted(init="random")
    changed = change(model) or model
    with pytest.raises(InputError, match=message):
        compute_bases(changed, [labelled()])


def test_a_loss_without_gradient_is_refused():
    model = adapted()
    with pytest.raises(InputError, match=r"BertForSequenceClassification has no gradient with dropout off.*random"):
        compute_bases(model.get_base_model(), [labelled()], lambda model, batch: model(**batch).loss.detach())


def test_batches_that_give_no_gradient():
    model = adapted()
    with pytest.raises(InputError, match="compute_bases got no batch"):
        compute_bases(model, [])
    with pytest.raises(InputError, match=r"returns no loss for these batches; add labels to them, or pass loss"):
        compute_bases(model, [batch()])
    with pytest.raises(InputError, match="there is no SparseGrad adapter 'other'; this model has: default"):
        compute_bases(model, [labelled()], adapter_name="other")
    with pytest.raises(InputError, match="no gradient reaches the layers with SparseGrad adapters"):
        compute_bases(model, [labelled()], lambda model, rows: 0 * model(**rows).loss)
    with torch.no_grad():
        model.get_submodule("base_model.model.bert.encoder.layer.1.output.dense.base_layer").weight[0, 0] = torch.nan
    with pytest.raises(InputError, match=r"gradient of bert\.encoder\.layer\.\d\..* is not finite in batch 0"):
        compute_bases(model, [labelled()])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"init": "pissa"}, "init must be one of gradient, random, svd, got 'pissa'"),
        ({"scope": "model"}, "scope must be one of kind, layer, got 'model'"),
        ({"density": 0.0}, r"density must be in \(0, 1\], got 0.0"),
        ({"n_params": 0}, "n_params must be 1 or more, got 0"),
        ({"n_params": 1, "density": 0.1}, "both set the number of trained entries; pass one"),
        ({"init_std": -1.0}, "init_std must be 0 or more, got -1.0"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(InputError, match=message):
        SparseGradConfig(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"n_params": 10**6}, r"n_params=1000000 is more than the 1536 entries of .*dense"),
        ({"density": 1e-9}, "density=1e-09 leaves no entry to train in .*dense"),
        ({"target_modules": ["output.LayerNorm"]}, r"LayerNorm is a LayerNorm, and SparseGrad trains linear layers"),
    ],
)
def test_settings_that_do_not_fit_the_model(settings, message):
    with pytest.raises(InputError, match=message):
        get_peft_model(small("bert"), SparseGradConfig(init="random", **settings))
    assert inputs()["input_ids"].shape == (2, 10)
