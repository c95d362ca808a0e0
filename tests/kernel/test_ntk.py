"""The kernel: both engines against each other and against plain products, over families, formulas and options."""

import functools

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
from transformers import AutoConfig, AutoModelForSeq2SeqLM, BertConfig, BertForMaskedLM

from hf_ft_ext import empirical_ntk, example_gradients
from hf_ft_ext.kernel.engines import contraction as contract
from hf_ft_ext.kernel.engines import packed
from hf_ft_ext.kernel.formulas import Formula, sign_product, sign_scale, signs
from hf_ft_ext.kernel.ntk import KernelComputation, KernelOptions
from hf_ft_ext.kernel.rows import ExampleRows

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
    """Equal up to `tolerance` relative to the largest entry; sign kernels are integers and must be equal."""
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


def test_pairs_cover_all_families():
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


@pytest.mark.parametrize("formula", FORMULAS)
def test_parts_of_several_processes_add_up_also_if_there_are_fewer_blocks(formula):
    computation = KernelComputation(family("bert").double(), KernelOptions(formula))
    rows = ExampleRows(FEW_LEFT), ExampleRows(FEW_RIGHT)
    whole = computation.run(*rows)
    parts = [computation.run(*rows, process=process, processes=13) for process in range(13)]
    assert 1 < sum(bool(part.any()) for part in parts) < 13  # of 3 x 4 rows
    torch.testing.assert_close(sum(parts), whole, rtol=1e-12, atol=0)


@pytest.mark.parametrize("by_tokens", [True, False])
@pytest.mark.parametrize("formula", ["sgd", "asymmetric_signgd"])
def test_linear_layers_by_tokens_and_by_entries(by_tokens, formula, monkeypatch):
    monkeypatch.setattr(contract, "tokens_are_cheaper", lambda left, right: by_tokens)
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
    monkeypatch.setattr(contract, "tokens_are_cheaper", lambda left, right: False)
    for module in (contract, packed):
        monkeypatch.setattr(module, "batching_pays", lambda tensor: True)
    computation = KernelComputation(model, KernelOptions(formula, batch_size=4))
    contraction = contract.Contraction.add_linear

    def bounded(self, *args):
        self.max_bytes = max_bytes
        contraction(self, *args)

    monkeypatch.setattr(contract.Contraction, "add_linear", bounded)
    found = computation.run(ExampleRows(FEW_LEFT), ExampleRows(FEW_RIGHT))
    assert_near(found if len(found) == 2 else found[0], expected, formula)


def test_decoder_inputs_as_long_as_the_encoders_are_not_cut():
    sizes = {"encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 8, "decoder_ffn_dim": 8, "d_model": 8}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    sizes |= {"vocab_size": 20, "max_position_embeddings": 12}
    config = AutoConfig.for_model("bart", **sizes, **heads, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    model = AutoModelForSeq2SeqLM.from_config(config).double()
    generator = torch.Generator().manual_seed(0)
    ids, decoder = torch.randint(3, 20, (2, 3, 6), generator=generator)
    mask = torch.arange(6) < torch.tensor([[4], [3], [5]])
    batch = {"input_ids": ids * mask, "attention_mask": mask.long(), "decoder_input_ids": decoder}

    def score(model, batch):
        return model(**batch).logits.log_softmax(-1)[..., 5].sum(1)

    gradients = [g.flatten(1) for g in next(example_gradients(model, batch, score)).gradients.values()]
    expected = torch.cat(gradients, 1) @ torch.cat(gradients, 1).T
    found = empirical_ntk(model, batch, function=score)[:, 0, :, 0]
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def test_cheaper_contraction_is_chosen():
    def side(n, tokens, width_in, width_out):
        counts = [tokens] * n
        return [
            contract.PackedLinear(torch.zeros(n * tokens, width_in), torch.zeros(n * tokens, 1, width_out), counts)
        ]

    assert contract.tokens_are_cheaper(side(8, 1, 64, 64), side(8, 1, 64, 64))
    assert not contract.tokens_are_cheaper(side(8, 60, 64, 64), side(8, 60, 64, 64))


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
    computation.run(rows)
    side = computation.engine.gradient_rows(rows, [[0, 1, 2, 3, 4]])
    keys = [name for name in computation.parameters if name.endswith(("key.bias", "k_lin.bias"))]
    assert len(keys) == 2
    for name in keys:
        ((_, record),) = side.packed[name]
        assert record.values.any()  # rounding leaves something
        assert not computation.engine.of_parameter(side, side, name).any()
        query = name.replace("key", "query").replace("k_lin", "q_lin")
        assert computation.engine.of_parameter(side, side, query)[0].diagonal().eq(16).all()


def test_sign_threshold_for_zero():
    rows = torch.tensor([[1.0, -2.0, 0.9e-14, 1.1e-13], [0, 0, 0, 0]], dtype=torch.float64)
    scale = sign_scale(rows.square().sum(1))
    assert signs(rows, scale).tolist() == [[1, -1, 0, 1], [0, 0, 0, 0]]


def test_products_of_signs_are_exact_beyond_float32(monkeypatch):
    monkeypatch.setattr("hf_ft_ext.kernel.formulas._EXACT_SUM", 1000)
    left = torch.ones(1, 2500)
    assert sign_product(left, left).item() == 2500 and sign_product(left, -left).dtype == torch.float64


@pytest.mark.parametrize("kind", [torch.int8, torch.float32])
def test_int8_and_float32_signs_give_the_same(kind, monkeypatch):
    model = family("roberta")
    expected = empirical_ntk(model, LEFT, RIGHT, "signgd", "jacobian")
    monkeypatch.setattr(contract, "sign_type", lambda device: kind)
    assert torch.equal(empirical_ntk(model, LEFT, RIGHT, "signgd"), expected)
