"""`benchmarks/masked_lm.py`: what it masks, and that its model loads as a masked language model."""

import sys

import pytest
import torch
from blocks import ROOT
from tiny import WORDS, tiny_tokenizer
from transformers import AutoConfig, AutoModel, AutoModelForMaskedLM, AutoTokenizer

sys.path.insert(0, str(ROOT / "benchmarks"))
import masked_lm


def test_fifteen_percent_of_the_ordinary_tokens_are_masked_as_in_bert():
    tokenizer, generator = tiny_tokenizer(), torch.Generator().manual_seed(0)
    ordinary = [i for i in range(len(tokenizer)) if i not in tokenizer.all_special_ids][:7]
    rows = [[tokenizer.cls_token_id, *(ordinary * 20)[: 90 + i % 3], tokenizer.sep_token_id] for i in range(300)]
    batch = masked_lm.masked(rows, tokenizer, generator)
    labels, ids = batch["labels"], batch["input_ids"]
    original = tokenizer.pad({"input_ids": rows}, return_tensors="pt")["input_ids"]
    chosen = labels != -100
    assert torch.equal(labels[chosen], original[chosen]) and torch.equal(ids[~chosen], original[~chosen])
    assert not chosen[torch.isin(original, torch.tensor(tokenizer.all_special_ids))].any()
    assert chosen.sum() / sum(len(row) - 2 for row in rows) == pytest.approx(0.15, abs=0.01)
    replaced = (ids == tokenizer.mask_token_id)[chosen].double().mean()
    assert replaced == pytest.approx(0.8, abs=0.02)
    assert (ids == original)[chosen].double().mean() == pytest.approx(0.1, abs=0.02)


def test_batches_hold_every_row_once_within_the_budget():
    rows = [[i] * (3 + i % 17) for i in range(200)]
    batches = masked_lm.token_batches(rows, 60, torch.Generator().manual_seed(0))
    assert sorted(row[0] for batch in batches for row in batch) == list(range(200))
    assert all(len(batch) * max(map(len, batch)) <= 60 for batch in batches)
    assert sum(map(len, rows)) / sum(len(batch) * max(map(len, batch)) for batch in batches) > 0.8


@pytest.mark.parametrize("kind", ["mpnet", "roberta"])
def test_the_trained_head_is_loaded_and_the_lower_layers_stay(tmp_path, monkeypatch, kind):
    tokenizer = tiny_tokenizer()
    config = AutoConfig.for_model(
        kind, vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=64, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    torch.manual_seed(0)
    encoder = AutoModel.from_config(config)
    encoder.save_pretrained(tmp_path / "encoder")
    tokenizer.save_pretrained(tmp_path / "encoder")
    (tmp_path / "texts").mkdir()
    lines = [" ".join(WORDS[(i * k) % 5] for k in range(1, 8)) for i in range(40)]
    lines = [f"{line} {WORDS[i % 5]} {WORDS[i // 5 % 5]}" for i, line in enumerate(lines)]
    (tmp_path / "texts" / "train.csv").write_text("sentence,label\n" + "".join(f"{line},1\n" for line in lines))
    monkeypatch.setattr(sys, "argv", [
        "masked_lm.py", "--model", str(tmp_path / "encoder"), "--output", str(tmp_path / "out"), "--texts",
        str(tmp_path / "texts"), "--steps", "6", "--tokens", "80", "--trained_layers", "1", "--held_out", "5",
        "--head_rate", "0.05",
    ])  # fmt: skip
    threads = torch.get_num_threads()
    masked_lm.main()
    torch.set_num_threads(threads)
    model = AutoModelForMaskedLM.from_pretrained(tmp_path / "out")
    assert AutoTokenizer.from_pretrained(tmp_path / "out").mask_token == tokenizer.mask_token
    before, after = dict(encoder.named_parameters()), dict(model.base_model.named_parameters())
    changed = {name for name in after if not torch.equal(before[name], after[name])}
    assert changed and all(name.startswith("encoder.layer.1.") for name in changed)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert model.lm_head.bias.detach().abs().max() > 0
