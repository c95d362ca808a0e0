"""The analysis commands: results and plots."""

import functools
import importlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from families import batch, family

from hf_ft_ext.errors import InputError
from hf_ft_ext.kernel.analysis import (
    between_classes,
    by_class,
    class_contrast,
    linearization,
    linearization_error,
    pictures,
    scores_by_seed,
)
from hf_ft_ext.kernel.store import write_kernel
from hf_ft_ext.per_example.gradients import ExampleGradients
from hf_ft_ext.per_example.types import dense

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


def script(name):
    """The module of a script."""
    sys.path.insert(0, str(BENCHMARKS))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(BENCHMARKS))


def main(words):
    """The command, from its script."""
    return script("kernel_analysis").main(words)


def test_by_class_sorts_and_normalizes_a_kernel():
    kernel = np.zeros((3, 1, 3, 1))
    kernel[:, 0, :, 0] = [[4, 1, 2], [1, 1, 0.5], [2, 0.5, 4]]
    matrix, labels = by_class(kernel, np.array([1, 0, 1]))
    assert labels.tolist() == [0, 1, 1]
    np.testing.assert_allclose(matrix, [[1, 0.5, 0.25], [0.5, 1, 0.5], [0.25, 0.5, 1]])
    assert class_contrast(matrix, labels) == (0.5, 0.375)


def test_linearization_equals_the_gradient_times_the_change():
    start, trained = family("bert"), family("bert")
    with torch.no_grad():
        for p in trained.parameters():
            p += 1e-3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()))
    inputs = batch(4)
    before = {name: p.clone() for name, p in start.named_parameters()}
    change, slope = linearization(start, trained, inputs)
    assert all(torch.equal(p, before[name]) and p.dtype == torch.float32 for name, p in start.named_parameters())
    (part,) = ExampleGradients(start, dtype=torch.float64)(inputs)
    deltas = {n: (p - before[n]).double() for n, p in trained.named_parameters()}
    for c, forms in enumerate(part.gradients):
        expected = sum((dense(found) * deltas[name]).flatten(1).sum(1) for name, found in forms.items())
        np.testing.assert_allclose(slope[:, c], expected.detach().numpy(), rtol=1e-5, atol=1e-8)
    assert 0 < linearization_error(change, slope) < 0.05
    assert linearization_error(change, change) == 0
    shifted = slope + np.arange(len(slope))[:, None]  # the same for all classes
    expected = linearization_error(change - change.mean(1)[:, None], slope - slope.mean(1)[:, None])
    assert linearization_error(between_classes(change), between_classes(shifted)) == pytest.approx(expected)
    assert np.array_equal(between_classes(change[:, :1]), change[:, :1])
    with pytest.raises(InputError, match="the two models have different parameters"):
        linearization(start, family("roberta"), inputs)


@pytest.fixture
def study(tmp_path):
    for name, seed, rate, dev, test, rows in (
        ("a", 1, "-1e-2", 0.8, 0.7, "xyxy"), ("a", 1, "-1e-3", 0.9, 0.6, "xxxy"), ("a", 2, "", 0.9, 0.8, "yyyy"),
        ("b", 1, "", 0.5, 0.5, "xxxx"), ("b", 2, "", 0.5, 0.6, "yyxx"),
    ):  # fmt: skip
        folder = tmp_path / f"{name}-{seed}{rate}"
        folder.mkdir()
        metrics = {"eval_accuracy": dev, "eval_loss": 1.0, "test_accuracy": test}
        (folder / "run.json").write_text(json.dumps({"metrics": metrics}))
        lines = "".join(f"{i}\t{row}\n" for i, row in enumerate(rows))
        (folder / "predictions.tsv").write_text(f"index\tprediction\n{lines}")
    return tmp_path


