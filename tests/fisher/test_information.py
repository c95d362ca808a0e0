"""Fisher sums equal those of one backward pass per example, for all adapters, batches and labels."""

import contextlib

import pytest
import torch
from peft import get_peft_model
from probes import KINDS, TARGETS, adapted, batched, plain_way, rows
from processes import two_ranks
from tiny import tiny_model
from torch import nn
from transformers.modeling_outputs import SequenceClassifierOutput

from hf_ft_ext import BottleneckConfig, fisher_information
from hf_ft_ext.errors import InputError
from hf_ft_ext.fisher.information import gradient_sums
from hf_ft_ext.per_example.shortcuts import skipping_zero_rows

SETTINGS = [(labels, power) for labels in ("true", "expected") for power in (1, 2)]


def same(found: dict, expected: dict) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-10, atol=1e-18 + 1e-10 * value.abs().max().item())


def trained(model) -> list[str]:
    return [name for name, p in model.named_parameters() if p.requires_grad]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("model_type", TARGETS)
def test_each_adapter_equals_one_backward_pass_per_example(model_type, kind):
    model = adapted(model_type, [kind])
    names = trained(model)
    expected = plain_way(model, rows(), names)
    assert sum(value.sum() for value in expected.values()) > 0
    same(fisher_information(model, batched(rows(), 4), names, progress=False), expected)


@pytest.mark.parametrize(("labels", "power"), SETTINGS)
def test_labels_and_powers_with_all_three_kinds_at_once(labels, power):
    model = adapted("bert", ["lora", "bottleneck", "prefix"])
    names = trained(model)
    found = fisher_information(model, batched(rows(), 4), names, labels=labels, power=power, progress=False)
    same(found, plain_way(model, rows(), names, power, labels == "expected"))


@pytest.mark.parametrize("model_type", TARGETS)
def test_all_parameters_of_a_plain_model(model_type):
    model = tiny_model(model_type).double()
    names = trained(model)
    found = fisher_information(model, batched(rows(), 3), progress=False)
    expected = plain_way(model, rows(), names)
    for name, value in expected.items():  # a key's bias has no gradient: what is computed is rounding noise
        torch.testing.assert_close(found[name], value, rtol=1e-10, atol=1e-24 + 1e-10 * value.max().item())


@pytest.mark.parametrize(("labels", "power"), SETTINGS)
def test_regression(labels, power):
    model = tiny_model(num_labels=1, problem_type="regression").double()
    targets = torch.linspace(-1, 2, 6, dtype=torch.double)
    examples = rows(labels=targets)
    names = ["classifier.weight", "bert.encoder.layer.0.output.dense.weight"]
    found = fisher_information(model, batched(examples, 4), names, labels=labels, power=power, progress=False)
    if labels == "true":
        expected = plain_way(model, examples, names, power)
    else:  # y = f + N(0, 1/2), averaged over many draws of each example's gradient 2 (f - y) df
        noise = torch.randn(200_000, generator=torch.Generator().manual_seed(1), dtype=torch.double) / 2**0.5
        factor = ((2 * noise).abs() ** power).mean()
        own, expected = dict(model.named_parameters()), {}
        for row in examples:
            model.zero_grad()
            model.eval()(**{k: v for k, v in row.items() if k != "labels"}).logits.sum().backward()
            for name in names:
                expected[name] = expected.get(name, 0) + factor * own[name].grad.abs() ** power
        for name in names:
            torch.testing.assert_close(found[name], expected[name], rtol=2e-2, atol=1e-12)
        return
    same(found, expected)


