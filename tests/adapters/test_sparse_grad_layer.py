"""One layer with a SparseGrad adapter: output, gradients, what is kept for the backward pass."""

from unittest import mock

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.pytorch_utils import Conv1D

from hf_ft_ext import SparseGradConfig
from hf_ft_ext.adapters.sparse_grad import functions
from hf_ft_ext.adapters.sparse_grad.layer import SparseGradLayer, new_columns

FEW_TOKENS, MANY_TOKENS = (2, 3), (40, 50)


def make_layer(n_out, n_in, n_params, kind="linear", bias=True):
    torch.manual_seed(0)
    if kind == "conv1d":
        base = Conv1D(n_out, n_in).double()
        nn.init.normal_(base.bias)
    else:
        base = nn.Linear(n_in, n_out, bias=bias).double()
    base.requires_grad_(False)
    if kind == "hooked":  # somebody else watches the layer: it has to be called
        base.register_forward_hook(lambda module, args, output: 2 * output)
    config = SparseGradConfig(n_params=n_params, init="random", init_std=0.5)
    return SparseGradLayer(base, "default", config, new_columns(base, "layer", config)).train()


def before_the_pre_pass(layer):
    columns = layer.sparse_grad_columns["default"]
    columns.ready = False
    for side in columns.buffers():
        side.zero_()


