"""Activity perturbation with several processes, which have to end where one does, and what rows affect."""

import copy
import itertools
import logging
import math

import pytest
import torch
from activity_models import Mixing, Passes, problem, searched_layers
from lockstep import lockstep
from prompt_models import prompt_model

from hf_ft_ext import ActivityPerturbation, InputError
from hf_ft_ext.gradientless.optimizers.exchange import SharedCandidates, SharedData
from hf_ft_ext.gradientless.optimizers.row_influence import sets_of_rows

STEPS = 2


def parts_of(sizes):
    return [sizes] * (8 // sizes) if isinstance(sizes, int) else sizes


def ended(model, passes, exchange=None, directions=2, update="adam"):
    """Losses and weights after some steps, and the optimizer."""
    layers = searched_layers(model)
    optimizer = ActivityPerturbation(layers, model, lr=1e-2, num_directions=directions, update=update)
    optimizer.exchange = exchange or optimizer.exchange
    losses = [optimizer.step(lambda: None, passes) for _ in range(STEPS)]
    return (losses, [p.detach().clone() for p in layers]), optimizer


def shared(model, passes, sizes, directions=2, update="adam"):
    """The same of two processes that take the micro-batches in turn."""
    models = [copy.deepcopy(model) for _ in range(2)]

    def main(rank, total):
        mine = parts_of(sizes)[rank::2]
        exchange = SharedData(total, float(sum(mine)), rank, 2)
        exchange.rows = mine
        own = Passes(models[rank], sizes, passes.contexts, slice(rank, None, 2))
        return ended(models[rank], own, exchange, directions, update)

    return lockstep(main, main)


@pytest.mark.parametrize(("kind", "sizes"), [
    *(("bert", sizes) for sizes in (1, 2, 4, [1, 3, 2, 2], [2, 3, 3])), ("contexts", 4), ("contexts", [2, 3, 3]),
])  # fmt: skip
def test_two_processes_with_parts_of_the_batch_equal_one(kind, sizes):
    model = prompt_model(num_hidden_layers=1).double() if kind == "contexts" else problem("bert")[0]
    passes = Passes(model, 8, 2 if kind == "contexts" else 0)
    found = shared(model, passes, sizes)
    expected, alone = ended(model, passes)
    for result, optimizer in found:
        torch.testing.assert_close(result, expected, rtol=1e-7, atol=1e-9)
        assert sizes == 1 or optimizer.noise.row_modules == alone.noise.row_modules
        assert optimizer.noise.masked == alone.noise.masked
    assert all(torch.equal(a, b) for a, b in zip(found[0][0][1], found[1][0][1], strict=True))


@pytest.mark.parametrize("directions", [1, 3])
def test_two_processes_with_parts_of_the_directions_equal_one(directions):
    model, _ = problem("bert")
    models = [copy.deepcopy(model) for _ in range(2)]
    expected, _ = ended(model, Passes(model, 4), directions=directions)

    def main(rank, total):
        exchange = SharedCandidates(total, rank, 2)
        return ended(models[rank], Passes(models[rank], 4), exchange, directions)

    for result, _ in lockstep(main, main):
        torch.testing.assert_close(result, expected, rtol=1e-7, atol=1e-9)


class Unequal(Passes):
    """Only one process has rows with labels, or reads the layer `other`."""

    def __init__(self, model, case, rank):
        super().__init__(model, 4, take=slice(rank, None, 2) if rank is not None else slice(None))
        self.case, self.rank = case, rank

    def row_passes(self):
        found, first = [], self.rank or 0
        for i, (losses, weight) in enumerate(super().row_passes()):
            if first + i == (1 if self.case == "no labels" else 0):
                losses, weight = self.changed(losses, weight)
            found.append((losses, weight))
        return found

    def changed(self, losses, weight):
        if self.case == "no labels":
            return lambda: 0 * losses(), 0.0
        return lambda: losses() + self.model.other(torch.ones(4, 3).double()).sum(1), weight


@pytest.mark.parametrize("case", ["no labels", "a layer of its own"])
def test_processes_whose_rows_differ_in_kind_equal_one(case):
    model, _ = problem("bert")
    model.other = torch.nn.Linear(3, 2).double()
    models = [copy.deepcopy(model) for _ in range(2)]
    expected, _ = ended(model, Unequal(model, case, None), update="momentum")

    def main(rank, total):
        exchange = SharedData(total, 4.0 if rank == 0 or case != "no labels" else 0.0, rank, 2)
        exchange.rows = [4]
        return ended(models[rank], Unequal(models[rank], case, rank), exchange, update="momentum")

    for result, _ in lockstep(main, main):
        torch.testing.assert_close(result, expected, rtol=1e-7, atol=1e-9)


def test_shared_parts_need_the_rows_of_each():
    model, _ = problem("bert")
    with pytest.raises(InputError, match=r"set exchange\.rows to the rows of each micro-batch"):
        ended(model, Passes(model, 8), SharedData(lambda values: values, 8.0))


# --- what rows affect ------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [*range(1, 12), 64, 71])
def test_sets_of_rows_tell_any_row_from_any_other(rows):
    sets = sets_of_rows(rows)
    assert len(sets) <= 2 * max(1, math.ceil(math.log2(rows)))
    for one, other in itertools.permutations(range(rows), 2):
        assert any(one in some and other not in some for some in sets), (one, other)


class Reordered(torch.nn.Module):
    """A classifier whose rows exchange their places between two layers."""

    def __init__(self, order):
        super().__init__()
        self.first, self.second, self.order = torch.nn.Linear(3, 4), torch.nn.Linear(4, 3), order

    def forward(self, x):
        return self.second(self.first(x).tanh()[self.order])


class Leaking(Mixing):
    """A classifier in which row 5 also reads row `source`."""

    def __init__(self, source):
        super().__init__()
        self.source = source

    def forward(self, x):
        y = self.first(x).tanh()
        leak = torch.zeros_like(y)
        leak[5] = y[self.source]
        return self.second(y + leak)


@pytest.mark.parametrize("model", [
    Reordered([1, 0, 2, 3, 4, 5, 6, 7]), Reordered([0, 1, 2, 3, 4, 5, 7, 6]), Reordered([7, 0, 1, 2, 3, 4, 5, 6]),
    *(Leaking(source) for source in (0, 3, 4, 6, 7)),
], ids=str)  # fmt: skip
def test_each_row_that_affects_another_one_is_found(model, caplog):
    model, x = copy.deepcopy(model).double(), torch.randn(8, 3).double()
    optimizer = ActivityPerturbation(model.parameters(), model)
    with caplog.at_level(logging.WARNING):
        optimizer.step(lambda: model(x).square().sum(1))
    assert optimizer.noise.row_modules == {1}  # the second layer
    assert "the outputs of 1 of 2 searched modules affect the losses of several rows" in caplog.text


def test_layers_before_a_part_that_mixes_rows_are_found_among_many():
    blocks = [Leaking(2) if i == 3 else torch.nn.Linear(3, 3) for i in range(24)]
    for block in blocks:
        for layer in (block.first, block.second) if isinstance(block, Leaking) else (block,):
            torch.nn.init.orthogonal_(layer.weight)
    model, x = torch.nn.Sequential(*blocks).double(), torch.randn(8, 3).double()
    optimizer = ActivityPerturbation(model.parameters(), model)
    optimizer.step(lambda: model(x).square().sum(1))
    names = [name for name, module in model.named_modules() if hasattr(module, "weight")]
    shared_slopes = [name for i, name in enumerate(names) if i not in optimizer.noise.row_modules]
    assert shared_slopes == names[: names.index("3.second")]
