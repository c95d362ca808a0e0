"""Which parameters a search changes: frozen ones only if all are, or if they are named."""

import pytest
import torch
from heads import make, weights
from tiny import CONFIGS, tiny_model

SPSA = {"search_method": "spsa", "learning_rate": 0.01, "max_steps": 2}
HEADS = {"bert": r"pooler|classifier", "roberta": r"classifier", "distilbert": r"classifier"}


def frozen(model, *parts):
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not any(part in name for part in parts))
    return model


@pytest.mark.parametrize("method", [SPSA, {"learning_rate": 0.1, "max_steps": 2}], ids=["spsa", "gld"])
@pytest.mark.parametrize("model_type", CONFIGS)
def test_a_frozen_part_of_the_head_stays(tmp_path, model_type, method, caplog):
    part = {"bert": "pooler", "roberta": "classifier.dense", "distilbert": "pre_classifier"}[model_type]
    model = frozen(tiny_model(model_type), part)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trainer = make(tmp_path, model, **method)
    assert "search_target=head: 2 frozen parameters" in caplog.text
    assert not any(part in name for name in trainer.searched) and trainer.searched
    trainer.train()
    moved = {name for name, value in weights(trainer).items() if not torch.equal(value, before[name])}
    assert moved and moved <= set(trainer.searched)
    assert not any(part in name and p.requires_grad for name, p in model.named_parameters())


@pytest.mark.parametrize("direction", ["gaussian", "lozo"])
def test_all_leaves_a_frozen_encoder_alone(tmp_path, direction, caplog):
    model = frozen(tiny_model(), "embeddings", "layer.0")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trainer = make(tmp_path, model, search_target="all", search_direction=direction, **SPSA)
    trainer.train()
    for name, parameter in trainer.model.named_parameters():
        kept = "embeddings" in name or "layer.0" in name
        assert torch.equal(parameter, before[name]) == kept, name
        assert parameter.requires_grad != kept, name
    assert "a regular expression that matches their names includes them" in caplog.text


@pytest.mark.parametrize("target", ["head", "all", r"layer\.0\.output"])
def test_frozen_parameters_are_searched_if_all_are_frozen_or_they_are_named(tmp_path, target, caplog):
    model = tiny_model().requires_grad_(False) if target != r"layer\.0\.output" else frozen(tiny_model(), "layer.0")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trainer = make(tmp_path, model, search_target=target, **SPSA)
    trainer.train()
    assert len(trainer.searched) == {"head": 4, "all": len(before)}.get(target, 4)
    for name, parameter in trainer.searched.items():
        assert not torch.equal(parameter, before[name]) and not parameter.requires_grad
    assert "frozen parameters" not in caplog.text


DECAYING = {
    "spsa": SPSA,
    "momentum": {**SPSA, "search_update": "momentum"},
    "activity": {**SPSA, "search_method": "activity"},
    "node": {**SPSA, "search_method": "node"},
    "adam": {**SPSA, "search_method": "adam"},
}


@pytest.mark.parametrize("method", DECAYING)
def test_weight_decay_leaves_out_biases_and_norms(tmp_path, method):
    options = {"weight_decay": 0.3, **DECAYING[method], "max_steps": 1}
    if method in ("spsa", "momentum", "activity"):
        options["search_target"] = "all"
    ends = []
    for decay in (0.3, 0.0):  # without decay the parameters have other numbers, and so other directions
        trainer = make(tmp_path, tiny_model().double(), **options)
        optimizer = trainer.create_optimizer()
        inner = getattr(optimizer, "adam", optimizer)
        decayed = {id(p) for group in inner.param_groups for p in group["params"] if group["weight_decay"]}
        names = {name for name, p in trainer.searched.items() if id(p) in decayed}
        assert names == trainer.searched.keys() & set(trainer.get_decay_parameter_names(trainer.model))
        for group in inner.param_groups:
            group["weight_decay"] = decay if group["weight_decay"] else 0.0
        before = weights(trainer)
        trainer.train()
        ends.append(weights(trainer))
    rate = 1 - 0.3 * DECAYING[method]["learning_rate"]
    for name, value in ends[0].items():
        factor = rate if name in names else 1
        torch.testing.assert_close(value, ends[1][name] + (factor - 1) * before[name], rtol=1e-9, atol=1e-12)
