"""Gradients of each example: every family against autograd on single examples, what no rule covers, bad input.

What shows in later batches alone: `test_later_batches.py`.
"""

import pytest
import torch
from families import FAMILIES, batch, family
from peft import IA3Config, LoraConfig, PromptTuningConfig, TaskType, get_peft_model
from single_examples import assert_equal, gathered, plain
from torch import nn
from transformers import BertConfig, BertForMaskedLM

from hf_ft_ext.errors import InputError
from hf_ft_ext.per_example.gradients import ExampleGradients
from hf_ft_ext.per_example.rules import find_rule


@pytest.mark.parametrize("model_type", FAMILIES)
def test_every_family_equals_autograd_on_single_examples(model_type):
    model = family(model_type).double().train()
    trainable = {name: p.requires_grad for name, p in model.named_parameters()}
    examples = assert_equal(model, batch())
    uncovered = set(examples.uncovered)
    assert bool(uncovered) == (model_type == "deberta-v2")  # its relative positions run once for the whole batch
    assert {name: p.requires_grad for name, p in model.named_parameters()} == trainable and model.training
    assert all(p.grad is None for p in model.parameters())


def test_position_and_type_embeddings_do_not_sum_over_examples():
    model = family("bert").double()
    names = [name for name in dict(model.named_parameters()) if "position" in name or "token_type" in name]
    assert len(names) == 2
    examples = assert_equal(model, batch(), parameters={n: p for n, p in model.named_parameters() if n in names})
    assert examples.uncovered == []


@pytest.mark.parametrize(
    "config, covered",
    [
        (LoraConfig(task_type=TaskType.SEQ_CLS, r=2, target_modules=["query", "value"]), True),
        (LoraConfig(task_type=TaskType.SEQ_CLS, r=2, target_modules=["query", "value"], use_dora=True), True),
        (IA3Config(task_type=TaskType.SEQ_CLS, target_modules=["key"], feedforward_modules=[]), True),
        (PromptTuningConfig(task_type=TaskType.SEQ_CLS, num_virtual_tokens=3), False),
    ],
)
def test_adapters(config, covered):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = get_peft_model(family("bert"), config).double()
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter)
    examples = assert_equal(model, batch())
    assert all(p.requires_grad for p in examples.parameters.values())
    assert (examples.uncovered == []) == covered


def test_a_fresh_lora_goes_by_rules_although_half_of_its_gradients_are_zero_in_the_trial():
    """While lora_B is zero, the gradient of lora_A is zero: its rule cannot be compared, and need not be."""
    model = get_peft_model(family("bert"), LoraConfig(task_type=TaskType.SEQ_CLS, r=2, target_modules=["query"]))
    examples = assert_equal(model.double(), batch())
    assert examples.uncovered == []
    parts = list(examples(batch(seed=1)))
    assert len(parts) == 1 and examples.uncovered == []
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    # now lora_A has gradients, whose rule was never compared
    found = gathered(examples, batch(seed=2))
    expected = plain(model, examples.function, batch(seed=2), examples.parameters)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)
    assert examples.uncovered and all("lora_A" in name for name in examples.uncovered)


def test_tied_weights_and_single_scalars():
    """Embedding and decoder of a masked LM are one parameter, used as a table and as a linear layer."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = {k: v for k, v in FAMILIES["bert"].items() if k != "vocab_size"}
        model = BertForMaskedLM(BertConfig(vocab_size=60, **config)).double()
    assert model.cls.predictions.decoder.weight is model.bert.embeddings.word_embeddings.weight

    def label_words(model, batch):
        logits = model(**batch).logits[:, 1]
        return logits[:, [7, 9]]

    examples = assert_equal(model, batch(), label_words)
    assert examples.uncovered == []
    one = ExampleGradients(model, lambda model, batch: label_words(model, batch)[:, 0])
    (part,) = one(batch())
    assert part.scalars.shape == (5, 1) and len(part.gradients) == 1


def test_float32_is_close_and_conversion_to_float64_is_undone():
    model = family("roberta")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    narrow, wide = (gathered(ExampleGradients(model, dtype=dtype), batch()) for dtype in (None, torch.float64))
    for name, value in wide[0].items():
        assert value.dtype == torch.float64
        torch.testing.assert_close(narrow[0][name].double(), value, rtol=1e-3, atol=1e-5)
    assert all(p.dtype == torch.float32 and torch.equal(p, before[name]) for name, p in model.named_parameters())


class Layered(nn.Module):
    """A classifier over token embeddings with a layer of the test's choice."""

    def __init__(self, layer, width=8):
        super().__init__()
        self.embeddings, self.layer, self.head = nn.Embedding(60, width), layer, nn.Linear(width, 2)

    def forward(self, input_ids, attention_mask):
        hidden = self.layer(self.embeddings(input_ids).mean(1))
        return type("Output", (), {"logits": self.head(hidden)})


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.scale = nn.Linear(8, 8), nn.Parameter(torch.randn(8))

    def forward(self, x):
        return self.inner(x) * self.scale + torch.nn.functional.linear(x, self.inner.weight)


@pytest.mark.parametrize(
    "layer",
    [
        Doubled(8, 8),  # its rule gives half the gradient: it is called again for each example
        Scaled(),  # no rule; a weight used outside its module too: the module around it is called again
        nn.Sequential(nn.RMSNorm(8), nn.Tanh()),
    ],
)
def test_module_with_a_wrong_rule_is_called_again(layer):
    assert assert_equal(Layered(layer).double(), batch()).uncovered == []


