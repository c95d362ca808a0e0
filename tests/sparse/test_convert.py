"""Conversion and merging: which layers, the same outputs, clear refusals."""

import re

import pytest
import torch
from classifiers import classifier_rows, tiny_classifier
from other_models import other_batch, other_model
from peft import LoraConfig, get_peft_model
from tiny import CONFIGS, tiny_model
from torch import nn

from hf_ft_ext import InputError, SparseGradLinear, convert_to_sparse, merge_sparse, save_delta, sparse_layers
from hf_ft_ext.sparse.convert import freeze_rest
from hf_ft_ext.sparse.prepare import _choose_rotation, _fill_random
from hf_ft_ext.structure.targets import is_plain_linear

INPUTS = {"input_ids": torch.arange(5, 25).view(2, 10)}


@pytest.mark.parametrize("model_type", CONFIGS)
def test_converts_the_mlp_of_every_block_and_nothing_else(model_type):
    model = tiny_model(model_type).eval()
    names = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    before = model(**INPUTS).logits
    converted = convert_to_sparse(model)
    assert len(converted) == 4  # two layers, two MLP weights each
    assert {tuple(layer.weight.shape) for layer in converted.values()} == {(48, 32), (32, 48)}
    assert len({id(layer.basis) for layer in converted.values()}) == 2  # shared per kind
    assert not any("attention" in name for name in converted) and converted.keys() < names
    assert torch.equal(model(**INPUTS).logits, before)
    merge_sparse(model)
    assert not sparse_layers(model)
    assert {name for name, m in model.named_modules() if type(m) is nn.Linear} == names
    assert torch.equal(model(**INPUTS).logits, before)


@pytest.mark.parametrize("support", ["dynamic", "static", "structured"])
def test_layers_that_are_frozen_are_not_converted_unless_all_are_or_they_are_named(support):
    model = tiny_model()
    model.bert.encoder.layer[0].requires_grad_(False)
    assert all(".layer.1." in name for name in convert_to_sparse(model, support=support, density=0.2))
    for frozen, pattern in ((tiny_model(), None), (tiny_model().bert.encoder.layer[0], r"layer\.\d\.output\.dense")):
        frozen.requires_grad_(False)
        model = tiny_model() if pattern else frozen
        if pattern:
            model.bert.encoder.layer[0] = frozen
        found = convert_to_sparse(model, target_modules=pattern, support=support, density=0.2)
        assert len(found) == (2 if pattern else 4)


def test_state_dict_keeps_its_keys():
    model = tiny_model()
    keys = list(model.state_dict())
    convert_to_sparse(model)
    assert list(model.state_dict()) == keys


def test_half_precision_model_converts_and_merges_back():
    model = tiny_model().bfloat16().eval()
    before = model(**INPUTS).logits
    convert_to_sparse(model)
    assert torch.equal(model(**INPUTS).logits, before)
    assert {p.dtype for p in merge_sparse(model).parameters()} == {torch.bfloat16}


@pytest.mark.parametrize(
    "options, count", [({}, 18), ({"density": 0.5}, 768), ({"n_params": 7}, 7), ({"density": 1.0}, 1536)]
)
def test_entries_per_step(options, count):
    assert {layer.n_params for layer in convert_to_sparse(tiny_model(), **options).values()} == {count}


def test_regex_picks_layers():
    converted = convert_to_sparse(tiny_model(), target_modules=r"layer\.1\.attention\.self\.(query|key)$")
    assert sorted(name.rsplit(".", 1)[1] for name in converted) == ["key", "query"]
    assert all(isinstance(layer, SparseGradLinear) for layer in converted.values())


@pytest.mark.parametrize(
    "options, message",
    [
        ({"n_params": 1537}, "n_params=1537 is more than the 1536 entries of .*intermediate.dense"),
        ({"n_params": 0}, "n_params must be 1 or more, got 0"),
        ({"density": 1.5}, r"density must be in \(0, 1\], got 1.5"),
        ({"density": 0.5, "n_params": 7}, "n_params=7 and density=0.5 both say which entries train; pass one"),
        ({"threshold": 1e-3, "n_params": 7}, "n_params=7 and threshold=0.001 both say which entries train"),
        ({"threshold": 1e-3, "support": "static"}, "threshold=0.001 with support='static': pass .* dynamic support"),
        ({"threshold": 0.0}, "threshold=0.0 with support='dynamic': pass a number above 0"),
        ({"support": "fixed"}, "support='fixed' is unknown; choose from: dynamic, static, structured"),
        ({"basis": "svd"}, "basis='svd' is unknown; choose from: hosvd, none, random"),
        ({"basis_scope": "model"}, "basis_scope='model' is unknown; choose from: kind, layer"),
        ({"density": 1e-9}, "density=1e-09 leaves no trainable entry in .*; raise it"),
        ({"target_modules": "no_such_layer"}, "'no_such_layer' matches no layer; linear layers here: .*classifier"),
        ({"target_modules": "LayerNorm"}, "matches .*LayerNorm, a LayerNorm; SparseGrad trains linear layers"),
        ({"target_modules": "("}, r"sparse_target_modules='\(' is no regular expression"),
    ],
)
def test_bad_input(options, message):
    model = tiny_model()
    with pytest.raises(InputError, match=message):
        convert_to_sparse(model, **options)
    assert not sparse_layers(model)


