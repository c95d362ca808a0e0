"""Fisher information and kernels of many families of models, against one plain backward pass per example.

The expected values take nothing of the package: autograd on one row at a time, for each logit and for the loss. Tiny
models, all parameters away from 0, rows of different lengths.
"""

import functools
import itertools
import re
from dataclasses import dataclass

import pytest
import torch
from classifiers import perturb, ragged_rows, tiny_classifier
from torch import nn
from torch.overrides import TorchFunctionMode
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
        tolerance: largest error of a kernel, relative to its largest entry.
        jacobians: by whether the rows are padded, of the logits `[rows, logits, all scalars of all parameters]`.
        fisher: by whether the rows are padded, parameter by parameter the sum of the squared gradients of the loss.
            Where padding does not matter both are those of padded rows.
    """

    kind: str
    model: nn.Module
    batch: dict[str, torch.Tensor]
    rows: list[dict[str, torch.Tensor]]
    tolerance: float
    jacobians: dict[bool, torch.Tensor]
    fisher: dict[bool, dict[str, torch.Tensor]]


class NothingNarrower(TorchFunctionMode):
    """Leaves out the model's own casts to float32 (of norms, softmax, rotary angles), whose rounding is near 1e-6."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if isinstance(args[0] if args else None, torch.Tensor) and args[0].dtype == torch.float64:
            if func is torch.Tensor.float:
                return args[0]
            args = tuple(torch.float64 if value is torch.float32 else value for value in args)
            kwargs = {key: torch.float64 if value is torch.float32 else value for key, value in kwargs.items()}
        return func(*args, **kwargs)


def wide(model: nn.Module) -> nn.Module:
    """The model in float64 throughout."""
    plain = model.double().forward

    @functools.wraps(plain)
    def forward(*args, **kwargs):
        with NothingNarrower():
            return plain(*args, **kwargs)

    model.forward = forward
    return model


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
    logits = model(**row).logits[0]
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


