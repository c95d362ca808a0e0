"""What is found in a model equals what its source says; the model stays as it was; bad input."""

import copy
import functools
from types import MethodType

import pytest
import torch
from classifiers import tiny_classifier
from peft import LoraConfig, get_peft_model
from tiny import tiny_masked_lm, tiny_model
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMultipleChoice,
    AutoModelForSeq2SeqLM,
    BertModel,
)

from hf_ft_ext import InputError, LoraTrainingArguments, convert_to_sparse, find_structure
from hf_ft_ext.lora.trainer import add_lora
from hf_ft_ext.structure.table import structure_table

pytestmark = pytest.mark.usefixtures("fresh_structures")

# Read off transformers' source. Family -> (layer, {role: names within the layer}); feed-forwards as "gate|up|down".
BERT = {
    "query": "attention.self.query",
    "key": "attention.self.key",
    "value": "attention.self.value",
    "output": "attention.output.dense",
    "feed_forward": ["|intermediate.dense|output.dense"],
    "norm": "output.LayerNorm",
}
LLAMA = {
    "query": "self_attn.q_proj",
    "key": "self_attn.k_proj",
    "value": "self_attn.v_proj",
    "output": "self_attn.o_proj",
    "feed_forward": ["mlp.gate_proj|mlp.up_proj|mlp.down_proj"],
}
BART = {
    "query": "self_attn.q_proj",
    "key": "self_attn.k_proj",
    "value": "self_attn.v_proj",
    "output": "self_attn.out_proj",
    "feed_forward": ["|fc1|fc2"],
    "norm": "final_layer_norm",
}
T5 = {
    "query": "layer.0.SelfAttention.q",
    "key": "layer.0.SelfAttention.k",
    "value": "layer.0.SelfAttention.v",
    "output": "layer.0.SelfAttention.o",
    "feed_forward": ["|layer.1.DenseReluDense.wi|layer.1.DenseReluDense.wo"],
}
EXPECTED = {
    "bert": ("bert.encoder.layer.0", BERT),
    "mpnet": ("mpnet.encoder.layer.0", {**BERT, "query": "attention.attn.q", "key": "attention.attn.k",
              "value": "attention.attn.v", "output": "attention.attn.o"}),
    "distilbert": ("distilbert.transformer.layer.0", {"query": "attention.q_lin", "key": "attention.k_lin",
                   "value": "attention.v_lin", "output": "attention.out_lin", "feed_forward": ["|ffn.lin1|ffn.lin2"],
                   "norm": "output_layer_norm"}),
    "deberta": ("deberta.encoder.layer.0", {**BERT, **dict.fromkeys(("query", "key", "value"),
                "attention.self.in_proj")}),
    "albert": ("albert.encoder.albert_layer_groups.0.albert_layers.0", {"query": "attention.query",
               "key": "attention.key", "value": "attention.value", "output": "attention.dense",
               "feed_forward": ["|ffn|ffn_output"], "norm": "full_layer_layer_norm"}),
    "modernbert": ("model.layers.0", {**dict.fromkeys(("query", "key", "value"), "attn.Wqkv"), "output": "attn.Wo",
                   "feed_forward": ["mlp.Wi|mlp.Wi|mlp.Wo"]}),
    "gpt2": ("transformer.h.0", {**dict.fromkeys(("query", "key", "value"), "attn.c_attn"), "output": "attn.c_proj",
             "feed_forward": ["|mlp.c_fc|mlp.c_proj"]}),
    "llama": ("model.layers.0", LLAMA),
    "phi3": ("model.layers.0", {**dict.fromkeys(("query", "key", "value"), "self_attn.qkv_proj"),
             "output": "self_attn.o_proj", "feed_forward": ["mlp.gate_up_proj|mlp.gate_up_proj|mlp.down_proj"]}),
    "doge": ("model.layers.0", LLAMA),  # its self_attn.dt_proj makes a mask of the values and is neither
    "deepseek_v2": ("model.layers.0", {**LLAMA, "query": "self_attn.q_b_proj",
                    "key": ("self_attn.kv_a_proj_with_mqa", "self_attn.kv_b_proj"), "value": "self_attn.kv_b_proj",
                    "other": "self_attn.q_a_proj"}),
    "bart": ("model.encoder.layers.0", BART),
    "t5": ("transformer.encoder.block.0", T5),
    "xlm": ("transformer.attentions.0", {"query": "q_lin", "key": "k_lin", "value": "v_lin", "output": "out_lin",
            "feed_forward": ["|transformer.ffns.0.lin1|transformer.ffns.0.lin2"]}),
    "funnel": ("funnel.encoder.blocks.0.0", {"query": "attention.q_head", "value": "attention.v_head",
               "key": ("attention.k_head", "attention.r_kernel"), "output": "attention.post_proj",
               "feed_forward": ["|ffn.linear_1|ffn.linear_2"], "norm": "ffn.layer_norm"}),
    "xlnet": ("transformer.layer.0", {"query": "rel_attn.q", "key": ("rel_attn.k", "rel_attn.r"),
              "value": "rel_attn.v", "output": "rel_attn.o", "feed_forward": ["|ff.layer_1|ff.layer_2"],
              "norm": "ff.layer_norm"}),
    "mobilebert": ("mobilebert.encoder.layer.0", {**BERT, "other": "bottleneck.attention.dense", "feed_forward": [
                   *(f"|ffn.{i}.intermediate.dense|ffn.{i}.output.dense" for i in range(3)),
                   "|intermediate.dense|output.dense"]}),
    "longformer": ("longformer.encoder.layer.0", {**BERT, **{role: (BERT[role], f"{BERT[role]}_global")
                   for role in ("query", "key", "value")}}),
    "qwen2_moe": ("model.layers.0", {**LLAMA, "feed_forward": [
                  "mlp.experts.gate_up_proj|mlp.experts.gate_up_proj|mlp.experts.down_proj",
                  "mlp.shared_expert.gate_proj|mlp.shared_expert.up_proj|mlp.shared_expert.down_proj"]}),
    "fnet": ("fnet.encoder.layer.0", {"feed_forward": BERT["feed_forward"], "norm": "output.LayerNorm"}),
}  # fmt: skip


