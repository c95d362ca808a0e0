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
    assert "frozen" not in caplog.text
