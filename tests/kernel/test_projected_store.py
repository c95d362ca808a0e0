"""Projected gradients that are kept: killed, shared, damaged, and read by the trainer."""

import random

import numpy as np
import pytest
import torch
from families import batch, family
from kernel_runs import make
from safetensors.torch import load_file, save_file
from torch.utils.data import Dataset

from hf_ft_ext import InputError
from hf_ft_ext.kernel.arguments import KernelTrainingArguments
from hf_ft_ext.kernel.engines import projected
from hf_ft_ext.kernel.engines.projected import MemoryChunks, ProjectedEngine, divide_rows, features_product
from hf_ft_ext.kernel.ntk import KernelComputation, KernelOptions
from hf_ft_ext.kernel.rows import ExampleRows
from hf_ft_ext.kernel.store import DESCRIPTION, FeatureStore

RIGHT = batch(7, 11, seed=1)
ABOUT = {"rows": "a", "dimension": 64}


class Killed(BaseException):
    """Ends the process like a signal: nothing may catch it."""


def project(folder, chunks_before_death=None, rows=RIGHT, model=None, process=0, processes=1):
    options = KernelOptions(engine="projected", dimension=64)
    engine = KernelComputation(model or family("bert"), options).projected
    features, left, computed = engine.features, [chunks_before_death], []

    def mortal(rows, first, batches):
        if left[0] == 0:
            raise Killed
        left[0] = None if left[0] is None else left[0] - 1
        computed.append(first)
        return features(rows, first, batches)

    engine.features = mortal
    store, rows = FeatureStore(folder, ABOUT), ExampleRows(rows)
    store.cut(divide_rows(len(rows)))
    try:
        engine.project(rows, store, process, processes)
    except Killed:
        return None, len(computed)
    return store, len(computed)


def kept(store):
    return torch.cat([store.get(i) for i in range(len(store.edges))])


def test_killed_ten_times_projections_end_with_the_same_bits(tmp_path, monkeypatch):
    monkeypatch.setattr(projected, "CHUNK_ROWS", 1)
    whole, chunks = project(tmp_path / "whole")
    assert chunks == 7
    generator, total, deaths = random.Random(0), 0, 0
    for _ in range(10):
        store, computed = project(tmp_path / "killed", generator.choice([0, 0, 1]))
        total, deaths = total + computed, deaths + (store is None)
        if generator.random() < 0.5:  # half a file, as a killed write leaves it
            folder = FeatureStore(tmp_path / "killed", ABOUT).folder
            (folder / ".features-00000.safetensors.1.tmp").write_bytes(b"half")
    assert deaths == 10
    store, computed = project(tmp_path / "killed")
    assert total + computed == chunks and torch.equal(kept(store), kept(whole))  # no row was computed twice
    assert project(tmp_path / "killed")[1] == 0


def test_processes_share_chunks_and_keep_their_row_ranges(tmp_path, monkeypatch):
    monkeypatch.setattr(projected, "CHUNK_ROWS", 2)
    whole, _ = project(tmp_path / "whole")
    shares = [project(tmp_path / "shared", process=process, processes=3)[1] for process in range(3)]
    assert shares == [2, 1, 1]
    monkeypatch.setattr(projected, "CHUNK_ROWS", 5)
    store, computed = project(tmp_path / "shared")
    assert computed == 0 and store.edges == [(0, 2), (2, 4), (4, 6), (6, 7)]
    assert torch.equal(kept(store), kept(whole))
    left = MemoryChunks(divide_rows(5))
    left.put(0, kept(store)[:5])
    expected = torch.einsum("iak,jbk->iajb", kept(store)[:5].double(), kept(store).double())
    torch.testing.assert_close(features_product(left, store, False), expected)


def test_damaged_and_foreign_chunks_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(projected, "CHUNK_ROWS", 4)
    store, _ = project(tmp_path)
    paths = sorted(store.folder.glob("features-*"))
    content, other = paths[0].read_bytes(), load_file(paths[1])["features"]
    paths[0].write_bytes(content[:-5])
    with pytest.raises(InputError, match=r"chunk of projected gradients .*00000.* cannot be read .* delete the file"):
        project(tmp_path)
    save_file({"features": other}, paths[0], {"key": store.folder.name, "block": "0"})
    with pytest.raises(
        InputError, match=r"belongs to another set of projected gradients: it holds \(3, 2, 64\), expected \(4"
    ):
        project(tmp_path)
    paths[0].write_bytes(content)
    paths[1].write_bytes(content)
    with pytest.raises(InputError, match="expected"):
        project(tmp_path)
    description = store.folder / DESCRIPTION
    description.write_text(description.read_text().replace("4,", "3,", 1))
    with pytest.raises(InputError, match="is damaged"):
        project(tmp_path)


# --- the trainer ---------------------------------------------------------------------------------------------

SETTINGS = {"kernel_engine": "projected", "kernel_dimension": 2048, "kernel_regularization": "1e-2"}


class Reversed(Dataset):
    def __init__(self, data):
        self.data = data

    def __len__(self):
        return len(self.data)

    def __getitem__(self, i):
        return self.data[len(self.data) - 1 - i]


def test_the_trainer_keeps_projected_rows_and_predicts_as_with_the_exact_kernel(tmp_path, monkeypatch):
    projections = []
    features = ProjectedEngine.features
    monkeypatch.setattr(
        ProjectedEngine, "features", lambda self, *given: projections.append(1) or features(self, *given)
    )
    exact = make(tmp_path / "exact", kernel_regularization="1e-2")
    exact.train()
    expected = exact.predict(exact.eval_dataset).predictions
    trainer = make(tmp_path / "run", kernel_dir=str(tmp_path / "kept"), **SETTINGS)
    trainer.train()
    found = trainer.predict(trainer.eval_dataset).predictions
    assert len(projections) == 2 and len(list((tmp_path / "kept").iterdir())) == 2  # training rows, evaluation rows
    assert np.abs(found - expected).max() < 0.25 * np.abs(expected).max()
    again = make(tmp_path / "again", kernel_dir=str(tmp_path / "kept"), **SETTINGS)
    again.train()
    np.testing.assert_array_equal(again.predict(trainer.eval_dataset).predictions, found)
    assert len(projections) == 2  # nothing was computed
    rows = trainer.eval_dataset
    np.testing.assert_allclose(again.predict(Reversed(rows)).predictions[::-1], found, rtol=1e-3, atol=1e-4)
    assert len(projections) == 3  # new rows alone
    other = make(tmp_path / "other", kernel_dir=str(tmp_path / "kept"), seed=5, **SETTINGS)
    other.train()
    assert len(projections) == 4  # another seed, another projection


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"kernel_engine": "projected", "kernel_formula": "signgd"}, "projected does not support formula signgd"),
        ({"kernel_engine": "projected", "kernel_dimension": 0}, "kernel_dimension must be above 0 and finite, got 0"),
        ({"kernel_dimension": 64}, "kernel_dimension applies only to kernel_engine=projected; pass that engine too"),
    ],
)
def test_invalid_arguments_are_refused(tmp_path, settings, message):
    with pytest.raises(InputError, match=message):
        KernelTrainingArguments(str(tmp_path), use_cpu=True, **settings).validate()
