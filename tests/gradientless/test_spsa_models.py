"""SPSA on models of many kinds, with every combination of direction, estimate and rule, against the dense oracle."""

import copy
import io
import itertools

import pytest
import torch
from dense_oracle import DenseSearch
from other_models import loss_of, other_batch, other_model
from test_spsa import DIRECTIONS, RULES, closure_of, net
from torch import nn
from transformers import AutoConfig, AutoModelForMaskedLM

from hf_ft_ext import SPSA
from hf_ft_ext.errors import InputError
from hf_ft_ext.gradientless.optimizers.exchange import SharedData, SingleProcess
from hf_ft_ext.gradientless.trajectory import apply_trajectory, save_trajectory

DRAWN = 3
ESTIMATES = ("two-sided", "one-sided", "population")
COMBINATIONS = [
    (direction, estimate, rule)
    for direction, estimate, rule in itertools.product(DIRECTIONS, ESTIMATES, RULES)
    if (direction, rule) != ("small", "momentum")  # refused: earlier directions cannot be recomputed
]


class Parts(nn.Module):
    """Modules of torch that hold or read their weights in their own ways."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.groups = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.GroupNorm(2, 4)
        self.scale = nn.Parameter(torch.tensor(1.3))
        self.bag, self.recurrent = nn.EmbeddingBag(6, 4), nn.LSTM(4, 3, batch_first=True)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)  # reads the weight of its `out_proj`
        self.layer = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)  # passes all weights to one kernel
        self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(2, 2))
        self.out, self.product = nn.Linear(4, 2), nn.Bilinear(4, 3, 2)
        self.free = nn.ParameterList([nn.Parameter(torch.randn(2)), nn.Parameter(torch.randn(()))])

    def forward(self, x):
        h = self.groups(self.norm(self.conv(x)).tanh() * self.scale)
        s = h.flatten(2).transpose(1, 2)
        s = self.layer(s + self.attention(s, s, s)[0])
        f = h.mean((2, 3)) + self.bag(torch.tensor([[0, 1], [2, 3], [4, 5]]))
        y = self.out(f) + self.product(f, self.recurrent(s)[0].mean(1))
        return self.normed(y) + self.free[0] * self.free[1]


def parts():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Parts().double().eval()


def setup(name):
    if name == "net":
        model = net()
        return model, closure_of(model)
    if name == "parts":
        model, x = parts(), torch.randn(3, 3, 6, 6, generator=torch.Generator().manual_seed(3)).double()
        return model, lambda: model(x).square().mean()
    model, batch = other_model(name), other_batch(name)
    return model, lambda: loss_of(model, batch)


def two_groups(parameters, rate):
    half = len(parameters) // 2
    return [{"params": parameters[:half], "weight_decay": 0.3}, {"params": parameters[half:], "lr": 3 * rate}]


def search(model, direction, estimate, rule, seed=5, searched=None):
    """A search of two groups with a schedule."""
    settings = {"eps": 1e-3, "lr": 1e-3, **DIRECTIONS[direction], **RULES[rule], "num_directions": DRAWN}
    if "renew" in settings and rule != "momentum":  # that would be projected, see `test_spsa`
        settings["renew"] = 3
    groups = two_groups(list(model.parameters() if searched is None else searched), settings["lr"])
    optimizer = SPSA(groups, model, seed=seed, update=rule.partition("-")[0], estimate=estimate, **settings)
    return optimizer, torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=8)


def check_against_the_oracle(name, direction, estimate, rule, steps, every=1, exact=1e-9):
    (ours, closure), (plain, loss) = setup(name), setup(name)
    mine, others = (list(model.parameters())[every - 1 :: every] for model in (ours, plain))
    optimizer, schedule = search(ours, direction, estimate, rule, searched=mine)
    half = len(others) // 2
    oracle = DenseSearch(
        [p.detach() for p in others], optimizer.directions, 5, None, optimizer.eps, DRAWN, optimizer.update, estimate,
        weight_decay=[0.3] * half + [0.0] * (len(others) - half),
    )  # fmt: skip
    for _ in range(steps):
        rates = [group["lr"] for group in optimizer.param_groups]
        oracle.lr = [rates[0]] * half + [rates[1]] * (len(others) - half)
        optimizer.step(closure)
        oracle.step(loss)
        schedule.step()
    found = dict(zip((n for n, _ in plain.named_parameters()), ours.parameters(), strict=True))
    for path, expected in plain.named_parameters():
        torch.testing.assert_close(found[path], expected, rtol=exact, atol=exact, msg=path)
    assert all(not torch.equal(p, start) for p, start in zip(others, oracle.start, strict=True))
    return optimizer, oracle


# z-scores add up to zero, so G is zero up to rounding where all directions have the same sign: its own sign, and
# Adam's ratio, are those of rounding errors there.
ROUNDING = [(d, "population", rule) for d in ("rademacher", "rademacher-outer") for rule in ("sign", "adam")]


@pytest.mark.parametrize(("direction", "estimate", "rule"), [c for c in COMBINATIONS if c not in ROUNDING])
def test_every_combination_equals_the_dense_oracle(direction, estimate, rule):
    optimizer, oracle = check_against_the_oracle("net", direction, estimate, rule, 5)
    assert optimizer.evaluations == oracle.evaluations


SEVERAL = [("gaussian", "two-sided", "sgd"), ("lozo", "one-sided", "momentum"), ("small", "population", "adam"),
           ("subzero", "two-sided", "conservative")]  # fmt: skip
EXACT = ("parts", "bert", "vit", "whisper", "wav2vec2", "t5", "modernbert")


@pytest.mark.parametrize(
    ("name", "direction", "estimate", "rule"),
    [(name, *combination) for name in EXACT for combination in (SEVERAL if name == "parts" else SEVERAL[:2])],
)
@pytest.mark.parametrize("every", [1, 2])
def test_every_parameter_of_a_model_is_perturbed_and_updated(name, direction, estimate, rule, every):
    """`every=2`: every other parameter is frozen."""
    check_against_the_oracle(name, direction, estimate, rule, 2, every, exact=1e-7)


@pytest.mark.parametrize("name", ["gpt2", "mamba"])
def test_a_loss_in_single_precision_moves_the_same_parameters(name):
    # The loss of causal models is computed in single precision: 1e-7 of it, divided by 2 eps, is the error of a slope.
    check_against_the_oracle(name, "gaussian", "two-sided", "sgd", 1, exact=1e-6)


# --- state and trajectory ------------------------------------------------------------------------------------


# An estimate is computed from losses: it does not depend on which of the 16-bit types the weights have.
RESUMED = [
    (*combination, dtype)
    for combination, dtype in itertools.product(COMBINATIONS, (torch.float32, torch.bfloat16, torch.float16))
    if dtype != torch.float16 or combination[1] == "two-sided"
]


@pytest.mark.parametrize(("direction", "estimate", "rule", "dtype"), RESUMED)
def test_resumed_and_repeated_runs_equal_the_whole_one(tmp_path, direction, estimate, rule, dtype):
    model, file = net(dtype), io.BytesIO()
    optimizer, schedule = search(model, direction, estimate, rule)
    for step in range(4):
        if step == 2:  # between two renewals of lasting factors
            torch.save([part.state_dict() for part in (model, optimizer, schedule)], file)
        optimizer.step(closure_of(model))
        schedule.step()
    file.seek(0)
    resumed = net(dtype)
    again, schedule = search(resumed, direction, estimate, rule, seed=99)
    for part, state in zip((resumed, again, schedule), torch.load(file, weights_only=True), strict=True):
        part.load_state_dict(state)
    for _ in range(2):
        again.step(closure_of(resumed))
        schedule.step()
    base = net(dtype)
    apply_trajectory(base, save_trajectory(again, resumed, tmp_path))
    start = net(dtype)
    for path, expected in model.state_dict().items():
        assert torch.equal(resumed.state_dict()[path], expected), path
        assert torch.equal(base.state_dict()[path], expected), path
    if dtype == torch.float32:
        assert not any(torch.equal(value, start.state_dict()[path]) for path, value in model.state_dict().items())


@pytest.mark.parametrize(
    "other", [{"direction": "lozo", "rank": 1}, {"direction": "lozo", "renew": 7}, {"block": 4}, {"small": 0.5}]
)
def test_a_state_of_other_directions_is_refused(other):
    model = nn.Sequential(nn.Linear(4, 4)).double()
    kind = {"direction": other["direction"]} if "direction" in other else {}
    state = SPSA(model.parameters(), model, **kind).state_dict()
    with pytest.raises(ValueError, match="the state is of another method"):
        SPSA(model.parameters(), model, **other).load_state_dict(state)


# --- reads outside of a module's own forward -------------------------------------------------------------------


class Tied(nn.Module):
    """Reads the embedding's weight for its outputs, beside calling the embedding."""

    def __init__(self):
        super().__init__()
        self.words, self.dense = nn.Embedding(9, 4), nn.Linear(4, 4)

    def forward(self, ids):
        assert self.words.weight.dtype == self.dense.weight.dtype  # reading a property is no read of the values
        return nn.functional.linear(self.dense(self.words(ids)).tanh(), self.words.weight).logsumexp(-1).mean()


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("candidates", [1, 2])
def test_a_weight_that_is_also_read_directly_is_perturbed_there(direction, candidates):
    ids = torch.tensor([[1, 2], [3, 4]])

    def make():
        torch.manual_seed(0)
        return Tied().double()

    ours, plain = make(), make()
    settings = {key: value for key, value in DIRECTIONS[direction].items() if key != "renew"}
    optimizer = SPSA(ours.parameters(), ours, lr=0.1, seed=5, candidates_per_forward=candidates, **settings)

    class Evaluate:
        def repeated(self, n):
            return torch.stack([ours(part) for part in ids.repeat(n, 1).view(n, 2, 2)])

    oracle = DenseSearch([p.detach() for p in plain.parameters()], optimizer.directions, 5, 0.1, 1e-3)
    for _ in range(3):
        optimizer.step(lambda: ours(ids), Evaluate())
        oracle.step(lambda: plain(ids))
    for a, b in zip(ours.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    assert optimizer.perturbed_forward.elsewhere == {0}  # `dense` is read for its type only
    assert optimizer.evaluations == oracle.evaluations + 2  # the first step's, once more
    assert type(ours.words.weight) is nn.Parameter and nn.Module.__getattr__.__name__ == "__getattr__"


def test_mobilebert_reads_its_output_layers_weight_directly():
    values = {"vocab_size": 60, "hidden_size": 16, "embedding_size": 16, "intra_bottleneck_size": 16,
              "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}  # fmt: skip

    def make():
        torch.manual_seed(0)
        config = AutoConfig.for_model("mobilebert", **values)
        return AutoModelForMaskedLM.from_config(config).double().eval()

    ours, plain = make(), make()
    batch = other_batch("bert")
    optimizer = SPSA(ours.parameters(), ours, lr=1e-3, seed=5)
    oracle = DenseSearch([p.detach() for p in plain.parameters()], optimizer.directions, 5, 1e-3, 1e-3)
    for _ in range(2):
        optimizer.step(lambda: ours(**batch).loss)
        oracle.step(lambda: plain(**batch).loss)
    for (path, a), b in zip(ours.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9, msg=path)


def test_reads_outside_of_the_model_are_named(caplog):
    model = net()
    closure = closure_of(model)
    optimizer = SPSA(model.parameters(), model)
    optimizer.step(lambda: closure() + 0.1 * model[2].weight.square().sum())
    assert (
        "1 searched tensors (the first of shape (1, 8)) are read outside of the forward of Sequential" in caplog.text
    )
    assert not optimizer.perturbed_forward.elsewhere


class Late(nn.Module):
    """Runs its second layer from the fourth step on, as a mixture of experts may."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x, both):
        return (self.first(x) + (self.second(x) if both else 0)).square().mean()


LATE = [{}, {"update": "momentum"}, {"update": "momentum", "moments": "buffer"}, {"update": "adam"},
        {"direction": "lozo", "rank": 1, "renew": 2, "update": "momentum"}]  # fmt: skip


@pytest.mark.parametrize("settings", LATE)
def test_tensors_are_updated_from_the_step_that_first_reads_them(tmp_path, caplog, settings):
    def make():
        torch.manual_seed(0)
        return Late().double()

    x = torch.randn(5, 3, generator=torch.Generator().manual_seed(1)).double()
    model, file = make(), io.BytesIO()
    options = {"lr": 1e-2, "weight_decay": 0.1, "seed": 3, **settings}
    optimizer = SPSA(model.parameters(), model, **options)
    for step in range(3):
        optimizer.step(lambda: model(x, both=False))
        assert torch.equal(model.second.weight, make().second.weight) or step > 2
    assert "2 searched tensors are read by no forward pass" in caplog.text
    torch.save([model.state_dict(), optimizer.state_dict()], file)
    for _ in range(3):
        optimizer.step(lambda: model(x, both=True))
    file.seek(0)
    resumed, (weights, state) = make(), torch.load(file, weights_only=True)
    resumed.load_state_dict(weights)
    again = SPSA(resumed.parameters(), resumed, **options)
    again.load_state_dict(state)
    for _ in range(3):
        again.step(lambda: resumed(x, both=True))
    base = apply_trajectory(make(), save_trajectory(again, resumed, tmp_path))
    for path, expected in model.state_dict().items():
        assert torch.equal(resumed.state_dict()[path], expected), path
        assert torch.equal(base.state_dict()[path], expected), path
    # The second layer moves as in a search that begins with the fourth step, with the same directions and slopes.
    fresh = make()
    alone = SPSA(fresh.parameters(), fresh, **options)
    alone.load_state_dict({**alone.state_dict(), "search": _generator_of(state["search"])})
    alone.repeat(optimizer.record[3:])
    if settings.get("direction") != "lozo":  # its right factor depends on when it was drawn
        for a, b in zip(fresh.second.parameters(), model.second.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def _generator_of(state):
    """The state of a new search, but for the generator."""
    return {**state, "steps": 0, "history": [], "buffers": {}, "first_steps": {}, "unseen": [], "factor_basis": {}}


def test_processes_agree_on_what_was_read():
    exchange = SharedData(lambda flags: flags + torch.tensor([0.0, 0.0, 1.0]))
    assert exchange.union({1}, 3) == {1, 2} and exchange.union(set(), 3) == {2}
    assert SingleProcess().union({1}, 3) == {1}

    class Other(SingleProcess):
        def union(self, numbers, n):
            return numbers | {2, 3} if numbers else numbers  # another process has read the second layer

    model, x = Late().double(), torch.randn(5, 3).double()
    optimizer = SPSA(model.parameters(), model, lr=1e-2)
    optimizer.exchange = Other()
    before = copy.deepcopy(model)
    optimizer.step(lambda: model(x, both=False))
    assert not optimizer.perturbed_forward.unread
    assert not torch.equal(model.second.weight, before.second.weight)


@pytest.mark.parametrize("value", [float("nan"), torch.tensor(float("nan")), float("inf"), -float("inf")])
@pytest.mark.parametrize("update", ["sgd", "conservative"])
def test_a_loss_that_is_not_finite_stops_the_search(value, update):
    model = net()
    with pytest.raises(
        InputError, match=r"the loss at the current weights is -?(nan|inf) in step 1; look for bad rows"
    ):
        SPSA(model.parameters(), model, update=update).step(lambda: value)


@pytest.mark.parametrize("value", [1, 1.0, torch.tensor(1.0), torch.tensor([1.0], dtype=torch.bfloat16)])
def test_a_loss_may_be_any_number(value):
    model = net()
    assert SPSA(model.parameters(), model).step(lambda: (model(torch.zeros(1, 5).double()), value)[1]) == 1.0


@pytest.mark.parametrize("parameter", [torch.zeros(3).cfloat(), torch.zeros(3).long(), torch.zeros(3, 4).t()])
def test_parameters_that_cannot_be_searched_are_refused(parameter):
    model = nn.Module()
    model.weight = nn.Parameter(parameter, requires_grad=False)
    with pytest.raises(InputError, match=r"cannot be searched; pass contiguous floating-point parameters"):
        SPSA([model.weight], model)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("settings", [{}, {"update": "sign"}, {"update": "rms"}, {"estimate": "population"}])
def test_weight_decay_shrinks_only_the_entries_below_the_threshold(settings, dtype):
    model = net(dtype)
    before = [p.detach().clone() for p in model.parameters()]
    search = SPSA(model.parameters(), model, lr=0.02, small=0.25, weight_decay=2.0, num_directions=3, **settings)
    search.step(closure_of(model))
    for parameter, start in zip(model.parameters(), before, strict=True):
        smallest = start.abs() <= start.abs().flatten().kthvalue(max(1, round(start.numel() / 4))).values
        assert torch.equal(parameter != start, smallest)