def names(value, layer: str) -> set[str]:
    """Whole names of what the table says about a layer."""
    return {
        n if n.startswith("transformer.ffns") else f"{layer}.{n}"
        for n in ([value] if isinstance(value, str) else value)
    }


@pytest.mark.parametrize("kind", EXPECTED)
def test_projections_by_role_are_those_of_the_source(kind):
    structure = find_structure(tiny_classifier(kind))
    layer, expected = EXPECTED[kind]
    found = next(part for part in structure.layers if part.name == layer)
    own = [block for block in found.attentions if not block.cross]
    assert len(own) == ("query" in expected)
    for role in ("query", "key", "value", "output", "other"):
        assert {name for block in own for name in getattr(block, role)} == names(expected.get(role, ()), layer), role
    feed_forwards = sorted("|".join(",".join(part) for part in (b.gate, b.up, b.down)) for b in found.feed_forwards)
    wanted = [
        "|".join(",".join(names(part, layer)) if part else "" for part in f.split("|"))
        for f in expected["feed_forward"]
    ]
    assert feed_forwards == sorted(wanted)
    assert found.norm == (f"{layer}.{expected['norm']}" if "norm" in expected else None)


@pytest.mark.parametrize(
    ("kind", "layers"),
    [
        ("bert", {"bert.encoder.layer.0": 1, "bert.encoder.layer.1": 1}),
        ("albert", {"albert.encoder.albert_layer_groups.0.albert_layers.0": 2}),
        ("funnel", {"funnel.encoder.blocks.0.0": 1, "funnel.encoder.blocks.1.0": 1}),
        ("t5", {f"transformer.{stack}.block.{i}": 1 for stack in ("encoder", "decoder") for i in (0, 1)}),
        ("xlm", {"transformer.attentions.0": 1, "transformer.attentions.1": 1}),
        ("canine", {"canine.initial_char_encoder.layer.0": 1, "canine.encoder.layer.0": 1, "canine.encoder.layer.1": 1,
                    "canine.final_char_encoder.layer.0": 1}),
    ],
)  # fmt: skip
def test_layers_in_the_order_in_which_they_run(kind, layers):
    found = find_structure(tiny_classifier(kind)).layers
    assert {layer.name: layer.runs for layer in found} == layers
    assert [layer.name for layer in found] == list(layers)


def test_attention_to_another_sequence_is_told_apart():
    for kind, word in (("bart", "encoder_attn"), ("t5", "EncDecAttention")):
        blocks = find_structure(tiny_classifier(kind)).attentions
        assert {block.cross for block in blocks} == {True, False}
        assert all((word in block.output[0]) == block.cross for block in blocks)


def test_module_names_do_not_matter():
    """A model whose modules carry other modules' names is read by what they do."""
    model = tiny_model()
    for layer in model.bert.encoder.layer:
        attention = layer.attention.self
        attention.query, attention.value = attention.value, attention.query
        attention.forward = MethodType(_swapped, attention)
    block = find_structure(model).attentions[0]
    assert (block.query, block.value) == (
        ("bert.encoder.layer.0.attention.self.value",), ("bert.encoder.layer.0.attention.self.query",),
    )  # fmt: skip


def test_a_wrapped_forward_is_looked_through():
    """trl's fused head wraps a model's forward, and a copy of the wrapper would run the model itself."""
    model, plain = tiny_model(), find_structure(tiny_model())
    inner = model.forward
    model.forward = functools.wraps(inner)(lambda *args, **kwargs: inner(*args, **kwargs))
    assert find_structure(model) == plain


def _swapped(attention, hidden_states, *args, **kwargs):
    """BERT's attention with the projections called `query` and `value` in each other's place."""

    def heads(x):
        return x.view(*x.shape[:-1], attention.num_attention_heads, -1).transpose(1, 2)

    query, key, value = (heads(m(hidden_states)) for m in (attention.value, attention.key, attention.query))
    weights = (query @ key.transpose(2, 3)).softmax(-1)
    return (weights @ value).transpose(1, 2).flatten(2), weights


