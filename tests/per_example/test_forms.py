"""Forms of gradients per example: in parts, joined, and with inputs that all examples share."""

import pytest
import torch

from hf_ft_ext.per_example.forms import Dense, Outer, Rows, dense, joined, parts


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.double)


@pytest.mark.parametrize("transposed", [False, True])
def test_shared_inputs_are_those_of_every_example(transposed):
    x, g = draw(1, 3, 4), draw(5, 3, 2)
    shared, written_out = Outer(x, g, transposed), Outer(x.expand(5, -1, -1), g, transposed)
    assert shared.shared and not written_out.shared
    torch.testing.assert_close(shared.dense(), written_out.dense())
    torch.testing.assert_close(shared[1:3].dense(), written_out.dense()[1:3])


def test_uses_of_one_weight_join_to_their_sum():
    uses = [Outer(draw(5, t, 4), draw(5, t, 2)) for t in (3, 1)]
    torch.testing.assert_close(joined(uses).dense(), dense(uses))
    assert joined(uses[:1]) is uses[0]


@pytest.mark.parametrize(
    ("forms", "numbers", "steps"),
    [
        ([Outer(draw(5, 3, 4), draw(5, 3, 2))], 16, [2, 2, 1]),  # 8 numbers each
        ([Outer(draw(5, 3, 4), draw(5, 3, 2))], 1, [1] * 5),
        ([Rows(torch.arange(10).view(5, 2) % 7, draw(5, 2, 3), 7)] * 2, 50, [2, 2, 1]),  # 21 each
        ([Dense(draw(5, 9))], 1, [5]),  # there already
    ],
)
def test_parts_make_no_more_than_asked_for(forms, numbers, steps):
    found = list(parts(forms, numbers))
    assert [len(gradients) for _, gradients in found] == steps
    assert [first for first, _ in found] == [sum(steps[:i]) for i in range(len(steps))]
    torch.testing.assert_close(torch.cat([gradients for _, gradients in found]), dense(forms))
