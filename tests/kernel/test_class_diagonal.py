"""Kernels of each scalar with itself, and the two solvers that need only these."""

import numpy as np
import pytest
import torch
from families import batch, family
from kernel_runs import make
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from tiny import one_layer_model, tiny_dataset
from transformers import BertConfig, BertForMaskedLM

from hf_ft_ext import empirical_ntk
from hf_ft_ext.errors import InputError
from hf_ft_ext.kernel.engines import contraction
from hf_ft_ext.kernel.ntk import KernelComputation, KernelOptions
from hf_ft_ext.kernel.rows import ExampleRows
from hf_ft_ext.kernel.schedule import measure
from hf_ft_ext.kernel.solvers import KernelSystem, Solver, SolverOptions
from hf_ft_ext.kernel.store import KernelStore

LEFT, RIGHT = batch(3), batch(4, 11, seed=1)  # two blocks of two rows on either side


def diagonal(kernel: torch.Tensor) -> torch.Tensor:
    """`[..., N1, C, N2, C]` as `[..., N1, C, N2]`."""
    return torch.einsum("...iaja->...iaj", kernel)


def assert_diagonal(model, right, formula, **options):
    whole = diagonal(empirical_ntk(model, LEFT, right, formula, **options))
    found = empirical_ntk(model, LEFT, right, formula, class_diagonal=True, **options)
    assert found.shape == whole.shape and found.dtype == torch.float64
    assert (found - whole).abs().max() <= (0 if formula == "signgd" else 1e-12 * whole.abs().max())


@pytest.mark.parametrize("engine", ["auto", "jacobian"])
@pytest.mark.parametrize(
    "model_type, formula, symmetric, options",
    [
        ("bert", "sgd", False, {"block_rows": 2, "batch_size": 1}),
        ("bert", "asymmetric_signgd", True, {"block_rows": 2, "batch_size": 1}),
        ("deberta-v2", "sgd", True, {}),
        ("albert", "signgd", False, {"exclude_head": True}),
        ("gpt2", "signgd", True, {"block_rows": 2}),
        ("llama", "asymmetric_signgd", False, {"exclude_embeddings": True}),
        ("roberta", "sgd", False, {"binary_classification": True}),
    ],
)
def test_class_diagonal_equals_the_diagonal_of_the_full_kernel(model_type, formula, symmetric, options, engine):
    assert_diagonal(family(model_type).double(), None if symmetric else RIGHT, formula, engine=engine, **options)


@pytest.mark.parametrize("by_tokens", [True, False])
def test_class_diagonal_by_tokens_and_by_entries(by_tokens, monkeypatch):
    monkeypatch.setattr(contraction, "tokens_are_cheaper", lambda left, right: by_tokens)
    assert_diagonal(family("bert").double(), RIGHT, "sgd")


