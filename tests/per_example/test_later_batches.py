"""Parameters, uses and axes that the trial's rows do not show: right in every later batch too."""

import pytest
import torch
from families import batch
from single_examples import assert_equal, gathered, plain
from torch import nn
from transformers.modeling_outputs import SequenceClassifierOutput

from hf_ft_ext import empirical_ntk
from hf_ft_ext.per_example.gradients import ExampleGradients
from hf_ft_ext.per_example.types import dense


class Routed(nn.Module):
    """Two scalars of a table; other parameters have a part in one of the scalars or for some rows alone."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(60, 6)
        self.first, self.second, self.rare = nn.Linear(6, 1), nn.Linear(6, 1), nn.Linear(6, 6)
        self.only_first = nn.Parameter(torch.randn(6))  # no rule, and no part in the last scalar
        self.by_row = nn.Parameter(torch.randn(6))  # no rule, and a part in rows that hold a 7

    def forward(self, input_ids, attention_mask=None):
        x = self.table(input_ids).mean(1)
        rows = (input_ids == 7).any(1)
        if rows.any():
            x = torch.where(rows[:, None], torch.tanh(self.rare(x)) * self.by_row, x)
        logits = torch.cat([self.first(x * self.only_first), self.second(x)], 1)
        return SequenceClassifierOutput(logits=logits)


def test_parameters_that_only_some_scalars_or_rows_depend_on():
    torch.manual_seed(0)
    model = Routed().double()
    plain_rows = torch.randint(8, 60, (3, 5))
    late = torch.cat([plain_rows, torch.full((1, 5), 7)])
    for streamed in (False, True):
        examples = ExampleGradients(model)
        for ids in (plain_rows, late):
            inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
            found = summed(examples, inputs) if streamed else gathered(examples, inputs)
            expected = plain(model, examples.function, inputs, examples.parameters)
            for ours, theirs in zip(found, expected, strict=True):
                for name, value in theirs.items():
                    value = value.sum(0) if streamed else value
                    torch.testing.assert_close(ours[name], value, rtol=1e-9, atol=1e-12, msg=name)
        assert {"only_first", "by_row", "rare.weight"} <= set(examples.uncovered)
        assert not {"table.weight", "second.weight"} & set(examples.uncovered)


def summed(examples, inputs):
    """Sums of the streamed gradients: for each scalar `[*shape]` by name."""
    sums = [{name: torch.zeros_like(p) for name, p in examples.parameters.items()} for _ in range(2)]

    def receive(name, gradients, scalar, first):
        sums[scalar][name] += dense(gradients).sum(0)

    examples.stream(inputs, receive)
    return sums


class SecondUse(nn.Module):
    """A layer with a second use that the second scalar alone depends on, for rows that hold a 7."""

    def __init__(self):
        super().__init__()
        self.table, self.layer = nn.Embedding(60, 6), nn.Linear(6, 6)

    def forward(self, input_ids, attention_mask=None):
        x = self.layer(self.table(input_ids).mean(1))
        rows = (input_ids == 7).any(1)
        y = x
        if rows.any():  # on another layout than the first use
            again = self.layer(x.expand(4, *x.shape)).mean(0)
            y = torch.where(rows[:, None], again, x)
        return SequenceClassifierOutput(logits=torch.stack([x.square().sum(1), y.exp().sum(1)], 1))


def test_use_that_only_a_later_batch_and_one_scalar_have():
    torch.manual_seed(0)
    model = SecondUse().double()
    first = torch.randint(8, 60, (3, 5))
    examples = ExampleGradients(model)
    for ids in (first, torch.cat([first, torch.full((1, 5), 7)])):
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        expected = plain(model, examples.function, inputs, examples.parameters)
        for ours, theirs in zip(summed(examples, inputs), expected, strict=True):
            for name, value in theirs.items():
                torch.testing.assert_close(ours[name], value.sum(0), rtol=1e-9, atol=1e-12, msg=name)
    assert set(examples.uncovered) == {"layer.weight", "layer.bias"}


class InPlace(nn.Module):
    """Scales the output of its embedding in place, as CTRL does."""

    def __init__(self):
        super().__init__()
        self.table, self.head = nn.Embedding(60, 6), nn.Linear(6, 2)

    def forward(self, input_ids, attention_mask=None):
        x = self.table(input_ids)
        x *= 3.0
        return SequenceClassifierOutput(logits=self.head(x.mean(1)))


class ScaledRows(nn.Embedding):
    """Scaled rows, read with an offset."""

    def forward(self, input_ids):
        return super().forward(input_ids + 2) * torch.tensor(2.5, dtype=self.weight.dtype)


class Twisted(nn.Embedding):
    """Does more than scale rows."""

    def forward(self, input_ids):
        return torch.sin(super().forward(input_ids))


@pytest.mark.parametrize("table", [nn.Embedding, ScaledRows, Twisted])
def test_embeddings_of_other_kinds_and_outputs_changed_in_place(table):
    torch.manual_seed(0)
    model = InPlace().double()
    model.table = table(64, 6).double()
    assert assert_equal(model, batch()).uncovered == []


def test_a_norm_on_another_axis_is_right():
    class Transposed(nn.LayerNorm):
        def forward(self, x):
            return super().forward(x.permute(0, 2, 1)).permute(0, 2, 1)

    class Model(InPlace):
        def __init__(self):
            super().__init__()
            self.norm = Transposed(6)

        def forward(self, input_ids, attention_mask=None):
            x = self.norm(self.table(input_ids).permute(0, 2, 1))
            return SequenceClassifierOutput(logits=self.head(x.square().mean(2)))

    torch.manual_seed(0)
    assert assert_equal(Model().double(), batch()).uncovered == []


class SometimesTied(nn.Module):
    """Reads its table's weight for outputs too, in rows that hold a 7."""

    def __init__(self):
        super().__init__()
        self.table, self.head = nn.Embedding(60, 6), nn.Linear(6, 2)

    def forward(self, input_ids, attention_mask=None):
        x = self.table(input_ids).mean(1)
        rows = (input_ids == 7).any(1)
        if rows.any():
            again = torch.tanh(nn.functional.linear(x, self.table.weight)) @ self.table.weight
            x = torch.where(rows[:, None], again, x)
        return SequenceClassifierOutput(logits=self.head(x))


@pytest.mark.parametrize("kind", [SecondUse, SometimesTied])
@pytest.mark.parametrize("order", [[0, 1, 2, 3, 4], [4, 3, 0, 1, 2]])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_kernel_and_sums_of_batches_that_use_a_weight_in_other_ways(kind, order, batch_size):
    torch.manual_seed(0)
    model = kind().double()
    ids = torch.cat([torch.randint(8, 60, (3, 5)), torch.full((2, 5), 7)])
    ids[4, 1:] = 9
    ids = ids[order]
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    examples = ExampleGradients(model)
    scalars = plain(model, examples.function, inputs, examples.parameters)
    flat = [torch.cat([value.flatten(1) for value in scalar.values()], 1) for scalar in scalars]
    rows = torch.stack(flat, 1)
    expected = torch.einsum("iap,jbp->iajb", rows, rows)
    found = empirical_ntk(model, inputs, batch_size=batch_size, block_rows=5)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    for ours, theirs in zip(summed(ExampleGradients(model), inputs), scalars, strict=True):
        for name, value in theirs.items():
            torch.testing.assert_close(ours[name], value.sum(0), rtol=1e-9, atol=1e-12, msg=name)
