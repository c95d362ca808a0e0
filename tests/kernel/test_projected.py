"""Engine `projected`: against exact kernels and a dense matrix; determinism; memory; options."""

import logging

import pytest
import torch
from families import FAMILIES, batch, family
from peft import LoraConfig, TaskType, get_peft_model
from torch import nn

from hf_ft_ext import InputError, empirical_ntk, projected_gradients
from hf_ft_ext.kernel.engines import projected
from hf_ft_ext.kernel.engines import projection as projection_module
from hf_ft_ext.kernel.engines.projected import ProjectedEngine
from hf_ft_ext.kernel.engines.projection import Projection, matrix_shape, shared_activations
from hf_ft_ext.kernel.ntk import KernelComputation, KernelOptions
from hf_ft_ext.kernel.rows import ExampleRows
from hf_ft_ext.kernel.store import FeatureStore
from hf_ft_ext.per_example.outputs import logits
from hf_ft_ext.per_example.types import DenseGradient, LinearGradient

LEFT, RIGHT = batch(5), batch(4, 11, seed=1)


def whole_gradients(model, inputs):
    """One row and logit at a time, by autograd: `[n * c, p]`, and where each parameter begins."""
    parameters = dict(model.named_parameters())
    model.eval()
    found = []
    for i in range(len(inputs["input_ids"])):
        keep = int(inputs["attention_mask"][i].sum())
        scalars = model(**{key: value[i : i + 1, :keep] for key, value in inputs.items()}).logits.reshape(-1)
        for scalar in scalars:
            grads = torch.autograd.grad(scalar, list(parameters.values()), retain_graph=True, allow_unused=True)
            some = zip(grads, parameters.values(), strict=True)
            found.append(torch.cat([torch.zeros(p.numel()).to(p) if g is None else g.reshape(-1) for g, p in some]))
    return torch.stack(found), parameters


def matrix(projection, parameters):
    """The projection written out, `[p, k]`: one gradient entry at a time, by the definition in the module."""
    k, rows = projection.dimension, []
    for name, parameter in parameters.items():
        height, width = matrix_shape(parameter.shape)
        places = projection.buckets(name)
        columns = range(width) if places.columns is None else places.columns.tolist()
        for r in range(height):
            for c, column in enumerate(columns):
                row = torch.zeros(k, dtype=torch.float64)
                row[(int(places.rows[r]) + column) % k] = float(places.row_signs[r] * places.column_signs[c])
                rows.append(row)
    return torch.stack(rows)


@pytest.mark.parametrize("written_out", [0, 2, 1000])
@pytest.mark.parametrize("model_type, dimension", [("bert", 64), ("gpt2", 11), ("deberta-v2", 30)])
def test_features_are_the_gradients_times_one_matrix(model_type, dimension, written_out, monkeypatch):
    """For transformed and full gradients, and for fewer buckets than rows or columns."""
    monkeypatch.setattr(projection_module, "_DENSE_LIMIT", written_out)
    model = family(model_type).double()
    gradients, parameters = whole_gradients(model, LEFT)
    found = projected_gradients(model, LEFT, dimension)
    assert found.shape == (5, 2, dimension) and found.dtype == torch.float64
    shapes = {name: p.shape for name, p in parameters.items()}
    common = shared_activations(model, parameters)
    own = Projection(shapes, dimension, 0, torch.device("cpu"), torch.float64, common)
    expected = gradients @ matrix(own, parameters)
    torch.testing.assert_close(found.flatten(0, 1), expected, rtol=0, atol=1e-10 * expected.abs().max().item())


@pytest.mark.parametrize("written_out", [0, 1000])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("counts", [(2, 1), (3, 1), (1, 0)])
def test_activations_of_tokens_without_gradient_are_ignored(counts, transposed, written_out, monkeypatch):
    """Activations may be NaN for padding, or where only the first position is read."""
    monkeypatch.setattr(projection_module, "_DENSE_LIMIT", written_out)
    monkeypatch.setattr(projection_module, "_TOKENS", 2)
    generator = torch.Generator().manual_seed(0)
    inputs, grads = (torch.randn(2, 3, width, dtype=torch.float64, generator=generator) for width in (5, 4))
    used = torch.arange(2, -1, -1) < torch.tensor(counts)[:, None]  # the last tokens
    grads = grads * used[..., None]
    own = Projection({"w": (5, 4) if transposed else (4, 5)}, 7, 0, torch.device("cpu"), torch.float64)
    expected = own(2, [{"w": [DenseGradient(LinearGradient(inputs, grads, transposed).dense())]}])
    found = own(2, [{"w": [LinearGradient(inputs.masked_fill(~used[..., None], torch.nan), grads, transposed)]}])
    torch.testing.assert_close(found, expected)
    assert found.any()


def parts_of(model, inputs):
    """The factored gradients of rows, once for every seed."""
    rows, parameters = ExampleRows(inputs), dict(model.named_parameters())
    engine = ProjectedEngine(model, logits, parameters, 8, 0, torch.float64)
    return engine, list(engine.examples(rows.batch(range(len(rows)))))