def assert_same_fisher(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float) -> None:
    """Each parameter relative to its own largest entry; what is 0 but for rounding, to the largest of all."""
    assert found.keys() == expected.keys()
    top = max(value.max() for value in expected.values())
    errors = {
        name: float((found[name] - value).abs().max() / max(value.max(), NOTHING * top))
        for name, value in expected.items()
    }
    assert {name: error for name, error in errors.items() if not error <= tolerance} == {}


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference, in units of the largest entry."""
    return float((found - expected).abs().max() / expected.abs().max())


def kernel_of(jacobians: torch.Tensor) -> torch.Tensor:
    """`K[i, a, j, b] = sum_p J[i, a, p] J[j, b, p]`."""
    flat = jacobians.double().flatten(0, 1)
    rows, logits, _ = jacobians.shape
    return (flat @ flat.T).view(rows, logits, rows, logits)


@functools.cache
def case_of(kind: str) -> Case:
    experts = kind in EXPERTS
    model = perturb(tiny_classifier(kind, num_labels=3, **CONFIG.get(kind, {})))
    model = model if experts else wide(model)
    batch = ragged_rows()
    if kind in TYPED:
        places = torch.arange(batch["input_ids"].shape[1])
        batch["token_type_ids"] = (places % 3 > 0).long() * batch["attention_mask"]
    padded = one_by_one(batch)
    rows = [without_padding(row) for row in padded]
    model.eval()
    jacobians = dict.fromkeys((True, False), torch.stack([jacobian(model, row) for row in padded]))
    fisher = dict.fromkeys((True, False), squared_gradients(model, padded))
    if kind in PADDING_MATTERS:
        jacobians[False] = torch.stack([jacobian(model, row) for row in rows])
        fisher[False] = squared_gradients(model, rows)
    return Case(kind, model, batch, rows, 1e-4 if experts else 1e-9, jacobians, fisher)


@pytest.mark.parametrize("kind", FAMILIES)
def test_every_parameter_has_a_nonzero_gradient(kind):
    """Otherwise the comparisons below would not test it. Gradients differ between rows and between logits."""
    case = case_of(kind)
    jacobians = case.jacobians[True]
    parameters = trained(case.model)
    parts = jacobians.split([p.numel() for p in parameters.values()], 2)
    top = jacobians.abs().max()
    without = {name for name, part in zip(parameters, parts, strict=True) if part.abs().max() <= NOTHING * top}
    pattern = ZERO.get(case.kind)
    assert without == {name for name in parameters if pattern and re.search(pattern, name)}
    assert len({float(row.norm()) for row in jacobians.flatten(0, 1)}) == 9
    if case.kind in PADDING_MATTERS:
        assert relative_error(case.jacobians[False], jacobians) > 1e-4


SQUARE = ("bart", "funnel", "mpnet", "opt", "squeezebert", "t5", "xlnet")
# How rows are cut into batches may matter where padding does, or where the first axis counts something else.
CUT = sorted({*PADDING_MATTERS, *SQUARE, "bert", "gpt2"})


@pytest.mark.parametrize(
    ("kind", "batches"),
    [*((kind, "all rows") for kind in FAMILIES), *itertools.product(CUT, ("one row, then two", "rows alone"))],
)
def test_fisher_information(kind, batches):
    case = case_of(kind)
    given = {
        "all rows": [case.batch],
        "one row, then two": [{k: v[rows] for k, v in case.batch.items()} for rows in (slice(1), slice(1, None))],
        "rows alone": case.rows,
    }
    found = fisher_information(case.model, given[batches], progress=False)
    expected = case.fisher[batches != "rows alone"]
    assert_same_fisher(found, expected, 1e-4 if case.kind in EXPERTS else 1e-6)


@pytest.mark.parametrize(
    ("kind", "together"), [*((kind, True) for kind in FAMILIES), *((kind, False) for kind in CUT)]
)
def test_kernel(kind, together):
    case = case_of(kind)
    rows, options = (case.batch, {}) if together else (case.rows, {"batch_size": 1})
    found = empirical_ntk(case.model, rows, **options)
    expected = kernel_of(case.jacobians[together])
    assert found.shape == expected.shape == (3, 3, 3, 3)
    assert relative_error(found, expected) <= case.tolerance


# --- layouts in which the first axis counts something else -----------------------------------------------


@pytest.mark.parametrize("kind", SQUARE)
def test_kernel_of_as_many_rows_as_tokens(kind):
    """If tokens come first (XLNet), or share an axis with the rows (OPT), sizes cannot distinguish them."""
    model, batch = square(kind)
    expected = kernel_of(torch.stack([jacobian(model, row) for row in one_by_one(batch)]))
    assert relative_error(empirical_ntk(model, batch), expected) <= 1e-9


@pytest.mark.parametrize("kind", SQUARE)
def test_fisher_information_of_as_many_rows_as_tokens(kind):
    model, batch = square(kind)
    found = fisher_information(model, [batch], progress=False)
    assert_same_fisher(found, squared_gradients(model, one_by_one(batch)), 1e-6)


def square(kind: str) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    return wide(perturb(tiny_classifier(kind, num_labels=3))).eval(), ragged_rows((4, 3, 4, 4))


# --- parameters that a trial on a few rows does not see ---------------------------------------------------


class Partial(nn.Module):
    """Three logits; most parameters have a part in one of them alone, or in rows of one kind.

    Rows that hold a `MARK` go through `rare`.
    """

    MARK = 7

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(60, 6)
        self.heads = nn.ModuleList(nn.Linear(6, 1) for _ in range(3))
        self.rare, self.rare_norm = nn.Linear(6, 6), nn.LayerNorm(6)
        self.first_only, self.last_only = nn.Parameter(torch.rand(6) + 1), nn.Parameter(torch.rand(6) + 1)
        self.middle_only = nn.Linear(6, 6)
        self.rare_only = nn.Parameter(torch.rand(6) + 1)
        self.shared = nn.Linear(6, 6)

    def forward(self, input_ids, attention_mask=None, labels=None):
        mask = (input_ids != 0)[..., None]
        x = torch.tanh(self.shared((self.table(input_ids) * mask).sum(1)))
        marked = (input_ids == self.MARK).any(1)
        if marked.any():
            x = x.index_put((marked,), self.rare_norm(torch.tanh(self.rare(x[marked]))) * self.rare_only)
        read = [x * self.first_only, torch.tanh(self.middle_only(x)), x * self.last_only]
        logits = torch.cat([head(part) for head, part in zip(self.heads, read, strict=True)], 1)
        return SequenceClassifierOutput(loss=loss_of(logits, labels), logits=logits)


@pytest.fixture(scope="module")
def partial():
    """The model; plain rows and marked ones."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Partial().double()
    rows = ragged_rows((6, 4, 5, 3, 6, 5))
    rows["input_ids"] %= 60
    rows["input_ids"][rows["input_ids"] == Partial.MARK] = 8
    for i in (3, 5):
        rows["input_ids"][i, 1] = Partial.MARK
    rows["attention_mask"] = (rows["input_ids"] != 0).long()
    return perturb(model).eval(), rows


