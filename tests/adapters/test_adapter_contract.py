"""What peft promises of every adapter, for ours: attach, train, save, load, switch, several, dtypes, refusals."""

import json

import pytest
import torch
from peft import PeftConfig, PeftModel, get_peft_model
from peft.helpers import check_if_peft_model
from zoo import ADAPTERS, ALL, MERGEABLE, MODELS, inputs, logits, small

from hf_ft_ext.errors import InputError


def attach(model, name: str, **kw):
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return get_peft_model(model, ALL[name](task_type="SEQ_CLS", **kw))


def step(model) -> None:
    """One large step of plain gradient descent on everything that trains."""
    model.train()
    loss = model(**inputs(), labels=torch.tensor([0, 1])).loss
    loss.backward()
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad and p.grad is not None:
                p -= 0.5 * p.grad
    model.zero_grad()


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        (kind, name)
        for kind in MODELS
        for name in ALL
        if kind == "bert" or name in ("pfeiffer", "projected", "sparse", "mixture")
    ],
)
def test_train_save_load_and_unload(tmp_path, kind, name):
    model = small(kind)
    plain, frozen = logits(model), {n: p.clone() for n, p in model.named_parameters()}
    adapted = attach(model, name)
    trains = {n: p.clone() for n, p in adapted.named_parameters() if p.requires_grad}
    assert trains and not torch.equal(logits(adapted), plain)
    head = {n for n in trains if "modules_to_save" in n}
    step(adapted)
    step(adapted)
    moved = {n for n, p in adapted.named_parameters() if n in trains and not torch.equal(p, trains[n])}
    assert moved == set(trains) and head
    trained = logits(adapted)
    adapted.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(small(kind), tmp_path)
    assert torch.equal(logits(loaded), trained)
    with adapted.disable_adapter():
        assert torch.equal(logits(adapted), plain)
    assert torch.equal(logits(adapted), trained)
    base = adapted.unload()
    changed = {n for n, p in base.named_parameters() if not torch.equal(p, frozen[n])}
    assert changed <= {
        n for n in frozen if n.startswith(("classifier", "pre_classifier", "score"))
    }  # peft leaves the trained head
    assert {n for n, _ in base.named_parameters()} == set(frozen)


@pytest.mark.parametrize("name", ALL)
def test_several_adapters_in_one_model(tmp_path, name):
    model = attach(small("bert"), name)
    first = logits(model)
    with torch.random.fork_rng():
        torch.manual_seed(2)
        model.add_adapter("other", ALL[name](task_type="SEQ_CLS"))
    assert torch.equal(logits(model), first)
    assert not any(p.requires_grad for n, p in model.named_parameters() if ".other" in n)
    model.set_adapter("other")
    second = logits(model)
    assert not torch.allclose(second, first, atol=1e-5)
    assert not any(p.requires_grad for n, p in model.named_parameters() if ".default" in n)
    assert any(p.requires_grad for n, p in model.named_parameters() if ".other" in n)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(small("bert"), tmp_path)
    loaded.load_adapter(tmp_path / "other", "other")
    assert torch.equal(logits(loaded), first)
    loaded.set_adapter("other")
    assert torch.equal(logits(loaded), second)
    model.delete_adapter("other")
    model.set_adapter("default")
    assert torch.equal(logits(model), first)
    assert not any(".other" in n for n, _ in model.named_parameters())


@pytest.mark.parametrize("name", ADAPTERS)
def test_chosen_layers_only(name):
    model = attach(small("bert"), name, layers_to_transform=[1])
    names = [n for n, p in model.named_parameters() if p.requires_grad and "modules_to_save" not in n]
    layered = [n for n in names if "encoder.layer." in n]
    assert layered and all("layer.1." in n for n in layered)
    assert all("layer_prefix_embedding" in n or "layer_prefix_hidden" in n for n in set(names) - set(layered))


@pytest.mark.parametrize("name", [name for name in ADAPTERS if name not in MERGEABLE])
def test_merging_is_refused_before_anything_changes(name):
    model = attach(small("bert"), name)
    before = logits(model)
    for merge in (model.merge_and_unload, model.merge_adapter):
        with pytest.raises(InputError, match=r"cannot be merged into .*unload\(\)"):
            merge()
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("kind", ["bert", "llama", "gpt2"])
@pytest.mark.parametrize("name", MERGEABLE)
def test_merging_and_back(tmp_path, name, kind):
    model = attach(small(kind), name)
    plain, adapted = logits(small(kind)), logits(model)
    model.merge_adapter(safe_merge=True)
    torch.testing.assert_close(logits(model), adapted, rtol=1e-5, atol=1e-6)
    with model.disable_adapter():  # takes the change out of the weights
        torch.testing.assert_close(logits(model), plain, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(logits(model), adapted, rtol=1e-5, atol=1e-6)
    model.merge_adapter()
    model.unmerge_adapter()
    torch.testing.assert_close(logits(model), adapted, rtol=1e-5, atol=1e-6)
    merged = model.merge_and_unload()
    merged.save_pretrained(tmp_path)
    torch.testing.assert_close(logits(type(merged).from_pretrained(tmp_path)), adapted, rtol=1e-5, atol=1e-6)
    assert {n for n, _ in merged.named_parameters()} == {n for n, _ in small(kind).named_parameters()}


@pytest.mark.parametrize("name", MERGEABLE)
def test_a_merge_that_is_not_finite_changes_nothing(name):
    model = attach(small("bert"), name)
    values = next(p for n, p in model.named_parameters() if "values" in n)
    with torch.no_grad():
        values[0, 0] = torch.inf
    before = {n: p.clone() for n, p in model.named_parameters() if "base_layer" in n}
    with pytest.raises(ValueError, match="adapter default seems to be broken"):
        model.merge_adapter(safe_merge=True)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters() if n in before)


@pytest.mark.parametrize("name", ALL)
def test_half_precision_and_checkpointing(name):
    model = attach(small("bert").bfloat16(), name)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert {p.dtype for p in trained} >= {torch.float32}  # adapters are kept in single precision
    assert logits(model).isfinite().all()
    step(model)
    results = []
    for checkpointed in (False, True):
        model = attach(small("bert", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0), name).train()
        if checkpointed:
            model.gradient_checkpointing_enable()
            model.enable_input_require_grads()
        model(**inputs(), labels=torch.tensor([0, 1])).loss.backward()
        results.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    for n, gradient in results[0].items():
        torch.testing.assert_close(results[1][n], gradient, msg=n)


def test_metadata_and_model_card(tmp_path):
    for name in ALL:
        folder = tmp_path / name
        model = attach(small("bert"), name)
        model.save_pretrained(folder)
        config = json.loads((folder / "adapter_config.json").read_text())
        assert config["peft_type"] in ("BOTTLENECK", "LAYER_PREFIX", "LAYER_MIXTURE", "SPARSE_GRAD")
        assert "peft" in (folder / "README.md").read_text() and check_if_peft_model(str(folder))
        assert type(PeftConfig.from_pretrained(folder)) is type(model.peft_config["default"])
        assert model.get_model_status().enabled is True
        assert model.peft_config["default"].peft_type.value == config["peft_type"]
