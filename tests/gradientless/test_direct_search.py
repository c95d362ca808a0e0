"""DirectSearch against a plain, slow form of the same method, and its state across saving."""

import io
import itertools
import math

import pytest
import torch
from torch import nn

from hf_ft_ext import SPSA
from hf_ft_ext.errors import InputError
from hf_ft_ext.gradientless.optimizers.direct_search import DirectSearch
from hf_ft_ext.gradientless.optimizers.selection import random_subset


def net(dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 2)).to(dtype)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5, generator=generator)
    return model


def batches(n, dtype=torch.float64):
    generator = torch.Generator().manual_seed(9)
    for _ in range(n):
        x = torch.randn(16, 5, generator=generator, dtype=torch.float64).to(dtype)
        yield x, (x.sum(-1) > 0).long()


def closure_of(model, x, y):
    return lambda: nn.functional.cross_entropy(model(x).float() if x.dtype != torch.float64 else model(x), y)


class Option:
    """A change that a tensor may make, and the changes that may follow it."""

    def __init__(self, change, children=()):
        self.change, self.children = change, list(children)


class PlainSearch:
    """The method word by word: whole copies, recursion, one evaluation at a time; draws as `DirectSearch` does."""

    def __init__(self, parameters, seed, *, lr, k, options, size, weight_decay, antithetic):
        self.parameters, self.generator = list(parameters), torch.Generator().manual_seed(seed)
        self.lr, self.k, self.options, self.size = lr, k, options, size
        self.weight_decay, self.antithetic = weight_decay, antithetic
        self.roots = []
        for parameter in self.parameters:
            level = []
            for _ in range(options[1] if options else 0):
                level = [Option(torch.zeros_like(parameter), level)]
            self.roots.append(level)
        self.moves = []

    def objective(self, parameter, value, closure):
        saved = parameter.detach().clone()
        parameter.copy_(value)
        result = float(closure()) + self.weight_decay * float(value.norm())
        parameter.copy_(saved)
        return result

    def draw(self, parameter, n_leaves):
        entries = None
        if self.size is not None and self.size < parameter.numel():
            entries = random_subset(parameter.numel(), self.size, self.generator)
        seed = int(torch.randint(2**62, (), generator=self.generator))
        size = parameter.numel() if entries is None else self.size
        vectors = (self.k + 1) // 2 if self.antithetic else self.k
        noise = torch.randn(n_leaves * vectors, size, generator=torch.Generator().manual_seed(seed)).to(parameter)
        if parameter.dtype == torch.float64:
            generator = torch.Generator().manual_seed(seed)
            noise = torch.randn(n_leaves * vectors, size, generator=generator, dtype=torch.float64)
        for leaf in range(n_leaves):
            changes = []
            for i in range(self.k):
                vector, sign, power = (i // 2, -1 if i % 2 else 1, i // 2) if self.antithetic else (i, 1, i)
                change = torch.zeros_like(parameter).flatten()
                index = torch.arange(size) if entries is None else entries
                change[index] = noise[leaf * vectors + vector] * (sign * self.lr / 2**power)
                changes.append(change.view_as(parameter))
            yield changes

    @torch.no_grad()
    def step(self, closure):
        for position, parameter in enumerate(self.parameters):
            unmoved = self.objective(parameter, parameter.clone(), closure)
            if self.options is None:
                (changes,) = self.draw(parameter, 1)
                scored = [(self.objective(parameter, parameter + c, closure), i) for i, c in enumerate(changes)]
                best, i = min(scored)
                if best < unmoved:
                    parameter.add_(changes[i])
                self.moves.append(best < unmoved)
                continue
            self.search_options(position, parameter, unmoved, closure)

    def search_options(self, position, parameter, unmoved, closure):
        m, _ = self.options
        leaves = list(self.leaves(self.roots[position], parameter.detach()))
        drawn, best_of_first, everything = self.draw(parameter, len(leaves)), {}, []
        for (first, leaf, start), changes in zip(leaves, drawn, strict=True):
            scored = [
                (self.objective(parameter, start + change, closure), change)
                for change in (torch.zeros_like(parameter), *changes)
            ]
            best_of_first[first] = min(best_of_first.get(first, math.inf), min(s for s, _ in scored))
            leaf.next = [Option(change) for _, change in sorted(scored, key=lambda pair: pair[0])[:m]]
            everything += scored
        first = min(best_of_first, key=best_of_first.get)
        if best_of_first[first] < unmoved:
            for _, leaf, _ in leaves:
                leaf.children = leaf.next
            option = self.roots[position][first]
            parameter.add_(option.change)
            self.roots[position] = option.children
        else:
            kept = [change for _, change in sorted(everything, key=lambda pair: pair[0])[:m]]
            self.roots[position] = [self.chain(change, self.options[1] - 1) for change in kept]
        self.moves.append(best_of_first[first] < unmoved)

    def chain(self, change, depth):
        return Option(change, [self.chain(torch.zeros_like(change), depth - 1)] if depth else [])

    def leaves(self, roots, start, first=None):
        for i, option in enumerate(roots):
            top = i if first is None else first
            if option.children:
                yield from self.leaves(option.children, start + option.change, top)
            else:
                yield top, option, start + option.change


@pytest.mark.parametrize("options", [None, (1, 1), (3, 2), (1, 3)])
@pytest.mark.parametrize("size, weight_decay, antithetic", [(None, 0.0, False), (7, 0.05, False), (7, 0.0, True)])
def test_equals_the_plain_implementation(options, size, weight_decay, antithetic):
    ours, plain = net(), net()
    settings = {"lr": 3.0, "weight_decay": weight_decay, "antithetic": antithetic}
    optimizer = DirectSearch(
        ours.parameters(), seed=3, num_candidates=4, options=options, sampling_size=size, **settings
    )
    reference = PlainSearch(plain.parameters(), 3, k=4, options=options, size=size, **settings)
    for x, y in batches(15):
        optimizer.step(closure_of(ours, x, y))
        reference.step(closure_of(plain, x, y))
        for a, b in zip(ours.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
    assert 3 < sum(reference.moves) < 60  # both kinds of steps have been compared


@pytest.mark.parametrize("options", [None, (1, 1), (3, 2)])
def test_direct_search_lowers_the_loss(options):
    model = net()
    optimizer = DirectSearch(model.parameters(), lr=0.1, options=options, sampling_size=16)
    (x, y), *_ = batches(1)
    closure = closure_of(model, x, y)
    first = closure().item()
    for _ in range(60):
        optimizer.step(closure)
    assert closure().item() < 0.5 * first


def test_sampled_entries_alone_change_and_are_chosen_anew():
    model = net()
    before = model[0].weight.detach().clone()
    optimizer = DirectSearch([model[0].weight], lr=0.3, sampling_size=4, sampling_steps=3)
    touched = []
    for x, y in batches(6):
        optimizer.step(closure_of(model, x, y))
        touched.append(set(optimizer.blocks[0].views[0].indices.tolist()))
    assert touched[0] == touched[1] == touched[2] != touched[3] == touched[4] == touched[5]
    changed = set((model[0].weight.detach() != before).flatten().nonzero().flatten().tolist())
    assert changed and changed <= touched[0] | touched[3]


def test_magnitude_takes_the_largest():
    model = net()
    optimizer = DirectSearch([model[0].weight], selection="magnitude", sampling_size=5)
    largest = model[0].weight.detach().abs().flatten().topk(5).indices.sort().values
    (x, y), *_ = batches(1)
    optimizer.step(closure_of(model, x, y))
    assert torch.equal(optimizer.blocks[0].views[0].indices, largest)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("options", [None, (2, 2)])
def test_rejected_candidates_leave_the_weights_bit_identical(dtype, options):
    model = net(dtype)
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = DirectSearch(model.parameters(), lr=0.1, num_candidates=1, sampling_size=6, options=options)
    calls = 0

    def rejecting():  # the first evaluation of a step is that of the unmoved weights
        nonlocal calls
        calls += 1
        return 0.0 if calls % needed == 1 else 1.0

    needed = optimizer.evaluations_per_step() if options is None else None
    if options is not None:

        def rejecting():
            present = all(torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True))
            return 0.0 if present else 1.0

        # a leaf that changes nothing scores like the unmoved tensor, never lower: no step is taken
    for _ in range(60):
        optimizer.step(rejecting)
    for a, b in zip(model.parameters(), before, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("options", [None, "2x2"])
@pytest.mark.parametrize("pool", [False, True])
def test_a_loaded_state_continues_bit_for_bit(options, pool):
    def make(model):
        settings = {"lr": 0.1, "options": options, "sampling_size": 5, "sampling_steps": 2, "pool": pool}
        return DirectSearch(model.parameters(), seed=1, **settings)

    model = net(torch.float32)
    optimizer = make(model)
    data = list(batches(13, torch.float32))
    for x, y in data[:6]:
        optimizer.step(closure_of(model, x, y))
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    for x, y in data[6:]:
        optimizer.step(closure_of(model, x, y))
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    other = net(torch.float32, seed=4)
    other.load_state_dict(saved["model"])
    resumed = make(other)
    resumed.load_state_dict(saved["optimizer"])
    for x, y in data[6:]:
        resumed.step(closure_of(other, x, y))
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
    assert resumed.steps == 13 and resumed.evaluations == optimizer.evaluations


def test_a_step_that_fails_counts_for_no_tensor():
    """The entries are selected in every third step, also where a step failed after the first tensors."""
    model, chosen = net(), []
    optimizer = DirectSearch(model.parameters(), lr=0.1, sampling_size=4, sampling_steps=3)
    for number, (x, y) in enumerate(batches(9)):
        loss = closure_of(model, x, y)
        calls = iter(range(1000))

        def failing(loss=loss, calls=calls):
            if next(calls) == 12:
                raise RuntimeError("out of memory")
            return loss()

        if number == 4:
            with pytest.raises(RuntimeError):
                optimizer.step_ahead(failing)
        optimizer.step(loss)
        chosen.append([block.views[0].indices for block in optimizer.blocks])
    for block in (0, 2):  # the weights; the biases are searched in full
        renewed = [not torch.equal(a[block], b[block]) for a, b in itertools.pairwise(chosen)]
        assert renewed == [i % 3 == 2 for i in range(8)]


def test_pool_spreads_one_choice_over_all_tensors():
    model = net()
    optimizer = DirectSearch(model.parameters(), lr=0.1, pool=True, sampling_size=20)
    assert len(optimizer.blocks) == 1 and optimizer.evaluations_per_step() == 6
    first = None
    for x, y in batches(40):
        first = first or closure_of(model, x, y)().item()
        optimizer.step(closure_of(model, x, y))
        views = optimizer.blocks[0].views
        assert sum(view.size for view in views) == 20
    assert len({id(view.parameter) for view in views}) > 1
    assert closure_of(model, x, y)().item() < first


@pytest.mark.parametrize(("options", "pool"), [(None, False), ("2x2", True)])
def test_entries_of_a_block_change_equally(options, pool):
    model = nn.Linear(6, 4, bias=False).double()
    before = model.weight.detach().clone()
    optimizer = DirectSearch(model.parameters(), lr=0.1, options=options, selection="all", block=3, pool=pool)
    generator = torch.Generator().manual_seed(0)
    for _ in range(8):
        x = torch.randn(32, 6, generator=generator, dtype=torch.double)
        optimizer.step(lambda x=x: (model(x) - x.sum(1, keepdim=True)).square().mean())
    moved = (model.weight.detach() - before).view(-1, 3)
    assert moved.abs().max() > 1e-3
    torch.testing.assert_close(moved, moved[:, :1].expand(-1, 3), rtol=0, atol=1e-12)
    assert len(moved[:, 0].unique()) == 8


@pytest.mark.parametrize("first", [torch.bfloat16, torch.float32])
def test_a_pool_of_two_types_keeps_both_precisions(first):
    half, single = (
        torch.nn.Parameter(torch.linspace(0.1, 1, 5).to(dtype)) for dtype in (torch.bfloat16, torch.float32)
    )
    pooled = [half, single] if first == torch.bfloat16 else [single, half]
    optimizer = DirectSearch(pooled, lr=0.1, pool=True, selection="all")
    before = single.detach().clone()
    for _ in range(10):
        optimizer.step(lambda: (half.float().sum() + single.sum()).square())
    assert half.dtype == torch.bfloat16 and (single != before).all()
    assert (single != single.bfloat16().float()).all()  # rounded to the type of the other tensor otherwise


def test_a_scheduler_drives_the_radius():
    model = net()
    optimizer = DirectSearch(model.parameters(), lr=0.4)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    for x, y in batches(2):
        optimizer.step(closure_of(model, x, y))
        schedule.step()
    assert optimizer.blocks[0].scales()[0] == [0.1 / 2**k for k in range(5)]


def test_global_random_state_is_left_alone():
    model = net()
    state = torch.get_rng_state()
    optimizer = DirectSearch(model.parameters(), options=(2, 1), sampling_size=4)
    for x, y in batches(2):
        optimizer.step(closure_of(model, x, y))
    assert torch.equal(torch.get_rng_state(), state)


def test_candidates_that_are_not_finite_are_rejected_and_counted():
    model = net()
    optimizer = DirectSearch([model[0].bias], num_candidates=3)
    losses = iter([1.0, math.nan, 0.5, math.inf])
    optimizer.step(lambda: next(losses))
    assert optimizer.rejected == 2
    losses = iter([math.nan])
    with pytest.raises(InputError, match="the loss at the current weights is nan in step 2; look for bad rows"):
        optimizer.step(lambda: next(losses))


def test_large_tensors_are_drawn_row_by_row(monkeypatch):
    results = []
    for limit in (2**20, 1):
        monkeypatch.setattr("hf_ft_ext.gradientless.optimizers.candidates._BLOCK", limit)
        model = net()
        optimizer = DirectSearch(model.parameters(), lr=0.1, options="2x1", weight_decay=0.01, sampling_size=8)
        (x, y), *_ = batches(1)
        start = float(closure_of(model, x, y)())
        for _ in range(30):
            optimizer.step(closure_of(model, x, y))
        results.append(float(closure_of(model, x, y)()) / start)
    assert max(results) < 0.9


@pytest.mark.parametrize("n, size", [(1000, 30), (10, 9), (50, 24)])
def test_random_subsets_are_sets_of_that_size(n, size):
    generator = torch.Generator().manual_seed(0)
    counts = torch.zeros(n)
    for _ in range(300):
        subset = random_subset(n, size, generator)
        assert subset.numel() == size == subset.unique().numel() and (subset.diff() > 0).all()
        counts[subset] += 1
    assert counts.min() > 0 and counts.max() < 3 * 300 * size / n


@pytest.mark.parametrize(
    "options, message",
    [
        ({"num_candidates": 0}, "num_candidates must be 1 or more, got 0"),
        ({"sampling_size": 0}, "sampling_size must be 1 or more, got 0"),
        ({"sampling_steps": 0}, "sampling_steps must be 1 or more, got 0"),
        ({"selection": "best"}, "selection='best' is unknown; choose from: all, random, magnitude, fisher"),
        ({"lr": -1.0}, "lr must be 0 or more, got -1.0"),
        ({"weight_decay": -1.0}, "weight_decay must be 0 or more, got -1.0"),
        ({"options": "3y2"}, "options must be 'none' or options per level x levels, such as '3x2', got '3y2'"),
        ({"options": "0x2"}, "options must be 'none' or options per level x levels, such as '3x2', got '0x2'"),
        ({"options": "7x1"}, "options=7x1 would keep 7 changes per leaf, but only 6 are evaluated"),
        ({"options": "5x9"}, r"would need 46,875,0\d\d evaluations, more than max_evaluations_per_step=10,000"),
        ({"block": 0}, "block must be 1 or more, got 0"),
        ({"block": 2}, "block=2 changes consecutive entries together, and selection='random' selects"),
        ({"block": 7, "selection": "all"}, r"block=7 does not divide the 40 entries of .* shape \(8, 5\)"),
        ({"selection": "magnitude"}, "selection='magnitude' needs a sampling_size"),
        ({"selection": "all", "sampling_size": 3}, "selection='all' changes every entry; leave sampling_size=3 out"),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(InputError, match=message):
        DirectSearch(net().parameters(), **options)


def test_other_bad_input(caplog):
    model = net()
    with pytest.raises(InputError, match=r"call step\(closure\) with a function"):
        DirectSearch(model.parameters()).step()
    fisher = DirectSearch(model.parameters(), selection="fisher", sampling_size=2)
    (x, y), *_ = batches(1)
    with pytest.raises(InputError, match="pass an `evaluate` that has `importance"):
        fisher.step(closure_of(model, x, y))
    DirectSearch([model[0].bias], sampling_size=9)
    assert "sampling_size=9 is more than the 8 entries of the largest tensor: all entries are searched" in caplog.text
    with pytest.raises(InputError, match=r"a tensor of shape \(5, 8\) .* pass contiguous"):
        DirectSearch([model[0].weight.detach().T])
    two = DirectSearch(model.parameters())
    for search in (two, SPSA(model.parameters(), model)):
        with pytest.raises(InputError, match="pass all groups to its constructor instead of add_param_group"):
            search.add_param_group({"params": [nn.Parameter(torch.ones(2))]})
        with pytest.raises(InputError, match="closure returned nothing; return the loss of the batch, one number"):
            search.step(lambda: None)
        with pytest.raises(InputError, match=r"closure returned a tensor of shape \(8, 3\); return the loss"):
            search.step(lambda: torch.zeros(8, 3))
    with pytest.raises(InputError, match=r"eps=0\.5 of a group of parameters has no effect; pass it to SPSA for all"):
        SPSA([{"params": model.parameters(), "eps": 0.5}], model)
    with pytest.raises(InputError, match="seed=1 of a group of parameters has no effect"):
        DirectSearch([{"params": model.parameters(), "seed": 1, "options": "2x1"}])
    for options in ("00x1", 3):
        with pytest.raises(InputError, match="options must be 'none' or options per level x levels"):
            DirectSearch(model.parameters(), options=options)
    with pytest.raises(ValueError, match="the state has 1 parameter blocks, this optimizer has 4"):
        state = DirectSearch([model[0].bias]).state_dict()
        state["param_groups"] = two.state_dict()["param_groups"]
        two.load_state_dict(state)
    with pytest.raises(ValueError, match="is not a state of DirectSearch"):
        two.load_state_dict(torch.optim.SGD(model.parameters()).state_dict())


@pytest.mark.parametrize("options", ["2x1", "2x2"])
def test_a_tensor_does_not_move_to_an_option_whose_own_loss_is_not_finite(options):
    first, second = (nn.Parameter(torch.zeros(1, dtype=torch.float64)) for _ in range(2))
    search, option = DirectSearch([first, second], lr=1.0, options=options, num_candidates=8), None

    @torch.no_grad()
    def closure():
        x = float(first)
        if x == 0 or option is None:  # nothing is better at first, so the option is the best change
            return 1.0 if x == 0 else 1 + abs(abs(x) - 0.5)
        return math.nan if x == option else -1 / (1 + abs(x - option))  # all others are better in the second step

    search.step(closure)
    option = float(search.blocks[0].tree.levels[0][1])
    assert search.step(closure) == 1 and math.isfinite(closure()) and search.rejected
