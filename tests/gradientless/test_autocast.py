"""Under autocast, forward passes run in 16 bits, and all that a search computes from their losses in 32."""

import pytest
import torch
from activity_models import Passes, problem, searched_layers
from heads import family, padded_batch, reader_of
from torch import nn

from hf_ft_ext import SPSA, ActivityPerturbation, NodePerturbation
from hf_ft_ext.gradientless.scoring.evaluation import HeadEvaluation
from hf_ft_ext.gradientless.scoring.objectives import make_objective, row_losses


def autocast(enabled=True):
    return torch.autocast("cpu", torch.bfloat16, enabled=enabled)


@pytest.mark.parametrize("inside", [False, True])
def test_moments_of_activity_perturbation_have_32_bits(inside):
    model = problem("bert")[0].float()
    passes = Passes(model, 8)
    if inside:  # as accelerate does it
        forward = model.forward
        model.forward = lambda **inputs: autocast()(forward)(**inputs)
    optimizer = ActivityPerturbation(searched_layers(model), model, lr=1e-3)
    with autocast(not inside):
        optimizer.step(lambda: None, passes)
    assert {buffer.dtype for buffers in optimizer.buffers.values() for buffer in buffers} == {torch.float32}


@pytest.mark.parametrize("directions", ["next-layer", "signs"])
def test_moments_of_node_perturbation_have_32_bits(directions):
    model = family("bert")
    reader, labels = reader_of(model), torch.arange(6) % 2
    parameters = dict(reader.head_parameters())
    scoring = HeadEvaluation(
        reader, {id(p): name for name, p in parameters.items()}, make_objective("loss", None, 2), "divergence",
        lambda logits, labels: row_losses(logits, labels, None),
    )  # fmt: skip
    optimizer = NodePerturbation(parameters.values(), num_directions=1, directions=directions)
    with autocast():
        scoring.load([(reader.features(padded_batch()).float(), labels)])
        optimizer.step(scoring.closure, scoring)
    assert {buffer.dtype for buffers in optimizer.buffers.values() for buffer in buffers} == {torch.float32}


@pytest.mark.parametrize("update", ["sgd", "momentum", "adam"])
@pytest.mark.parametrize("direction", ["lozo", "subzero", "rademacher-outer", "gaussian"])
def test_updates_of_spsa_are_those_without_autocast(direction, update):
    ends = []
    for enabled in (False, True):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 7))
        kept = {"rank": 2, "renew": 2} if direction in ("lozo", "subzero") else {}
        optimizer = SPSA(model.parameters(), model, direction=direction, update=update, **kept)
        with autocast(enabled):
            optimizer.repeat([([0.3], [0.1]), ([-0.2], [0.1]), ([0.5], [0.1])])
        ends.append([p.detach().clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))