def test_several_labels_per_example():
    model = tiny_model(num_labels=3, problem_type="multi_label_classification").double()
    examples = rows(labels=torch.eye(3, dtype=torch.double).repeat(2, 1))
    names = ["bert.encoder.layer.1.intermediate.dense.weight"]
    found = fisher_information(model, batched(examples, 4), names, progress=False)
    same(found, plain_way(model, examples, names))
    model.config.problem_type = None  # then the labels say so, as in transformers
    same(fisher_information(model, batched(examples, 4), names, progress=False), plain_way(model, examples, names))
    model.config.problem_type = "multi_label_classification"
    found = fisher_information(model, batched(examples, 4), names, labels="expected", progress=False)
    expected = torch.zeros_like(found[names[0]])
    own = dict(model.named_parameters())
    for row in examples:  # every pattern of labels, with its probability
        shares = model.eval()(**{k: v for k, v in row.items() if k != "labels"}).logits.sigmoid().detach()[0]
        for pattern in torch.cartesian_prod(*[torch.tensor([0.0, 1.0], dtype=torch.double)] * 3):
            model.zero_grad()
            model(**{**row, "labels": pattern[None]}).loss.backward()
            share = torch.where(pattern > 0, shares, 1 - shares).prod()
            expected += share * own[names[0]].grad ** 2
    torch.testing.assert_close(found[names[0]], expected, rtol=1e-8, atol=1e-16)
    with pytest.raises(InputError, match=r"expected absolute gradient of a multi_label.* has no closed form"):
        fisher_information(model, batched(examples, 4), names, labels="expected", power=1)


def test_sums_do_not_depend_on_batch_size_or_order():
    model = adapted("bert", ["lora", "prefix"])
    one, two, six = (fisher_information(model, batched(rows(), n), progress=False) for n in (1, 2, 6))
    same(two, one)
    same(six, one)
    same(fisher_information(model, batched(rows()[::-1], 4), progress=False), one)


def test_model_state_is_restored():
    model = adapted("bert", ["lora", "bottleneck", "prefix"]).train()
    model.base_model.model.bert.encoder.layer[0].eval()
    model(**rows()[0]).loss.backward()
    state = {
        n: (p.clone(), p.requires_grad, None if p.grad is None else p.grad.clone())
        for n, p in model.named_parameters()
    }
    modes = {n: m.training for n, m in model.named_modules()}
    random = torch.get_rng_state()
    hooks = sum(len(m._forward_hooks) for m in model.modules())
    fisher_information(model, batched(rows(), 4), progress=False)
    with pytest.raises(RuntimeError):  # nor where it fails half way
        fisher_information(model, [batched(rows(), 6)[0], {**rows()[0], "input_ids": torch.zeros(1, 999).long()}],
                           progress=False)  # fmt: skip
    assert modes == {n: m.training for n, m in model.named_modules()}
    assert torch.equal(random, torch.get_rng_state())
    assert hooks == sum(len(m._forward_hooks) for m in model.modules())
    for n, p in model.named_parameters():
        value, trains, gradient = state[n]
        assert torch.equal(p, value) and p.requires_grad == trains
        assert (p.grad is None) == (gradient is None) and (gradient is None or torch.equal(p.grad, gradient))


def test_positions_without_gradient_are_skipped_and_nothing_else():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 200), nn.Linear(200, 5)).double().requires_grad_(False)
    for kept in ([0], [0, 1, 2, 3, 4, 5, 6]):
        gradients = []
        for context in (contextlib.nullcontext(), skipping_zero_rows(model)):
            x = torch.randn(2, 8, 6, dtype=torch.double, generator=torch.Generator().manual_seed(1)).requires_grad_()
            with context:
                y = model(x)
                y *= 2  # some models change an output in place (Longformer)
                (y[:, kept] ** 3).sum().backward()
            gradients.append(x.grad)
        torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-14)
        assert not gradients[0][:, 7].any() and gradients[0][:, kept].all()
    model.requires_grad_(True)
    with skipping_zero_rows(model):  # a layer that trains is left alone
        model(x).sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    assert not any("forward" in vars(module) for module in model)


@pytest.mark.parametrize("kept", [slice(0, 1), slice(None)])
def test_large_products_in_single_precision(kept):
    """Large products use another library; gradients in another memory order are tested too."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(512, 640), nn.Linear(640, 512, bias=False)).requires_grad_(False)
    drawn = torch.randn(64, 4, 512, dtype=torch.double)
    found = []
    for dtype, context in ((torch.double, contextlib.nullcontext()), (torch.float, skipping_zero_rows(model))):
        x = drawn.to(dtype, copy=True).requires_grad_()
        with context:
            outputs = model.to(dtype)(x)
            (outputs.transpose(0, 1)[kept] ** 2).sum().backward()
        found.append((outputs.double(), x.grad.double()))
    for theirs, ours in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5 * float(theirs.abs().max()))


def test_gradient_checkpointing_changes_nothing():
    model = adapted("bert", ["lora", "prefix"]).train()
    expected = fisher_information(model, batched(rows(), 4), progress=False)
    model.gradient_checkpointing_enable()
    same(fisher_information(model, batched(rows(), 4), progress=False), expected)


class Hidden(nn.Module):
    """A weight that is used without its module being called."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.inner = linear

    def forward(self, x):
        return nn.functional.linear(x, self.inner.weight, self.inner.bias)


