"""`example_gradients` and `example_norms` against torch.func, opacus, and a backward pass per example."""

import importlib.util

import pytest
import torch
from families import batch, family
from peft import LoraConfig, TaskType, get_peft_model
from torch import nn
from transformers import BertConfig, BertForMaskedLM

from hf_ft_ext import (
    DenseGradient,
    EmbeddingGradient,
    LinearGradient,
    empirical_ntk,
    example_gradients,
    example_norms,
    fisher_information,
)
from hf_ft_ext.errors import InputError
from hf_ft_ext.per_example.state import computing_in
from hf_ft_ext.per_example.types import dense


def labelled(n: int = 5) -> dict[str, torch.Tensor]:
    return {**batch(n), "labels": torch.arange(n) % 2}


def loss(model, inputs):
    logits = model(**{key: value for key, value in inputs.items() if key != "labels"}).logits
    return nn.functional.cross_entropy(logits, inputs["labels"], reduction="none")


def by_torch_func(model, inputs, vectorized):
    """Gradients of `loss` by torch.func: `vmap(grad)`, or `grad` of each example where a mask branches on data."""
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def one(values, example):
        example = {key: value[None] for key, value in example.items()}
        logits = torch.func.functional_call(
            model, values, (), {k: v for k, v in example.items() if k != "labels"}
        ).logits
        return nn.functional.cross_entropy(logits, example["labels"])

    with computing_in(model, torch.float64):
        if vectorized:
            return torch.func.vmap(torch.func.grad(one), in_dims=(None, 0))(parameters, inputs)
        rows = [{key: value[i] for key, value in inputs.items()} for i in range(len(inputs["input_ids"]))]
        found = [torch.func.grad(one)(parameters, example) for example in rows]
        return {name: torch.stack([gradients[name] for gradients in found]) for name in parameters}


def plain(model, inputs, function=loss):
    """One backward pass per example: `[n, *shape]` by name."""
    found = {name: [] for name, p in model.named_parameters() if p.requires_grad}
    for i in range(len(inputs["input_ids"])):
        model.zero_grad()
        function(model.eval(), {key: value[i : i + 1] for key, value in inputs.items()}).sum().backward()
        for name, p in model.named_parameters():
            if name in found:
                found[name].append(torch.zeros_like(p) if p.grad is None else p.grad.clone())
    model.zero_grad()
    return {name: torch.stack(values) for name, values in found.items()}


def assert_close(found, expected):
    assert found.keys() == expected.keys()
    top = max(float(value.abs().max()) for value in expected.values())
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-8, atol=1e-12 * top, msg=name)


@pytest.mark.parametrize(
    "model_type, vectorized", [("gpt2", True), ("llama", True), ("bert", False), ("modernbert", False)]
)
def test_gradients_and_norms_equal_torch_func(model_type, vectorized):
    model = family(model_type).double().eval()
    model.set_attn_implementation("eager")  # whose masks vmap takes
    expected = by_torch_func(model, labelled(), vectorized)
    (found,) = example_gradients(model, labelled(), loss)
    assert found.scalars.shape == (5, 1)
    assert_close(found.gradients, expected)
    (norms,) = example_norms(model, labelled(), loss, by_parameter=True)
    assert_close(norms, {name: value.flatten(1).norm(dim=1) for name, value in expected.items()})
    (norm,) = example_norms(model, labelled(), loss)
    torch.testing.assert_close(norm, torch.stack(list(norms.values())).norm(dim=0), rtol=1e-10, atol=0)


@pytest.mark.skipif(importlib.util.find_spec("opacus") is None, reason="opacus is not installed: pip install opacus")
def test_gradients_equal_those_of_opacus():
    from opacus import GradSampleModule

    model = family("bert").double().train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    inputs = labelled()
    n, tokens = inputs["input_ids"].shape
    # opacus wants every embedding to be run with a row per example
    inputs["position_ids"] = torch.arange(tokens).expand(n, tokens)
    inputs["token_type_ids"] = torch.zeros(n, tokens, dtype=torch.long)
    (found,) = example_gradients(model, inputs, loss)
    wrapped = GradSampleModule(model, loss_reduction="sum")
    loss(wrapped, inputs).sum().backward()
    theirs = {name.removeprefix("_module."): p.grad_sample for name, p in wrapped.named_parameters()}
    assert_close(found.gradients, theirs)


@pytest.mark.parametrize("model_type", ["mpnet", "deberta-v2", "albert"])
def test_uncovered_parameters_equal_torch_func(model_type):
    model = family(model_type).double() if model_type != "mpnet" else mpnet()
    expected = plain(model, labelled())
    (found,) = example_gradients(model, labelled(), loss)
    with computing_in(model, torch.float64):
        assert_close(found.gradients, expected)
    (norms,) = example_norms(model, labelled(), loss)
    torch.testing.assert_close(norms, torch.stack([v.flatten(1).norm(dim=1) for v in expected.values()]).norm(dim=0))


def mpnet():
    from transformers import MPNetConfig, MPNetForSequenceClassification

    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = MPNetConfig(
            vocab_size=60, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2
        )
        return MPNetForSequenceClassification(config).double()