def test_the_model_and_the_random_state_stay_as_they_were():
    model = tiny_classifier("big_bird")
    model.config.attention_type = "block_sparse"
    model.bert.set_attention_type("block_sparse")
    model.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    random = torch.get_rng_state()
    assert len(find_structure(model).layers) == 2
    assert torch.equal(random, torch.get_rng_state()) and model.training
    assert model.bert.attention_type == "block_sparse"  # one short batch through the model itself changes it
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("kind", ["bert", "t5", "mixtral", "longformer"])
def test_a_model_without_data_and_one_with_adapters_have_the_same_parts(kind):
    model = tiny_classifier(kind)
    expected = find_structure(model)
    with torch.device("meta"):
        empty = tiny_classifier(kind)
        assert find_structure(empty).layers == expected.layers
    assert find_structure(copy.deepcopy(model).to("meta")).layers == expected.layers
    first, in_full = expected.attentions[0], [*expected.attentions[0].output, *expected.head]
    for settings in ({"target_modules": "all-linear"}, {"target_modules": first.query, "modules_to_save": in_full}):
        adapted = get_peft_model(copy.deepcopy(model), LoraConfig(**settings))
        assert find_structure(adapted) == expected
    assert find_structure(model) == expected


def test_other_heads_and_a_base_model():
    bert = find_structure(tiny_model())
    assert (bert.head, bert.embeddings[0]) == (("classifier",), "bert.embeddings.word_embeddings")
    assert find_structure(tiny_masked_lm()).head == ("cls",)
    base = find_structure(BertModel(tiny_model().config))
    assert base.head == () and len(base.feed_forwards) == 2
    small = {
        "num_hidden_layers": 2,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_attention_heads": 2,
        "vocab_size": 50,
    }
    assert len(find_structure(AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **small))).layers) == 2
    t5 = tiny_classifier("t5").config
    assert len(find_structure(AutoModelForSeq2SeqLM.from_config(t5)).layers) == 4


@pytest.mark.parametrize("kind", ["bert", "distilbert", "canine", "xlnet"])
def test_multiple_choice_has_the_layers_of_a_classifier(kind):
    classifier = tiny_classifier(kind)
    assert (
        find_structure(AutoModelForMultipleChoice.from_config(classifier.config)).layers
        == find_structure(classifier).layers
    )


def test_experts_that_the_rows_did_not_reach_count_too():
    model = tiny_classifier("mixtral")
    experts = [f"model.layers.{i}.mlp.experts.{part}_proj" for i in (0, 1) for part in ("gate_up", "down")]
    structure = find_structure(model)
    assert [name for block in structure.feed_forwards for name in block.projections] == experts
    assert {structure.kinds[name] for name in experts} == {"tensor"}


def test_the_table_names_every_part_and_why():
    table = structure_table(find_structure(tiny_classifier("qwen2_moe")))
    for part in ("model.layers.*.mlp.experts.down_proj", "tensor, 32 to 32", "attention query", "head", "softmax"):
        assert part in table
    assert "run 2 times" in structure_table(find_structure(tiny_classifier("albert")))


class BagOfWords(nn.Module):
    def __init__(self):
        super().__init__()
        self.bag, self.out = nn.EmbeddingBag(50, 8), nn.Linear(8, 2)

    def forward(self, input_ids, attention_mask=None, labels=None):
        return self.out(self.bag(input_ids))


class Convolutions(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(50, 8)
        self.layers = nn.ModuleList(nn.Conv1d(8, 8, 3, padding=1) for _ in range(2))

    def forward(self, input_ids, attention_mask=None, labels=None):
        x = self.table(input_ids).transpose(1, 2)
        for layer in self.layers:
            x = layer(x).relu()
        return x.mean(-1)


@pytest.mark.parametrize("model", [BagOfWords, Convolutions])
def test_a_model_without_layers_has_none(model):
    structure = find_structure(model())
    assert structure.layers == () and "no repeated layers" in structure_table(structure)


def test_a_head_alone_does_not_run_on_token_ids():
    with pytest.raises(
        InputError,
        match=r"the parts of Linear cannot be found: it does not run on trial rows .*pass the names of the layers",
    ):
        find_structure(nn.Linear(4, 2))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_a_quantized_model_has_the_same_parts_and_is_refused_where_weights_train(tmp_path):
    expected = find_structure(tiny_model()).layers
    model = torch.ao.quantization.quantize_dynamic(tiny_model(), {nn.Linear})
    assert find_structure(model).layers == expected
    with pytest.raises(
        InputError, match=r"its feed-forwards \(.*intermediate.dense \(Linear\).* are not linear layers"
    ):
        convert_to_sparse(model)
    with pytest.raises(
        InputError, match=r"the default targets .* cannot be used \(Target module Dynamic.*not supported"
    ):
        add_lora(model, LoraTrainingArguments(str(tmp_path), use_cpu=True))
