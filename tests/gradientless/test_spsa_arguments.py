"""What `SPSA` refuses, in one line that says what to do."""

import math

import pytest
import torch
from test_spsa import net
from torch import nn

from hf_ft_ext.errors import InputError
from hf_ft_ext.gradientless.optimizers.spsa import SPSA


@pytest.mark.parametrize(
    "options, message",
    [
        ({"lr": -1.0}, "lr=-1.0 is below 0"),
        ({"eps": 0.0}, "eps=0.0 is no size of a perturbation"),
        ({"num_directions": 0}, "num_directions=0 leaves nothing to compare"),
        ({"num_directions": 6_000}, "would need 12,000 evaluations, more than max_evaluations_per_step=10,000"),
        ({"block": 0}, "block=0 holds no entry"),
        ({"block": 7}, r"blocks of 7 do not divide the \d+ entries"),
        ({"update": "lion"}, "update='lion' is unknown; choose from: sgd, sign, momentum, adam, rms, conservative"),
        ({"momentum": 1.0}, r"momentum=1.0 must be in \[0, 1\)"),
        ({"betas": (0.9, 2)}, r"betas\[1\]=2 must be in \[0, 1\)"),
        ({"direction": "cauchy"}, "direction='cauchy' is unknown; choose from: gaussian, rademacher, lozo, subzero"),
        ({"estimate": "both"}, "estimate='both' is unknown; choose from: two-sided, one-sided, population, forward"),
        ({"estimate": "one-sided"}, "num_directions=1 has no deviation of its losses for one-sided; pass 2 or more"),
        ({"rank": 2}, "rank=2 is about direction=lozo or subzero, not gaussian"),
        ({"direction": "lozo", "rank": 0}, "rank=0 must be 1 or more"),
        ({"direction": "lozo", "block": 2}, "direction=lozo makes whole matrices, which blocks of entries would tear"),
        ({"direction": "subzero", "small": 0.5}, "direction=subzero makes whole matrices, which masks would tear"),
        ({"small": 1.5}, r"small=1.5 must be in \(0, 1\]"),
        ({"small": 0.5, "block": 2}, "block=2 ties neighbours, and a mask tears them apart"),
        (
            {"masks": [torch.ones(3, dtype=torch.bool)]},
            "masks must be boolean tensors of the searched tensors' shapes",
        ),
        ({"moments": "buffer"}, "moments=buffer is about update=momentum or adam, not sgd"),
        ({"update": "adam", "moments": "replay"}, "moments=replay cannot keep adam's second moments"),
        ({"update": "momentum", "momentum": 0.999}, "momentum=0.999 would make 6905 directions anew in each step"),
        ({"update": "momentum", "small": 0.5}, "small=0.5 looks at the present weights, so directions of earlier"),
        ({"candidates_per_forward": 0}, "candidates_per_forward=0 must be 1 or more"),
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
    with pytest.raises(InputError, match=r"a tensor of shape \(2, 2\) is offloaded: it is on no device"):
        offloaded = nn.Linear(2, 2, device="meta")
        SPSA(offloaded.parameters(), offloaded)
    with pytest.raises(InputError, match="the loss at the present weights is nan in step 1"):
        SPSA(model.parameters(), model).step(lambda: math.nan)