def features_of(engine, parts, dimension, seed):
    common = shared_activations(engine.model, engine.parameters)
    own = Projection(engine_shapes(engine), dimension, seed, engine.device, torch.float64, common)
    return torch.cat([own(len(part.scalars), part.gradients) for part in parts]).flatten(0, 1)


def engine_shapes(engine):
    return {name: parameter.shape for name, parameter in engine.parameters.items()}


@pytest.mark.slow
@pytest.mark.parametrize("model_type", ["bert", "albert"])  # one use of each parameter, and several
def test_kernels_are_unbiased_and_their_error_falls_like_one_over_the_root(model_type):
    """The mean over seeds is the exact kernel; entries deviate by at most sqrt((|g|^2 |g'|^2 + <g, g'>^2) / k)."""
    model, seeds = family(model_type).double(), 24
    engine, parts = parts_of(model, LEFT)
    exact = empirical_ntk(model, LEFT).reshape(10, 10)
    size = exact.diagonal()
    bound = size[:, None] * size + exact.square()
    errors = {}
    for dimension in (64, 1024):
        kernels = [f @ f.T for f in (features_of(engine, parts, dimension, seed) for seed in range(seeds))]
        found = torch.stack(kernels)
        deviation = (bound / dimension).sqrt()
        bias = (found.mean(0) - exact) / (deviation / seeds**0.5)
        assert bias.abs().max() < 4.5 and bias.square().mean() < 2.5  # entries depend on each other
        errors[dimension] = (found - exact).square().mean(0).sum().sqrt()
        ratio = errors[dimension] / (bound / dimension).sum().sqrt()
        assert 0.5 < ratio < 1.35
    assert 2.5 < errors[64] / errors[1024] < 6.4  # 4 = sqrt(1024 / 64)


def test_a_layer_that_dominates_has_no_larger_error():
    """Separate projections of activations and output gradients would be off by k^(-1/4): 2 / 8 + 2 / 8 at k = 64."""
    torch.manual_seed(0)
    layer, dimension, seeds = nn.Linear(48, 40, bias=False).double(), 64, 60
    inputs = {"x": torch.randn(2, 1, 48, dtype=torch.float64)}
    weights = torch.randn(40, dtype=torch.float64)

    def function(model, given):
        return (model(given["x"]) * weights).sum((1, 2))

    exact = empirical_ntk(layer, inputs, function=function).reshape(2, 2)
    bound = exact.diagonal()[:, None] * exact.diagonal() + exact.square()
    squares = torch.zeros(2, 2, dtype=torch.float64)
    for seed in range(seeds):
        found = empirical_ntk(
            layer, inputs, engine="projected", function=function, dimension=dimension, seed=seed
        ).reshape(2, 2)
        squares += (found - exact).square() / seeds
    assert (squares / (bound / dimension)).mean() < 1.5


@pytest.mark.parametrize("shape, names, least", [((8, 8), 1, 0.7), ((40, 40), 1, 1.2), ((40, 40), 3, 1.2)])
def test_the_error_is_at_most_twice_the_usual_bound(shape, names, least):
    """More rows and columns than values, and layers with a common input: the variance is up to four times as large."""
    parameters = {f"layer{i}": shape for i in range(names)}
    gradients = [{name: [DenseGradient(torch.ones(1, *shape, dtype=torch.float64))] for name in parameters}]
    shared = dict.fromkeys(parameters, "input")
    exact, dimension, found = names * shape[0] * shape[1], 8, []
    for seed in range(400):
        project = Projection(parameters, dimension, seed, torch.device("cpu"), torch.float64, shared)
        found.append(project(1, gradients).square().sum())
    ratios = torch.stack(found) / exact
    assert ratios.mean() == pytest.approx(1, abs=0.15)
    assert least < ratios.std() / (2 / dimension) ** 0.5 < 2


# --- the same projection whatever the circumstances ------------------------------------------------------------


@pytest.mark.parametrize("model_type", sorted(FAMILIES))
def test_projection_does_not_depend_on_batches_order_padding_or_dtype(model_type):
    model = family(model_type).double()
    whole = projected_gradients(model, RIGHT, 96, seed=3)
    size = whole.abs().max().item()
    for batch_size in (1, 3):
        found = projected_gradients(model, RIGHT, 96, seed=3, batch_size=batch_size)
        torch.testing.assert_close(found, whole, rtol=0, atol=1e-10 * size)
    order = torch.tensor([2, 0, 3, 1])
    found = projected_gradients(model, {key: value[order] for key, value in RIGHT.items()}, 96, seed=3)
    torch.testing.assert_close(found, whole[order], rtol=0, atol=1e-10 * size)
    assert torch.equal(projected_gradients(model, RIGHT, 96, seed=3), whole)
    assert not torch.allclose(projected_gradients(model, RIGHT, 96, seed=4), whole, rtol=0.1, atol=0.1 * size)
    narrow = projected_gradients(model.float(), RIGHT, 96, seed=3)
    assert narrow.dtype == torch.float32
    torch.testing.assert_close(narrow.double(), whole, rtol=0, atol=1e-4 * size)


