"""Solvers against their formulas, multi-class and regression, and combinations that cannot work."""

import numpy as np
import pytest

from hf_ft_ext.errors import InputError
from hf_ft_ext.kernel.formulas import Formula
from hf_ft_ext.kernel.solvers import KernelModel, Solver, SolverOptions, check_combination, check_labels


def problem(classes: int, scalars: int, n: int = 24, m: int = 40, seed: int = 0, kernels: int = 1):
    """Jacobians with a direction per class; kernels of train with train and with test, and labels."""
    rng = np.random.default_rng(seed)
    means = 3 * rng.normal(size=(classes, 6))
    labels, truth = np.arange(n) % classes, np.arange(m) % classes
    size = 6 * scalars

    def jacobians(labels):
        features = means[labels] + rng.normal(size=(len(labels), 6))
        return np.einsum("nf,ab->nafb", features, np.eye(scalars)).reshape(len(labels), scalars, size)

    train, test = jacobians(labels), jacobians(truth)
    products = [(train, test), (np.sign(train), test), (train, np.sign(test))][-kernels:] if kernels == 2 else None
    if kernels == 2:
        kernel = np.stack([np.einsum("iap,jbp->iajb", np.sign(train), train)] * 2)
        kernel[1] = kernel[0].transpose(2, 3, 0, 1)
        other = np.stack([np.einsum("iap,jbp->iajb", a, b) for a, b in products])
        return kernel, labels, other, truth
    return (
        np.einsum("iap,jbp->iajb", train, train)[None],
        labels,
        np.einsum("iap,jbp->iajb", train, test)[None],
        truth,
    )


def predicted(found: np.ndarray) -> np.ndarray:
    return (found[:, 0] > 0).astype(int) if found.shape[1] == 1 else found.argmax(1)


@pytest.mark.parametrize("classes, scalars", [(2, 1), (2, 2), (4, 4)])
@pytest.mark.parametrize("solver", Solver)
def test_every_solver_takes_two_and_more_classes(solver, classes, scalars):
    kernels = 2 if solver is Solver.ASYM else 1
    kernel, labels, other, truth = problem(classes, scalars, kernels=kernels)
    model = KernelModel(SolverOptions(solver, regularization=1e-3), kernel, labels)
    found = model.predict(other)
    assert found.shape == (40, scalars)
    assert np.mean(predicted(found) == truth) > 0.85, (solver, np.mean(predicted(found) == truth))
    assert np.mean(predicted(model.predict(kernel)) == labels) > 0.9
    assert 0 <= model.loss(found, truth) < 2


def test_least_squares_equal_the_normal_equations():
    kernel, labels, other, _ = problem(3, 3)
    model = KernelModel(SolverOptions(Solver.LSTSQ, regularization=0.01), kernel, labels)
    flat = kernel[0].reshape(72, 72)
    alpha = np.linalg.solve(flat + 0.01 * np.linalg.norm(flat, 2) * np.eye(72), np.eye(3)[labels].reshape(-1))
    np.testing.assert_allclose(model.predict(other), (other[0].reshape(72, 120).T @ alpha).reshape(40, 3), rtol=1e-6)
    assert model.rank == 72 and 1 < model.condition <= 101.1


def test_an_asymmetric_kernel_is_fitted_by_its_columns():
    """f(x_j) = sum_i alpha_i K[i, j]: the train predictions have to be the targets."""
    rng = np.random.default_rng(0)
    kernel = rng.normal(size=(1, 5, 1, 5, 1))
    labels = np.array([0, 1, 1, 0, 1])
    model = KernelModel(SolverOptions(Solver.LSTSQ), kernel, labels)
    np.testing.assert_allclose(model.predict(kernel), 2.0 * labels[:, None] - 1, atol=1e-10)


