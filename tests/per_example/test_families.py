"""Fisher information and kernels of many families of models, against one plain backward pass per example.

The expected values take nothing of the package: autograd on one row at a time, for each logit and for the loss. Tiny
models, all parameters away from 0, rows of different lengths.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from classifiers import perturb, ragged_rows, tiny_classifier
from torch import nn
from transformers.modeling_outputs import SequenceClassifierOutput

from hf_ft_ext import empirical_ntk, fisher_information

FAMILIES = (
    "albert", "bart", "bert", "bloom", "convbert", "ctrl", "deberta", "deberta-v2", "deberta-v3", "distilbert",
    "electra", "esm", "falcon", "fnet", "funnel", "gemma", "gemma2", "gemma3_text", "gpt2", "gpt_neox", "llama",
    "longformer", "mixtral", "mobilebert", "modernbert", "mpnet", "opt", "phi", "qwen2_moe", "qwen3", "rembert",
    "roberta", "roformer", "squeezebert", "t5", "xlm", "xlnet",
)  # fmt: skip
CONFIG = {"mixtral": {"num_local_experts": 3}, "qwen2_moe": {"num_experts": 3}}
CONFIG = {kind: {**config, "num_experts_per_tok": 2} for kind, config in CONFIG.items()}
EXPERTS = tuple(CONFIG)  # their grouped products take no float64
TYPED = ("funnel", "xlnet")  # parameters of segments have no gradient unless the rows have two
# What padding holds matters there: convolutions, Fourier transforms and last positions take no notice of the mask.
PADDING_MATTERS = ("convbert", "fnet", "mobilebert", "xlnet")
# A softmax does not change when all its scores do, so a key's bias has no gradient (but rounding) where it adds the
# same to all scores of a query. Families with rotary, relative or disentangled attention have one.
KEY_BIAS = r"attention\.self\.(key|key_proj|key_global)\.bias"
ZERO = {
    **dict.fromkeys(("bert", "convbert", "deberta-v2", "electra", "esm", "longformer"), KEY_BIAS),
    **dict.fromkeys(("mobilebert", "rembert", "roberta"), KEY_BIAS),
    "albert": r"attention\.key\.bias",
    "bart": r"k_proj\.bias",
    "ctrl": r"Wk\.bias",
    "distilbert": r"k_lin\.bias",
    # the contact head is another task's
    "esm": rf"{KEY_BIAS}|contact_head\.",
    # the classifier reads the first position, which is excepted from relative attention (`separate_cls`)
    "funnel": r"k_head\.bias|blocks\.1\.0\.attention\.(r_r_bias|r_kernel|r_s_bias|seg_embed)",
    # the last layer's first position is global: it has its own projections
    "longformer": rf"{KEY_BIAS}|layer\.1\.attention\.self\.(query|key|value)\.",
    "mpnet": r"attn\.k\.bias",
    "opt": r"k_proj\.bias",
    "squeezebert": r"attention\.key\.bias",
    "xlm": r"k_lin\.bias",
    "xlnet": r"mask_emb",  # of masked tokens in pretraining
}
NOTHING = 1e-7  # of the largest entry of all: no gradient but for rounding


@dataclass
class Case:
    """A family's model and rows, and what one backward pass per example says.

    Attributes:
        kind: the family.
        model: in evaluation mode.
        batch: all rows, padded to the longest, with labels.
        rows: the same rows one by one without padding.
        tolerance: largest error, relative to the largest entry.
        jacobians: by whether the rows were padded, of the logits `[rows, logits, all scalars of all parameters]`.
        fisher: by whether the rows were padded, parameter by parameter the sum of the squared gradients of the loss.
    """

    kind: str
    model: nn.Module
    batch: dict[str, torch.Tensor]
    rows: list[dict[str, torch.Tensor]]
    tolerance: float
    jacobians: dict[bool, torch.Tensor]
    fisher: dict[bool, dict[str, torch.Tensor]]


def one_by_one(batch: dict[str, torch.Tensor]) -> list[dict[str, torch.Tensor]]:
    """Each row of a batch as a batch of its own, padding and all."""
    return [{key: value[i : i + 1] for key, value in batch.items()} for i in range(len(batch["input_ids"]))]


def without_padding(row: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    length = int(row["attention_mask"].sum())
    return {key: value[:, :length] if value.ndim == 2 else value for key, value in row.items()}


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def jacobian(model: nn.Module, row: dict[str, torch.Tensor]) -> torch.Tensor:
    """Of each logit of one row, the gradient over all parameters: `[logits, scalars]`."""
    parameters = list(trained(model).values())
    logits = model(**{key: value for key, value in row.items() if key != "labels"}).logits[0]
    found = []
    for logit in logits:
        gradients = torch.autograd.grad(logit, parameters, retain_graph=True, allow_unused=True)
        flat = [
            torch.zeros_like(p) if gradient is None else gradient
            for p, gradient in zip(parameters, gradients, strict=True)
        ]
        found.append(torch.cat([gradient.flatten() for gradient in flat]))
    return torch.stack(found)


def squared_gradients(model: nn.Module, rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Sum over the rows of the squared gradient of the model's own loss of that row."""
    total = {name: torch.zeros_like(p) for name, p in trained(model).items()}
    for row in rows:
        model.zero_grad()
        model(**row).loss.backward()
        for name, parameter in trained(model).items():
            if parameter.grad is not None:
                total[name] += parameter.grad**2
    model.zero_grad()
    return total


