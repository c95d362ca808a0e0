"""Gradients in factors: in chunks, joined, their norms, and with activations that all examples share."""

import pytest
import torch

from hf_ft_ext.per_example.types import (
    DenseGradient,
    EmbeddingGradient,
    LinearGradient,
    dense,
    dense_in_chunks,
    join_uses,
    share_activations,
    squared_norms,
    squares_of_shared,
)


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.double)


def ids(*shape: int) -> torch.Tensor:
    return torch.arange(torch.Size(shape).numel()).view(shape) % 7 - 1  # some add nothing, some rows are read twice


@pytest.mark.parametrize("transposed", [False, True])
def test_shared_activations_are_found_only_if_all_examples_share_them(transposed):
    x, g = draw(1, 3, 4), draw(5, 3, 2)
    written_out = LinearGradient(x.expand(5, -1, -1), g, transposed)
    shared = share_activations(written_out)
    assert shared.shared and not written_out.shared
    torch.testing.assert_close(shared.dense(), written_out.dense())
    torch.testing.assert_close(shared[1:3].dense(), written_out.dense()[1:3])
    torch.testing.assert_close(shared.squared_norms(), written_out.dense().square().sum((1, 2)))
    other = x.repeat(5, 1, 1)
    other[3, 2, 1] += 1e-9
    assert not share_activations(LinearGradient(other, g)).shared  # one entry of one example differs


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("weights", [0.5, torch.tensor([0.1, 0.0, 2.0, 1.0])])
def test_squares_of_shared_activations(transposed, weights):
    gradient = LinearGradient(draw(1, 3, 5), draw(4, 3, 2), transposed)
    w = weights.view(4, 1, 1) if isinstance(weights, torch.Tensor) else weights
    torch.testing.assert_close(squares_of_shared(gradient, weights), (gradient.dense().square() * w).sum(0))


@pytest.mark.parametrize(
    "uses",
    [
        [LinearGradient(draw(5, t, 4), draw(5, t, 2)) for t in (3, 1)],
        [LinearGradient(draw(5, 9, 4), draw(5, 9, 2))],  # more tokens than it pays to pair
        [LinearGradient(draw(5, t, 4), draw(5, t, 2), True) for t in (2, 2)],
        [EmbeddingGradient(ids(5, t), draw(5, t, 4), 6) for t in (4, 3)],
        [EmbeddingGradient(ids(5, 8), draw(5, 8, 4), 6), LinearGradient(draw(5, 2, 4), draw(5, 2, 6))],  # a tied table
        [DenseGradient(draw(5, 3)), DenseGradient(draw(5, 3) + 1)],
    ],
    ids=["uses", "long", "transposed", "table", "tied", "dense"],
)
def test_uses_of_one_weight_join_to_their_sum_and_its_norm(uses):
    total = sum(use.dense() for use in uses)
    torch.testing.assert_close(dense(join_uses(uses)), total)
    torch.testing.assert_close(squared_norms(uses), total.square().flatten(1).sum(1))
    torch.testing.assert_close(squared_norms(uses, numbers=1), total.square().flatten(1).sum(1))


@pytest.mark.parametrize(
    ("gradients", "numbers", "steps"),
    [
        ([LinearGradient(draw(5, 3, 4), draw(5, 3, 2))], 16, [2, 2, 1]),  # 8 numbers each
        ([LinearGradient(draw(5, 3, 4), draw(5, 3, 2))], 1, [1] * 5),
        ([EmbeddingGradient(torch.arange(10).view(5, 2) % 7, draw(5, 2, 3), 7)] * 2, 50, [2, 2, 1]),  # 21 each
        ([DenseGradient(draw(5, 9))], 1, [5]),  # there already
    ],
)
def test_chunks_keep_the_limit_of_values(gradients, numbers, steps):
    found = list(dense_in_chunks(gradients, numbers))
    assert [len(values) for _, values in found] == steps
    assert [first for first, _ in found] == [sum(steps[:i]) for i in range(len(steps))]
    torch.testing.assert_close(torch.cat([values for _, values in found]), dense(gradients))
