"""Rows, batches and blocks of a kernel: what is held at a time, and what is refused."""

import weakref

import pytest
import torch
from families import batch, family
from torch import nn

from hf_ft_ext import empirical_ntk
from hf_ft_ext.errors import InputError
from hf_ft_ext.kernel.ntk import KernelComputation, KernelOptions
from hf_ft_ext.kernel.rows import ExampleRows
from hf_ft_ext.kernel.schedule import make_schedule, measure

LEFT, RIGHT = batch(5), batch(7, 11, seed=1)


def test_kernel_does_not_depend_on_batches_and_padding():
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
def test_batches_have_the_least_padding(size, overhead, cost):
    """`cost`: the least over all ways to cut the lengths in order (each was tried)."""
    lengths = [3, 10, 2, 1, 7, 2, 3]
    rows = ExampleRows([{"input_ids": torch.ones(1, n, dtype=torch.long)} for n in lengths])
    groups = rows.by_length(0, 7, size, overhead)
    assert sorted(i for group in groups for i in group) == list(range(7)) and max(map(len, groups)) <= size
    assert sum(overhead + len(group) * max(lengths[i] for i in group) for group in groups) == cost
    longest = [max(lengths[i] for i in group) for group in groups]
    assert longest == sorted(longest, reverse=True)
    assert [i for group in reversed(rows.by_length(2, 5, size, overhead)) for i in group] == [3, 2, 4]


def test_memory_limit_is_kept_and_too_little_is_refused():
    model = family("bert").double()
    whole = empirical_ntk(model, LEFT, RIGHT)
    with pytest.raises(InputError, match=r"one pair of examples takes .* pass at least (.*), or shorten") as error:
        empirical_ntk(model, LEFT, RIGHT, memory_gb=1e-6)
    least = float(str(error.value).split("at least ")[1].split(",")[0])
    computation = KernelComputation(model, KernelOptions(memory_gb=least))
    tokens = []
    side = computation.engine.gradient_rows

    def watched(rows, batches):
        tokens.append(sum(rows.lengths[i] for indices in batches for i in indices))
        assert all(len(indices) == 1 for indices in batches)
        return side(rows, batches)

    computation.engine.gradient_rows = watched
    torch.testing.assert_close(computation.run(ExampleRows(LEFT), ExampleRows(RIGHT))[0], whole)
    assert len(tokens) > 5 and max(tokens) <= max(*ExampleRows(LEFT).lengths, *ExampleRows(RIGHT).lengths)


@pytest.mark.parametrize("right", [None, RIGHT])
def test_one_set_of_gradient_rows_per_side_is_in_memory(right):
    """One block of each side is in memory, and only the packed gradients of earlier batches."""
    computation = KernelComputation(family("bert"), KernelOptions(block_rows=2, batch_size=1))
    engine, sides, parts = computation.engine, [], []
    side = engine.gradient_rows

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

    engine.gradient_rows, engine.examples.__class__ = watched, Watched
    computation.run(ExampleRows(LEFT), None if right is None else ExampleRows(right))
    assert len(sides) >= 4 and len(parts) > len(sides)


@pytest.mark.parametrize("engine", ["structured", "jacobian"])
@pytest.mark.parametrize("model_type, formula", [("bert", "sgd"), ("albert", "signgd"), ("gpt2", "asymmetric_signgd")])
def test_memory_estimate_bounds_every_row(model_type, formula, engine):
    """Stored gradients grow with a row's tokens: blocks of many short rows are as large as those of few long ones."""
    rows = ExampleRows(batch(9, 30, seed=2))
    computation = KernelComputation(family(model_type), KernelOptions(formula, engine))
    computation.engine.prepare(rows)
    needs = measure(computation.engine, rows)
    planned = needs.examples(rows.lengths)
    kept = [computation.engine.gradient_rows(rows, [[i]]).bytes() for i in range(len(rows))]
    assert all(k <= 1.05 * p for k, p in zip(kept, planned, strict=True)) and max(kept) == needs.example
    assert sum(planned) <= 1.1 * sum(kept)
    room = 2.5 * needs.example
    plan = make_schedule(needs, rows.lengths, rows.lengths[:4], (needs.least + 4 * needs.example) / 1e9, 16, None)
    assert [a for a, _ in plan.first] + [9] == [0] + [b for _, b in plan.first]
    for blocks in (plan.first, plan.second):
        assert all(sum(planned[a:b]) <= room for a, b in blocks)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"formula": "sng"}, "formula='sng'; choose from: sgd, signgd"),
        ({"engine": "fast"}, "engine='fast'; choose from: auto, structured"),
        ({"memory_gb": 0}, "memory_gb=0 must be above 0"),
        ({"parameters": "("}, "is not a valid regular expression"),
        ({"parameters": "nothing"}, "kernel_parameters='nothing': no trainable parameter is left; some are .*classif"),
        ({"binary_classification": True, "num_labels": 3}, r"difference of two logits, but there are \(3,\)"),
    ],
)
def test_invalid_options_are_refused(options, message):
    model = family("bert", num_labels=options.pop("num_labels", 2))
    with pytest.raises(InputError, match=message):
        empirical_ntk(model, LEFT, RIGHT, **options)


def test_unsupported_models_and_data_are_refused():
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


@pytest.mark.parametrize("formula", ["sgd", "signgd", "asymmetric_signgd"])
def test_nan_in_the_gradient_of_a_weight_alone_is_found(formula):
    """signgd multiplies signs in int8, which has no NaN."""
    model, x = nn.Linear(8, 1).double(), torch.randn(6, 3, 8, dtype=torch.double)
    settings = {"formula": formula, "parameters": "weight", "function": lambda m, rows: m(rows["x"]).mean((1, 2))}
    assert empirical_ntk(model, {"x": x}, **settings).isfinite().all()
    x[2, 1, 3] = torch.nan
    with pytest.raises(InputError, match=r"gradient of weight for example 2 \(from 0\) of the first side is NaN"):
        empirical_ntk(model, {"x": x}, **settings)