class OwnModel(nn.Module):
    """A user's model: parameters that are one number or a vector, a parametrized and a recurrent layer, attention."""

    def __init__(self):
        super().__init__()
        self.scale, self.shift = nn.Parameter(torch.tensor(0.7)), nn.Parameter(torch.randn(8))
        self.unused = nn.Parameter(torch.tensor(1.0))
        self.layer = nn.utils.parametrizations.weight_norm(nn.Linear(8, 8))
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.recurrent, self.head = nn.GRU(8, 4, batch_first=True), nn.Linear(4, 3)

    def forward(self, x):
        x = self.layer(x) * self.scale + self.shift
        return self.head(self.recurrent(self.attention(x, x, x)[0])[0].mean(1))


def test_every_parameter_of_a_user_s_model():
    """Gradients, norms, kernels and Fisher sums, against a backward pass per example and scalar."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, inputs = OwnModel().double().eval(), {"x": torch.randn(5, 6, 8).double(), "labels": torch.arange(5) % 3}

    def scalars(model, batch):
        return model(batch["x"])

    parameters = list(model.parameters())
    rows = [
        [torch.autograd.grad(value, parameters, retain_graph=True, allow_unused=True) for value in row]
        for row in scalars(model, inputs)
    ]
    jacobian = {
        name: torch.stack([torch.stack([torch.zeros_like(p) if g[i] is None else g[i] for g in row]) for row in rows])
        for i, (name, p) in enumerate(model.named_parameters())
    }
    flat = {name: value.reshape(5, 3, -1) for name, value in jacobian.items()}
    whole = torch.cat(list(flat.values()), 2)
    (found,) = example_gradients(model, inputs, scalars)
    assert_close(found.gradients, jacobian)
    (norms,) = example_norms(model, inputs, scalars, by_parameter=True)
    assert_close(norms, {name: value.norm(dim=2) for name, value in flat.items()})
    expected = torch.einsum("ncp,mdp->ncmd", whole, whole)
    for engine in ("auto", "jacobian"):
        torch.testing.assert_close(empirical_ntk(model, inputs, function=scalars, engine=engine), expected)
    residual = scalars(model, inputs).detach().softmax(-1) - nn.functional.one_hot(inputs["labels"])
    sums = fisher_information(
        model, [inputs], progress=False,
        loss=lambda logits, batch: nn.functional.cross_entropy(logits, batch["labels"], reduction="none"),
    )  # fmt: skip
    assert_close(sums, {n: torch.einsum("nc,nc...->n...", residual, g).square().sum(0) for n, g in jacobian.items()})


def test_several_scalars_batches_and_chosen_parameters():
    model = family("roberta").double()
    names = ["classifier.out_proj.weight", "roberta.encoder.layer.1.output.dense.bias"]
    whole = labelled(6)
    batches = [{key: value[i : i + 3] for key, value in whole.items()} for i in (0, 3)]
    found = list(example_gradients(model, batches, parameters=names))
    norms = list(example_norms(model, batches, parameters=names))
    assert [f.scalars.shape for f in found] == [(3, 2)] * 2 and [value.shape for value in norms] == [(3, 2)] * 2
    for c in range(2):
        expected = plain(model, whole, lambda model, b, c=c: model(b["input_ids"], b["attention_mask"]).logits[:, c])
        ours = {name: torch.cat([f.gradients[name][:, c] for f in found]) for name in names}
        assert_close(ours, {name: expected[name] for name in names})
        length = torch.stack([value.flatten(1).norm(dim=1) for value in ours.values()]).norm(dim=0)
        torch.testing.assert_close(torch.cat(norms)[:, c], length)


def test_factors_multiply_out_to_the_gradients():
    model = family("bert").double()
    (found,) = example_gradients(model, labelled(), loss)
    (part,) = example_gradients(model, labelled(), loss, factored=True)
    (factors,) = part.gradients
    kinds = {type(use) for uses in factors.values() for use in uses}
    assert kinds == {LinearGradient, EmbeddingGradient, DenseGradient} and part.first == 0
    assert_close({name: dense(uses) for name, uses in factors.items()}, found.gradients)


def test_tied_weights_have_one_norm():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = BertConfig(
            vocab_size=60, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2
        )
        model = BertForMaskedLM(config).double()

    def first(model, inputs):
        return model(inputs["input_ids"], inputs["attention_mask"]).logits[:, 1, 7]

    expected = plain(model, labelled(), first)
    (norms,) = example_norms(model, labelled(), first, by_parameter=True)
    for name, value in expected.items():
        torch.testing.assert_close(norms[name], value.flatten(1).norm(dim=1), rtol=1e-8, atol=1e-12)


def test_half_precision_adapters_give_float32_gradients():
    config = LoraConfig(task_type=TaskType.SEQ_CLS, r=2, target_modules=["query"])
    model = get_peft_model(family("bert"), config).to(torch.bfloat16)
    (found,) = example_gradients(model, labelled(), loss)
    assert {value.dtype for value in found.gradients.values()} == {torch.float32}
    assert all("lora" in name or "classifier" in name for name in found.gradients)


def test_bad_input_is_refused():
    model = family("bert")
    with pytest.raises(InputError, match=r"no parameter 'classifier.wait'; did you mean 'classifier.weight'"):
        list(example_gradients(model, labelled(), loss, ["classifier.wait"]))
    with pytest.raises(InputError, match="parameters is empty"):
        list(example_norms(model, labelled(), loss, []))
    with pytest.raises(InputError, match="has to return one scalar per example"):
        list(example_norms(model, labelled(), lambda model, inputs: loss(model, inputs).mean()))
