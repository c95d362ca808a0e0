"""SPSA against its formula, without drift in any type, and its state across saving."""

import io
import math

import pytest
import torch
from tiny import tiny_model
from torch import nn

from hf_ft_ext.errors import InputError
from hf_ft_ext.gradientless.optimizers.perturb import PerturbedUse
from hf_ft_ext.gradientless.optimizers.spsa import SPSA, direction, rounded_at_random

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


def seeds_of(seed, steps, directions=1):
    generator = torch.Generator().manual_seed(seed)
    return [[int(torch.randint(2**62, (), generator=generator)) for _ in range(directions)] for _ in range(steps)]


@pytest.mark.parametrize("update", ["sgd", "momentum", "adam"])
@pytest.mark.parametrize("directions, weight_decay", [(1, 0.0), (3, 0.1)])
def test_follows_the_formula(update, directions, weight_decay):
    ours, plain = net(), net()
    lr, eps = 1e-2, 1e-3
    settings = {"update": update, "num_directions": directions, "weight_decay": weight_decay}
    optimizer = SPSA(ours.parameters(), ours, lr=lr, eps=eps, seed=5, **settings)
    closure, loss_of = closure_of(ours), closure_of(plain)
    first, second = [0.0] * directions, [0.0] * directions
    for t, seeds in enumerate(seeds_of(5, 6, directions), start=1):
        optimizer.step(closure)
        with torch.no_grad():
            z = [[direction(p, seed, i) for i, p in enumerate(plain.parameters())] for seed in seeds]
            lengths = []
            for d in range(directions):
                losses = []
                for sign in (1, -1):
                    for p, part in zip(plain.parameters(), z[d], strict=True):
                        p.add_(sign * eps * part)
                    losses.append(loss_of().item())
                    for p, part in zip(plain.parameters(), z[d], strict=True):
                        p.sub_(sign * eps * part)
                g = (losses[0] - losses[1]) / (2 * eps)
                if update == "momentum":
                    first[d] = 0.9 * first[d] + g
                    g = first[d]
                elif update == "adam":
                    first[d], second[d] = 0.9 * first[d] + 0.1 * g, 0.999 * second[d] + 0.001 * g * g
                    g = first[d] / (1 - 0.9**t) / (math.sqrt(second[d] / (1 - 0.999**t)) + 1e-8)
                lengths.append(g)
            for i, p in enumerate(plain.parameters()):
                p.mul_(1 - lr * weight_decay)
                for d in range(directions):
                    p.sub_(lr * lengths[d] * z[d][i] / directions)
    for a, b in zip(ours.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9)


def test_the_slope_is_that_of_the_gradient_on_average():
    model = net()
    closure = closure_of(model)
    gradient = torch.cat([g.flatten() for g in torch.autograd.grad(closure(), list(model.parameters()))])
    optimizer = SPSA(model.parameters(), model, eps=1e-4)
    for seed in range(5):
        z = torch.cat([direction(p, seed, i).flatten() for i, p in enumerate(model.parameters())])
        with torch.no_grad():
            slope = (
                optimizer.perturbed_loss(closure, seed, 1.0) - optimizer.perturbed_loss(closure, seed, -1.0)
            ) / 2e-4
        assert slope == pytest.approx(float(gradient @ z), rel=1e-4)


def test_entries_of_a_block_move_alike():
    model = nn.Linear(6, 4, bias=False).double()
    before = model.weight.detach().clone()
    optimizer = SPSA(model.parameters(), model, lr=0.05, block=3)
    x = torch.randn(32, 6, generator=torch.Generator().manual_seed(0), dtype=torch.double)
    optimizer.step(lambda: (model(x) - x.sum(1, keepdim=True)).square().mean())
    moved = (model.weight.detach() - before).view(-1, 3)
    assert moved.abs().min() > 0
    torch.testing.assert_close(moved, moved[:, :1].expand(-1, 3), rtol=0, atol=1e-12)


