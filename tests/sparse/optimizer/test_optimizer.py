"""SparseAdamW against AdamW on explicit rotated weights, and its state across saving."""

import copy
import io

import pytest
import torch
from torch import nn

from hf_ft_ext.sparse.basis import ACTIVATIONS, GRADIENT, Basis
from hf_ft_ext.sparse.fixed import FixedSupport
from hf_ft_ext.sparse.layer import SparseGradLinear
from hf_ft_ext.sparse.optimizer import SparseAdamW
from hf_ft_ext.sparse.optimizer.support import carry_over, top_k

N_OUT, N_IN = 6, 5


def make(n_params, rotates=GRADIENT, dtype=torch.float64, seed=0):
    """A two-layer net, its first layer converted."""
    generator = torch.Generator().manual_seed(seed)
    net = nn.Sequential(nn.Linear(N_IN, N_OUT), nn.Tanh(), nn.Linear(N_OUT, 1)).to(dtype)
    for parameter in net.parameters():
        nn.init.normal_(parameter, generator=generator)
    factors = [torch.linalg.qr(torch.randn(n, n, dtype=dtype, generator=generator)).Q for n in (N_OUT, N_IN)]
    net[0] = SparseGradLinear.from_linear(net[0], Basis(*factors, rotates), n_params, "kind")
    return net


def batches(n, dtype=torch.float64):
    generator = torch.Generator().manual_seed(9)
    return [torch.randn(8, N_IN, dtype=dtype, generator=generator) for _ in range(n)]


def loss_of(net, x):
    return (net(x).squeeze(-1) - x.sin().sum(-1)).square().mean()


def train(net, optimizer, data):
    for x in data:
        optimizer.zero_grad()
        loss_of(net, x).backward()
        optimizer.step()


def dense_reference(net, data, n_params, lr, weight_decay):
    """The same method spelled out on dense rotated matrices, entry by entry where moments restart."""
    layer = net[0]
    v, u = layer.basis.out_factor, layer.basis.in_factor
    rotated = (v.T @ layer.weight.detach() @ u).requires_grad_()
    rest = [p for p in net.parameters() if p is not layer.weight]
    adamw = torch.optim.AdamW(rest, lr=lr, weight_decay=weight_decay)
    step, first, second = (torch.zeros_like(rotated.detach()) for _ in range(3))
    last = torch.zeros_like(step, dtype=torch.bool)
    for x in data:
        adamw.zero_grad()
        rotated.grad = None
        hidden = nn.functional.linear(x, v @ rotated @ u.T, layer.bias)
        (net[2](net[1](hidden)).squeeze(-1) - x.sin().sum(-1)).square().mean().backward()
        adamw.step()
        with torch.no_grad():
            chosen = torch.zeros_like(last).flatten()
            chosen[rotated.grad.abs().flatten().argsort(descending=True)[:n_params]] = True
            chosen = chosen.view_as(last)
            for state in (step, first, second):
                state[~(chosen & last)] = 0
            step[chosen] += 1
            first[chosen] = 0.9 * first[chosen] + 0.1 * rotated.grad[chosen]
            second[chosen] = 0.999 * second[chosen] + 0.001 * rotated.grad[chosen] ** 2
            mean, square = (first / (1 - 0.9**step))[chosen], (second / (1 - 0.999**step))[chosen]
            rotated[chosen] -= lr * (mean / (square.sqrt() + 1e-8) + weight_decay * rotated[chosen])
            last = chosen
    return v @ rotated.detach() @ u.T


@pytest.mark.parametrize("rotates", [ACTIVATIONS, GRADIENT])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("n_params", [1, 7, N_OUT * N_IN])
def test_equals_the_spelled_out_method(rotates, weight_decay, n_params):
    net, data = make(n_params, rotates), batches(12)
    reference = copy.deepcopy(net)
    train(net, SparseAdamW(net.parameters(), [net[0]], lr=0.05, weight_decay=weight_decay), data)
    expected = dense_reference(reference, data, n_params, 0.05, weight_decay)
    torch.testing.assert_close(net[0].weight.detach(), expected, rtol=1e-10, atol=1e-10)
    for parameter, other in zip(net[2].parameters(), reference[2].parameters(), strict=True):
        torch.testing.assert_close(parameter, other, rtol=1e-10, atol=1e-10)