def test_converting_twice_is_refused():
    model = tiny_model()
    convert_to_sparse(model)
    with pytest.raises(InputError, match="is converted already; call merge_sparse"):
        convert_to_sparse(model)


def test_an_unknown_model_type_is_read_by_structure():
    model = tiny_model()
    model.config.model_type = "novel"
    assert len(convert_to_sparse(model)) == 4


@pytest.mark.parametrize(
    ("kind", "converted", "warning"),
    [
        ("falcon", {"dense_h_to_4h", "dense_4h_to_h"}, None),  # a class of its own over nn.Linear
        (
            "qwen2_moe",
            {"gate_proj", "up_proj", "down_proj"},
            r"are not linear layers .*experts.down_proj \(tensor 2x32x32\)",
        ),
        ("mixtral", {"q_proj", "k_proj", "v_proj", "o_proj"}, r"are .*experts.gate_up_proj \(tensor .*instead"),
        ("fnet", {"dense"}, None),
    ],
)
def test_converted_layers_of_unusual_feed_forwards(kind, converted, warning, caplog):
    model = tiny_classifier(kind)
    rows = {name: value for name, value in classifier_rows().items() if name != "labels"}
    before, keys = model(**rows).logits, list(model.state_dict())
    layers = convert_to_sparse(model)
    assert {name.rpartition(".")[2] for name in layers} == converted
    assert not any("experts" in name and "shared" not in name for name in layers)
    torch.testing.assert_close(model(**rows).logits, before)
    assert list(model.state_dict()) == keys
    messages = [record.getMessage() for record in caplog.records]
    assert messages == [] if warning is None else re.search(warning, messages[0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_layers_that_round_their_product_before_the_bias_are_linear(dtype):
    class Rounding(nn.Linear):  # as Falcon's
        def forward(self, x):
            return x @ self.weight.T + self.bias

    layer = Rounding(256, 256)
    nn.init.normal_(layer.bias)
    assert is_plain_linear(layer.to(dtype))
    layer.forward = lambda x: 1.05 * Rounding.forward(layer, x)
    assert not is_plain_linear(layer)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            lambda: tiny_classifier("ibert"),
            r"its feed-forwards \(.*\(QuantLinear\)\) are not linear layers, and its att",
        ),
        (
            lambda: tiny_classifier("squeezebert"),
            r"intermediate.conv1d \(Conv1d\).*select layers with sparse_target_modules",
        ),
        (lambda: nn.Sequential(nn.Embedding(50, 8), nn.Linear(8, 2)), "the parts of Sequential cannot be found"),
    ],
)
def test_models_without_linear_layers_to_convert(model, message):
    with pytest.raises(InputError, match=message):
        convert_to_sparse(model())


@pytest.mark.parametrize("pattern", [None, r"layer\.\d+\.output\.dense"])
def test_models_with_adapters_are_refused(pattern):
    model = get_peft_model(tiny_model(), LoraConfig(target_modules=["dense"])).base_model.model
    with pytest.raises(InputError, match="the model carries PEFT adapters; pass the base model"):
        convert_to_sparse(model, target_modules=pattern)


def test_a_module_with_two_names_trains_by_all_its_gradients_or_is_refused():
    model = nn.ModuleDict({"first": nn.Linear(4, 4)})
    model["second"] = model["first"]
    with pytest.raises(InputError, match="first shares its weight with second"):
        convert_to_sparse(model, target_modules="first", support="static", density=0.5)
    assert convert_to_sparse(model, target_modules="first", density=0.5)["first"].shared
    assert model["first"].weight is model["second"].weight


def test_a_tied_weight_trains_by_all_its_gradients_or_is_refused(tmp_path):
    """The gradient of dynamic support's entries is that of the head and of the embedding together."""
    batch, plain = other_batch("gpt2"), other_model("gpt2")
    plain(**batch).loss.backward()
    model = other_model("gpt2")
    layer = convert_to_sparse(model, target_modules="lm_head", density=1.0)["lm_head"]
    freeze_rest(model, "none")
    assert [name for name, p in model.named_parameters() if p.requires_grad] == ["transformer.wte.weight"]
    model(**batch).loss.backward()
    assert layer.weight is model.transformer.wte.weight
    torch.testing.assert_close(layer.weight.grad, plain.lm_head.weight.grad, rtol=1e-6, atol=1e-9)
    _fill_random({"lm_head": layer}, seed=0)
    _choose_rotation({"lm_head": layer}, {layer.kind: 1})  # so few tokens would be cheaper to rotate
    model.zero_grad()
    model(**batch).loss.backward()
    torch.testing.assert_close(layer.value_gradient(), layer.basis.rotate(plain.lm_head.weight.grad))
    with pytest.raises(InputError, match="lm_head shares its weight with another module, which a delta cannot hold"):
        save_delta(model, tmp_path, other_model("gpt2"))
    message = r"lm_head shares its weight with transformer\.wte, so its entries cannot train for this layer alone"
    for support, dtype in (("static", torch.float64), ("structured", torch.float64), ("dynamic", torch.bfloat16)):
        model = other_model("gpt2").to(dtype)
        with pytest.raises(InputError, match=message):
            convert_to_sparse(model, target_modules="lm_head", support=support)
        assert not sparse_layers(model)