def test_the_coupled_system_is_the_published_one():
    kernel, labels, other, _ = problem(2, 1, kernels=2)
    gamma, mix = 0.7, 0.3
    model = KernelModel(SolverOptions(Solver.ASYM, gamma=gamma, mix=mix), kernel, labels)
    y = 2.0 * labels - 1
    h = np.diag(y) @ kernel[0, :, 0, :, 0] @ np.diag(y)
    eye = np.eye(24) / gamma
    alpha, beta = np.split(np.linalg.solve(np.block([[eye, h], [h.T, eye]]), np.ones(48)), 2)
    expected = mix * other[0, :, 0, :, 0].T @ (alpha * y) + (1 - mix) * other[1, :, 0, :, 0].T @ (beta * y)
    np.testing.assert_allclose(model.predict(other)[:, 0], expected, rtol=1e-6)


@pytest.mark.parametrize("solver", [Solver.LSTSQ, Solver.SVR])
def test_scores(solver):
    rng = np.random.default_rng(0)
    train, test, weights = rng.normal(size=(40, 5)), rng.normal(size=(30, 5)), rng.normal(size=5)
    kernel, other = (train @ train.T)[None, :, None, :, None], (train @ test.T)[None, :, None, :, None]
    options = SolverOptions(solver, regularization=1e-6, svm_c=100.0, regression=True)
    model = KernelModel(options, kernel, train @ weights)
    assert np.corrcoef(model.predict(other)[:, 0], test @ weights)[0, 1] > 0.99
    assert model.loss(model.predict(other), test @ weights) < 0.1


def test_predictions_relative_to_the_start():
    kernel, labels, other, _ = problem(2, 2)
    start, begin = np.random.default_rng(1).normal(size=(24, 2)), np.ones((40, 2))
    kernel = kernel + np.eye(48).reshape(1, 24, 2, 24, 2)  # of full rank
    model = KernelModel(SolverOptions(Solver.LSTSQ), kernel, labels, start)
    np.testing.assert_allclose(model.predict(kernel, start), np.eye(2)[labels], atol=1e-10)
    np.testing.assert_allclose(model.predict(other, begin) - model.predict(other), 1, rtol=1e-10)


def test_an_ill_conditioned_kernel_is_said_to_be_one(caplog):
    kernel, labels, other, _ = problem(2, 1, n=24)  # rank 6
    model = KernelModel(SolverOptions(Solver.LSTSQ), kernel, labels)
    assert model.rank == 6 and model.condition > 1e12
    assert "ill-conditioned: rank 6 of 24" in caplog.text and "kernel_regularization" in caplog.text
    assert np.isfinite(model.predict(other)).all()


@pytest.mark.parametrize(
    "options, message",
    [
        ({"solver": Solver.LOGISTIC, "regression": True}, "logistic classifies, but the task is regression; pass"),
        ({"solver": Solver.SVC, "regression": True}, "kernel_solver=svc classifies"),
        ({"solver": Solver.ASYM}, "needs|solves with a kernel and its flip, which kernel_formula=sgd does not give"),
        ({"solver": Solver.SVR, "formula": Formula.ASYMMETRIC_SIGNGD}, "svr needs a symmetric kernel"),
        ({"solver": Solver.SVC, "adjust_for_init": True}, "predicts classes, from which the logits at the start"),
        ({"binary": True, "classes": 3}, "binary_classification needs two classes, but the task has 3 classes"),
        ({"binary": True, "regression": True}, "but the task has scores"),
    ],
)
def test_combinations_that_cannot_work(options, message):
    defaults = {"solver": Solver.LSTSQ, "formula": Formula.SGD, "regression": False, "adjust_for_init": False}
    with pytest.raises(InputError, match=message):
        check_combination(**{**defaults, "classes": 2, "binary": False, **options})


def test_labels_that_cannot_be_learnt():
    with pytest.raises(InputError, match="no example of 'b', 'd'; a kernel method learns only"):
        check_labels(np.array([0, 2, 2]), ["a", "b", "c", "d"])
    kernel, _, _, _ = problem(2, 1, n=3)
    with pytest.raises(InputError, match="a class has a single example; pass kernel_solver=lstsq"):
        KernelModel(SolverOptions(Solver.LOGISTIC), kernel, np.array([0, 0, 1]))
