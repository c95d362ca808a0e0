"""The slopes of `Estimate` where losses are equal, as those of an objective without a derivative often are."""

import copy

import pytest
import torch
from torch import nn

from hf_ft_ext.gradientless.optimizers.perturbation.estimates import Estimate
from hf_ft_ext.gradientless.optimizers.spsa import SPSA

ESTIMATES = ("one-sided", "population")


@pytest.mark.parametrize("estimate", ESTIMATES)
@pytest.mark.parametrize("loss", [0.1, 1 / 3, 0.7])
def test_equal_losses_leave_the_weights_as_they_are(estimate, loss):
    """In floating point, the mean of equal losses may differ from them, and their standard deviation from 0."""
    model, x = nn.Linear(4, 2).double(), torch.ones(3, 4, dtype=torch.double)
    before = copy.deepcopy(model.state_dict())
    optimizer = SPSA(model.parameters(), model, lr=1.0, num_directions=3, estimate=estimate)
    for _ in range(2):
        optimizer.step(lambda: 0 * model(x).sum() + loss)
    assert optimizer.record == [([0.0] * 3, [1.0])] * 2
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


@pytest.mark.parametrize("estimate", ESTIMATES)
def test_equal_losses_have_no_slope_where_the_unperturbed_one_differs(estimate):
    perturbed = [0.7] * 7
    losses = torch.tensor([0.4, *perturbed] if estimate == "one-sided" else perturbed, dtype=torch.double)
    assert Estimate(estimate, 1e-3, 7).slopes(losses).tolist() == [0.0] * 7
