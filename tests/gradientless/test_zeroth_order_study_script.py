"""`benchmarks/zeroth_order_study.py`: the model above its frozen part is the whole model."""

import copy
import sys
from types import SimpleNamespace

import pytest
import torch
from blocks import ROOT
from prompt_models import TEXTS, batch, prompt_model
from tiny import tiny_tokenizer
from transformers import DataCollatorWithPadding

sys.path.insert(0, str(ROOT / "benchmarks"))
import zeroth_order_study


@pytest.mark.parametrize("frozen", [0, 1])
@pytest.mark.parametrize("family", ["bert", "roberta", "mpnet"])
def test_stored_outputs_of_the_frozen_part_replace_it(family, frozen):
    model = prompt_model(family)
    collator = DataCollatorWithPadding(tiny_tokenizer())
    single = [batch([text], family) for text in TEXTS]
    rows = [{key: value[0].tolist() for key, value in row.items()} | {"labels": i % 2} for i, row in enumerate(single)]
    whole = torch.cat([model(**row).logits for row in single])

    rows = zeroth_order_study._embedded(model, zeroth_order_study.last_frozen(model, frozen), rows)
    upper = copy.deepcopy(model)
    zeroth_order_study.drop_frozen(upper, frozen)
    task = SimpleNamespace(collate=collator)
    padded = zeroth_order_study.Task.batch(task, rows)
    padded.pop("labels")
    torch.testing.assert_close(zeroth_order_study.logits_of(upper, padded), whole)
