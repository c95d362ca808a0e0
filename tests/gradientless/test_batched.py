"""All candidates at once give what each alone gives, for the heads of many families."""

from functools import partial

import pytest
import torch
from heads import READABLE, family, padded_batch, reader_of
from transformers import AutoModelForSequenceClassification

from hf_ft_ext import InputError, NodePerturbation
from hf_ft_ext.gradientless.optimizers.direct_search import DirectSearch, Sequential
from hf_ft_ext.gradientless.scoring import batched_heads, evaluation
from hf_ft_ext.gradientless.scoring.evaluation import HeadEvaluation
from hf_ft_ext.gradientless.scoring.objectives import make_objective, row_losses

LABELS = torch.tensor([0, 1, 1, 0, 1, 0])


def evaluation_of(model, micro_batches=1):
    reader = reader_of(model)
    names = {id(p): name for name, p in reader.head_parameters().items()}
    scoring = HeadEvaluation(reader, names, make_objective("loss", "single_label_classification", 2))
    features = reader.features(padded_batch())
    parts = zip(features.chunk(micro_batches), LABELS.chunk(micro_batches), strict=True)
    scoring.load(list(parts))
    return scoring


@pytest.mark.parametrize("model_type", READABLE)
def test_the_head_alone_gives_the_logits_of_the_model(model_type):
    model = family(model_type)
    reader = reader_of(model)
    other = padded_batch(rows=9, seed=3)
    expected = model(**other).logits
    torch.testing.assert_close(reader.logits(reader.features(other)), expected, rtol=1e-5, atol=1e-6)
    single = {key: value[:1] for key, value in other.items()}
    torch.testing.assert_close(reader.logits(reader.features(single)), expected[:1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("model_type", "settings", "micro_batches"),
    [(model_type, {}, 3) for model_type in READABLE]
    + [("bert", {}, 1), ("bert", {"options": "2x2"}, 1), ("roberta", {"options": "2x2"}, 1)]
    + [("bert", {"pool": True}, 1), ("roberta", {"pool": True}, 1)],
)
def test_batched_candidates_equal_sequential_ones(model_type, settings, micro_batches):
    results = []
    for looped in (False, True):
        model = family(model_type).double()
        scoring = evaluation_of(model, micro_batches)
        optimizer = DirectSearch(
            scoring.reader.head_parameters().values(), lr=0.1, sampling_size=40, weight_decay=0.01, **settings
        )

        def alone(scoring=scoring):
            return scoring.objective(scoring.plain_logits(), scoring.labels)

        losses = []
        for _ in range(6):
            scoring.stale = True
            losses.append(optimizer.step(scoring.closure, Sequential(alone) if looped else scoring))
        assert not scoring.sequential
        results.append((losses, [p.detach().clone() for p in model.parameters()]))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-9)
    for a, b in zip(results[0][1], results[1][1], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
    assert results[0][0][-1] < results[0][0][0]


@pytest.mark.parametrize("after", [lambda y: y, lambda y: 3 * y, lambda y: y.mul_(3), lambda y: y.tanh()])
def test_what_a_model_does_after_its_last_layer_is_part_of_the_logits(after):
    """The last layer's candidates need no forward pass of the head, but only where its output is the logits."""
    results = []
    for looped in (False, True):
        model = family("bert").double()

        def forward(*args, model=model, **kwargs):
            output = type(model).forward(model, *args, **kwargs)
            output.logits = after(output.logits)
            return output

        model.forward = forward
        scoring = evaluation_of(model)
        optimizer = DirectSearch(model.classifier.parameters(), lr=0.3, sampling_size=40)

        def alone(scoring=scoring):
            return scoring.objective(scoring.plain_logits(), scoring.labels)

        for _ in range(4):
            scoring.stale = True
            loss = optimizer.step(scoring.closure, Sequential(alone) if looped else scoring)
            results.append((loss, [p.detach().clone() for p in model.classifier.parameters()]))
    for (fast, a), (slow, b) in zip(results[:4], results[4:], strict=True):
        assert fast == pytest.approx(slow, rel=1e-9)
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_evaluation_does_not_change_the_head():
    model = family("bert")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    scoring = evaluation_of(model)
    optimizer = DirectSearch(scoring.reader.head_parameters().values(), lr=0.0, sampling_size=40)
    for _ in range(3):
        optimizer.step(scoring.closure, scoring)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert "forward" not in model.classifier.__dict__ and "forward" not in model.bert.pooler.dense.__dict__
    assert not model.classifier._forward_hooks


def test_small_memory_splits_the_candidates(monkeypatch):
    losses = []
    for limit in (2**22, 500):
        monkeypatch.setattr(batched_heads, "_MAX_OUTPUT_ENTRIES", limit)
        scoring = evaluation_of(family("roberta"))
        optimizer = DirectSearch(scoring.reader.head_parameters().values(), lr=0.1, sampling_size=40)
        losses.append([optimizer.step(scoring.closure, scoring) for _ in range(5)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_a_head_that_mixes_rows_is_evaluated_one_by_one(caplog):
    model = family("distilbert")
    model.dropout.forward = lambda x: x - x.mean(0)  # a batch statistic
    caplog.set_level("INFO", logger="hf_ft_ext")
    scoring = evaluation_of(family("distilbert"))
    scoring.reader.model.dropout.forward = model.dropout.forward
    parameters = scoring.reader.head_parameters()
    optimizer = DirectSearch([parameters["pre_classifier.weight"]], lr=0.1, sampling_size=40)
    first = optimizer.step(scoring.closure, scoring)
    assert "candidates are evaluated one by one: batched logits of pre_class" in caplog.text
    for _ in range(5):
        last = optimizer.step(scoring.closure, scoring)
    assert last < first


def test_a_head_that_calls_a_module_twice_is_evaluated_one_by_one(monkeypatch):
    scoring = evaluation_of(family("bert"))
    monkeypatch.setattr(evaluation.BatchedHead, "begin", _refuse)
    optimizer = DirectSearch(scoring.reader.head_parameters().values(), lr=0.1, sampling_size=40)
    losses = [optimizer.step(scoring.closure, scoring) for _ in range(6)]
    assert losses[-1] < losses[0] and len(scoring.sequential) == 4


def _refuse(self, features):
    raise batched_heads.HeadCannotBatch("a module of the head runs twice")


@pytest.mark.parametrize("model_type", READABLE)
def test_node_perturbation_finds_the_gradient(model_type):
    """With many directions, the estimate is the gradient by backward; a layer of few outputs has it at once."""
    model = family(model_type).double()
    reader = reader_of(model)
    head = reader.head_parameters()
    features = reader.features(padded_batch()).detach()
    labels = torch.tensor([0, 1, 1, 0, 1, 0])
    names = {id(p): name for name, p in head.items()}
    scoring = HeadEvaluation(
        reader, names, make_objective("loss", None, 2), of_rows=partial(row_losses, problem_type=None)
    )
    scoring.load([(features[:4], labels[:4]), (features[4:], labels[4:])])
    loss = torch.nn.functional.cross_entropy(reader.logits(features), labels)
    gradients = torch.autograd.grad(loss, list(head.values()))
    before = [p.detach().clone() for p in head.values()]
    try:
        optimizer = NodePerturbation(head.values(), lr=1.0, eps=1e-5, num_directions=3000, update="sgd")
        assert optimizer.step(scoring.closure, scoring) == pytest.approx(float(loss))
    except InputError as error:
        assert "in no linear layer of the head" in str(error)  # the head contains a normalisation layer
        return
    for p, start, gradient in zip(head.values(), before, gradients, strict=True):
        estimate = start - p.detach()
        small = p.shape[0] <= 3000
        assert small
        torch.testing.assert_close(estimate, gradient, rtol=1e-3, atol=1e-6)


def test_node_perturbation_with_few_directions_is_right_on_average():
    model = family("bert").double()
    reader = reader_of(model)
    head = reader.head_parameters()
    features, labels = reader.features(padded_batch()).detach(), torch.tensor([0, 1, 1, 0, 1, 0])
    names = {id(p): name for name, p in head.items()}
    scoring = HeadEvaluation(
        reader, names, make_objective("loss", None, 2), of_rows=partial(row_losses, problem_type=None)
    )
    (gradient,) = torch.autograd.grad(
        torch.nn.functional.cross_entropy(reader.logits(features), labels), [head["bert.pooler.dense.weight"]]
    )
    total, start = torch.zeros_like(gradient), {name: p.detach().clone() for name, p in head.items()}
    settings = {"num_directions": 4, "directions": "signs", "update": "sgd"}
    optimizer = NodePerturbation(head.values(), lr=1.0, eps=1e-4, **settings)
    for _ in range(300):
        scoring.load([(features, labels)])
        optimizer.step(scoring.closure, scoring)
        total += start["bert.pooler.dense.weight"] - head["bert.pooler.dense.weight"].detach()
        for name, p in head.items():
            p.detach().copy_(start[name])
    cosine = torch.nn.functional.cosine_similarity(total.flatten(), gradient.flatten(), dim=0)
    assert cosine > 0.9 and float(total.norm() / 300 / gradient.norm()) == pytest.approx(1, abs=0.25)


@pytest.mark.parametrize("classes", [2, 5])
def test_node_perturbation_along_the_next_layer_finds_the_gradient_in_its_span(classes):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = family("bert").config
        config.num_labels = classes
        model = AutoModelForSequenceClassification.from_config(config).double().eval().requires_grad_(False)
    reader, labels = reader_of(model), torch.tensor([0, 1, 1, 0, 1, 0])
    features = reader.features(padded_batch()).detach()
    dense, after = model.bert.pooler.dense, model.classifier.weight
    names = {id(dense.weight): "bert.pooler.dense.weight", id(dense.bias): "bert.pooler.dense.bias"}
    scoring = HeadEvaluation(
        reader, names, make_objective("loss", None, classes), of_rows=partial(row_losses, problem_type=None)
    )
    scoring.load([(features, labels)])
    outputs = (features @ dense.weight.T + dense.bias).requires_grad_(True)
    loss = torch.nn.functional.cross_entropy(outputs.tanh() @ after.T + model.classifier.bias, labels)
    (d,) = torch.autograd.grad(loss, outputs)
    projection = torch.linalg.pinv(after) @ after
    start, expected = dense.weight.clone(), projection @ d.T @ features
    optimizer = NodePerturbation([dense.weight, dense.bias], lr=1.0, eps=1e-6, num_directions=classes, update="sgd")
    optimizer.step(scoring.closure, scoring)
    torch.testing.assert_close(start - dense.weight, expected, rtol=1e-4, atol=1e-8)
    exact = d.T @ features
    assert float((expected * exact).sum() / expected.norm() / exact.norm()) > 0.95
    assert optimizer.evaluations == 1 + classes


def test_node_perturbation_needs_losses_of_rows():
    model = family("bert")
    with pytest.raises(InputError, match="node perturbation needs the loss of each row for given layer outputs"):
        NodePerturbation(model.classifier.parameters()).step(lambda: 0.0)
    for options, message in (
        ({"lr": -1}, "lr must be 0 or more, got -1"),
        ({"eps": 0}, "eps must be a finite number above 0, such as 1e-2, got 0"),
        ({"num_directions": 0}, "num_directions must be 1 or more, got 0"),
        ({"directions": "both"}, "directions='both' is unknown; choose from: next-layer, signs"),
        (
            {"update": "conservative"},
            "update=conservative is not available for node and activity perturbation; choose from: sgd",
        ),
    ):
        with pytest.raises(InputError, match=message):
            NodePerturbation(model.classifier.parameters(), **options)


class SumOfOutputs:
    """An `evaluate` whose loss of a row is the sum of the layer's outputs, so that each output gradient is 1."""

    def __init__(self, layer):
        self.layer, self.x = layer, torch.ones(8, layer.in_features, dtype=layer.weight.dtype)

    def nodes(self):
        return [(self.layer, self.x, torch.zeros(8, self.layer.out_features, dtype=self.x.dtype))]

    def node_losses(self, module, outputs):
        return outputs.float().sum(-1)


def test_node_perturbation_of_16_bit_weights_keeps_small_updates():
    layers = [torch.nn.Linear(64, 2, dtype=torch.bfloat16) for _ in range(2)]
    optimizers = []
    for layer in layers:
        torch.nn.init.ones_(layer.weight)
        settings = {"lr": 1e-4, "eps": 1.0, "num_directions": 2, "update": "sgd"}
        optimizers.append(NodePerturbation(layer.parameters(), **settings))
    for _ in range(200):  # each step is a fortieth of the distance to the next bfloat16 number
        optimizers[0].step(lambda: 0.0, SumOfOutputs(layers[0]))
    assert float(1 - layers[0].weight.float().mean()) == pytest.approx(200 * 1e-4, rel=0.15)
    layers[1].load_state_dict(layers[0].state_dict())
    optimizers[1].load_state_dict(optimizers[0].state_dict())
    for layer, optimizer in zip(layers, optimizers, strict=True):
        optimizer.step(lambda: 0.0, SumOfOutputs(layer))
    assert torch.equal(layers[0].weight, layers[1].weight) and torch.equal(layers[0].bias, layers[1].bias)
