"""The kernel: both engines against each other and against plain products, over families, formulas and options."""

import functools
import weakref

import pytest
import torch
from families import FAMILIES, batch, family
from peft import (
    IA3Config,
    LNTuningConfig,
    LoraConfig,
    PrefixTuningConfig,
    PromptTuningConfig,
    TaskType,
    VeraConfig,
    get_peft_model,
)
from torch import nn
from transformers import BertConfig, BertForMaskedLM

from hf_ft_ext import empirical_ntk
from hf_ft_ext.errors import InputError
from hf_ft_ext.kernel.engines import contraction as contract
from hf_ft_ext.kernel.engines import packed
from hf_ft_ext.kernel.formulas import Formula, sign_product, sign_scale, signs
from hf_ft_ext.kernel.ntk import KernelComputation, KernelOptions
from hf_ft_ext.kernel.rows import ExampleRows
from hf_ft_ext.kernel.schedule import make_plan, measure

FORMULAS = [formula.value for formula in Formula]
LEFT, RIGHT = batch(5), batch(7, 11, seed=1)
FEW_LEFT, FEW_RIGHT = batch(3), batch(4, 11, seed=1)  # two blocks of two rows on either side
# One setting of each option next to each formula and each family, not the full grid.
PAIRS = [
    ("bert", "sgd", {}),
    ("bert", "signgd", {"binary_classification": True}),
    ("bert", "asymmetric_signgd", {"exclude_embeddings": True}),
    ("roberta", "sgd", {"binary_classification": True}),
    ("roberta", "signgd", {"exclude_head": True}),
    ("roberta", "asymmetric_signgd", {"only_biases": True}),
    ("distilbert", "sgd", {"exclude_embeddings": True}),
    ("distilbert", "signgd", {}),
    ("electra", "signgd", {"only_biases": True}),
    ("electra", "asymmetric_signgd", {"binary_classification": True}),
    ("deberta-v2", "sgd", {}),
    ("deberta-v2", "signgd", {"parameters": "attention"}),
    ("albert", "sgd", {"exclude_head": True}),
    ("albert", "signgd", {}),
    ("albert", "asymmetric_signgd", {}),
    ("modernbert", "sgd", {"parameters": r"layers\.1\."}),
    ("modernbert", "asymmetric_signgd", {}),
    ("gpt2", "sgd", {"only_biases": True}),
    ("gpt2", "signgd", {"binary_classification": True, "exclude_embeddings": True}),
    ("llama", "sgd", {}),
    ("llama", "signgd", {"exclude_head": True}),
    ("llama", "asymmetric_signgd", {"binary_classification": True}),
]


def assert_near(found, expected, formula, tolerance=1e-10):
    """Equal to `tolerance` relative to the largest entry; sign kernels, whole numbers, exactly."""
    assert found.shape == expected.shape and found.dtype == torch.float64
    if formula == "signgd":
        assert torch.equal(found, expected) and torch.equal(found, found.round())
    assert (found - expected).abs().max() <= tolerance * expected.abs().max()