def test_a_weight_that_is_used_without_its_module_being_called():
    model = tiny_model().double()
    block = model.bert.encoder.layer[0].intermediate
    block.dense = Hidden(block.dense)
    names = ["bert.encoder.layer.0.intermediate.dense.inner.weight", "classifier.weight"]
    found = fisher_information(model, batched(rows(), 4), names, progress=False)
    same(found, plain_way(model, rows(), names))


def test_user_loss_and_totals():
    model = tiny_model().double()
    names = ["classifier.weight", "bert.encoder.layer.1.output.LayerNorm.weight"]

    def loss(output, batch):
        return nn.functional.cross_entropy(output.logits, batch["labels"], reduction="none") * 3

    found = fisher_information(model, batched(rows(), 4), names, loss=loss, progress=False)
    same(found, {n: 9 * v for n, v in plain_way(model, rows(), names).items()})
    sums = gradient_sums(model, batched(rows(), 4), names, totals=True, progress=False)
    model.eval().zero_grad()
    for row in rows():
        model(**row).loss.backward()
    own = dict(model.named_parameters())
    same(sums.totals, {name: own[name].grad for name in names})
    assert sums.examples == 6


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"labels": "both"}, "labels='both' is unknown; choose from: true, expected"),
        ({"power": 3}, "power=3 is unknown"),
        ({"parameters": ["classifier.wait"]}, "the model has no parameter 'classifier.wait'"),
        ({"parameters": []}, "no parameter requires gradients"),
        ({"labels": "expected", "loss": lambda o, b: o.logits[:, 0]}, "needs the model's distribution of labels"),
        ({"dataloader": []}, "the data loader gave no batch"),
        ({"dataloader": [(1, 2)]}, "a batch is a tuple, not keyword arguments of the model"),
        ({"dataloader": rows()[0]}, r"dataloader is a single batch, .* pass \[batch\]"),
        (
            {"dataloader": [{**rows()[0], "input_ids": rows()[0]["input_ids"].float()}]},
            "input_ids have dtype float32",
        ),
        (
            {"dataloader": [{**rows()[0], "labels": torch.tensor([1.0])}]},
            "labels have dtype float32, but .*2 classes",
        ),
        (
            {"dataloader": [{**rows()[0], "labels": torch.tensor([[0, 1]])}]},
            r"labels have shape \(1, 2\), but the",
        ),
        (
            {"model": tiny_model(problem_type="multi_label_classification", num_labels=3)},
            r"labels have shape \(1,\), but a multi-label model with 3 labels needs .*\[batch, 3\]",
        ),
        ({"model": tiny_model().bert}, "BertModel returns no loss.*pass loss"),
        ({"dataloader": [{k: v for k, v in rows()[0].items() if k != "labels"}]}, "a batch has no labels .*expected"),
        ({"model": nn.Linear(2, 2)}, "Linear is not a transformers model.* pass loss"),
    ],
)
def test_bad_input_is_refused(settings, message):
    settings = {"model": tiny_model(), "dataloader": rows(), "progress": False, **settings}
    with pytest.raises(InputError, match=message):
        fisher_information(**settings)


def test_gradients_that_are_not_finite_and_quantized_weights():
    model = tiny_model()
    with torch.no_grad():
        model.classifier.weight[0, 0] = torch.inf
    with pytest.raises(InputError, match=r"outputs are not finite .*float32 or bfloat16"):
        fisher_information(model, rows(), progress=False)
    model = tiny_model()
    quantized = nn.Parameter(torch.zeros(2, 32, dtype=torch.int8), requires_grad=False)
    model.classifier.weight = quantized
    with pytest.raises(InputError, match=r"classifier.weight is quantized .*its adapters: pass their names"):
        fisher_information(model, rows(), ["classifier.weight"], progress=False)


def test_half_precision_gradients_are_summed_in_float32():
    model = get_peft_model(tiny_model().bfloat16(), BottleneckConfig(bottleneck_size=4))
    found = fisher_information(model, rows(), progress=False)
    assert {v.dtype for v in found.values()} == {torch.float32} and all(v.isfinite().all() for v in found.values())