def test_dense_moments_are_those_of_sparse_adam():
    net, data = make(7), batches(12)
    layer = net[0]
    v, u = layer.basis.out_factor, layer.basis.in_factor
    rotated = (v.T @ layer.weight.detach() @ u).requires_grad_()
    rest = nn.Sequential(*copy.deepcopy(net)[1:])
    bias = layer.bias.detach().clone().requires_grad_()
    adam = torch.optim.SparseAdam([rotated], lr=0.05)
    adamw = torch.optim.AdamW([*rest.parameters(), bias], lr=0.05, weight_decay=0)
    train(net, SparseAdamW(net.parameters(), [layer], lr=0.05, weight_decay=0, dense_moments=True), data)
    for x in data:
        adamw.zero_grad()
        hidden = nn.functional.linear(x, v @ rotated @ u.T, bias)
        loss = (rest(hidden).squeeze(-1) - x.sin().sum(-1)).square().mean()
        dense, *others = torch.autograd.grad(loss, [rotated, *rest.parameters(), bias])
        keep = torch.zeros_like(dense).view(-1)
        keep[dense.abs().flatten().topk(7).indices] = 1
        rotated.grad = (dense * keep.view_as(dense)).to_sparse()
        for parameter, gradient in zip([*rest.parameters(), bias], others, strict=True):
            parameter.grad = gradient
        adam.step()
        adamw.step()
    # SparseAdam adds its eps before the bias correction, hence no closer than that.
    torch.testing.assert_close(layer.weight.detach(), v @ rotated.detach() @ u.T, rtol=1e-6, atol=1e-6)


def test_state_with_other_moments_is_refused():
    net = make(4)
    optimizer = SparseAdamW(net.parameters(), [net[0]])
    train(net, optimizer, batches(1))
    with pytest.raises(ValueError, match="other moments; load it with the same dense_moments"):
        SparseAdamW(net.parameters(), [net[0]], dense_moments=True).load_state_dict(optimizer.state_dict())


def test_one_step_changes_only_the_support_in_rotated_coordinates():
    net = make(n_params=4)
    layer, before = net[0], net[0].weight.detach().clone()
    optimizer = SparseAdamW(net.parameters(), [layer], lr=0.01, weight_decay=0.1)
    train(net, optimizer, batches(1))
    change = layer.basis.rotate(layer.weight.detach() - before).flatten()
    support = optimizer.state[layer.weight]["indices"].long()
    assert len(support) == 4 and (change[support].abs() > 1e-4).all()
    change[support] = 0
    assert change.abs().max() < 1e-12


def test_state_has_the_size_of_the_support():
    net = make(n_params=4, dtype=torch.float32)
    optimizer = SparseAdamW(net.parameters(), [net[0]])
    train(net, optimizer, batches(2, torch.float32))
    state = optimizer.state[net[0].weight]
    assert {key: tuple(value.shape) for key, value in state.items()} == dict.fromkeys(
        ("step", "indices", "exp_avg", "exp_avg_sq"), (4,)
    )
    assert sum(value.numel() * value.element_size() for value in state.values()) == 4 * 16