def plain(model, left, right, formula):
    """Jacobians by autograd, one example and logit at a time, and a product written out."""
    computation = KernelComputation(model, KernelOptions(formula=formula))
    parameters = list(computation.parameters.values())

    def rows(inputs):
        found = []
        for i in range(len(inputs["input_ids"])):
            scalars = computation.function(model, {key: value[i : i + 1] for key, value in inputs.items()}).reshape(-1)
            for scalar in scalars:
                grads = torch.autograd.grad(scalar, parameters, retain_graph=True, allow_unused=True)
                flat = [
                    torch.zeros(p.numel(), dtype=p.dtype) if g is None else g.reshape(-1)
                    for g, p in zip(grads, parameters, strict=True)
                ]
                found.append(torch.cat(flat))
        return torch.stack(found), len(scalars)

    model.eval()
    (a, c), (b, _) = rows(left), rows(right)
    sign_a, sign_b = (torch.where(j.abs() < 1e-14 * j.norm(dim=1, keepdim=True), 0, j.sign()) for j in (a, b))
    products = {"sgd": [a @ b.T], "signgd": [sign_a @ sign_b.T], "asymmetric_signgd": [sign_a @ b.T, a @ sign_b.T]}
    kernel = torch.stack(products[formula]).view(-1, len(a) // c, c, len(b) // c, c)
    return kernel if len(kernel) == 2 else kernel[0]


@functools.cache
def written_out(model_type, formula):
    """A model and what `plain` gives for few rows."""
    model = family(model_type).double()
    return model, plain(model, FEW_LEFT, FEW_RIGHT, formula)


@pytest.mark.parametrize("formula", FORMULAS)
@pytest.mark.parametrize("model_type", ["bert", "gpt2"])
def test_both_engines_equal_products_written_out(model_type, formula):
    model, expected = written_out(model_type, formula)
    assert expected.shape[-4:] == (3, 2, 4, 2)
    for engine in ("structured", "jacobian"):
        assert_near(empirical_ntk(model, FEW_LEFT, FEW_RIGHT, formula, engine), expected, formula)


@pytest.mark.parametrize("model_type, formula, options", PAIRS)
def test_structured_equals_jacobian(model_type, formula, options):
    """At once, cut into blocks and batches, and in float32; so close that kernels of signs are the same numbers."""
    model = family(model_type).double()
    expected = empirical_ntk(model, FEW_LEFT, FEW_RIGHT, formula, "jacobian", **options)
    assert expected.shape[-1] == (1 if options.get("binary_classification") else 2)
    assert_near(empirical_ntk(model, FEW_LEFT, FEW_RIGHT, formula, **options), expected, formula)
    cut = empirical_ntk(model, FEW_LEFT, FEW_RIGHT, formula, batch_size=1, block_rows=2, **options)
    assert_near(cut, expected, formula)
    narrow = empirical_ntk(model.float(), FEW_LEFT, FEW_RIGHT, formula, batch_size=2, **options)
    assert_near(narrow, expected, None, 1e-4 if formula == "sgd" else 1e-6)


def test_families_are_all_there():
    assert {model_type for model_type, _, _ in PAIRS} == set(FAMILIES) and len(FAMILIES) == 9


@pytest.mark.parametrize("formula", FORMULAS)
def test_a_kernel_with_itself_is_computed_once_per_pair(formula):
    model = family("roberta").double()
    expected = empirical_ntk(model, RIGHT, RIGHT, formula, "jacobian")
    calls = []
    computation = KernelComputation(model, KernelOptions(formula, block_rows=3))
    kernels = computation.engine.kernels
    computation.engine.kernels = lambda left, right: calls.append(1) or kernels(left, right)
    found = computation.run(ExampleRows(RIGHT))
    assert_near(found if len(found) == 2 else found[0], expected, formula)
    assert len(calls) == 6  # of nine blocks
    if formula != "asymmetric_signgd":
        flat = found[0].reshape(14, 14)
        torch.testing.assert_close(flat, flat.T, rtol=1e-12, atol=0)
    else:
        torch.testing.assert_close(found[1].permute(2, 3, 0, 1), found[0], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("by_tokens", [True, False])
@pytest.mark.parametrize("formula", ["sgd", "asymmetric_signgd"])
def test_weights_by_tokens_and_by_entries(by_tokens, formula, monkeypatch):
    monkeypatch.setattr(contract, "_tokens_are_cheaper", lambda left, right: by_tokens)
    for model_type in ("albert", "gpt2"):
        model = family(model_type).double()
        expected = empirical_ntk(model, FEW_LEFT, FEW_RIGHT, formula, "jacobian")
        assert_near(empirical_ntk(model, FEW_LEFT, FEW_RIGHT, formula), expected, formula)


@pytest.mark.parametrize("max_bytes", [2**28, 2**13])
@pytest.mark.parametrize("formula", FORMULAS)
@pytest.mark.parametrize("model_type", ["bert", "gpt2", "albert"])
def test_products_of_all_examples_at_once_as_on_an_accelerator(model_type, formula, max_bytes, monkeypatch):
    """Ragged rows and several scalars, gradients by autograd; with little memory a few examples at a time."""
    model, expected = written_out(model_type, formula)
    monkeypatch.setattr(contract, "_tokens_are_cheaper", lambda left, right: False)
    for module in (contract, packed):
        monkeypatch.setattr(module, "launches_cost", lambda tensor: True)
    computation = KernelComputation(model, KernelOptions(formula, batch_size=4))
    contraction = contract.Contraction.matrices

    def bounded(self, *args):
        self.max_bytes = max_bytes
        contraction(self, *args)

    monkeypatch.setattr(contract.Contraction, "matrices", bounded)
    found = computation.run(ExampleRows(FEW_LEFT), ExampleRows(FEW_RIGHT))
    assert_near(found if len(found) == 2 else found[0], expected, formula)


def test_the_cheaper_way_is_taken():
    def side(n, tokens, width_in, width_out):
        counts = [tokens] * n
        return [
            contract.PackedLinear(torch.zeros(n * tokens, width_in), torch.zeros(n * tokens, 1, width_out), counts)
        ]

    assert contract._tokens_are_cheaper(side(8, 1, 64, 64), side(8, 1, 64, 64))
    assert not contract._tokens_are_cheaper(side(8, 60, 64, 64), side(8, 60, 64, 64))


ADAPTERS = {
    "lora": LoraConfig(task_type=TaskType.SEQ_CLS, r=2, target_modules=["query", "value"]),
    "dora": LoraConfig(task_type=TaskType.SEQ_CLS, r=2, target_modules=["query"], use_dora=True),
    "ia3": IA3Config(task_type=TaskType.SEQ_CLS, target_modules=["key"], feedforward_modules=[]),
    "prefix": PrefixTuningConfig(task_type=TaskType.SEQ_CLS, num_virtual_tokens=3),
    "prompt": PromptTuningConfig(task_type=TaskType.SEQ_CLS, num_virtual_tokens=3),
    "vera": VeraConfig(task_type=TaskType.SEQ_CLS, r=2, target_modules=["query", "value"]),
    "layer norms": LNTuningConfig(task_type=TaskType.SEQ_CLS, target_modules=["LayerNorm"]),
}


@pytest.mark.parametrize(
    "kind, formula",
    [("lora", f) for f in FORMULAS]
    + [("dora", "sgd"), ("ia3", "signgd"), ("prefix", "sgd"), ("prompt", "asymmetric_signgd"), ("vera", "sgd")]
    + [("layer norms", "signgd")],
)
def test_a_peft_model_has_the_kernel_of_its_trainable_parameters(kind, formula):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = get_peft_model(family("bert"), ADAPTERS[kind]).double()
        for parameter in model.parameters():
            if parameter.requires_grad and not parameter.any():  # an adapter that has begun to train
                nn.init.normal_(parameter)
    computation = KernelComputation(model, KernelOptions(formula=formula))
    assert set(computation.parameters) == {n for n, p in model.named_parameters() if p.requires_grad}
    expected = plain(model, FEW_LEFT, FEW_RIGHT, formula)
    assert_near(empirical_ntk(model, FEW_LEFT, FEW_RIGHT, formula), expected, formula)


@pytest.mark.parametrize("formula", FORMULAS)
def test_label_words_of_a_masked_lm_with_tied_weights(formula):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = {k: v for k, v in FAMILIES["bert"].items() if k != "vocab_size"}
        model = BertForMaskedLM(BertConfig(vocab_size=60, **config)).double()

    def label_words(model, batch):
        return model(**batch).logits[:, 1][:, [7, 9, 11]]

    found, expected = (
        empirical_ntk(model, LEFT, RIGHT, formula, engine, function=label_words)
        for engine in ("structured", "jacobian")
    )
    assert found.shape[-4:] == (5, 3, 7, 3)
    assert_near(found, expected, formula)


# --- signs ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", ["bert", "roberta", "distilbert"])
def test_gradients_that_are_zero_up_to_rounding_have_no_sign(model_type):
    model = family(model_type)
    computation = KernelComputation(model, KernelOptions(formula="signgd"))
    rows = ExampleRows(LEFT)
    computation._prepare(rows)
    side = computation.engine.side(rows, [[0, 1, 2, 3, 4]])
    keys = [name for name in computation.parameters if name.endswith(("key.bias", "k_lin.bias"))]
    assert len(keys) == 2
    for name in keys:
        ((_, record),) = side.records[name]
        assert record.values.any()  # rounding leaves something
        assert not computation.engine.of_parameter(side, side, name).any()
        query = name.replace("key", "query").replace("k_lin", "q_lin")
        assert computation.engine.of_parameter(side, side, query)[0].diagonal().eq(16).all()


def test_the_rule_for_zero():
    rows = torch.tensor([[1.0, -2.0, 0.9e-14, 1.1e-13], [0, 0, 0, 0]], dtype=torch.float64)
    scale = sign_scale(rows.square().sum(1))
    assert signs(rows, scale).tolist() == [[1, -1, 0, 1], [0, 0, 0, 0]]


def test_products_of_signs_are_exact_beyond_float32(monkeypatch):
    monkeypatch.setattr("hf_ft_ext.kernel.formulas._EXACT_SUM", 1000)
    left = torch.ones(1, 2500)
    assert sign_product(left, left).item() == 2500 and sign_product(left, -left).dtype == torch.float64


@pytest.mark.parametrize("kind", [torch.int8, torch.float32])
def test_both_types_of_signs_give_the_same(kind, monkeypatch):
    model = family("roberta")
    expected = empirical_ntk(model, LEFT, RIGHT, "signgd", "jacobian")
    monkeypatch.setattr(contract, "sign_type", lambda device: kind)
    assert torch.equal(empirical_ntk(model, LEFT, RIGHT, "signgd"), expected)


# --- rows, memory, bad input ---------------------------------------------------------------------------


def test_batches_and_padding_do_not_matter():
    model = family("roberta").double()
    whole = empirical_ntk(model, RIGHT, LEFT)
    parts = [{key: value[i : i + 1] for key, value in RIGHT.items()} for i in range(7)]
    for part in parts:
        keep = int(part["attention_mask"].sum())
        part.update({key: value[:, :keep] for key, value in part.items()}, labels=torch.tensor([0]))
    rows = ExampleRows(parts)
    assert rows.lengths == RIGHT["attention_mask"].sum(1).tolist() and rows.labels.tolist() == [0] * 7
    assert rows.batch([0, 3])["input_ids"].shape == (2, max(rows.lengths[0], rows.lengths[3]))
    torch.testing.assert_close(empirical_ntk(model, parts, LEFT), whole, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("size, overhead, cost", [(2, 0, 28), (3, 5, 47), (7, 5, 45), (7, 100, 170)])
def test_batches_are_those_of_least_padding(size, overhead, cost):
    """`cost`: the least over all ways to cut the lengths in order (each was tried)."""
    lengths = [3, 10, 2, 1, 7, 2, 3]
    rows = ExampleRows([{"input_ids": torch.ones(1, n, dtype=torch.long)} for n in lengths])
    groups = rows.by_length(0, 7, size, overhead)
    assert sorted(i for group in groups for i in group) == list(range(7)) and max(map(len, groups)) <= size
    assert sum(overhead + len(group) * max(lengths[i] for i in group) for group in groups) == cost
    longest = [max(lengths[i] for i in group) for group in groups]
    assert longest == sorted(longest, reverse=True)
    assert [i for group in reversed(rows.by_length(2, 5, size, overhead)) for i in group] == [3, 2, 4]


def test_memory_is_bounded_and_too_little_is_refused():
    model = family("bert").double()
    whole = empirical_ntk(model, LEFT, RIGHT)
    with pytest.raises(InputError, match=r"one pair of examples takes .* pass at least (.*), or shorten") as error:
        empirical_ntk(model, LEFT, RIGHT, memory_gb=1e-6)
    least = float(str(error.value).split("at least ")[1].split(",")[0])
    computation = KernelComputation(model, KernelOptions(memory_gb=least))
    tokens = []
    side = computation.engine.side

    def watched(rows, batches):
        tokens.append(sum(rows.lengths[i] for indices in batches for i in indices))
        assert all(len(indices) == 1 for indices in batches)
        return side(rows, batches)

    computation.engine.side = watched
    torch.testing.assert_close(computation.run(ExampleRows(LEFT), ExampleRows(RIGHT))[0], whole)
    assert len(tokens) > 5 and max(tokens) <= max(*ExampleRows(LEFT).lengths, *ExampleRows(RIGHT).lengths)


@pytest.mark.parametrize("right", [None, RIGHT])
def test_no_more_is_held_than_was_planned(right):
    """One block of either side, and of a batch nothing but its records once the next one runs."""
    computation = KernelComputation(family("bert"), KernelOptions(block_rows=2, batch_size=1))
    engine, sides, parts = computation.engine, [], []
    side = engine.side

    def alive(references):
        return sum(reference() is not None for reference in references)

    def watched(*given):
        assert alive(sides) <= 1
        found = side(*given)
        sides.append(weakref.ref(found))
        return found

    class Watched(type(engine.examples)):
        def __call__(self, batch):
            assert alive(parts) == 0
            for part in super().__call__(batch):
                parts.append(weakref.ref(part))
                yield part

    engine.side, engine.examples.__class__ = watched, Watched
    computation.run(ExampleRows(LEFT), None if right is None else ExampleRows(right))
    assert len(sides) >= 4 and len(parts) > len(sides)


@pytest.mark.parametrize("engine", ["structured", "jacobian"])
@pytest.mark.parametrize("model_type, formula", [("bert", "sgd"), ("albert", "signgd"), ("gpt2", "asymmetric_signgd")])
def test_no_row_keeps_more_than_is_planned_for_it(model_type, formula, engine):
    """Records grow with a row's tokens, and blocks of many short rows are as large as those of few long ones."""
    rows = ExampleRows(batch(9, 30, seed=2))
    computation = KernelComputation(family(model_type), KernelOptions(formula, engine))
    computation.engine.prepare(rows)
    needs = measure(computation.engine, rows)
    planned = needs.records(rows.lengths)
    kept = [computation.engine.side(rows, [[i]]).bytes() for i in range(len(rows))]
    assert all(k <= 1.05 * p for k, p in zip(kept, planned, strict=True)) and max(kept) == needs.record
    assert sum(planned) <= 1.1 * sum(kept)
    room = 2.5 * needs.record
    plan = make_plan(needs, rows.lengths, rows.lengths[:4], (needs.least + 4 * needs.record) / 1e9, 16, None)
    assert [a for a, _ in plan.first] + [9] == [0] + [b for _, b in plan.first]
    for blocks in (plan.first, plan.second):
        assert all(sum(planned[a:b]) <= room for a, b in blocks)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"formula": "sng"}, "formula='sng'; choose from: sgd, signgd"),
        ({"engine": "fast"}, "engine='fast'; choose from: auto, structured"),
        ({"memory_gb": 0}, "memory_gb=0 must be above 0"),
        ({"parameters": "("}, "is no regular expression"),
        ({"parameters": "nothing"}, "kernel_parameters='nothing': no trainable parameter is left; some are .*classif"),
        ({"binary_classification": True, "num_labels": 3}, r"difference of two logits, but there are \(3,\)"),
    ],
)
def test_options_that_cannot_work(options, message):
    model = family("bert", num_labels=options.pop("num_labels", 2))
    with pytest.raises(InputError, match=message):
        empirical_ntk(model, LEFT, RIGHT, **options)


