"""SPSA against its formula, without drift in any type, and its state across saving."""

import io

import pytest
import torch
from dense_oracle import DenseSearch
from tiny import tiny_model
from torch import nn

from hf_ft_ext.gradientless.optimizers.perturbation import directions as directions_module
from hf_ft_ext.gradientless.optimizers.perturbation.directions import Directions, Draw
from hf_ft_ext.gradientless.optimizers.perturbation.perturb import PerturbedForward
from hf_ft_ext.gradientless.optimizers.spsa import SPSA

IDS = torch.arange(5, 25).view(2, 10)
LABELS = torch.tensor([0, 1])


def net(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 1)).to(dtype)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5, generator=generator)
    return model


def closure_of(model):
    x = torch.randn(16, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return lambda: (model(x.to(model[0].weight.dtype)).squeeze(-1).double() - x.sin().sum(-1)).square().mean()


def draws_of(seed, steps, directions=1, renew=None):
    """The directions that an optimizer with this seed draws, step by step."""
    generator, basis, result = torch.Generator().manual_seed(seed), 0, []
    for t in range(steps):
        if renew and t % renew == 0:
            basis = int(torch.randint(2**62, (), generator=generator))
        seeds = [int(torch.randint(2**62, (), generator=generator)) for _ in range(directions)]
        result.append([Draw(seed, basis) for seed in seeds])
    return result


def whole_direction(directions, model, draw):
    """The direction as one tensor for each parameter."""
    parts = []
    for i, p in enumerate(model.parameters()):
        if directions.has_factors(p.shape):
            left, right = directions.factors(p.shape, i, draw, p.dtype, p.device)
            parts.append(left @ right.T)
        else:
            parts.append(directions.dense(p.detach().view(-1), i, draw, slice(0, p.numel())).view(p.shape))
    return parts


class Quadratic(nn.Module):
    """`sum of scale * weight^2` in 200 dimensions, scales from 0.03 to 1."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.full((200,), 0.1, dtype=torch.double))
        self.scales = torch.logspace(-1.5, 0, 200, dtype=torch.double)

    def forward(self):
        return (self.scales * self.weight.square()).sum()


def run_both(steps=30, lr=0.02, weight_decay=0.0, model=net, **settings):
    """The weights of `SPSA` and of the oracle after the same steps, and how far the oracle has moved."""
    ours, plain = model(), model()
    optimizer = SPSA(ours.parameters(), ours, lr=lr, seed=5, weight_decay=weight_decay, **{"eps": 1e-3, **settings})
    oracle = DenseSearch(
        [p.detach() for p in plain.parameters()], optimizer.directions, 5, lr, optimizer.eps,
        optimizer.num_directions, optimizer.update, optimizer.estimate.kind, weight_decay=weight_decay,
    )  # fmt: skip
    closure, loss_of = closure_of(ours), closure_of(plain)
    for _ in range(steps):
        optimizer.step(closure)
        oracle.step(loss_of)
    return ours, plain, optimizer, oracle


RULES = {
    "sgd": {}, "sign": {"lr": 2e-3}, "momentum": {"lr": 5e-3}, "adam": {}, "rms": {}, "conservative": {},
    "momentum-buffer": {"lr": 5e-3, "moments": "buffer"},
}  # fmt: skip
DIRECTIONS = {
    "gaussian": {}, "rademacher": {"direction": "rademacher"}, "rademacher-outer": {"direction": "rademacher-outer"},
    "lozo": {"direction": "lozo", "rank": 2, "renew": 60}, "subzero": {"direction": "subzero", "rank": 2, "renew": 20},
    "small": {"small": 0.7},
}  # fmt: skip


@pytest.mark.parametrize(
    ("direction", "rule"),
    [(direction, rule) for direction in ("gaussian", "lozo") for rule in RULES]
    + [(direction, rule) for direction in list(DIRECTIONS)[1:] for rule in ("sgd", "adam") if direction != "lozo"],
)
def test_every_rule_on_every_direction_equals_the_dense_oracle(rule, direction, monkeypatch):
    if direction in ("gaussian", "lozo"):
        monkeypatch.setattr(directions_module, "CHUNK", 1000)
    settings = {**RULES[rule], **DIRECTIONS[direction]}
    ours, plain, optimizer, oracle = run_both(update=rule.partition("-")[0], num_directions=2, **settings)
    for a, b, start in zip(ours.parameters(), plain.parameters(), oracle.start, strict=True):
        assert (b - start).abs().max() > 1e-4
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
    assert optimizer.evaluations == oracle.evaluations


@pytest.mark.parametrize("estimate", ["two-sided", "one-sided", "population"])
@pytest.mark.parametrize("weight_decay", [0.0, 0.5])
def test_every_estimate_equals_the_dense_oracle(estimate, weight_decay):
    settings = {
        "lr": 0.005,
        "num_directions": 3,
        "direction": "lozo",
        "estimate": estimate,
        "weight_decay": weight_decay,
    }
    ours, plain, _, oracle = run_both(**settings)
    for a, b, start in zip(ours.parameters(), plain.parameters(), oracle.start, strict=True):
        assert (b - start).abs().max() > 1e-3
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_replayed_momentum_leaves_out_what_the_tolerance_allows():
    ours, plain, optimizer, _ = run_both(steps=90, lr=2e-3, update="momentum", momentum=0.9)
    assert (
        optimizer.weight_updates.rule.replayed == 66 and 0.9**66 <= 1e-3 < 0.9**65
    )  # directions of 24 steps are left out at the end
    for a, b in zip(ours.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-3)
    assert len(optimizer.weight_updates.history) == 65


def test_momentum_of_low_rank_directions_is_projected_by_least_squares():
    model = nn.Linear(6, 5, bias=False).double()
    optimizer = SPSA(model.parameters(), model, lr=0.0, direction="lozo", rank=2, renew=2, update="momentum")
    x = torch.randn(9, 6, generator=torch.Generator().manual_seed(0), dtype=torch.double)
    for _ in range(2):
        optimizer.step(lambda: model(x).square().mean())
    weight, factor = model.weight, optimizer.weight_updates.buffers[0][0].clone()
    _, before = optimizer.directions.factors(weight.shape, 0, Draw(0, optimizer.basis), weight.dtype, weight.device)
    optimizer.step(lambda: model(x).square().mean())
    (slope,), _ = optimizer.record[-1]
    draw = draws_of(0, 3, renew=2)[-1][0]
    left, right = optimizer.directions.factors(weight.shape, 0, draw, weight.dtype, weight.device)
    # the N that brings N right^T nearest to factor before^T
    nearest = torch.linalg.lstsq(right, before @ factor.T).solution.T
    torch.testing.assert_close(
        optimizer.weight_updates.buffers[0][0], 0.9 * nearest + slope * left / 2, rtol=1e-9, atol=1e-12
    )


def test_momentum_and_adam_are_no_worse_than_sgd_on_a_quadratic():
    """200 dimensions, equal evaluations, each rule at its best rate."""

    def final(rule, lr, seed, **settings):
        model = Quadratic()
        optimizer = SPSA(model.parameters(), model, lr=lr, eps=1e-4, update=rule, seed=seed, **settings)
        for _ in range(200):
            optimizer.step(model)
        return float(model().detach())

    best = {}
    for rule, rates, settings in (
        ("sgd", (4e-3, 8e-3), {}),
        ("momentum", (4e-4, 8e-4), {"moments": "buffer"}),
        ("adam", (4e-3, 8e-3), {"betas": (0.9, 0.99)}),
    ):
        best[rule] = min(final(rule, lr, 0, **settings) for lr in rates)
    assert best["momentum"] < 1.3 * best["sgd"] and best["adam"] < 1.3 * best["sgd"], best


def test_the_forward_gradient_is_the_derivative_along_the_direction():
    for kind in ("gaussian", "lozo"):
        model = net()
        closure = closure_of(model)
        gradient = torch.autograd.grad(closure(), list(model.parameters()))
        optimizer = SPSA(model.parameters(), model, lr=0.0, estimate="forward", num_directions=2, direction=kind)
        optimizer.step(closure)
        for slope, draw in zip(optimizer.record[0][0], draws_of(0, 1, 2, optimizer.directions.renew)[0], strict=True):
            z = whole_direction(optimizer.directions, model, draw)
            assert slope == pytest.approx(sum(float((g * part).sum()) for g, part in zip(gradient, z, strict=True)))


def test_signs_are_fair_and_independent():
    values = torch.empty(100_003)
    first, second = (
        Directions("rademacher").dense(values, 0, Draw(seed, 0), slice(0, len(values))) for seed in (1, 2)
    )
    assert set(first.tolist()) == {-1.0, 1.0}
    others = {"mean": torch.ones_like(first), "other seed": second, **{k: first.roll(k) for k in (1, 8, 64)}}
    for name, other in others.items():
        assert abs((first * other).mean()) < 4 / len(values) ** 0.5, name


@pytest.mark.parametrize("kind", ["gaussian", "rademacher", "lozo", "subzero", "rademacher-outer"])
def test_slope_times_direction_is_the_gradient_on_average(kind):
    directions = Directions(kind, rank=2 if kind in ("lozo", "subzero") else None)
    gradient = torch.randn(4, 3, generator=torch.Generator().manual_seed(0), dtype=torch.double)
    total = torch.zeros_like(gradient)
    for seed in range(3000):
        draw = Draw(seed, seed + 10_000)
        if directions.has_factors(gradient.shape):
            left, right = directions.factors(gradient.shape, 0, draw, gradient.dtype, gradient.device)
            z = left @ right.T
        else:
            z = directions.dense(gradient.view(-1), 0, draw, slice(0, 12)).view(4, 3)
        total += (gradient * z).sum() * z * directions.scale(gradient.shape)
    assert float((total / 3000 - gradient).norm() / gradient.norm()) < 0.2


def test_the_slope_is_that_of_the_gradient_on_average():
    model = net()
    closure = closure_of(model)
    gradient = torch.cat([g.flatten() for g in torch.autograd.grad(closure(), list(model.parameters()))])
    optimizer = SPSA(model.parameters(), model, eps=1e-4)
    for seed in range(5):
        draw = Draw(seed, 0)
        z = torch.cat([part.flatten() for part in whole_direction(optimizer.directions, model, draw)])
        with torch.no_grad():
            above, below = (optimizer.perturbed_loss(closure, [(draw, sign * 1e-4)]) for sign in (1, -1))
            slope = (above - below) / 2e-4
        assert slope == pytest.approx(float(gradient @ z), rel=1e-4)


def test_entries_of_a_block_change_equally():
    model = nn.Linear(6, 4, bias=False).double()
    before = model.weight.detach().clone()
    optimizer = SPSA(model.parameters(), model, lr=0.05, block=3)
    x = torch.randn(32, 6, generator=torch.Generator().manual_seed(0), dtype=torch.double)
    optimizer.step(lambda: (model(x) - x.sum(1, keepdim=True)).square().mean())
    moved = (model.weight.detach() - before).view(-1, 3)
    assert moved.abs().min() > 0
    torch.testing.assert_close(moved, moved[:, :1].expand(-1, 3), rtol=0, atol=1e-12)


def test_spsa_lowers_the_loss():
    model = net(torch.float32)
    closure = closure_of(model)
    first = closure().item()
    optimizer = SPSA(model.parameters(), model, lr=2e-2, num_directions=4)
    for _ in range(60):
        optimizer.step(closure)
    assert closure().item() < 0.5 * first


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_steps_without_effect_leave_no_drift(dtype):
    model = net(dtype)
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = SPSA(model.parameters(), model, lr=0.0, eps=1e-3)
    for _ in range(100):
        optimizer.step(closure_of(model))
    for a, b in zip(model.parameters(), before, strict=True):
        assert torch.equal(a, b)


def test_bf16_weights_learn():
    model = net(torch.bfloat16)
    closure = closure_of(model)
    first = closure().item()
    optimizer = SPSA(model.parameters(), model, lr=1e-2, num_directions=4, eps=1e-2)
    for _ in range(60):
        optimizer.step(closure)
    assert closure().item() < 0.8 * first


@pytest.mark.parametrize("model_type", ["bert", "roberta", "distilbert"])
def test_every_weight_of_a_model_is_perturbed_where_it_is_used(model_type):
    model = tiny_model(model_type).eval()
    expected = tiny_model(model_type).eval()
    optimizer = SPSA(model.parameters(), model, eps=1e-2)
    with torch.no_grad():
        draw = Draw(3, 4)
        seen = optimizer.perturbed_loss(lambda: model(input_ids=IDS, labels=LABELS).loss, [(draw, 1e-2)])
        for p, part in zip(expected.parameters(), whole_direction(optimizer.directions, expected, draw), strict=True):
            p.add_(part, alpha=1e-2)
        assert seen == pytest.approx(expected(input_ids=IDS, labels=LABELS).loss.item(), rel=1e-5)
    assert not optimizer.perturbed_forward.unread


def test_shared_weights_and_modules_used_twice_are_perturbed_alike():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
            self.b.weight = self.a.weight

        def forward(self, x):
            return self.b(self.a(self.a(x))).sum()

    model = Shared().double()
    (weight,) = model.parameters()
    stored, seed, x = weight.detach().clone(), 7, torch.ones(1, 4).double()
    optimizer = SPSA([weight], model, eps=0.1)
    with torch.no_grad():
        moved = stored + 0.1 * whole_direction(optimizer.directions, model, Draw(seed, 0))[0]
        loss = optimizer.perturbed_loss(lambda: model(x), [(Draw(seed, 0), 0.1)])
    assert loss == pytest.approx(float((x @ moved.T @ moved.T @ moved.T).sum()), rel=1e-9)
    assert torch.equal(weight, stored) and model.b.weight is model.a.weight is weight


def test_weights_are_put_back_when_the_forward_fails():
    model = net()
    before = dict(model.named_parameters())

    def fail():
        model(torch.zeros(1, 3).double())

    optimizer = SPSA(model.parameters(), model)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        optimizer.step(fail)
    assert all(p is before[name] for name, p in model.named_parameters())
    assert not model[0]._forward_hooks and not model[0]._forward_pre_hooks


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "settings",
    [
        {}, {"update": "adam"}, {"update": "momentum"}, {"update": "momentum", "moments": "buffer", "carry": True},
        {"update": "momentum", "direction": "lozo", "renew": 3}, {"update": "rms", "direction": "subzero", "rank": 2},
        {"estimate": "one-sided", "direction": "rademacher", "small": 0.5}, {"update": "conservative"},
    ],
)  # fmt: skip
def test_a_loaded_state_continues_bit_for_bit(settings, dtype):
    def make(model):
        return SPSA(model.parameters(), model, lr=1e-2, num_directions=2, seed=2, **settings)

    model = net(dtype)
    optimizer = make(model)
    for _ in range(4):
        optimizer.step(closure_of(model))
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    for _ in range(4):
        optimizer.step(closure_of(model))
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    other = net(dtype)
    other.load_state_dict(saved["model"])
    resumed = make(other)
    resumed.load_state_dict(saved["optimizer"])
    for _ in range(4):
        resumed.step(closure_of(other))
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
    with pytest.raises(ValueError, match="another method or number of directions"):
        SPSA(other.parameters(), other, num_directions=5).load_state_dict(saved["optimizer"])


def test_global_random_state_is_left_alone():
    model = net()
    state = torch.get_rng_state()
    SPSA(model.parameters(), model).step(closure_of(model))
    assert torch.equal(torch.get_rng_state(), state)


def test_tensors_that_no_forward_reads_are_named(caplog):
    model = net()
    extra = nn.Linear(2, 2).double()
    whole = nn.ModuleDict({"net": model, "extra": extra})
    before = extra.weight.detach().clone()
    optimizer = SPSA(whole.parameters(), whole, lr=0.1, weight_decay=0.1)
    optimizer.step(closure_of(model))
    assert "2 searched tensors are read by no forward pass" in caplog.text
    assert torch.equal(extra.weight, before)
    assert not PerturbedForward(whole, list(model.parameters()), Directions()).missing
