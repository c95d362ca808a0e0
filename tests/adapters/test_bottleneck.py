"""Bottleneck adapters against the papers' formulas, their start, their sizes, bad input."""

import pytest
import torch
from classifiers import classifier_rows, tiny_classifier
from peft import get_peft_model, inject_adapter_in_model
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
)
from zoo import inputs, logits, small

from hf_ft_ext import BottleneckConfig
from hf_ft_ext.adapters.bottleneck.layer import BottleneckLayer
from hf_ft_ext.adapters.bottleneck.model import default_targets
from hf_ft_ext.errors import InputError


def adapted(kind="bert", **settings):
    torch.manual_seed(0)
    return get_peft_model(small(kind), BottleneckConfig(bottleneck_size=4, init_std=0.4, **settings))


def layers(model) -> dict[str, BottleneckLayer]:
    return {n: m for n, m in model.named_modules() if isinstance(m, BottleneckLayer)}


def written_out(layer: BottleneckLayer, x: torch.Tensor, activation) -> torch.Tensor:
    down, up = layer.bottleneck_down["default"], layer.bottleneck_up["default"]
    return activation(x @ down.weight.T + down.bias) @ up.weight.T + up.bias


def test_pfeiffer_reads_the_normalised_sum_and_adds_before_the_norm():
    model = adapted()
    name, layer = next(iter(layers(model).items()))
    assert name.endswith("layer.0.output.LayerNorm") and len(layers(model)) == 2
    s = torch.randn(2, 3, 32)
    norm = layer.base_layer
    expected = norm(s + written_out(layer, norm(s), torch.relu))
    torch.testing.assert_close(layer(s), expected)


def test_houlsby_adds_to_both_outputs():
    model = adapted(placement="houlsby")
    names = [n.split("layer.0.")[1] for n in layers(model) if "layer.0." in n]
    assert names == ["attention.output.dense", "output.dense"]
    layer = next(iter(layers(model).values()))
    x = torch.randn(2, 3, 32)
    y = layer.base_layer(x)
    torch.testing.assert_close(layer(x), y + written_out(layer, y, torch.nn.functional.silu))


@pytest.mark.parametrize(("kind", "name"), [("bert", "output"), ("distilbert", "ffn"), ("llama", "mlp")])
def test_parallel_reads_the_feed_forwards_input(kind, name):
    model = adapted(kind, placement="parallel", scaling=4.0)
    layer = next(iter(layers(model).values()))
    assert all(n.rpartition(".")[2] == name for n in layers(model))
    x = torch.randn(2, 3, 32)
    extra = 4 * written_out(layer, x, torch.relu)
    if kind == "bert":  # the block adds its second input before it normalises
        inner = torch.randn(2, 3, 48)
        torch.testing.assert_close(layer(inner, x), layer.base_layer(inner, x + extra))
        torch.testing.assert_close(layer(inner, input_tensor=x), layer.base_layer(inner, x + extra))
    else:
        torch.testing.assert_close(layer(x), layer.base_layer(x) + extra)


def test_the_initial_output_is_near_or_equal_to_the_base_model():
    plain = logits(small("bert"))
    near = logits(get_peft_model(small("bert"), BottleneckConfig()))
    assert 0 < (near - plain).abs().max() < 0.02
    exact = logits(get_peft_model(small("bert"), BottleneckConfig(init_weights="zero")))
    assert torch.equal(exact, plain)


def test_own_norms_dropout_and_learned_scaling():
    model = adapted(layer_norm="both", dropout=0.5, learned_scaling=True, scaling=2.0)
    layer = next(iter(layers(model).values()))
    x = torch.randn(2, 3, 32)
    down, up = layer.bottleneck_down["default"], layer.bottleneck_up["default"]
    norm = torch.nn.functional.layer_norm
    layer.eval()
    expected = 2 * norm(up(torch.relu(down(norm(x, (32,))))), (32,))
    torch.testing.assert_close(layer.adapter("default", x), expected)
    layer.train()
    assert not torch.equal(layer.adapter("default", x), layer.adapter("default", x))
    assert {n for n, p in layer.named_parameters() if p.requires_grad} >= {"bottleneck_scale.default.weight"}


def test_the_thesis_size():
    with torch.device("meta"):
        model = AutoModelForSequenceClassification.from_config(AutoConfig.for_model("roberta"))
        model = get_peft_model(model, BottleneckConfig(bottleneck_size=48))
    assert sum(p.numel() for n, p in model.named_parameters() if "bottleneck_" in n) == 894_528
    by_factor = BottleneckConfig(reduction_factor=16)
    assert by_factor.width(768) == 48


