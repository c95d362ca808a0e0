"""HeadAdam, the baseline of the searches: AdamW on the gradients that it computes itself."""

import copy

import pytest
import torch
from torch import nn

from hf_ft_ext.errors import InputError
from hf_ft_ext.training.head_adam import HeadAdam


def test_steps_are_those_of_adamw_and_each_evaluates_one_loss():
    torch.manual_seed(0)
    ours = nn.Linear(4, 2).double()
    plain, x = copy.deepcopy(ours), torch.randn(6, 4).double()
    groups = [{"params": [model.weight], "weight_decay": 0.1} for model in (ours, plain)]
    optimizer = HeadAdam([groups[0], {"params": [ours.bias], "lr": 0.3}], lr=0.1)
    adamw = torch.optim.AdamW([groups[1], {"params": [plain.bias], "lr": 0.3}], lr=0.1, weight_decay=0.0)
    ours.requires_grad_(False)  # as a search leaves it
    for _ in range(3):
        adamw.zero_grad()
        expected = plain(x).square().mean()
        expected.backward()
        adamw.step()
        assert optimizer.step(lambda: ours(x).square().mean()) == expected.item()
        torch.testing.assert_close(ours.state_dict(), plain.state_dict(), rtol=1e-12, atol=0)
    assert optimizer.evaluations == 3 * optimizer.evaluations_per_step() == 3


def test_a_step_without_a_loss_and_a_loss_that_is_not_finite_are_refused():
    model = nn.Linear(2, 1)
    optimizer, before = HeadAdam(model.parameters()), copy.deepcopy(model.state_dict())
    with pytest.raises(InputError, match=r"call step\(closure\) with a function that returns the loss"):
        optimizer.step()
    with pytest.raises(InputError, match="the loss at the current weights is nan in step 1; look for bad rows"):
        optimizer.step(lambda: model(torch.full((1, 2), torch.nan)).sum())
    torch.testing.assert_close(model.state_dict(), before)