@pytest.mark.parametrize("formula", ["sgd", "asymmetric_signgd"])
def test_scalars_that_share_no_parameters(formula):
    """In a tied decoder each scalar reads its own word's row; no scalar reads the row of an unused token."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=64, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    model = get_peft_model(
        BertForMaskedLM(config).double(), LoraConfig(r=2, modules_to_save=["cls"], target_modules=["query"])
    )

    def words(model, inputs):
        return model(**inputs).logits[:, 1, 5:8]

    assert_diagonal(model, RIGHT, formula, function=words)
    assert_diagonal(BertForMaskedLM(config).double(), RIGHT, formula, function=words)


def test_memory_estimate_counts_one_scalar_at_a_time():
    computation = KernelComputation(family("bert"), KernelOptions("signgd"))
    rows = ExampleRows(LEFT)
    computation.engine.prepare(rows)
    assert measure(computation.engine, rows).row == 2 * measure(computation.engine, rows, class_diagonal=True).row


# --- solvers ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", [Solver.SVC, Solver.ASYM])
def test_solvers_by_class_predict_the_same_from_the_diagonal(solver):
    rng = np.random.default_rng(0)
    labels = np.arange(15) % 3
    train, other = (rng.normal(size=(n, 3, 40)) for n in (15, 6))
    whole, cross = (np.stack([np.einsum("iap,jbp->iajb", a, np.tanh(b)), np.einsum("iap,jbp->iajb", np.tanh(a), b)])
                    for a, b in ((train, train), (train, other)))  # fmt: skip
    options = SolverOptions(solver, regularization=0.1, mix=0.3)
    expected = KernelSystem(options, whole, labels).solve().predict(cross)
    parts = [np.einsum("kiaja->kiaj", kernel) for kernel in (whole, cross)]
    np.testing.assert_array_equal(KernelSystem(options, parts[0], labels).solve().predict(parts[1]), expected)
    with pytest.raises(InputError, match=r"kernel_classes=full needs products of different classes too"):
        KernelSystem(SolverOptions(Solver.LSTSQ), parts[0], labels)


def test_each_class_is_regularized_by_its_own_norm():
    rng = np.random.default_rng(0)
    labels = np.arange(8) % 2
    kernel = rng.normal(size=(2, 8, 2, 8)) * np.array([1.0, 100.0])[:, None]
    found = KernelSystem(SolverOptions(Solver.ASYM, 0.1, mix=1.0), kernel, labels).solve().predict(kernel)
    for c in range(2):
        y = np.where(labels == c, 1.0, -1.0)
        matrix = kernel[0, :, c]
        h = y[:, None] * (matrix + 0.1 * np.linalg.norm(matrix, 2) * np.eye(8)) * y
        alpha = np.linalg.solve(np.block([[np.eye(8), h], [h.T, np.eye(8)]]), np.ones(16))[:8]
        np.testing.assert_allclose(found[:, c], matrix.T @ (alpha * y), rtol=1e-8)


# --- runs -----------------------------------------------------------------------------------------------


def three(folder, solver="svc", **settings):
    data = {"train": tiny_dataset(12, num_labels=3), "evaluation": tiny_dataset(6, num_labels=3, seed=1)}
    return make(folder, one_layer_model(num_labels=3), **data, kernel_solver=solver, **settings)


def shapes(folder) -> set[tuple[int, ...]]:
    return {tuple(load_file(path)["kernel"].shape) for path in folder.glob("kernels/*/block-*.safetensors")}


def test_trainer_computes_only_the_products_that_its_solver_needs(tmp_path, monkeypatch):
    alone = three(tmp_path / "alone")
    alone.train()
    metrics = alone.evaluate()
    assert shapes(tmp_path / "alone") == {(1, 12, 3, 12), (1, 12, 3, 6)}

    whole = three(tmp_path / "whole", "lstsq", kernel_regularization="1e-3")
    whole.train()
    whole.evaluate()
    assert shapes(tmp_path / "whole") == {(1, 12, 3, 12, 3), (1, 12, 3, 6, 3)}
    with monkeypatch.context() as patch:
        patch.setattr(
            "hf_ft_ext.kernel.engines.structured.StructuredEngine.gradient_rows", None
        )  # nothing may be computed
        after = three(tmp_path / "whole")
        after.train()
        assert after.evaluate()["eval_loss"] == pytest.approx(metrics["eval_loss"], rel=1e-5)
    exported = three(tmp_path / "files", export_kernels=str(tmp_path / "written"))
    exported.train()
    assert shapes(tmp_path / "files") == {(1, 12, 3, 12, 3)}
    loaded = three(tmp_path / "loaded", load_kernels=str(tmp_path / "written"))
    loaded.train()
    assert loaded.solved.predict(loaded.source.kernel(loaded.train_dataset, "train")).shape == (12, 3)


def test_unfinished_full_kernel_is_not_used(tmp_path):
    whole = three(tmp_path, "lstsq", kernel_regularization="1e-3")
    whole.train()
    (block,) = tmp_path.glob("kernels/*/block-00000-00000.safetensors")
    block.unlink()
    three(tmp_path).train()
    assert shapes(tmp_path) == {(1, 12, 3, 12)} and not block.exists()


def test_finished_is_true_once_every_block_exists(tmp_path):
    about = {"model": "a", "second": None}
    computation = KernelComputation(family("bert"), KernelOptions(block_rows=2))
    assert not KernelStore(tmp_path, about).finished()
    computation.run(ExampleRows(batch(5)), None, KernelStore(tmp_path, about))
    store = KernelStore(tmp_path, about)
    assert store.finished() and len(list(store.folder.glob("block-*"))) == 6
    (store.folder / "block-00001-00002.safetensors").unlink()
    assert not store.finished()
