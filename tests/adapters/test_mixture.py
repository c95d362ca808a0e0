"""Several kinds of adapters in one model: each layer its own, refusals, merging where all can."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from tiny import tiny_model
from zoo import logits, small

from hf_ft_ext import BottleneckConfig, LayerMixtureConfig, LayerPrefixConfig, SparseGradConfig
from hf_ft_ext.adapters.bottleneck.layer import BottleneckLayer
from hf_ft_ext.adapters.layer_prefix.layer import PrefixLayer
from hf_ft_ext.errors import InputError

KINDS = {"lora": LoraConfig(r=2), "prefix": LayerPrefixConfig(), "bottleneck": BottleneckConfig()}


def test_every_layer_has_its_own_and_nothing_else():
    model = get_peft_model(
        tiny_model(num_hidden_layers=4),
        LayerMixtureConfig(kinds=KINDS, layers={0: "prefix", 1: "bottleneck", 3: ["lora"]}),
    )
    found = {
        kind: {int(n.split("layer.")[1].split(".")[0]) for n, m in model.named_modules() if isinstance(m, kind)}
        for kind in (PrefixLayer, BottleneckLayer, LoraLayer)
    }
    assert found == {PrefixLayer: {0}, BottleneckLayer: {1}, LoraLayer: {3}}


def test_adapters_of_different_layouts_side_by_side(tmp_path):
    torch.manual_seed(0)
    model = get_peft_model(small("bert"), LayerMixtureConfig(kinds=KINDS, layers={0: "prefix", 1: "lora"}))
    first = logits(model)
    model.add_adapter("other", LayerMixtureConfig(kinds=KINDS, layers={0: "lora", 1: ["bottleneck", "prefix"]}))
    model.set_adapter("other")
    second = logits(model)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(small("bert"), tmp_path)
    assert torch.equal(logits(loaded), first)
    loaded.load_adapter(tmp_path / "other", "other")
    loaded.set_adapter("other")
    assert torch.equal(logits(loaded), second) and not torch.equal(first, second)
    loaded.delete_adapter("default")
    assert torch.equal(logits(loaded), second)


def test_kinds_that_can_be_merged_are(tmp_path):
    kinds = {
        "lora": LoraConfig(r=2, init_lora_weights=False),
        "loha": {"r": 2, "init_weights": False, "target_modules": ["key"]},
    }
    torch.manual_seed(0)
    model = get_peft_model(small("bert").double(), LayerMixtureConfig(kinds=kinds, layers={0: "lora", 1: "loha"}))
    expected = logits(model)
    merged = model.merge_and_unload()
    torch.testing.assert_close(logits(merged), expected, rtol=1e-6, atol=1e-6)
    assert not torch.allclose(logits(merged), logits(small("bert").double()), atol=1e-4)
    merged.save_pretrained(tmp_path)


@pytest.mark.parametrize("outer", ["sparse", "ia3"])
@pytest.mark.parametrize("merge", ["merge_adapter", "merge_and_unload"])
def test_kinds_at_one_module_are_all_merged(merge, outer):
    """IA3 around LoRA multiplies the sum of weight and change."""
    kinds = {
        "lora": LoraConfig(r=2, init_lora_weights=False, target_modules=["key"]),
        "sparse": SparseGradConfig(init="random", init_std=0.3, target_modules=["attention.self.key"]),
        "ia3": {"target_modules": ["key"], "feedforward_modules": [], "init_ia3_weights": False},
    }
    torch.manual_seed(0)
    model = get_peft_model(small("bert").double(), LayerMixtureConfig(kinds=kinds, layers={0: ["lora", outer]}))
    expected = logits(model)
    merged = getattr(model, merge)()
    torch.testing.assert_close(logits(merged or model), expected, rtol=1e-6, atol=1e-6)
    if merge == "merge_adapter":
        model.unmerge_adapter()
        torch.testing.assert_close(logits(model), expected, rtol=1e-6, atol=1e-6)


def test_merging_a_kind_that_cannot_merge_is_refused():
    model = get_peft_model(small("bert"), LayerMixtureConfig(kinds=KINDS, layers={0: "lora", 1: "bottleneck"}))
    before = logits(model)
    with pytest.raises(InputError, match=r"kind 'bottleneck': .* cannot be merged"):
        model.merge_and_unload()
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("merge", ["merge_adapter", "merge_and_unload"])
def test_adapters_that_cannot_merge_do_not_prevent_merging_another_one(merge):
    kinds = {**KINDS, "lora": LoraConfig(r=2, init_lora_weights=False)}
    torch.manual_seed(0)
    model = get_peft_model(small("bert"), LayerMixtureConfig(kinds=kinds, layers={0: "lora", 1: "lora"}))
    model.add_adapter("other", LayerMixtureConfig(kinds=kinds, layers={0: ["bottleneck", "prefix"], 1: "bottleneck"}))
    expected = logits(model)
    with pytest.raises(InputError, match=r"kind '(bottleneck|prefix)': .* cannot be merged"):
        getattr(model, merge)(adapter_names=["other"])
    merged = getattr(model, merge)()
    torch.testing.assert_close(logits(merged or model), expected)
    if merge == "merge_adapter":
        model.unmerge_adapter()
        torch.testing.assert_close(logits(model), expected)


def test_merging_sparse_grad_into_a_shared_weight_is_refused():
    base = small("bert")
    base.bert.encoder.layer[1].output.dense.weight = base.bert.encoder.layer[0].output.dense.weight
    kinds = {"sparse": SparseGradConfig(init="random", target_modules=["output.dense"])}
    model = get_peft_model(base, LayerMixtureConfig(kinds=kinds, layers={0: "sparse"}))
    with pytest.raises(
        InputError, match=r"output\.dense shares its weight with .*layer\.1\.output\.dense, so merging"
    ):
        model.merge_adapter()


@pytest.mark.parametrize(
    ("kinds", "layers", "message"),
    [
        (
            {"prompt_tuning": {}},
            {0: "prompt_tuning"},
            "'prompt_tuning': prompt_tuning adds its parameters to the inputs",
        ),
        ({"vera": {}}, {0: "vera"}, "vera shares parameters between layers, so it cannot be limited to layers"),
        ({"layer_mixture": {}}, {}, "is a mixture itself"),
        ({"loro": {}}, {0: "loro"}, "peft has no method 'loro'; did you mean 'LORA'"),
        ({"lora": {"rank": 3}}, {0: "lora"}, "kind 'lora': .*rank"),
        ({"lora": {"modules_to_save": ["classifier"]}}, {0: "lora"}, "sets modules_to_save=.*only the mixture itself"),
        ({"lora": {"bias": "all"}}, {0: "lora"}, "bias='all' would also train biases"),
        (
            {"lora": {"target_parameters": ["w"]}},
            {0: "lora"},
            r"sets target_parameters=\['w'\], which a mixture does not",
        ),
        (
            {"lora": {"trainable_token_indices": [1]}},
            {0: "lora"},
            "sets trainable_token_indices=.* a mixture does not",
        ),
        ({"lora": {}}, {0: "lore"}, "layer 0: kind 'lore' is not defined; did you mean 'lora'"),
        ({"lora": {}}, {"first": "lora"}, "'first' is not a layer number"),
    ],
)
def test_invalid_configurations_are_refused(kinds, layers, message):
    with pytest.raises(InputError, match=message):
        LayerMixtureConfig(kinds=kinds, layers=layers)


def test_unsuitable_models_are_refused():
    with pytest.raises(InputError, match="the mixture gives no layer an adapter; set layers"):
        get_peft_model(small("bert"), LayerMixtureConfig(kinds=KINDS, layers={0: []}))
    with pytest.raises(InputError, match="the mixture names layer 9, and BertForSequenceClassification has layers 0"):
        get_peft_model(small("bert"), LayerMixtureConfig(kinds=KINDS, layers={9: "lora"}))
    config = LayerMixtureConfig(kinds={"lora": {"target_modules": ["qkv"]}}, layers={1: "lora"})
    with pytest.raises(InputError, match="kind 'lora' finds no target in layer 1"):
        get_peft_model(small("bert"), config)
    kinds = {"one": LoraConfig(r=2), "two": LoraConfig(r=4, target_modules=["key", "value"])}
    message = r"kind 'two' and another one of the same method both adapt .*layer\.0\.attention\.self\.value"
    with pytest.raises(InputError, match=message):
        get_peft_model(small("bert"), LayerMixtureConfig(kinds=kinds, layers={0: ["one", "two"]}))
    with pytest.raises(InputError, match="kind 'ia3': peft knows no default targets for a 'electra' model"):
        get_peft_model(small("electra"), LayerMixtureConfig(kinds={"ia3": {}}, layers={1: "ia3"}))