RANKS = """
import sys, torch
from probes import adapted, batched, rows
from hf_ft_ext import fisher_information
torch.distributed.init_process_group("gloo")
rank = torch.distributed.get_rank()
mine = rows()[rank::2] if sys.argv[2] == "even" else rows()[:2 + 4 * rank][2 * rank:]
found = fisher_information(adapted("bert", ["lora", "prefix"]), batched(mine, 2), progress=False)
torch.save(found, f"{sys.argv[1]}/{rank}.pt")
torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
@pytest.mark.parametrize("split", ["even", "uneven"])
def test_two_processes_equal_one(tmp_path, split):
    torch.manual_seed(0)
    (tmp_path / "ranks.py").write_text(RANKS.replace("found =", "torch.manual_seed(0)\nfound =", 1))
    two_ranks(tmp_path / "ranks.py", str(tmp_path), split)
    torch.manual_seed(0)
    expected = fisher_information(adapted("bert", ["lora", "prefix"]), batched(rows(), 6), progress=False)
    for rank in (0, 1):
        same(torch.load(tmp_path / f"{rank}.pt", weights_only=True), expected)


# --- the last layer's positions that nobody reads -----------------------------------------------------


def feed_forward_positions(model, layer: int) -> list[int]:
    """Positions that a layer's feed-forward part is run on, call by call, filled while the model runs."""
    seen = []
    part = model.get_submodule(f"bert.encoder.layer.{layer}.intermediate.dense")
    part.register_forward_hook(lambda module, args, output: seen.append(output.shape[1]))
    return seen


def test_last_feed_forward_part_runs_on_the_first_position_only():
    model = adapted("bert", ["lora", "bottleneck", "prefix"])
    inner = model.get_base_model()
    last, first = feed_forward_positions(inner, 1), feed_forward_positions(inner, 0)
    fisher_information(model, batched(rows(), 3), progress=False)
    assert last[-1] == 1 and first[-1] > 1
    assert "feed_forward_chunk" not in vars(inner.bert.encoder.layer[1])


class MeanForSequenceClassification(nn.Module):
    """A head on all positions that are not padding."""

    def __init__(self, model):
        super().__init__()
        self.config, self.bert, self.classifier = model.config, model.bert, model.classifier
        self.first_only = False

    def read(self, hidden, attention_mask):
        mask = attention_mask[..., None].to(hidden.dtype)
        return hidden[:, 0] if self.first_only else (hidden * mask).sum(1) / mask.sum(1)

    def forward(self, input_ids, attention_mask, labels=None):
        hidden = self.bert(input_ids, attention_mask).last_hidden_state
        logits = self.classifier(self.read(hidden, attention_mask))
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)


def test_head_that_reads_all_positions_is_exact():
    model = MeanForSequenceClassification(tiny_model().double())
    seen = feed_forward_positions(model, 1)
    names = ["bert.encoder.layer.1.output.dense.weight", "classifier.weight"]
    found = fisher_information(model, batched(rows(), 3), names, progress=False)
    assert seen[-1] > 1
    same(found, plain_way(model, rows(), names))


def test_head_that_starts_to_read_all_positions_is_exact():
    model = MeanForSequenceClassification(tiny_model().double())
    names = ["bert.encoder.layer.1.output.dense.weight", "classifier.weight"]

    def batches():
        for i, batch in enumerate(batched(rows(), 2)):
            model.first_only = i == 0
            yield batch

    found = fisher_information(model, batches(), names, progress=False)
    model.first_only = True
    expected = plain_way(model, rows()[:2], names)
    model.first_only = False
    rest = plain_way(model, rows()[2:], names)
    same(found, {name: expected[name] + rest[name] for name in names})


def test_norm_after_the_last_layer_is_exact():
    class NormedForSequenceClassification(MeanForSequenceClassification):
        def __init__(self, model):
            super().__init__(model)
            self.norm = nn.LayerNorm(model.config.hidden_size).double()

        def read(self, hidden, attention_mask):
            return self.norm(hidden)[:, 0]

    model = NormedForSequenceClassification(tiny_model().double())
    names = ["norm.weight", "norm.bias", "bert.encoder.layer.1.output.dense.weight"]
    same(fisher_information(model, batched(rows(), 3), names, progress=False), plain_way(model, rows(), names))
