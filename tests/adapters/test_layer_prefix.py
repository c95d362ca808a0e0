"""Prefixes: against attention written out, with padding on either side, causal models, sdpa and eager, folding."""

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
)
from zoo import CAUSAL, MODELS, inputs, logits, mixture, small

from hf_ft_ext import LayerPrefixConfig, keep_projection
from hf_ft_ext.adapters.layer_prefix.layer import PrefixLayer
from hf_ft_ext.errors import InputError

CLOSE = {"rtol": 1e-5, "atol": 1e-6}  # some models' softmax and norms are in single precision whatever the weights are


def adapted(kind="bert", model=None, **settings):
    torch.manual_seed(0)
    model = small(kind).double() if model is None else model
    settings = {"prefix_length": 3, "init_std": 1.0, **settings}
    return get_peft_model(model, LayerPrefixConfig(**settings))


def test_prefix_attention_equals_the_written_out_formula():
    model = adapted()
    layer = next(m for m in model.modules() if isinstance(m, PrefixLayer))
    base = layer.base_layer
    x, mask = torch.randn(2, 5, 32, dtype=torch.double), torch.ones(2, 1, 5, 5, dtype=torch.bool)
    mask[1, :, :, 3:] = False

    def heads(y):
        return y.view(2, -1, 2, 16).transpose(1, 2)

    rows = layer.layer_prefix_table["default"].weight
    keys = torch.cat([rows[:, :32].expand(2, 3, 32), base.key(x)], 1)
    values = torch.cat([rows[:, 32:].expand(2, 3, 32), base.value(x)], 1)
    scores = heads(base.query(x)) @ heads(keys).transpose(2, 3) / 4
    seen = torch.cat([torch.ones(2, 1, 5, 3, dtype=torch.bool), mask], 3)
    weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
    expected = (weights @ heads(values)).transpose(1, 2).reshape(2, 5, 32)
    torch.testing.assert_close(layer(x, attention_mask=mask)[0], expected)


@pytest.mark.parametrize("kind", MODELS)
def test_sdpa_and_eager_agree_and_padding_changes_nothing(kind):
    results = []
    for attention in ("sdpa", "eager"):
        model = adapted(kind, small(kind, attn_implementation=attention).double())
        assert model.config._attn_implementation == attention
        batch = inputs()
        results.append(logits(model, **batch))
        alone = {key: value[1:, :7] for key, value in batch.items()}
        torch.testing.assert_close(logits(model, **alone), results[-1][1:], **CLOSE)
    torch.testing.assert_close(*results, **CLOSE)
    assert not torch.allclose(results[0], logits(small(kind).double()), atol=1e-6)


def causal(kind, attention):
    values = small(kind).config.to_dict()
    values = {k: v for k, v in values.items() if k not in ("model_type", "architectures", "num_labels")}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = AutoConfig.for_model(kind, **values)
        return AutoModelForCausalLM.from_config(config, attn_implementation=attention).double().eval()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", CAUSAL)
def test_causal_models_stay_causal_pad_on_the_left_and_generate(kind, attention):
    model = adapted(model=causal(kind, attention))
    ids = torch.arange(5, 15)[None]
    full = logits(model, input_ids=ids)
    changed = ids.clone()
    changed[0, 6:] = 30
    torch.testing.assert_close(logits(model, input_ids=changed)[:, :6], full[:, :6])
    # every position sees the prefix, the first one too
    assert not torch.allclose(full[:, 0], logits(causal(kind, attention), input_ids=ids)[:, 0], atol=1e-6)
    padded = torch.cat([torch.zeros(1, 4, dtype=torch.long), ids], 1)
    mask = (padded > 0).long()
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    left = logits(model, input_ids=padded, attention_mask=mask, position_ids=positions)
    torch.testing.assert_close(left[:, 4:], full, **CLOSE)
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    cached = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=True, **options)
    plain = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False, **options)
    assert torch.equal(cached, plain) and cached.shape[1] > 10


