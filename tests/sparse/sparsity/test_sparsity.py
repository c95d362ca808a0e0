"""How sparse gradients are: values against the plain formula, a watch that leaves training alone, pictures."""

import json

import pytest
import torch
from sparse_trainer import make, reference_gradients, weights

from hf_ft_ext import InputError, sparse_layers
from hf_ft_ext.sparse.basis import Basis
from hf_ft_ext.sparse.sparsity import FRACTIONS, FRESH, RAW, START, captured_energy, measure_sparsity


def test_captured_energy():
    matrix = torch.tensor([[3.0, 0.0], [-4.0, 1.0]])
    values = captured_energy(matrix, (0.01, 0.25, 0.5, 1.0))
    assert values.tolist() == pytest.approx([16 / 26, 16 / 26, 25 / 26, 1])
    assert captured_energy(torch.zeros(2, 2), (0.5, 1.0)).tolist() == [0, 0]


def test_zero_gradients_are_left_out_of_the_mean(tmp_path, monkeypatch):
    trainer = make(tmp_path)
    first, second = list(sparse_layers(trainer.model).items())[:2]
    gradient = torch.tensor([[3.0, 0.0], [-4.0, 1.0]])

    def gradients(trainer, layers, steps, receive, desc, draw):
        for name, found in ((first[0], gradient), (first[0], 0 * gradient), (second[0], 0 * gradient)):
            receive(name, found)

    monkeypatch.setattr("hf_ft_ext.sparse.sparsity.measure.for_each_gradient", gradients)
    found = measure_sparsity(trainer, dict((first, second)), {}, 2)[RAW]
    assert found[first[0]] == pytest.approx(captured_energy(gradient).tolist())
    assert found[second[0]] == [0] * len(FRACTIONS)


def test_raw_and_rotated_values_are_means_over_other_batches(tmp_path):
    trainer = make(tmp_path)
    layers = sparse_layers(trainer.model)
    kinds = {layer.kind: layer for layer in layers.values()}
    generator = torch.Generator().manual_seed(0)
    bases = {}
    for kind, layer in kinds.items():
        sides = (layer.out_features, layer.in_features)
        bases[kind] = Basis(*(torch.linalg.qr(torch.randn(n, n, generator=generator)).Q for n in sides))
    found = measure_sparsity(trainer, layers, {"mine": bases}, 2)
    trainer.args.seed += 1  # the reference draws as the pre-pass does; the measurement takes the next draw
    gradients = list(reference_gradients(trainer, 2))
    for name, layer in layers.items():
        raw = [captured_energy(batch[name]) for batch in gradients]
        mine = [captured_energy(bases[layer.kind].rotate(batch[name])) for batch in gradients]
        for system, expected in ((RAW, raw), ("mine", mine)):
            assert found[system][name] == pytest.approx(torch.stack(expected).mean(0).tolist(), rel=1e-4)


@pytest.mark.parametrize("support", ["dynamic", "structured"])
def test_the_watch_writes_values_and_pictures_and_leaves_training_alone(tmp_path, support, monkeypatch):
    drawn = []
    if support == "structured":  # a second each; what is drawn does not depend on the support
        monkeypatch.setattr("hf_ft_ext.sparse.sparsity.pictures.draw_sparsity", lambda *given: drawn.append(given))
    plain = make(tmp_path / "plain", sparse_support=support)
    plain.train()
    watched = make(tmp_path / "watched", sparse_support=support, sparse_show_steps=4)
    watched.train()
    for name, value in weights(plain).items():
        assert torch.equal(value, weights(watched)[name]), name
    written = json.loads((tmp_path / "watched" / "sparsity.json").read_text())
    assert written["fractions"] == list(FRACTIONS) and list(written["steps"]) == ["0", "4", "8"]
    first, last = written["steps"]["0"], written["steps"]["8"]
    layers = sparse_layers(watched.model)
    for name in layers:
        assert first[START][name] == first[FRESH][name] != first[RAW][name]
        assert last[START][name] != last[FRESH][name]
        for system in (RAW, START, FRESH):
            assert last[system][name] == sorted(last[system][name]) and last[system][name][-1] == pytest.approx(1)
    assert len(drawn) == (support == "structured")
    for picture in () if drawn else ("energy_by_fraction.png", "energy_by_layer.png", "energy_by_step.png"):
        content = (tmp_path / "watched" / picture).read_bytes()
        assert content.startswith(b"\x89PNG") and len(content) > 10_000


def test_bad_options(tmp_path, monkeypatch):
    with pytest.raises(InputError, match="sparse_show_steps=-1 is out of range; pass 0"):
        make(tmp_path, sparse_show_steps=-1)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"matplotlib is not installed; run pip install 'hf_ft_ext\[pictures\]'"):
        make(tmp_path, sparse_show_steps=5)
