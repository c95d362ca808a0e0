"""What `SPSA` refuses, in one line that says what to do."""

import math

import pytest
import torch
from test_spsa import net
from torch import nn

from hf_ft_ext.errors import InputError
from hf_ft_ext.gradientless.optimizers.direct_search import DirectSearch
from hf_ft_ext.gradientless.optimizers.spsa import SPSA


@pytest.mark.parametrize(
    "options, message",
    [
        ({"lr": -1.0}, "lr must be 0 or more, got -1.0"),
        ({"eps": 0.0}, "eps must be a finite number above 0, such as 1e-3, got 0.0"),
        ({"num_directions": 0}, "num_directions must be 1 or more, got 0"),
        ({"num_directions": 6_000}, "would need 12,000 evaluations, more than max_evaluations_per_step=10,000"),
        ({"block": 0}, "block must be 1 or more, got 0"),
        ({"block": 7}, r"block=7 does not divide the \d+ entries"),
        ({"update": "lion"}, "update='lion' is unknown; choose from: sgd, sign, momentum, adam, rms, conservative"),
        ({"momentum": 1.0}, r"momentum must be in \[0, 1\), got 1.0"),
        ({"betas": (0.9, 2)}, r"betas\[1\] must be in \[0, 1\), got 2"),
        ({"direction": "cauchy"}, "direction='cauchy' is unknown; choose from: gaussian, rademacher, lozo, subzero"),
        ({"estimate": "both"}, "estimate='both' is unknown; choose from: two-sided, one-sided, population, forward"),
        ({"estimate": "one-sided"}, "num_directions must be 2 or more for estimate=one-sided, .*, got 1"),
        ({"rank": 2}, "rank=2 applies to direction=lozo or subzero, not to gaussian"),
        ({"direction": "lozo", "rank": 0}, "rank must be 1 or more, got 0"),
        (
            {"direction": "lozo", "block": 2},
            "direction=lozo is low-rank and cannot be combined with blocks of entries",
        ),
        ({"direction": "subzero", "small": 0.5}, "direction=subzero is low-rank and cannot be combined with masks"),
        ({"small": 1.5}, r"small must be in \(0, 1\] .*, got 1.5"),
        ({"small": 0.5, "block": 2}, "block=2 changes consecutive entries together, and a mask selects single ones"),
        (
            {"masks": [torch.ones(3, dtype=torch.bool)]},
            "masks must be one boolean tensor for each searched tensor",
        ),
        ({"moments": "buffer"}, "moments=buffer applies to update=momentum or adam, not to sgd"),
        ({"update": "adam", "moments": "replay"}, "moments=replay does not support update=adam"),
        ({"update": "momentum", "momentum": 0.999}, "momentum=0.999 would recompute the directions of 6905 steps"),
        ({"update": "momentum", "small": 0.5}, "small=0.5 depends on the current weights, so directions of earlier"),
        ({"candidates_per_forward": 0}, "candidates_per_forward must be 1 or more, got 0"),
        ({"adam_eps": 0}, "adam_eps must be above 0, got 0"),
        ({"weight_decay": -0.1}, "weight_decay must be 0 or more, got -0.1"),
    ],
)
def test_bad_arguments(options, message):
    model = net()
    with pytest.raises(InputError, match=message):
        SPSA(model.parameters(), model, **options)


def test_other_bad_input():
    model = net()
    with pytest.raises(InputError, match=r"a parameter of shape \(8, 5\) is in no part of the module"):
        SPSA(net().parameters(), model)
    with pytest.raises(InputError, match=r"call step\(closure\)"):
        SPSA(model.parameters(), model).step()
    with pytest.raises(InputError, match=r"a tensor of shape \(2, 2\) is on the meta device, and no module of"):
        offloaded = nn.Linear(2, 2, device="meta")
        SPSA(offloaded.parameters(), offloaded)
    with pytest.raises(InputError, match=r"\(2, 2\) is offloaded .*DirectSearch changes tensors in place; keep its"):
        DirectSearch(offloaded.parameters())
    with pytest.raises(InputError, match="the loss at the current weights is nan in step 1"):
        SPSA(model.parameters(), model).step(lambda: math.nan)