@pytest.mark.parametrize("make", [
    lambda: LayerPrefixConfig(prefix_length=3, projection_size=6, task_type="SEQ_CLS"),
    lambda: mixture(task_type="SEQ_CLS"),
])  # fmt: skip
def test_projections_are_folded_away_on_save_unless_training_goes_on(tmp_path, make):
    model = get_peft_model(small("bert"), make())
    expected = logits(model)
    model.save_pretrained(tmp_path / "folded")
    tensors = load_file(tmp_path / "folded" / "adapter_model.safetensors")
    assert not any("layer_prefix_out" in n or "hidden" in n or "embedding" in n for n in tensors)
    assert all(t.shape == (3, 64) for n, t in tensors.items() if "layer_prefix_table" in n)
    with keep_projection(model):
        model.save_pretrained(tmp_path / "whole")
    for folder, parts in (("folded", False), ("whole", True)):
        loaded = PeftModel.from_pretrained(small("bert"), tmp_path / folder, is_trainable=True)
        assert torch.equal(logits(loaded), expected)
        assert any("layer_prefix_hidden" in n for n, p in loaded.named_parameters() if p.requires_grad) == parts
    model.load_adapter(tmp_path / "whole", "default", is_trainable=True)
    assert torch.equal(logits(model), expected)
    with pytest.raises(InputError, match="holds only the keys and values of a prefix"):
        model.load_adapter(tmp_path / "folded", "default")


def test_the_thesis_sizes():
    with torch.device("meta"):
        model = AutoModelForSequenceClassification.from_config(AutoConfig.for_model("roberta"))
        model = get_peft_model(model, LayerPrefixConfig(prefix_length=10, projection_size=512))
    assert sum(p.numel() for n, p in model.named_parameters() if "layer_prefix_" in n) == 9_857_024


def test_several_prefixes_are_concatenated():
    model = adapted()
    one = logits(model)
    model.add_adapter("other", LayerPrefixConfig(prefix_length=2, init_std=1.0))
    model.base_model.set_adapter(["default", "other"])
    both = logits(model)
    assert both.isfinite().all() and not torch.allclose(both, one, atol=1e-6)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prefix_length": 0}, "prefix_length must be 1 or more, got 0"),
        ({"projection_size": 0}, "projection_size must be 1 or more, or none, got 0"),
        ({"dropout": -1}, r"dropout must be in \[0, 1\), got -1"),
    ],
)
def test_invalid_values_are_refused(settings, message):
    with pytest.raises(InputError, match=message):
        LayerPrefixConfig(**settings)


def test_models_that_a_prefix_cannot_reach():
    config = AutoConfig.for_model(
        "deberta-v2", hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, vocab_size=45
    )
    deberta = AutoModelForSequenceClassification.from_config(config)
    with pytest.raises(InputError, match="DebertaV2ForSequenceClassification has no attention that uses"):
        get_peft_model(deberta, LayerPrefixConfig())
    swin = AutoConfig.for_model("swin", image_size=32, patch_size=2, embed_dim=8, depths=[1, 1], num_heads=[2, 4])
    with pytest.raises(InputError, match=r"differs by stage \(\[2, 4\]\); choose another adapter"):
        get_peft_model(AutoModelForImageClassification.from_config(swin), LayerPrefixConfig())
    with pytest.raises(InputError, match=r"bert.encoder.layer.0.output.dense .*does not use transformers"):
        get_peft_model(small("bert"), LayerPrefixConfig(target_modules=["output.dense"]))
    with pytest.raises(InputError, match=r"names layer 5, .* has layers 0 to 1"):
        get_peft_model(small("bert"), LayerPrefixConfig(layers_to_transform=[5]))
    model = adapted()
    model.config._attn_implementation = "flex_attention"
    rows = {"input_ids": torch.full((1, 3), 5), "attention_mask": torch.ones(1, 1, 3, 3)}  # flex would compile a mask
    with pytest.raises(InputError, match="works with attn_implementation eager and sdpa, and this model uses 'flex_"):
        logits(model, **rows)