def test_models_and_data_that_cannot_work():
    with pytest.raises(InputError, match=r"engine=structured has no rule for \d+ parameters .*engine=auto"):
        empirical_ntk(family("deberta-v2"), LEFT, RIGHT, "sgd", "structured")
    with pytest.raises(InputError, match="no trainable parameter to take a kernel over"):
        empirical_ntk(family("bert").requires_grad_(False), LEFT, RIGHT)
    with pytest.raises(InputError, match="there are no examples"):
        ExampleRows([])
    with pytest.raises(InputError, match="the batches hold different inputs"):
        ExampleRows([LEFT, {"input_ids": RIGHT["input_ids"]}])
    with pytest.raises(InputError, match="exclude_head: Linear does not say which part is its base model"):
        empirical_ntk(nn.Linear(2, 2), LEFT, RIGHT, exclude_head=True)


def test_a_kernel_with_nan_names_example_and_parameter():
    def function(model, batch):
        factor = torch.where((batch["input_ids"] == 59).any(1), 1e38, 1.0)
        return model(**batch).logits * factor[:, None] * factor[:, None].sqrt()

    left, right = ({k: v.masked_fill(v == 59, 58) for k, v in rows.items()} for rows in (LEFT, RIGHT))
    assert empirical_ntk(family("bert"), left, right, function=function).isfinite().all()
    right["input_ids"][6, 1] = 59
    with pytest.raises(InputError, match=r"of bert\..* for example 6 \(from 0\) of the second.* is NaN or infinite"):
        empirical_ntk(family("bert"), left, right, function=function)