def test_scores_and_agreements_of_studies_are_printed(study, capsys, monkeypatch):
    assert scores_by_seed(study, ["a", "b"]) == {"a": [0.6, 0.8], "b": [0.5, 0.6]}  # the best on the dev split
    assert main(["compare", str(study), "--names", "a", "b"]) == 0
    assert "a: 0.7000 ± 0.1414 (2 seeds)" in capsys.readouterr().out
    assert main(["agreement", str(study), "--names", "a", "b"]) == 0
    assert "a: 1.000 0.625" in capsys.readouterr().out  # 3/4 and 2/4
    for name in ("compare", "agreement"):
        assert (study / f"{name}.png").stat().st_size > 5_000
    results = script("results")
    monkeypatch.setattr(results, "save", functools.partial(results.save, folder=study))
    words = ["agreement", str(study), "--names", "a", "b", "--result", "alike"]
    assert main([*words, "--what", "sst2"]) == 0
    rows = [{key: row[key] for key in ("what", "variant", "other", "value")} for row in results.read("alike", study)]
    assert rows == [{"what": "sst2", "variant": "a", "other": "b", "value": 0.625}]
    with pytest.raises(SystemExit):
        main(words)
    assert "--result needs --what" in capsys.readouterr().err
    assert main(["compare", str(study), "--names", "c"]) == 2
    assert "holds no finished run of c" in capsys.readouterr().err


def test_heat_map_of_a_kernel_is_written(tmp_path, capsys):
    features = torch.randn(6, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    kernel, labels = (features @ features.T)[None, :, None, :, None], torch.arange(6) % 2
    path = write_kernel(tmp_path, "train", "sst-2", kernel, labels)
    assert main(["heatmap", str(path)]) == 0
    assert "mean entry within classes" in capsys.readouterr().out
    assert (tmp_path / "train_kernels_sst-2.png").stat().st_size > 5_000
    other = write_kernel(tmp_path, "dev", "sst-2", kernel[:, :, :, :4], labels[:4])
    assert main(["heatmap", str(other)]) == 2
    assert "needs the train kernel" in capsys.readouterr().err
    assert main(["heatmap", "x.pt"]) == 2


def test_picture_of_changes_against_their_expansion_shows_each_logit(tmp_path):
    pyplot = pytest.importorskip("matplotlib.pyplot")
    slope = np.random.default_rng(0).normal(size=(8, 2))
    pictures.scatter(slope, slope + 0.1, 0.05, tmp_path / "expansion.png")
    assert pyplot.imread(tmp_path / "expansion.png").std() > 0.05
    one = tmp_path / "one.png"
    pictures.scatter(slope[:, :1], slope[:, :1], 0.0, one)
    assert (pyplot.imread(one) != pyplot.imread(tmp_path / "expansion.png")).any()


def test_regularizations_of_kernels_and_their_means(tmp_path):
    module = script("kernel_regularization")
    truth, rows = np.array([0, 1, 1, 0, 1]), []
    for seed in (0, 1):
        gradients = np.random.default_rng(seed).normal(size=(11, 4))
        train, test = (gradients[:6] @ part.T for part in (gradients[:6], gradients[6:]))
        labels = np.array([0, 1, 0, 1, 0, 1])
        folder = tmp_path / f"kernel{seed}"
        for split, kernel, of_split in (("train", train, labels), ("test", test, truth)):
            write_kernel(
                folder, split, "sst2", torch.from_numpy(kernel)[None, :, None, :, None], torch.tensor(of_split)
            )
        found = module.measured(folder)
        rows += found
        by_value = {(row["regularization"], row["quantity"]): row["value"] for row in found}
        for value in ("0.001", "0.1"):  # (K + r |K| I) a = y
            matrix = train + float(value) * np.linalg.norm(train, 2) * np.eye(6)
            scores = test.T @ np.linalg.solve(matrix, 2.0 * labels - 1)
            assert by_value[value, module.LOSS] == pytest.approx(np.mean((scores - (2 * truth - 1)) ** 2))
            assert by_value[value, module.ACCURACY] == pytest.approx(100 * np.mean((scores > 0) == truth))
        assert by_value["loo", module.LOSS] == by_value[f"{by_value['loo', 'chosen']:g}", module.LOSS]
    means = module.means(rows)
    assert len(means) == 2 * (len(module.VALUES) + 1)
    for row in means:
        same = [r["value"] for r in rows if all(r[key] == row[key] for key in ("regularization", "quantity"))]
        assert len(same) == 2 and row["value"] == pytest.approx(sum(same) / 2)
    assert module.means([*rows, *means]) == means  # a file that holds means already
