"""Fisher importance: the divergence against its definition, the gradient against autograd."""

import pytest
import torch
from heads import family
from test_batched import evaluation_of

from hf_ft_ext.gradientless.optimizers.direct_search import DirectSearch
from hf_ft_ext.gradientless.scoring.importance import henze_penrose
from hf_ft_ext.gradientless.scoring.objectives import classification_loss


def plain_divergence(before, after):
    """Word by word: classify each point of both samples by its nearest neighbour among all others."""
    points = torch.cat([before, after])
    own = [0] * len(before) + [1] * len(after)
    errors = 0
    for i, point in enumerate(points):
        distances = ((points - point) ** 2).sum(-1)
        distances[i] = torch.inf
        mine = min(float(d) for d, o in zip(distances, own, strict=True) if o == own[i])
        other = min(float(d) for d, o in zip(distances, own, strict=True) if o != own[i])
        errors += other < mine
    m, n = len(before), len(after)
    return 1 - (m + n) / (2 * m * n) * errors


@pytest.mark.parametrize("classes", [2, 3])
def test_divergence_equals_its_definition(classes):
    generator = torch.Generator().manual_seed(0)
    before = torch.randn(20, classes, generator=generator)
    after = before + torch.tensor([0.0, 0.01, 0.3, 1.0, 10.0])[:, None, None] * torch.randn(
        5, 20, classes, generator=generator
    )
    found = henze_penrose(before, after)
    assert found.tolist() == pytest.approx([plain_divergence(before, sample) for sample in after])
    assert found[0] == -1 and found[-1] > found[1]


@pytest.mark.parametrize("model_type", ["bert", "modernbert", "albert", "gpt2"])
@pytest.mark.parametrize("micro_batches", [1, 2])
def test_batched_scores_equal_sequential_ones(model_type, micro_batches):
    scoring = evaluation_of(family(model_type).double(), micro_batches)
    for parameter in scoring.reader.head_parameters().values():
        flat = parameter.detach().view(-1)
        noise = torch.randn(flat.numel(), generator=torch.Generator().manual_seed(3)).double() * flat.abs().max()
        with torch.no_grad():
            found = scoring.importance(parameter, torch.Generator().manual_seed(3))
            before = scoring.plain_logits().float()
            for i in range(0, flat.numel(), max(1, flat.numel() // 12)):
                saved = flat[i].clone()
                flat[i] += noise[i]
                expected = plain_divergence(before, scoring.plain_logits().float())
                flat[i] = saved
                assert float(found[i]) == pytest.approx(expected, abs=2.1 / len(before))
    assert scoring.stale


def test_gradient_scores_are_mean_squares_of_the_rows_gradients():
    scoring = evaluation_of(family("bert"), 2)
    scoring.fisher = "gradient"
    parameter = scoring.reader.head_parameters()["bert.pooler.dense.weight"]
    total = torch.zeros(parameter.numel())
    for features, labels in scoring.micro_batches:
        for i in range(len(features)):
            logits = scoring.reader.logits(features[i : i + 1])
            loss = classification_loss(logits, labels[i : i + 1], "single_label_classification")
            total += torch.autograd.grad(loss, [parameter])[0].flatten() ** 2
    with torch.no_grad():
        parameter.requires_grad_(False)
        found = scoring.importance(parameter, torch.Generator())
    torch.testing.assert_close(found, total / 6)
    assert not parameter.requires_grad


@pytest.mark.parametrize("fisher", ["divergence", "gradient"])
def test_the_most_important_entries_are_searched(fisher):
    scoring = evaluation_of(family("bert"))
    scoring.fisher = fisher
    parameter = scoring.reader.head_parameters()["classifier.weight"]
    optimizer = DirectSearch([parameter], selection="fisher", sampling_size=5, sampling_steps=4, seed=2)
    scores = scoring.importance(parameter, torch.Generator().manual_seed(2))
    optimizer.step(scoring.closure, scoring)
    chosen = optimizer.blocks[0].views[0].indices
    assert scores[chosen].min() >= scores.sort(descending=True).values[4]
