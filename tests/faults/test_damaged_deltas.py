"""Deltas that were damaged, wherever: refused by name, the model as it was."""

from random import Random

import pytest
import torch
from damages import DAMAGES, damage
from tiny import tiny_dataset, tiny_model, tiny_tokenizer

from hf_ft_ext import attach_entries, load_delta, load_entries, save_entries
from hf_ft_ext.entries.delta import DELTA_FILE as ENTRIES
from hf_ft_ext.errors import InputError
from hf_ft_ext.sparse.saved.delta import DELTA_FILE as SPARSE
from hf_ft_ext.sparse.saved.delta import save_delta
from hf_ft_ext.sparse.trainer import SparseTrainer, SparseTrainingArguments


def entries(folder):
    model = tiny_model()
    attach_entries(model, {"bert.encoder.layer.0.output.dense.weight": torch.tensor([0, 700, 31])})
    save_entries(model, folder)
    return folder / ENTRIES, load_entries


def sparse(folder):
    args = SparseTrainingArguments(
        str(folder / "out"), sparse_support="static", sparse_basis="none", max_steps=1, use_cpu=True, report_to=[],
        save_strategy="no", disable_tqdm=True, sparse_basis_steps=1,
    )  # fmt: skip
    trainer = SparseTrainer(tiny_model(), args, train_dataset=tiny_dataset(8), processing_class=tiny_tokenizer())
    trainer.train()
    save_delta(trainer.model, folder)
    return folder / SPARSE, load_delta


@pytest.mark.parametrize("make", [entries, sparse])
def test_damage_is_found(make, tmp_path):
    path, load = make(tmp_path)
    undamaged = path.read_bytes()
    other = tmp_path / "other.safetensors"
    other.write_bytes(undamaged[:8] + undamaged[9:] + b"0")
    load(tiny_model(), tmp_path)
    model, start = tiny_model(), list(tiny_model().parameters())
    for seed in range(24):
        path.write_bytes(undamaged)
        damage(path, DAMAGES[seed % len(DAMAGES)], Random(seed), other)
        with pytest.raises(InputError, match=path.name):
            load(model, tmp_path)
        assert all(torch.equal(p, q) for p, q in zip(model.parameters(), start, strict=True))
