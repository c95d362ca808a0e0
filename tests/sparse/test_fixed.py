"""Fixed supports: gradient, saved memory and updates against the written-out formulas."""

import copy
import itertools

import pytest
import torch
from torch import nn

from hf_ft_ext.adapters.sparse_grad.config import block_shape
from hf_ft_ext.sparse.basis import ACTIVATIONS, GRADIENT, Basis
from hf_ft_ext.sparse.fixed import FixedSupport
from hf_ft_ext.sparse.layer import SparseGradLinear
from hf_ft_ext.sparse.optimizer import SparseAdamW

N_OUT, N_IN = 7, 5
INDICES = torch.tensor([1, 4, 8, 23, 34])
ROWS, COLUMNS = torch.tensor([0, 2, 6]), torch.tensor([1, 4])


def random(*shape, seed):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def basis_of(kind: str) -> tuple[Basis, torch.Tensor, torch.Tensor]:
    if kind == "identity":
        return Basis(identity=True), torch.eye(N_OUT).double(), torch.eye(N_IN).double()
    factors = [torch.linalg.qr(random(n, n, seed=n)).Q for n in (N_OUT, N_IN)]
    return Basis(*factors), *factors


def make(kind: str, shape: str):
    """A plain layer, the converted one with its support set, the factors, and the support's flat indices."""
    linear = nn.Linear(N_IN, N_OUT).double()
    nn.init.normal_(linear.weight, generator=torch.Generator().manual_seed(0))
    basis, v, u = basis_of(kind)
    if shape == "block":
        support = FixedSupport.of_block(basis, ROWS, COLUMNS)
        indices = (ROWS[:, None] * N_IN + COLUMNS).flatten()
    else:
        support, indices = FixedSupport.of_entries(basis, INDICES, N_IN), INDICES
    layer = SparseGradLinear.from_linear(copy.deepcopy(linear), basis, support.size, "kind")
    layer.expect_fixed_support(block=False)
    layer.set_support(support)
    return linear, layer, v, u, indices