def test_buckets_and_signs_of_a_seed_are_these():
    """In every process, on every machine, in every version of torch; whatever the order and the dtype."""
    shapes = {"a.weight": (3, 2), "b": (4,)}
    for names, dtype in ((("a.weight", "b"), torch.float64), (("b", "a.weight"), torch.float32)):
        own = Projection({name: shapes[name] for name in names}, 5, 7, torch.device("cpu"), dtype)
        weight, bias = own.buckets("a.weight"), own.buckets("b")
        found = [x.tolist() for x in (weight.rows, weight.row_signs, weight.column_signs, bias.column_signs)]
        assert found == [[2, 3, 0], [1.0, 1.0, -1.0], [-1.0, 1.0], [1.0, -1.0, -1.0, 1.0]]


# --- options -------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"binary_classification": True},
        {"class_diagonal": True},
        {"exclude_embeddings": True, "exclude_head": True},
        {"only_biases": True},
    ],
)
def test_kernels_of_many_dimensions_are_near_the_exact_ones(options):
    model = family("roberta")
    for right in (None, RIGHT):
        exact = empirical_ntk(model, LEFT, right, **options)
        found = empirical_ntk(model, LEFT, right, engine="projected", dimension=2**17, **options)
        assert found.shape == exact.shape and found.dtype == torch.float64
        assert (found - exact).norm() < 0.02 * exact.norm()


def test_projection_of_an_adapter_and_of_a_user_function():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = LoraConfig(
            task_type=TaskType.SEQ_CLS, r=2, target_modules=["query", "value"], init_lora_weights=False
        )
        model = get_peft_model(family("bert"), config).double()

    def norms(model, batch):
        return model(**batch).logits.square().sum(1)

    exact = empirical_ntk(model, LEFT, function=norms)
    found = empirical_ntk(model, LEFT, engine="projected", dimension=2**16, function=norms)
    assert found.shape == (5, 1, 5, 1) and (found - exact).norm() < 0.02 * exact.norm()


def test_features_beyond_the_memory_limit_are_stored_on_disk(monkeypatch):
    model = family("bert")
    expected = empirical_ntk(model, LEFT, batch(7, 11, seed=1), engine="projected", dimension=64)
    folders = []
    kept = FeatureStore.put
    monkeypatch.setattr(FeatureStore, "put", lambda store, *chunk: folders.append(store.folder) or kept(store, *chunk))
    monkeypatch.setattr(projected, "CHUNK_ROWS", 2)
    monkeypatch.setattr(projected, "_SHARE_OF_FEATURES", 1e-9)
    found = empirical_ntk(model, LEFT, batch(7, 11, seed=1), engine="projected", dimension=64)
    assert len(folders) == 3 + 4 and not any(folder.exists() for folder in folders)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * expected.abs().max().item())


def test_memory_limit_is_kept_and_logged(caplog, monkeypatch):
    model = family("bert")
    monkeypatch.setattr(Projection, "scratch_bytes", lambda *_: 0)  # more than a tiny model's rows
    with pytest.raises(InputError, match=r"one example takes .* pass at least (.*), or shorten") as error:
        projected_gradients(model, LEFT, 64, memory_gb=1e-6)
    least = float(str(error.value).split("at least ")[1].split(",")[0])
    computation = KernelComputation(model, KernelOptions(engine="projected", dimension=64, memory_gb=least))
    sizes, features = [], computation.projected.features
    computation.projected.features = lambda rows, first, batches: (
        sizes.extend(map(len, batches)) or features(rows, first, batches)
    )
    computation.run(ExampleRows(LEFT))
    assert sizes == [1] * 5
    with caplog.at_level(logging.INFO):
        projected_gradients(model, LEFT, 64)
    assert "half of the" in caplog.text and "GB free on" in caplog.text


@pytest.mark.parametrize(
    "options, message",
    [
        (
            {"formula": "signgd"},
            "engine=projected does not support formula signgd: .* pass formula sgd, or engine auto",
        ),
        ({"formula": "asymmetric_signgd"}, "engine=projected does not support formula asymmetric_signgd"),
        ({"dimension": 0}, "dimension=0 must be above 0"),
        ({"block_rows": 2}, "block_rows applies only to the exact engines"),
        ({"engine": "auto", "dimension": 64}, "dimension applies only to engine=projected, not auto"),
        ({"engine": "jacobian", "seed": 1}, "seed applies only to engine=projected, not jacobian"),
    ],
)
def test_invalid_options_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        empirical_ntk(family("bert"), LEFT, **{"engine": "projected", **options})


def test_a_gradient_that_is_not_finite_is_named():
    def function(model, given):
        return model(**given).logits * torch.where((given["input_ids"] == 59).any(1), torch.inf, 1.0)[:, None]

    rows = {key: value.masked_fill(value == 59, 58) for key, value in LEFT.items()}
    assert projected_gradients(family("bert"), rows, 8, function=function).isfinite().all()
    rows["input_ids"][4, 1] = 59  # not one of the rows of middling lengths that the rules are tried on
    with pytest.raises(InputError, match=r"the gradient of .* for example 4 \(from 0\) is NaN or infinite"):
        projected_gradients(family("bert"), rows, 8, function=function)