@pytest.mark.parametrize("rotates", [ACTIVATIONS, GRADIENT])
def test_saved_and_loaded_state_continues_bit_for_bit(rotates):
    data = batches(10, torch.float32)
    unbroken = make(5, rotates, torch.float32)
    train(unbroken, SparseAdamW(unbroken.parameters(), [unbroken[0]], lr=0.05, weight_decay=0.01), data)

    net = make(5, rotates, torch.float32)
    optimizer = SparseAdamW(net.parameters(), [net[0]], lr=0.05, weight_decay=0.01)
    train(net, optimizer, data[:6])
    file = io.BytesIO()
    torch.save({"net": net.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)

    resumed = make(5, GRADIENT, torch.float32, seed=1)
    resumed[0].basis = Basis()  # a resumed run has not computed one
    resumed.load_state_dict(saved["net"])
    optimizer = SparseAdamW(resumed.parameters(), [resumed[0]], lr=0.05, weight_decay=0.01)
    optimizer.load_state_dict(saved["optimizer"])
    assert resumed[0].basis.rotates == rotates
    train(resumed, optimizer, data[6:])
    for a, b in zip(unbroken.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(("fixed", "dense_moments"), [(False, False), (False, True), (True, False)])
@pytest.mark.parametrize(("of", "into"), [(torch.float32, torch.float64), (torch.float64, torch.float32)])
def test_a_state_continues_in_another_dtype(of, into, dense_moments, fixed):
    """As torch's own optimizers do; the steps then are those of the first dtype, to its rounding."""

    def prepared(dtype):
        net = make(5, dtype=dtype)
        if fixed:
            net[0].expect_fixed_support(block=False)
            chosen = torch.tensor([0, 3, 8, 17, 29])
            net[0].set_support(FixedSupport.of_entries(net[0].basis, chosen, N_IN))
        refresh = {} if fixed else {"refresh_steps": 4, "refresh_gradients": 4}
        parameters = [p for p in net.parameters() if p.requires_grad]
        return net, SparseAdamW(parameters, [net[0]], lr=0.05, dense_moments=dense_moments, **refresh)

    net, optimizer = prepared(of)
    data = batches(9, torch.float32)
    train(net, optimizer, [x.to(of) for x in data[:6]])  # two steps after a refresh of the basis
    other, loaded = prepared(into)
    other.load_state_dict(net.state_dict())
    loaded.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for pair, dtype in (((net, optimizer), of), ((other, loaded), into)):
        train(*pair, [x.to(dtype) for x in data[6:]])
    for parameter, expected in zip(other.parameters(), net.parameters(), strict=True):
        assert parameter.dtype == into
        torch.testing.assert_close(parameter.double(), expected.double(), rtol=1e-4, atol=1e-5)
    for state in loaded.state.values():
        assert {value.dtype for key, value in state.items() if key.startswith("exp_avg")} == {into}


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        (lambda net: [{"params": list(net.parameters()), "maximize": True}], "maximize=True has no sparse form"),
        (lambda net: [{"params": list(net.parameters()), "amsgrad": True}], "amsgrad=True has no sparse form"),
        (lambda net: net[2].parameters(), "a layer of kind kind trains, but it is not among `params`"),
    ],
)
def test_groups_that_would_be_ignored_are_refused(groups, message):
    net = make(4)
    with pytest.raises(ValueError, match=message):
        SparseAdamW(groups(net), [net[0]])


def test_layers_may_be_a_mapping_and_frozen_ones_need_no_group():
    net, same = make(4), make(4)
    train(net, SparseAdamW(net.parameters(), {"0": net[0]}), batches(2))
    train(same, SparseAdamW(same.parameters(), [same[0]]), batches(2))
    assert torch.equal(net[0].weight, same[0].weight)
    net[0].weight.requires_grad_(False)
    SparseAdamW([p for p in net.parameters() if p.requires_grad], [net[0]])


def test_half_precision_keeps_float32_moments_through_a_reload():
    net = make(4, dtype=torch.float32)
    net = nn.Sequential(nn.Linear(N_IN, N_OUT).bfloat16())
    net[0] = SparseGradLinear.from_linear(net[0], Basis(torch.eye(N_OUT), torch.eye(N_IN)), 4, "kind")
    optimizer = SparseAdamW(net.parameters(), [net[0]])
    net(torch.randn(3, N_IN).bfloat16()).sum().backward()
    optimizer.step()
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    state = optimizer.state[net[0].weight]
    assert state["exp_avg"].dtype == torch.float32 and state["indices"].dtype == torch.int32


def test_step_hooks_run_once_and_gradients_stay_visible():
    net = make(4)
    optimizer = SparseAdamW(net.parameters(), [net[0]])
    torch.optim.AdamW([nn.Parameter(torch.zeros(1))])  # its construction wraps AdamW.step
    calls = []
    optimizer.register_step_post_hook(lambda *_: calls.append(1))
    train(net, optimizer, batches(1))
    assert calls == [1]
    assert net[0].weight.grad is not None