@pytest.mark.parametrize("rows", [FEW_TOKENS, MANY_TOKENS], ids=["few", "many"])
@pytest.mark.parametrize("kind", ["linear", "conv1d", "hooked"])
@pytest.mark.parametrize(("n_out", "n_in"), [(12, 5), (5, 12), (8, 8)])
@pytest.mark.parametrize("copy_cost", [0, 10**9], ids=["by weight", "by product"])
def test_output_and_gradients_are_those_of_the_changed_weight(monkeypatch, rows, kind, n_out, n_in, copy_cost):
    monkeypatch.setattr(functions, "_COPY", copy_cost)
    layer = make_layer(n_out, n_in, 12, kind)
    values, columns = layer.sparse_grad_values["default"], layer.sparse_grad_columns["default"]
    x = torch.randn(*rows, n_in, dtype=torch.float64, requires_grad=True)
    g = torch.randn(*rows, n_out, dtype=torch.float64)
    y = layer(x)
    y.backward(g)

    base = layer.base_layer
    w = (base.weight.T if kind == "conv1d" else base.weight).detach()
    d, other_x = values.detach().clone().requires_grad_(), x.detach().clone().requires_grad_()
    change = torch.einsum("or,rc,ic->oi", columns.out_columns, d, columns.in_columns)
    plain = torch.einsum("abi,oi->abo", other_x, w) + base.bias
    expected = (2 if kind == "hooked" else 1) * plain + torch.einsum("abi,oi->abo", other_x, change)
    expected.backward(g)
    torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(values.grad, d.grad, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(x.grad, other_x.grad, rtol=1e-10, atol=1e-10)
    assert base.weight.grad is None and torch.equal(w, (base.weight.T if kind == "conv1d" else base.weight))


def with_padding(tokens, width):
    """Output gradients that are zero for the last two thirds of each row's tokens, or for all of them."""
    g = torch.randn(4, tokens, width, dtype=torch.float64)
    g[:, max(tokens // 3, 1) :] = 0
    return g if tokens > 1 else torch.zeros_like(g)


@pytest.mark.parametrize("tokens", [9, 1])
@pytest.mark.parametrize("kind", ["linear", "conv1d", "hooked"])
def test_tokens_without_a_gradient_are_left_out(kind, tokens):
    layer = make_layer(12, 40, 12, kind)
    values, columns = layer.sparse_grad_values["default"], layer.sparse_grad_columns["default"]
    x, g = torch.randn(4, tokens, 40, dtype=torch.float64, requires_grad=True), with_padding(tokens, 12)
    with mock.patch.object(functions, "linear", wraps=functions.linear) as product:
        layer(x).backward(g)
    rows = int(g.any(2).sum())
    assert kind == "hooked" or [len(call.args[0]) for call in product.call_args_list] == [rows]

    weight = layer.base_layer.weight.T if kind == "conv1d" else layer.base_layer.weight
    change = torch.einsum("or,rc,ic->oi", columns.out_columns, values, columns.in_columns)
    wanted = (2 if kind == "hooked" else 1) * weight + change
    torch.testing.assert_close(x.grad, torch.einsum("abo,oi->abi", g, wanted), rtol=1e-10, atol=1e-10)
    wanted = torch.einsum("or,abo,abi,ic->rc", columns.out_columns, g, x, columns.in_columns)
    torch.testing.assert_close(values.grad, wanted, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", ["linear", "conv1d", "hooked"])
def test_observed_tokens_are_those_with_a_gradient(kind):
    layer, seen = make_layer(12, 40, 12, kind), []
    before_the_pre_pass(layer)
    layer.observe("default", lambda x, g: seen.append((x, g)))
    x, g = torch.randn(4, 9, 40, dtype=torch.float64, requires_grad=True), with_padding(9, 12)
    y = layer(x)
    y.backward(g)
    weight = layer.base_layer.weight.T if kind == "conv1d" else layer.base_layer.weight
    scale = 2 if kind == "hooked" else 1
    torch.testing.assert_close(y, scale * (x @ weight.T + layer.base_layer.bias), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(x.grad, scale * g @ weight, rtol=1e-10, atol=1e-10)
    ((rows, grads),) = seen
    assert len(rows) == len(grads) == 4 * 3
    torch.testing.assert_close(grads.T @ rows, torch.einsum("abo,abi->oi", g, x), rtol=1e-10, atol=1e-10)
    assert layer.sparse_grad_values["default"].grad is None


def test_most_tokens_with_a_gradient_are_all_taken():
    g = torch.randn(100, 40)
    g[:20] = 0
    assert functions.tokens_with_gradient(g) is None
    g[:60, ::2] = 0  # of half of the features: those that are looked at first, and not all there are
    assert functions.tokens_with_gradient(g) is None
    g[:60] = 0
    assert functions.tokens_with_gradient(g).tolist() == list(range(60, 100))
    g[3, 1] = float("nan")
    assert functions.tokens_with_gradient(g).tolist() == [3, *range(60, 100)]


@pytest.mark.parametrize("kind", ["linear", "hooked"])
@pytest.mark.parametrize("observed", [False, True])
def test_outputs_can_be_changed_in_place(kind, observed):
    layer = make_layer(6, 4, 4, kind)
    if observed:
        before_the_pre_pass(layer)
        layer.observe("default", lambda x, g: None)
    y = layer(torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True))
    y += 1  # as Falcon does
    y.sum().backward()


@pytest.mark.parametrize("by_weight", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_large_layers_in_single_precision(by_weight, bias, monkeypatch):
    """Sizes at which products are another library's; in-place changes of the output are allowed as always."""
    monkeypatch.setattr(functions, "by_weight_is_cheaper", lambda *args, **kwargs: by_weight)
    torch.manual_seed(0)
    parts = {"x": torch.randn(8, 16, 512), "w": torch.randn(640, 512), "b": torch.randn(640), "d": torch.randn(5, 7)}
    parts |= {"v": torch.linalg.qr(torch.randn(640, 5))[0], "u": torch.linalg.qr(torch.randn(512, 7))[0]}
    exact = {name: part.double() for name, part in parts.items()}
    for one in (parts, exact):
        one["x"].requires_grad_(), one["d"].requires_grad_()
    x, w, b, d, v, u = exact.values()
    expected = x @ (w + v @ d @ u.T).T + (b if bias else 0)
    (expected**2).sum().backward()
    x, w, b, d, v, u = parts.values()
    found = functions.ChangedLinear.apply(x, w, b if bias else None, d, v, u)
    (found**2).sum().backward()
    pairs = [(found, expected), (x.grad, exact["x"].grad), (d.grad, exact["d"].grad)]
    for ours, theirs in pairs:
        torch.testing.assert_close(ours.double(), theirs, rtol=0, atol=1e-5 * float(theirs.abs().max()))
    functions.ChangedLinear.apply(x, w, None, d, v, u).add_(1.0)  # Falcon does


def test_many_tokens_go_by_weight_and_few_by_product():
    shape = {"values": torch.zeros(84, 334), "n_out": 3072, "n_in": 768}
    for backward in (False, True):
        assert not functions.by_weight_is_cheaper(64, backward=backward, **shape)
        assert functions.by_weight_is_cheaper(100_000, backward=backward, **shape)


@pytest.mark.parametrize("n_out, n_in", [(48, 16), (16, 48)])
def test_only_the_narrow_inputs_are_saved(n_out, n_in):
    layer = make_layer(n_out, n_in, 16)
    sizes = []
    x = torch.randn(1000, n_in, dtype=torch.float64)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
        layer(x.requires_grad_())
    c = layer.sparse_grad_values["default"].shape[1]
    assert sum(size for size in sizes if size >= 1000) == 1000 * c < x.numel()


def test_trainable_base_parameters_keep_their_gradients():
    layer = make_layer(6, 4, 4)
    layer.base_layer.bias.requires_grad_(True)
    layer(torch.randn(3, 4, dtype=torch.float64)).sum().backward()
    assert torch.equal(layer.base_layer.bias.grad, torch.full((6,), 3.0, dtype=torch.float64))


def test_autocast_computes_in_its_format_and_trains_in_float32():
    layer = make_layer(12, 5, 12).float()
    x = torch.randn(4, 5, requires_grad=True)
    expected = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), expected, rtol=0.05, atol=0.1)
    y.float().sum().backward()
    assert layer.sparse_grad_values["default"].grad.dtype == torch.float32


class Multiplications(TorchDispatchMode):
    """Counts the multiplications of matrix products: `addmm_` too, which torch's counter of operations leaves out."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.__name__.split(".")[0] in ("mm", "addmm", "addmm_"):
            left, right = args[-2:]
            self.count += left.shape[0] * left.shape[1] * right.shape[1]
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize(("r", "c"), [(12, 16), (16, 16), (16, 12)])
def test_the_cheaper_way_is_that_of_fewer_multiplications(monkeypatch, r, c, backward):
    monkeypatch.setattr(functions, "_COPY", 8)
    cheaper = functions.by_weight_is_cheaper
    weight, d, v, u = torch.ones(64, 64), torch.ones(r, c, requires_grad=True), torch.ones(64, r), torch.ones(64, c)

    def multiplications(tokens: int, by_weight: bool) -> int:
        monkeypatch.setattr(functions, "by_weight_is_cheaper", lambda *_, **__: by_weight)
        x = torch.ones(tokens, 64, requires_grad=True)
        with Multiplications() as forward:
            y = functions.ChangedLinear.apply(x, weight, None, d, v, u)
        with Multiplications() as back:
            y.sum().backward()
        return back.count if backward else forward.count

    chosen = set()
    for tokens in range(40, 301, 4):
        by_weight = cheaper(tokens, d, 64, 64, backward)
        expected = multiplications(tokens, True) + 8 * weight.numel() < multiplications(tokens, False)
        assert by_weight == expected, tokens
        chosen.add(by_weight)
    assert chosen == {True, False}