@pytest.mark.filterwarnings("error:.*no modules were excluded")
def test_targets_by_name_in_the_layer_or_by_expression():
    model = adapted(target_modules=["output.dense"])
    assert [n.split("layer.0.")[1] for n in layers(model) if "layer.0." in n] == ["output.dense"]
    model = adapted(target_modules=r".*attention\.output\.dense", layers_to_transform=0)
    assert [n.split("encoder.")[1] for n in layers(model)] == ["layer.0.attention.output.dense"]
    model = adapted(placement="houlsby", exclude_modules=["output.dense"])
    assert all("attention" in n for n in layers(model))


@pytest.mark.parametrize("pattern", ["layer", ["blocks", "layer"], "bert|layer"])
def test_the_list_of_layers_is_named_where_names_hold_another_number_before(pattern):
    settings = {"target_modules": ["attention.output.dense"], "layers_to_transform": [1], "layers_pattern": pattern}
    model = torch.nn.ModuleDict({"parts": torch.nn.ModuleList([small("bert")])})
    inject_adapter_in_model(BottleneckConfig(bottleneck_size=4, **settings), model)
    assert list(layers(model)) == ["parts.0.bert.encoder.layer.1.attention.output.dense"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"placement": "pfeifer"}, "placement='pfeifer' is unknown; choose from: pfeiffer, houlsby, parallel"),
        ({"bottleneck_size": 4, "reduction_factor": 2}, "both set the width of the bottleneck"),
        ({"bottleneck_size": 0}, "bottleneck_size must be 1 or more, got 0"),
        ({"reduction_factor": 0}, "reduction_factor must be above 0, such as 16, got 0"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\), got 1.0"),
        ({"activation": "relux"}, "activation='relux' is unknown to transformers"),
        ({"layer_norm": "inside"}, "layer_norm='inside' is unknown"),
        ({"init_weights": "ones"}, "init_weights='ones' is unknown"),
    ],
)
def test_invalid_values_are_refused(settings, message):
    with pytest.raises(InputError, match=message):
        BottleneckConfig(**settings)


def test_layers_that_are_not_there_and_unknown_structures():
    with pytest.raises(InputError, match=r"layers_to_transform=\[0, 7\] names layer 7, .* has layers 0 to 1"):
        adapted(layers_to_transform=[0, 7])
    with pytest.raises(
        InputError, match=r"layers_pattern='blocks' names no list of layers of .*, which has layer; pass"
    ):
        adapted(layers_pattern="blocks")
    strange = torch.nn.ModuleDict({"layers": torch.nn.ModuleList([torch.nn.Sequential(torch.nn.Linear(2, 2))])})
    with pytest.raises(InputError, match=r"the parts of ModuleDict cannot be found: .*target_modules"):
        get_peft_model(strange, BottleneckConfig())


def test_inputs_without_adapters_stay_what_they_were():
    model = adapted()
    before = logits(model)
    model.base_model.set_adapter([])
    assert torch.equal(logits(model, **inputs()), logits(small("bert")))
    model.base_model.set_adapter("default")
    assert torch.equal(logits(model), before)


PLACES = {  # pfeiffer, houlsby, parallel
    "bert": (["output.LayerNorm"], ["attention.output.dense", "output.dense"], ["output"]),
    "bart": (["final_layer_norm"], ["fc2", "self_attn.out_proj"], None),
    "mbart": (["fc2"], ["fc2", "self_attn.out_proj"], None),
    "esm": (["output.dense"], ["attention.output.dense", "output.dense"], None),  # reads a norm of `input_tensor`
    "bloom": (["mlp.dense_4h_to_h"], ["mlp.dense_4h_to_h", "self_attention.dense"], None),  # `mlp` adds the residual
    "falcon": (["mlp"], ["mlp", "self_attention.dense"], ["mlp"]),
    "phimoe": (["mlp"], ["mlp", "self_attn.o_proj"], ["mlp"]),
    "funnel": (["0.ffn.layer_norm"], ["0.attention.post_proj", "0.ffn.linear_2"], None),
    "xlm": (["lin2"], ["lin2", "out_lin"], None),
    "xlnet": (["ff.layer_norm"], None, None),  # its attention's output is a weight outside of modules
    "squeezebert": (None, None, None),  # channels before positions
    "t5": (
        ["layer.1.DenseReluDense", "layer.2.DenseReluDense"],
        ["layer.0.SelfAttention.o", "layer.1.DenseReluDense", "layer.2.DenseReluDense"],
        ["layer.1.DenseReluDense", "layer.2.DenseReluDense"],
    ),
}