def test_closure_is_called_and_its_loss_returned():
    net = make(4)
    optimizer = SparseAdamW(net.parameters(), [net[0]])

    def closure():
        optimizer.zero_grad()
        loss = loss_of(net, batches(1)[0])
        loss.backward()
        return loss

    assert optimizer.step(closure).item() > loss_of(net, batches(1)[0]).item()


def test_missing_basis_is_an_error():
    net = make(4)
    net[0].basis = Basis()
    optimizer = SparseAdamW(net.parameters(), [net[0]])
    loss_of(net, batches(1)[0]).backward()
    with pytest.raises(RuntimeError, match=r"basis of kind has not been computed.*prepare_layers"):
        optimizer.step()


def test_state_of_another_model_is_refused():
    net, other = make(4), make(4)
    optimizer = SparseAdamW(net.parameters(), [net[0]])
    train(net, optimizer, batches(1))
    other[0].kind = "another kind"
    with pytest.raises(ValueError, match=r"no basis for .*another kind"):
        SparseAdamW(other.parameters(), [other[0]]).load_state_dict(optimizer.state_dict())
    state = optimizer.state_dict()
    state["bases"]["kind"]["out_factor"] = torch.eye(3)
    with pytest.raises(ValueError, match=r"sizes \(3, 5\), the layer \(6, 5\)"):
        SparseAdamW(net.parameters(), [net[0]]).load_state_dict(state)


def test_top_k_is_sorted_and_of_largest_magnitude():
    rotated = torch.tensor([[0.1, -5.0, 0.0], [3.0, -0.2, 4.0]])
    assert top_k(rotated, 3).tolist() == [1, 3, 5]


@pytest.mark.parametrize("columns", [512, 510])  # with 510 = 17 x 30 the sample sees every 17th column only
@pytest.mark.parametrize("kind", ["decay", "ties", "misleading"])
def test_top_k_by_candidates_is_exact(kind, columns):
    generator = torch.Generator().manual_seed(0)
    rotated = torch.randn(600, columns, generator=generator)
    if kind == "decay":
        rotated *= torch.logspace(0, -4, 600)[:, None]
    if kind == "ties":
        rotated = (rotated * 2).round()
    if kind == "misleading":
        rotated[:, ::17] *= 10
    for k in (300, 3_500, 70_000):
        chosen = top_k(rotated, k)
        assert len(chosen.unique()) == k and (chosen.diff() > 0).all()
        values = rotated.abs().flatten()
        assert torch.equal(values[chosen.long()].sort().values, values.topk(k).values.flip(0))


def test_threshold_updates_what_reaches_it_even_if_nothing_does():
    net = make(n_params=4)
    layer = net[0]
    loss_of(net, batches(1)[0]).backward()
    layer.threshold = layer.value_gradient().abs().median().item()
    optimizer = SparseAdamW(net.parameters(), [layer], lr=0.01)
    sizes = []
    for scale in (1.0, 1e-6, 0.3):
        optimizer.zero_grad()
        (scale * loss_of(net, batches(1)[0])).backward()
        expected = (layer.value_gradient().abs() >= layer.threshold).flatten().nonzero().squeeze(1)
        before = layer.weight.detach().clone()
        optimizer.step()
        chosen = optimizer.state[layer.weight]["indices"].long()
        assert torch.equal(chosen, expected)
        assert torch.equal(layer.weight, before) == (len(chosen) == 0)
        sizes.append(len(chosen))
    assert sizes[0] > sizes[2] > sizes[1] == 0


def test_carry_over_keeps_common_entries_and_restarts_the_others():
    old, new = torch.tensor([1, 4, 7]), torch.tensor([0, 4, 7, 9])
    (state,) = carry_over(old, new, torch.tensor([10.0, 20.0, 30.0]))
    assert state.tolist() == [0, 20, 30, 0]
    (fresh,) = carry_over(None, new, torch.zeros(0))
    assert fresh.tolist() == [0, 0, 0, 0]