def kernel_of(jacobians: torch.Tensor) -> torch.Tensor:
    """`K[i, a, j, b] = sum_p J[i, a, p] J[j, b, p]`."""
    flat = jacobians.double().flatten(0, 1)
    rows, logits, _ = jacobians.shape
    return (flat @ flat.T).view(rows, logits, rows, logits)


@pytest.fixture(scope="module", params=FAMILIES)
def case(request) -> Iterator[Case]:
    kind = request.param
    experts = kind in EXPERTS
    model = perturb(tiny_classifier(kind, num_labels=3, **CONFIG.get(kind, {}))).to(
        torch.float32 if experts else torch.float64
    )
    batch = ragged_rows()
    if kind in TYPED:
        places = torch.arange(batch["input_ids"].shape[1])
        batch["token_type_ids"] = (places % 3 > 0).long() * batch["attention_mask"]
    padded = one_by_one(batch)
    rows = [without_padding(row) for row in padded]
    ways = {True: padded, False: rows}
    yield Case(
        kind,
        model.eval(),
        batch,
        rows,
        1e-4 if experts else 1e-6,
        {way: torch.stack([jacobian(model, row) for row in found]) for way, found in ways.items()},
        {way: squared_gradients(model, found) for way, found in ways.items()},
    )


def test_every_parameter_has_a_gradient(case):
    """Else the comparisons below would say nothing of it; and the rows differ, padded or not, as is expected."""
    padded, alone = case.jacobians[True], case.jacobians[False]
    top = padded.abs().max()
    parameters = trained(case.model)
    sizes = [p.numel() for p in parameters.values()]
    largest = {
        name: max(part.abs().max() / top for part in parts)
        for name, *parts in zip(parameters, padded.split(sizes, 2), alone.split(sizes, 2), strict=True)
    }
    pattern = ZERO.get(case.kind)
    expected = {name for name in parameters if pattern and re.search(pattern, name)}
    assert {name for name, size in largest.items() if not size > NOTHING} == expected
    assert len({float(row.norm()) for row in padded.flatten(0, 1)}) == padded.shape[0] * padded.shape[1]
    difference = (padded - alone).abs().max() / top
    assert (difference > 1e-4) == (case.kind in PADDING_MATTERS)


@pytest.mark.parametrize("together", [True, False], ids=["one batch", "rows alone"])
def test_fisher_information(case, together):
    batches = [case.batch] if together else case.rows
    found, expected = fisher_information(case.model, batches, progress=False), case.fisher[together]
    assert found.keys() == expected.keys()
    top = max(value.max() for value in expected.values())
    wrong = {}
    for name, value in expected.items():
        # each parameter by its own largest entry, and what is zero but for rounding by the largest of all
        size = max(value.max(), NOTHING * top)
        error = float((found[name] - value).abs().max() / size)
        if not error <= case.tolerance:
            wrong[name] = f"{error:.1e}"
    assert wrong == {}


@pytest.mark.parametrize("together", [True, False], ids=["one batch", "rows alone"])
def test_kernel(case, together):
    if together:
        found = empirical_ntk(case.model, case.batch)
    else:
        found = empirical_ntk(case.model, case.rows, batch_size=1)
    expected = kernel_of(case.jacobians[together])
    assert found.shape == expected.shape == (4, 3, 4, 3)
    assert float((found - expected).abs().max() / expected.abs().max()) <= case.tolerance