@pytest.mark.parametrize("kind", PLACES)
def test_places_by_structure(kind):
    for placement, places in zip(("pfeiffer", "houlsby", "parallel"), PLACES[kind], strict=True):
        model = tiny_classifier(kind)
        config = BottleneckConfig(placement=placement, bottleneck_size=4, init_weights="zero")
        if places is None:
            with pytest.raises(
                InputError, match=rf"no layers that fit a bottleneck adapter of placement '{placement}'"
            ):
                get_peft_model(model, config)
            continue
        rows = {name: value for name, value in classifier_rows().items() if name != "labels"}
        before = model(**rows).logits
        wrapped = get_peft_model(model, config)
        assert wrapped.peft_config["default"].target_modules == places
        torch.testing.assert_close(wrapped(**rows).logits, before)  # the up projections are zero
        for layer in layers(wrapped).values():
            torch.nn.init.normal_(layer.bottleneck_down["default"].weight)
            torch.nn.init.normal_(layer.bottleneck_up["default"].weight)
        assert not torch.allclose(wrapped(**rows).logits, before, atol=1e-4)


def test_experts_inside_of_a_larger_block_get_no_adapter_of_their_own():
    sizes = {"hidden_size": 32, "intermediate_size": 48, "intermediate_size_mlp": 48, "head_dim": 8}
    sizes |= {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 2}
    config = AutoConfig.for_model("llama4_text", vocab_size=45, max_position_embeddings=64, pad_token_id=0, **sizes)
    model = AutoModelForCausalLM.from_config(config)
    assert default_targets(model, "houlsby") == ["feed_forward", "self_attn.o_proj"]  # not feed_forward.experts


@pytest.mark.parametrize("placement", ["pfeiffer", "houlsby", "parallel"])
def test_stages_of_other_sizes_have_adapters_of_theirs(placement):
    """Swin's hidden size is that of its last stage, 32; a feed-forward of the first one is 8 -> 32 -> 8."""
    config = AutoConfig.for_model(
        "swin", image_size=32, patch_size=2, embed_dim=8, depths=[1, 1, 1], num_heads=[2, 2, 4], window_size=4
    )
    model = AutoModelForImageClassification.from_config(config).eval()
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    before = model(pixels).logits
    model = get_peft_model(model, BottleneckConfig(placement=placement)).eval()
    sizes = [layer.hidden for layer in model.modules() if isinstance(layer, BottleneckLayer)]
    each = 2 if placement == "houlsby" else 1  # the attention, too
    assert sizes == [size for size in (8, 16, 32) for _ in range(each)]
    torch.testing.assert_close(model(pixels).logits, before, atol=0.05, rtol=0)
    model(pixels, labels=torch.tensor([0, 1])).loss.backward()
    trained = [p for name, p in model.named_parameters() if ".bottleneck_" in name]
    assert len(trained) >= 4 * len(sizes) and all(p.grad is not None for p in trained)  # weights and biases


def test_modules_inside_of_wrapped_ones_are_refused():
    """peft skips them: the second adapter would be in some layers only."""
    model = get_peft_model(small("bert"), BottleneckConfig(placement="parallel", layers_to_transform=[0]))
    with pytest.raises(
        InputError, match=r"0\.output\.LayerNorm is inside of .*0\.output, which another .*other order"
    ):
        model.add_adapter("other", BottleneckConfig())
    model = get_peft_model(small("bert"), BottleneckConfig())
    model.add_adapter("other", BottleneckConfig(placement="parallel", layers_to_transform=[0]))
    assert len(layers(model)) == 3


def test_two_placements_at_one_normalization_are_both_added():
    torch.manual_seed(0)
    norm, x = torch.nn.LayerNorm(8), torch.randn(3, 8)
    config = BottleneckConfig(bottleneck_size=2, init_std=0.4)
    layer = BottleneckLayer(norm, "default", config, 8)
    layer.update_layer("other", BottleneckConfig(placement="parallel", bottleneck_size=2, init_std=0.4))
    layer.set_adapter(["default", "other"])
    expected = norm(x + layer.adapter("default", norm(x))) + layer.adapter("other", x)
    torch.testing.assert_close(layer(x), expected)