class SequenceFirst(Layered):
    """A layer that runs on rows of several examples, and a parameter of the model's own."""

    def __init__(self):
        super().__init__(nn.Linear(8, 8))
        self.scale = nn.Parameter(torch.randn(8))

    def forward(self, input_ids, attention_mask):
        hidden = self.embeddings(input_ids).transpose(0, 1)  # [tokens, n, width]
        hidden = self.layer(hidden).mean(0) * torch.tanh(self.scale)
        return type("Output", (), {"logits": self.head(hidden)})


def test_a_layer_whose_first_axis_is_not_the_example(caplog):
    caplog.set_level("INFO", logger="hf_ft_ext")
    for n in (5, 9):  # 9 examples of 9 tokens: the axes are of one length
        examples = assert_equal(SequenceFirst().double(), batch(n))
        assert set(examples.uncovered) == {"layer.weight", "layer.bias", "scale"}
    assert "examples run one by one" in caplog.text


class Noisy(nn.Module):
    def forward(self, x):
        return x + torch.rand_like(x)


class Drawing(nn.Module):
    """Draws random numbers without using them."""

    def forward(self, x):
        torch.rand(1)
        return x


class Counting(nn.Module):
    """Gives a different output at each call without drawing random numbers from torch."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return x + 1e-12 * self.calls


@pytest.mark.parametrize("model_type", ["bert", "roberta", "gpt2"])
def test_trial_makes_no_redundant_pass(model_type):
    """Two rows twice, without a graph and by the rules; the first alone with its graph, the second without."""
    model, sizes = family(model_type), []
    model.register_forward_hook(lambda module, args, output: sizes.append(len(output.logits)))
    ExampleGradients(model).prepare(batch())
    assert sizes == [2, 2, 1, 1]


def test_random_numbers_without_effect_are_allowed():
    assert assert_equal(Layered(Drawing()).double(), batch()).uncovered == []


@pytest.mark.parametrize(
    "layer, message",
    [
        (Counting(), "different outputs for the same batch"),
        (Noisy(), "different outputs for the same batch.*remove what draws random numbers"),
        (nn.BatchNorm1d(8, track_running_stats=False), r"other examples of its batch \(layer\)"),
    ],
)
def test_models_without_per_example_gradients_are_refused(layer, message):
    with pytest.raises(InputError, match=message):
        list(ExampleGradients(Layered(layer))(batch()))


def test_bad_input_is_refused():
    model = family("bert")
    with pytest.raises(InputError, match="has to return one scalar per example"):
        list(ExampleGradients(model, lambda model, batch: model(**batch).logits.sum())(batch()))
    with pytest.raises(InputError, match="all are frozen"):
        ExampleGradients(family("bert").requires_grad_(False))
    broken = family("bert")
    nn.init.constant_(broken.classifier.weight, float("nan"))
    with pytest.raises(InputError, match="not finite"):
        list(ExampleGradients(broken)(batch()))
    assert find_rule(nn.Conv1d(2, 2, 1)) is None


def feed_forward_positions(model) -> list[int]:
    """Positions that the last layer's feed-forward part is run on, call by call, filled while the model runs."""
    seen = []
    part = model.bert.encoder.layer[-1].intermediate.dense
    part.register_forward_hook(lambda module, args, output: seen.append(output.shape[1]))
    return seen


class Normed(nn.Module):
    """A norm between the encoder and the classifier."""

    def __init__(self, model):
        super().__init__()
        self.bert, self.classifier, self.norm = model.bert, model.classifier, nn.LayerNorm(16).double()

    def forward(self, input_ids, attention_mask):
        hidden = self.norm(self.bert(input_ids, attention_mask).last_hidden_state)
        return type("Output", (), {"logits": self.classifier(hidden[:, 0])})


def test_last_feed_forward_part_runs_on_the_first_position_only():
    model = family("bert").double()
    seen = feed_forward_positions(model)
    examples = ExampleGradients(model)
    list(examples(batch()))
    assert seen[-1] == 1 and "feed_forward_chunk" not in vars(model.bert.encoder.layer[-1])
    normed = Normed(model)
    assert assert_equal(normed, batch()).uncovered == []  # its norm of what nobody reads would not be finite


def test_other_positions_read_from_the_second_batch_on_are_computed():
    model = family("bert").double()
    names = ["bert.encoder.layer.1.output.dense.weight", "classifier.weight", "bert.embeddings.word_embeddings.weight"]
    parameters = {name: p for name, p in model.named_parameters() if name in names}
    positions = [0]

    def read(model, batch):
        hidden = model.bert(batch["input_ids"], batch["attention_mask"]).last_hidden_state
        return model.classifier(hidden[:, positions[-1]])

    seen, examples = feed_forward_positions(model), ExampleGradients(model, read, parameters)
    for position in (0, 2, 0):
        positions.append(position)
        (ours, _), (theirs, _) = gathered(examples, batch()), plain(model, read, batch(), parameters)
        for name in names:
            torch.testing.assert_close(ours[name], theirs[name], rtol=1e-9, atol=1e-12)
    assert 1 in seen
