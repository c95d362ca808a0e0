"""Accumulated micro-batches of unequal lengths equal one batch: the loss counts tokens, not micro-batches."""

import pytest
import torch
from decoders import TOKENIZER_OF, decoder, subword_tokenizer

pytest.importorskip("trl")
from cells import VARIANTS, make, result


@pytest.mark.parametrize(
    ("family", "task"),
    [("llama", "prompt"), ("llama", "language"), ("llama", "text"), ("t5", "prompt"), ("t5", "language")],
)
@pytest.mark.parametrize("name", [name for name in VARIANTS if name != "kernel"])
def test_eight_times_one_row_equals_two_times_four(tmp_path, name, family, task):
    ended = []
    for batch, accumulation in ((1, 8), (4, 2)):
        trainer = make(tmp_path, name, family, task, batch, accumulation)
        trainer.train()
        ended.append(result(trainer))
    one, four = ended
    start = dict(decoder(family, len(subword_tokenizer(TOKENIZER_OF[family]))).double().named_parameters())
    assert one.keys() == four.keys()
    plain = {key: key.rpartition("masked_lm.")[2] for key in one}
    assert any(plain[key] not in start or not torch.equal(start[plain[key]], p) for key, p in one.items())
    for key, parameter in one.items():
        assert torch.allclose(parameter, four[key], rtol=0, atol=1e-6), key