def test_learns():
    model = net(torch.float32)
    closure = closure_of(model)
    first = closure().item()
    optimizer = SPSA(model.parameters(), model, lr=5e-3, num_directions=4)
    for _ in range(300):
        optimizer.step(closure)
    assert closure().item() < 0.5 * first


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_thousand_steps_without_effect_leave_no_drift(dtype):
    model = net(dtype)
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = SPSA(model.parameters(), model, lr=0.0, eps=1e-3)
    for _ in range(1000):
        optimizer.step(closure_of(model))
    for a, b in zip(model.parameters(), before, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_updates_below_half_a_unit_are_not_lost(dtype):
    exact = torch.full((20_000,), 1.0 + 0.1 * torch.finfo(dtype).eps)
    exact[1::2] *= -1
    rounded = rounded_at_random(exact, dtype, torch.Generator().manual_seed(0)).float()
    assert set(rounded.abs().tolist()) == {1.0, 1.0 + torch.finfo(dtype).eps}
    assert rounded.abs().mean().item() == pytest.approx(exact[0].item(), abs=0.02 * torch.finfo(dtype).eps)
    kept = torch.tensor([0.0, -0.5, 1.5])
    assert torch.equal(rounded_at_random(kept, dtype, torch.Generator()).float(), kept)


def test_bf16_weights_learn():
    model = net(torch.bfloat16)
    closure = closure_of(model)
    first = closure().item()
    optimizer = SPSA(model.parameters(), model, lr=3e-3, num_directions=4, eps=1e-2)
    for _ in range(200):
        optimizer.step(closure)
    assert closure().item() < 0.8 * first


@pytest.mark.parametrize("model_type", ["bert", "roberta", "distilbert"])
def test_every_weight_of_a_model_is_perturbed_where_it_is_used(model_type):
    model = tiny_model(model_type).eval()
    expected = tiny_model(model_type).eval()
    optimizer = SPSA(model.parameters(), model, eps=1e-2)
    with torch.no_grad():
        seen = optimizer.perturbed_loss(lambda: model(input_ids=IDS, labels=LABELS).loss, 3, 1.0)
        for i, p in enumerate(expected.parameters()):
            p.add_(direction(p, 3, i), alpha=1e-2)
        assert seen == pytest.approx(expected(input_ids=IDS, labels=LABELS).loss.item(), rel=1e-5)
    assert not optimizer.use.unseen


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
        moved = stored + 0.1 * direction(weight, seed, 0)
        loss = optimizer.perturbed_loss(lambda: model(x), seed, 1.0)
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


@pytest.mark.parametrize("update", ["sgd", "adam"])
def test_a_loaded_state_continues_bit_for_bit(update):
    def make(model):
        return SPSA(model.parameters(), model, lr=1e-2, update=update, num_directions=2, seed=2)

    model = net(torch.float32)
    optimizer = make(model)
    for _ in range(4):
        optimizer.step(closure_of(model))
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    for _ in range(4):
        optimizer.step(closure_of(model))
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    other = net(torch.float32)
    other.load_state_dict(saved["model"])
    resumed = make(other)
    resumed.load_state_dict(saved["optimizer"])
    for _ in range(4):
        resumed.step(closure_of(other))
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
    with pytest.raises(ValueError, match="another method or number of directions"):
        SPSA(other.parameters(), other).load_state_dict(saved["optimizer"])


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
    assert "2 searched tensors are read by no module's forward" in caplog.text
    assert torch.equal(extra.weight, before)
    assert not PerturbedUse(whole, list(model.parameters())).missing


@pytest.mark.parametrize(
    "options, message",
    [
        ({"lr": -1.0}, "lr=-1.0 is below 0"),
        ({"eps": 0.0}, "eps=0.0 is no size of a perturbation"),
        ({"num_directions": 0}, "num_directions=0 leaves nothing to compare"),
        ({"num_directions": 6_000}, "would need 12,000 evaluations, more than max_evaluations_per_step=10,000"),
        ({"block": 0}, "block=0 holds no entry"),
        ({"block": 7}, r"blocks of 7 do not divide the \d+ entries"),
        ({"update": "lion"}, "update='lion' is unknown; choose from: sgd, momentum, adam"),
        ({"momentum": 1.0}, r"momentum=1.0 is no factor in \[0, 1\)"),
        ({"betas": (0.9, 2)}, r"betas\[1\]=2 is no factor"),
        ({"adam_eps": 0}, "adam_eps=0 cannot keep a division finite"),
        ({"weight_decay": -0.1}, "weight_decay=-0.1 is below 0"),
    ],
)
def test_bad_arguments(options, message):
    model = net()
    with pytest.raises(InputError, match=message):
        SPSA(model.parameters(), model, **options)


def test_other_bad_input():
    model = net()
    with pytest.raises(InputError, match=r"a parameter of shape \(8, 5\) belongs to no part of the module"):
        SPSA(net().parameters(), model)
    with pytest.raises(InputError, match=r"call step\(closure\)"):
        SPSA(model.parameters(), model).step()
    with pytest.raises(InputError, match="the loss at the present weights is nan in step 1"):
        SPSA(model.parameters(), model).step(lambda: math.nan)