@pytest.mark.parametrize("order", [(0, 1, 2, 3, 4, 5), (5, 3, 0, 1, 2, 4)])
@pytest.mark.parametrize("size", [1, 2, 6])
def test_parameters_of_some_logits_or_some_rows_alone(partial, order, size):
    model, rows = partial
    rows = {key: value[list(order)] for key, value in rows.items()}
    batches = [{key: value[i : i + size] for key, value in rows.items()} for i in range(0, 6, size)]
    alone = one_by_one(rows)
    jacobians = torch.stack([jacobian(model, row) for row in alone])
    assert all(p.any() for p in squared_gradients(model, alone).values())
    expected = kernel_of(jacobians)
    found = empirical_ntk(model, batches, batch_size=size, block_rows=size)
    assert relative_error(found, expected) <= 1e-9
    found = fisher_information(model, batches, loss=of_each_row, progress=False)
    assert_same_fisher(found, squared_gradients(model, alone), 1e-6)


def loss_of(logits: torch.Tensor, labels: torch.Tensor | None) -> torch.Tensor | None:
    return None if labels is None else nn.functional.cross_entropy(logits, labels)


def of_each_row(output, batch) -> torch.Tensor:
    return nn.functional.cross_entropy(output.logits, batch["labels"], reduction="none")


class OneRowAtATime(nn.Module):
    """Only marked rows add a row of a table, so it may run on one row that does not belong to the whole batch."""

    def __init__(self):
        super().__init__()
        self.table, self.kinds, self.head = nn.Embedding(60, 6), nn.Embedding(3, 6), nn.Linear(6, 2)

    def forward(self, input_ids, attention_mask=None, labels=None):
        x = (self.table(input_ids) * (input_ids != 0)[..., None]).sum(1)
        marked = (input_ids == Partial.MARK).any(1)
        if marked.any():
            kinds = self.kinds(marked[marked].long()[:, None])[:, 0]
            x = x.index_put((marked,), torch.tanh(x[marked] + kinds))
        logits = self.head(x)
        return SequenceClassifierOutput(loss=loss_of(logits, labels), logits=logits)


@pytest.mark.parametrize("what", ["fisher", "kernel"])
@pytest.mark.parametrize("marked", [0, 3])  # the trial's rows reach the table, or do not
def test_embedding_that_runs_on_one_row_for_the_batch(what, marked):
    rows = ragged_rows((6, 4, 5, 3), labels=2)
    rows["input_ids"] %= 60
    rows["input_ids"][rows["input_ids"] == Partial.MARK] = 8
    rows["input_ids"][marked, 1] = Partial.MARK
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = OneRowAtATime().double().eval()
    alone = one_by_one(rows)
    if what == "fisher":
        found = fisher_information(model, [rows], loss=of_each_row, progress=False)
        assert_same_fisher(found, squared_gradients(model, alone), 1e-6)
    else:
        expected = kernel_of(torch.stack([jacobian(model, row) for row in alone]))
        assert relative_error(empirical_ntk(model, rows), expected) <= 1e-9