@pytest.mark.parametrize("route", [ACTIVATIONS, GRADIENT])
@pytest.mark.parametrize("shape", ["block", "entries"])
@pytest.mark.parametrize("kind", ["identity", "rotated"])
def test_gradients(kind, shape, route, monkeypatch):
    monkeypatch.setattr(FixedSupport, "cheaper_route", lambda *_: route)
    linear, layer, v, u, indices = make(kind, shape)
    x1 = random(2, 3, N_IN, seed=1).requires_grad_()
    x2 = x1.detach().clone().requires_grad_()
    y1, y2 = linear(x1), layer(x2)
    assert torch.equal(y1, y2)
    weights = random(2, 3, N_OUT, seed=2)
    (y1 * weights).sum().backward()
    (y2 * weights).sum().backward()
    expected = (v.T @ linear.weight.grad @ u).flatten()[indices]
    torch.testing.assert_close(layer.values.grad, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(x2.grad, x1.grad, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(layer.bias.grad, linear.bias.grad, rtol=1e-13, atol=1e-13)
    assert layer.weight.grad is None and not layer.weight.requires_grad
    assert torch.autograd.gradcheck(layer, (x2.detach().requires_grad_(),))


@pytest.mark.parametrize("shape", ["block", "entries"])
@pytest.mark.parametrize("kind", ["identity", "rotated"])
def test_values_are_the_entries_and_folding_moves_only_them(kind, shape):
    _, layer, v, u, indices = make(kind, shape)
    before = (v.T @ layer.weight @ u).detach()
    torch.testing.assert_close(layer.values.detach(), before.flatten()[indices])
    change = random(len(indices), seed=3)
    with torch.no_grad():
        layer.values += change
    assert layer.fold() and not layer.fold()
    expected = before.flatten().index_add(0, indices, change)
    torch.testing.assert_close((v.T @ layer.weight @ u).flatten().detach(), expected)


def test_a_layer_without_a_support_has_no_changes_and_no_basis():
    _, chosen, *_ = make("rotated", "block")
    layer = SparseGradLinear.from_linear(nn.Linear(N_IN, N_OUT), Basis(), chosen.n_params, "kind")
    assert not layer.fold()
    with pytest.raises(ValueError, match="the layer has no fixed support; run `prepare_layers`"):
        layer.changes()
    with pytest.raises(ValueError, match="converted for dynamic support; call expect_fixed_support first"):
        layer.set_support(chosen.support)
    with pytest.raises(ValueError, match="this basis has no factors; run `prepare_layers`"):
        layer.basis.rotate(layer.weight)


OPTIMIZERS = {
    "ours": lambda parameters, layer, **settings: SparseAdamW(parameters, [layer], **settings),
    "torch's": lambda parameters, layer, **settings: torch.optim.AdamW(parameters, **settings),
    "torch's, fused": lambda parameters, layer, **settings: torch.optim.AdamW(parameters, fused=True, **settings),
}


@pytest.mark.parametrize("maker", OPTIMIZERS)
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("shape", ["block", "entries"])
@pytest.mark.parametrize("kind", ["identity", "rotated"])
def test_optimizer_equals_adamw_on_the_entries(kind, shape, weight_decay, maker):
    _, layer, v, u, indices = make(kind, shape)
    entries = (v.T @ layer.weight.detach() @ u).flatten()
    chosen = nn.Parameter(entries[indices].clone())
    bias = nn.Parameter(layer.bias.detach().clone())
    trained = [p for p in layer.parameters() if p.requires_grad]
    optimizer = OPTIMIZERS[maker](trained, layer, lr=0.05, weight_decay=weight_decay)
    reference = torch.optim.AdamW([chosen, bias], lr=0.05, weight_decay=weight_decay)
    for seed in range(8):
        x = random(6, N_IN, seed=10 + seed)
        for opt in (optimizer, reference):
            opt.zero_grad()
        layer(x).sin().sum().backward()
        weight = v @ entries.index_copy(0, indices, chosen).view(N_OUT, N_IN) @ u.T
        nn.functional.linear(x, weight, bias).sin().sum().backward()
        optimizer.step()
        reference.step()
    torch.testing.assert_close(layer.values.detach(), chosen.detach(), rtol=1e-10, atol=1e-10)
    # other optimizers' last step is added to the weight when it is read
    expected = weight_of(v, u, entries, indices, chosen)
    torch.testing.assert_close(layer.state_dict()["weight"], expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("inference", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("kind", ["identity", "rotated"])
def test_values_exchanged_for_an_evaluation_are_used_and_given_back(kind, inference):
    """Averages of weights are exchanged through `data`, which leaves no new version."""
    linear, layer, v, u, indices = make(kind, "entries")
    x, own, average = random(4, N_IN, seed=1), layer.values.detach().clone(), random(len(indices), seed=2)
    plain = linear(x)
    graph = layer(x)
    for values in (average, own, average, own):
        layer.values.data.copy_(values)
        with inference():
            weight = v @ (v.T @ linear.weight @ u).flatten().index_copy(0, indices, values).view(N_OUT, N_IN) @ u.T
            torch.testing.assert_close(layer(x), nn.functional.linear(x, weight, linear.bias))
    layer.values.data.copy_(average)
    with inference():
        layer(x)
    layer.values.data.copy_(own)
    torch.testing.assert_close(layer(x), plain)  # with gradients, as in the training step that follows
    assert graph.requires_grad


def test_training_compares_no_values(monkeypatch):
    """A comparison waits for the device; a gradient tells the optimizer that the values change."""
    _, layer, *_ = make("rotated", "entries")
    compared, equal = [], torch.equal
    monkeypatch.setattr(torch, "equal", lambda a, b: compared.append(a) or equal(a, b))
    optimizer = SparseAdamW([layer.values], [layer], lr=0.05)
    for seed in range(2):
        before = layer.weight.detach().clone()
        layer(random(6, N_IN, seed=seed)).square().mean().backward()
        optimizer.step()
        assert (layer.weight != before).any()
        optimizer.zero_grad()
    assert not compared
    optimizer.step()  # without a gradient
    assert len(compared) == 1


def test_a_compiled_layer_is_one_graph():
    _, layer, *_ = make("rotated", "entries")
    x = random(6, N_IN, seed=1).requires_grad_()
    inputs = [x, layer.values, layer.bias]
    expected = torch.autograd.grad(layer(x).square().sum(), inputs)
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    torch.testing.assert_close(torch.autograd.grad(compiled(x).square().sum(), inputs), expected)


def weight_of(v, u, entries, indices, chosen):
    return v @ entries.index_copy(0, indices, chosen.detach()).view(N_OUT, N_IN) @ u.T


def test_a_narrow_block_saves_only_the_projected_input():
    layer = SparseGradLinear.from_linear(nn.Linear(64, 96), Basis(torch.eye(96), torch.eye(64)), 64, "kind")
    layer.expect_fixed_support(block=False)
    layer.set_support(FixedSupport.of_block(layer.basis, torch.arange(8), torch.arange(8)))
    x = torch.randn(32, 64, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        layer(x).sum()
    own = [t for t in saved if t.data_ptr() != layer.weight.data_ptr()]
    assert sum(t.numel() for t in own) == 32 * 8  # x itself would be 32 x 64


def test_optimizer_state_is_two_moments_per_entry():
    layer = SparseGradLinear.from_linear(nn.Linear(64, 96), Basis(torch.eye(96), torch.eye(64)), 64, "kind")
    layer.expect_fixed_support(block=False)
    layer.set_support(FixedSupport.of_block(layer.basis, torch.arange(8), torch.arange(8)))
    optimizer = SparseAdamW([layer.values], [layer])
    layer(torch.randn(4, 64)).sum().backward()
    optimizer.step()
    (state,) = optimizer.state.values()
    assert sum(value.numel() for value in state.values()) == 2 * 64 + 1  # and the step count
    assert layer.weight.grad is None


@pytest.mark.parametrize("tokens, expected", [(64, ACTIVATIONS), (2048, ACTIVATIONS), (200_000, ACTIVATIONS)])
def test_a_small_block_projects_activations_at_any_length(tokens, expected):
    basis = Basis(torch.eye(768), torch.eye(256))
    support = FixedSupport.of_block(basis, torch.arange(32), torch.arange(32))
    assert support.cheaper_route(768, 256, tokens) == expected


def test_scattered_entries_form_the_gradient_when_batches_are_long():
    basis = Basis(torch.eye(768), torch.eye(256))
    support = FixedSupport.of_entries(basis, torch.arange(0, 768 * 256, 81), 256)
    assert support.cheaper_route(768, 256, 64) == ACTIVATIONS
    assert support.cheaper_route(768, 256, 20_000) == GRADIENT


@pytest.mark.parametrize(
    "n_params, sides, expected",
    [
        (28_000, (3072, 768), (84, 334)),
        (28_000, (768, 3072), (334, 84)),
        (100, (20, 20), (10, 10)),
        (399, (4, 100), (4, 100)),
        (127, (2, 64), (2, 64)),
        (1, (100, 2), (1, 1)),
    ],
)
def test_block_shape_costs_both_sides_the_same(n_params, sides, expected):
    assert block_shape(n_params, *sides) == expected


def test_block_shape_fits_and_wastes_no_row_or_column():
    for n_out, n_in in itertools.product(range(1, 7), repeat=2):
        for k in range(1, n_out * n_in + 1):
            r, c = block_shape(k, n_out, n_in)
            assert r <= n_out and c <= n_in and max((r - 1) * c, r * (c - 1)) < k <= r * c


def test_wrong_size_and_missing_support_are_errors():
    _, layer, *_ = make("rotated", "block")
    with pytest.raises(ValueError, match="a support of 5 entries for a layer that trains 6"):
        layer.set_support(FixedSupport.of_entries(layer.basis, INDICES, N_IN))
    optimizer = SparseAdamW([layer.values], [layer])
    layer.support = None
    with pytest.raises(RuntimeError, match=r"the support of kind has not been computed"):
        optimizer.step()
