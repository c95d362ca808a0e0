"""Solvers against their formulas, several classes and labels, grids, and invalid combinations."""

import numpy as np
import pytest
import scipy.linalg
from sklearn.linear_model import LogisticRegressionCV
from sklearn.svm import SVC, SVR
from solver_problems import flat, problem, random_problem, solved

from hf_ft_ext.errors import InputError
from hf_ft_ext.kernel.solvers import (
    Coupling,
    GeneralMatrix,
    KernelSystem,
    Solver,
    SolverOptions,
    SymmetricMatrix,
    matrix_of,
)

GRID = (0.0, 1e-6, 1e-4, 1e-2, 1.0)


def predicted(found: np.ndarray) -> np.ndarray:
    return (found[:, 0] > 0).astype(int) if found.shape[1] == 1 else found.argmax(1)


@pytest.mark.parametrize("classes, scalars", [(2, 1), (2, 2), (4, 4)])
@pytest.mark.parametrize("solver", Solver)
def test_every_solver_takes_two_and_more_classes(solver, classes, scalars):
    kernels = 2 if solver is Solver.ASYM else 1
    kernel, labels, other, truth = problem(classes, scalars, kernels=kernels)
    for coupling in solver.couplings:
        if coupling is Coupling.PSEUDO:  # of one scalar
            continue
        model = solved(SolverOptions(solver, regularization=1e-3, coupling=coupling), kernel, labels)
        found = model.predict(other)
        assert found.shape == (40, scalars)
        assert np.mean(predicted(found) == truth) > 0.85, (solver, coupling, np.mean(predicted(found) == truth))
        assert np.mean(predicted(model.predict(kernel)) == labels) > 0.9
        assert 0 <= model.loss(found, truth) < 2


def ridge(matrix: np.ndarray, r: float) -> np.ndarray:
    return matrix + r * np.linalg.norm(matrix, 2) * np.eye(len(matrix))


def plain_lstsq(kernel, other, targets, r):
    alpha = scipy.linalg.lstsq(ridge(flat(kernel[0]), r).T, targets.reshape(-1))[0]
    return (flat(other[0]).T @ alpha).reshape(-1, targets.shape[1])


def plain_asym(kernel, other, labels, r, gamma, mix):
    columns = []
    for c in range(kernel.shape[2]):
        y = np.where(labels == c, 1.0, -1.0)
        h = np.diag(y) @ ridge(kernel[0, :, c, :, c], r) @ np.diag(y)
        eye = np.eye(len(y)) / gamma
        both = scipy.linalg.lstsq(np.block([[eye, h], [h.T, eye]]), np.ones(2 * len(y)))[0]
        alpha, beta = np.split(both, 2)
        columns.append(mix * other[0, :, c, :, c].T @ (alpha * y) + (1 - mix) * other[1, :, c, :, c].T @ (beta * y))
    return np.stack(columns, 1)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("scalars", [1, 3])
def test_grid_from_one_system_equals_separate_solutions(scalars, symmetric):
    kernel, other = random_problem(scalars, symmetric=symmetric)
    labels = np.arange(15) % max(scalars, 2)
    targets = np.eye(3)[labels] if scalars == 3 else 2.0 * labels[:, None] - 1
    start = np.random.default_rng(1).normal(size=targets.shape)
    system = KernelSystem(SolverOptions(Solver.LSTSQ), kernel, labels, start)
    assert isinstance(system.matrices[0], SymmetricMatrix if symmetric else GeneralMatrix)
    for r in GRID:
        model = system.solve(r)
        np.testing.assert_allclose(model.predict(other), plain_lstsq(kernel, other, targets - start, r), rtol=1e-8)
        sizes = np.linalg.svd(ridge(flat(kernel[0]), r), compute_uv=False)
        assert model.rank == np.linalg.matrix_rank(ridge(flat(kernel[0]), r))
        assert model.condition == pytest.approx(sizes.max() / sizes.min(), rel=1e-6)


def test_a_grid_takes_one_decomposition(monkeypatch):
    calls = []
    plain = scipy.linalg.eigh
    monkeypatch.setattr(scipy.linalg, "eigh", lambda *a, **k: calls.append("eigh") or plain(*a, **k))
    for name in ("lstsq", "svd", "solve", "eigvalsh"):
        monkeypatch.setattr(scipy.linalg, name, lambda *a, **k: pytest.fail("a second decomposition"))
    monkeypatch.setattr(np.linalg, "svd", lambda *a, **k: pytest.fail("a second decomposition"))
    kernel, other = random_problem(3)
    system = KernelSystem(SolverOptions(Solver.LSTSQ), kernel, np.arange(15) % 3)
    for r in GRID:
        system.solve(r).predict(other)
        system.leave_one_out(r)
    assert calls == ["eigh"]


@pytest.mark.parametrize("r", GRID)
def test_coupled_system_equals_the_published_one(r):
    kernel, other = random_problem(3, symmetric=False)
    labels, gamma, mix = np.arange(15) % 3, 0.7, 0.3
    system = KernelSystem(SolverOptions(Solver.ASYM, gamma=gamma, mix=mix), kernel, labels)
    np.testing.assert_allclose(
        system.solve(r).predict(other), plain_asym(kernel, other, labels, r, gamma, mix), rtol=1e-6, atol=1e-9
    )


@pytest.mark.parametrize("kind", ["two classes", "three classes", "several labels"])
def test_coupled_system_fits_the_difference_from_the_initial_outputs(kind):
    scalars = 1 if kind == "two classes" else 3
    kernel, other = random_problem(scalars, symmetric=False)
    rng, labels, multi = np.random.default_rng(1), np.arange(15) % max(scalars, 2), kind == "several labels"
    labels = rng.integers(0, 2, (15, 3)) if multi else labels
    truth = labels if multi else labels[:, None] if scalars == 1 else labels[:, None] == np.arange(3)
    targets = np.where(truth, 1.0, -1.0)
    start, new_start = rng.normal(size=(15, scalars)), rng.normal(size=(other.shape[3], scalars))
    options = SolverOptions(Solver.ASYM, regularization=1e-2, gamma=0.7, mix=0.3, multi_label=multi)
    found = KernelSystem(options, kernel, labels, start).solve().predict(other, new_start)
    for c in range(scalars):
        matrix, y = ridge(kernel[0, :, c, :, c], 1e-2), targets[:, c] - start[:, c]
        eye = np.eye(15) / 0.7
        a, b = np.split(np.linalg.solve(np.block([[eye, matrix], [matrix.T, eye]]), np.append(y, y)), 2)
        expected = new_start[:, c] + 0.3 * other[0, :, c, :, c].T @ a + 0.7 * other[1, :, c, :, c].T @ b
        np.testing.assert_allclose(found[:, c], expected, rtol=1e-8)
    # With errors that cost much and the kernel's transpose as its flip, the training rows are fitted exactly.
    both = np.stack([kernel[0], kernel[0].transpose(2, 3, 0, 1)])
    exact = KernelSystem(SolverOptions(Solver.ASYM, gamma=1e9, multi_label=multi), both, labels, start).solve()
    np.testing.assert_allclose(exact.predict(both, start), targets, atol=1e-5)


def test_a_singular_coupled_system_gives_the_least_norm():
    """With gamma 1 and an orthogonal kernel the coupled matrix is singular."""
    kernel = np.linalg.qr(np.random.default_rng(0).normal(size=(6, 6)))[0]
    labels = np.arange(6) % 2
    both = np.stack([kernel, kernel.T])[:, :, None, :, None]
    model = solved(SolverOptions(Solver.ASYM), both, labels)
    y = 2.0 * labels - 1
    h = np.diag(y) @ kernel @ np.diag(y)
    alpha, beta = np.split(np.linalg.pinv(np.block([[np.eye(6), h], [h.T, np.eye(6)]])) @ np.ones(12), 2)
    expected = 0.5 * kernel.T @ (alpha * y) + 0.5 * kernel @ (beta * y)
    np.testing.assert_allclose(model.predict(both)[:, 0], expected, atol=1e-10)


@pytest.mark.parametrize("coupling", [Coupling.FULL, Coupling.BY_CLASS, Coupling.SHARED])
@pytest.mark.parametrize("r", [0.0, 1e-2])
def test_support_vector_regression_is_that_of_scikit_learn(coupling, r):
    kernel, other = random_problem(3)
    labels = np.arange(15) % 3
    found = solved(SolverOptions(Solver.SVR, r, svm_c=0.01, coupling=coupling), kernel, labels).predict(other)
    if coupling is Coupling.FULL:
        svm = SVR(kernel="precomputed", C=0.01).fit(ridge(flat(kernel[0]), r), np.eye(3)[labels].reshape(-1))
        expected = svm.predict(flat(other[0]).T).reshape(-1, 3)
    else:
        own, across = ([k[0, :, c, :, c] for c in range(3)] for k in (kernel, other))
        if coupling is Coupling.SHARED:
            own, across = [sum(own) / 3] * 3, [sum(across) / 3] * 3
        svms = [SVR(kernel="precomputed", C=0.01).fit(ridge(own[c], r), 1.0 * (labels == c)) for c in range(3)]
        expected = np.stack([svm.predict(across[c].T) for c, svm in enumerate(svms)], 1)
    np.testing.assert_allclose(found, expected, rtol=1e-6)


@pytest.mark.parametrize("classes, scalars", [(2, 1), (2, 2), (3, 3), (5, 5)])
@pytest.mark.parametrize("r", [0.0, 1e-2])
def test_support_vector_classification_is_that_of_scikit_learn(classes, scalars, r):
    kernel, other = random_problem(scalars, seed=classes)
    labels = np.random.default_rng(3).permutation(np.arange(15) % classes)
    found = solved(SolverOptions(Solver.SVC, r, svm_c=0.02), kernel, labels).predict(other)
    own, across = (np.einsum("icjc->ij", k[0]) for k in (kernel, other))
    svm = SVC(kernel="precomputed", C=0.02, decision_function_shape="ovr").fit(ridge(own, r), labels)
    expected = svm.decision_function(across.T)
    if classes == 2:
        margin = found[:, 0] if scalars == 1 else found[:, 1] - found[:, 0]
        np.testing.assert_allclose(margin, expected, rtol=1e-6)
    else:
        np.testing.assert_allclose(found, expected, rtol=1e-6)


@pytest.mark.parametrize("coupling", [Coupling.FULL, Coupling.SHARED])
@pytest.mark.parametrize("classes, scalars", [(2, 1), (2, 2), (3, 3)])
def test_logistic_regression_is_that_of_scikit_learn(classes, scalars, coupling):
    kernel, other = random_problem(scalars)
    labels = np.arange(15) % classes
    found = solved(SolverOptions(Solver.LOGISTIC, 1e-3, coupling=coupling), kernel, labels).predict(other)
    if coupling is Coupling.FULL:
        matrix = ridge(flat(kernel[0]), 1e-3)
        features = matrix.reshape(15, scalars, 15, scalars).transpose(2, 0, 1, 3).reshape(15, -1)
        new = other[0].transpose(2, 0, 1, 3).reshape(9, -1)
    else:
        matrix = features = ridge(np.einsum("icjc->ij", kernel[0]) / scalars, 1e-3)
        new = np.einsum("icjc->ji", other[0]) / scalars
    scale = 1 / np.mean(matrix.diagonal())
    model = LogisticRegressionCV(
        Cs=np.logspace(-4, 8, 13), cv=5, max_iter=10_000, l1_ratios=(0,), scoring="neg_log_loss",
        use_legacy_attributes=False,
    )  # fmt: skip
    expected = model.fit(scale * features, labels).predict_log_proba(scale * new)
    if scalars == 1:
        expected = expected[:, 1:] - expected[:, :1]
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_several_labels_are_solved_separately():
    """For every solver the columns equal those of separate two-class problems with one scalar."""
    kernel, other = random_problem(3)
    labels = np.random.default_rng(0).integers(0, 2, (15, 3))
    labels[:2], labels[2:4] = 0, 1
    for solver in Solver:
        options = SolverOptions(solver, 1e-2, multi_label=True, svm_c=0.05)
        found = solved(options, kernel, labels).predict(other)
        for c in range(3):
            one, across = kernel[:, :, c : c + 1, :, c : c + 1], other[:, :, c : c + 1, :, c : c + 1]
            alone = solved(SolverOptions(solver, 1e-2, svm_c=0.05), one, labels[:, c]).predict(across)
            np.testing.assert_allclose(found[:, c], alone[:, 0], rtol=1e-5, atol=1e-8, err_msg=solver)
        model = solved(options, kernel, labels)
        assert 0 <= model.loss(model.predict(kernel), labels) < model.loss(-model.predict(kernel), labels)
    labels[:, 1] = 1
    for solver in (Solver.SVC, Solver.LOGISTIC):
        with pytest.raises(InputError, match=f"{solver.value} separates two classes .* the same value of label 1"):
            solved(SolverOptions(solver, multi_label=True), kernel, labels)


def test_couplings_are_different_systems():
    kernel, other = random_problem(3)
    labels = np.arange(15) % 3
    by_class, shared = (solved(SolverOptions(Solver.LSTSQ, 0.1, coupling=c), kernel, labels).predict(other)
                        for c in (Coupling.BY_CLASS, Coupling.SHARED))  # fmt: skip
    mean, across = (np.einsum("icjc->ij", k[0]) / 3 for k in (kernel, other))
    np.testing.assert_allclose(shared, across.T @ np.linalg.solve(ridge(mean, 0.1), np.eye(3)[labels]), rtol=1e-9)
    for c in range(3):
        alpha = np.linalg.solve(ridge(kernel[0, :, c, :, c], 0.1), 1.0 * (labels == c))
        np.testing.assert_allclose(by_class[:, c], other[0, :, c, :, c].T @ alpha, rtol=1e-9)


@pytest.mark.slow
def test_many_classes_are_solved_without_the_full_matrix():
    rng = np.random.default_rng(0)
    n, classes = 160, 80  # the full matrix would hold 12,800 x 12,800 products
    labels = np.arange(n) % classes
    means = rng.normal(size=(classes, 40))
    train, test = (means[labels] + 0.1 * rng.normal(size=(n, 40)) for _ in range(2))
    scales = rng.uniform(0.5, 2, classes)  # each class's own kernel, `[N, C, N]`
    kernel, other = (np.einsum("ij,c->icj", train @ x.T, scales)[None] for x in (train, test))
    for coupling in (Coupling.SHARED, Coupling.BY_CLASS):
        model = solved(SolverOptions(Solver.LSTSQ, 1e-3, coupling=coupling), kernel, labels)
        assert model.solution.coefficients.shape == (1, n, classes)
        assert np.mean(model.predict(other).argmax(1) == labels) > 0.95
    with pytest.raises(InputError, match="needs products of different classes too"):
        KernelSystem(SolverOptions(Solver.LSTSQ), kernel, labels)


def test_a_singular_asymmetric_kernel_gives_the_least_norm():
    rng = np.random.default_rng(0)
    kernel = (rng.normal(size=(8, 5)) @ rng.normal(size=(5, 8)))[None, :, None, :, None]
    labels = np.arange(8) % 2
    model = solved(SolverOptions(Solver.LSTSQ), kernel, labels)
    expected = np.linalg.pinv(kernel[0, :, 0, :, 0].T) @ (2.0 * labels - 1)
    np.testing.assert_allclose(model.solution.coefficients[0, :, 0], expected, rtol=1e-6)
    assert model.rank == 5


@pytest.mark.parametrize("solver", [Solver.LSTSQ, Solver.SVR, Solver.SVC, Solver.LOGISTIC])
def test_one_scalar_serves_all_classes(solver):
    """With the same kernel, `shared` and `pseudo` are the same problem."""
    kernel, other = random_problem(3)
    mean, across = (np.einsum("kicjc->kij", k)[:, :, None, :, None] / 3 for k in (kernel, other))
    labels = np.arange(15) % 3
    shared = solved(SolverOptions(solver, 0.1, svm_c=0.05, coupling=Coupling.SHARED), kernel, labels).predict(other)
    options = SolverOptions(solver, 0.1, svm_c=0.05, coupling=Coupling.PSEUDO)
    pseudo = KernelSystem(options, mean, labels, scalars=3).solve()
    assert pseudo.scalars == 3 and pseudo.predict(across).shape == (9, 3)
    np.testing.assert_allclose(pseudo.predict(across), shared, rtol=1e-6)


# --- formulas ---------------------------------------------------------------------------------------------


def test_least_squares_equal_the_normal_equations():
    kernel, labels, other, _ = problem(3, 3)
    model = solved(SolverOptions(Solver.LSTSQ, regularization=0.01), kernel, labels)
    matrix = kernel[0].reshape(72, 72)
    alpha = np.linalg.solve(matrix + 0.01 * np.linalg.norm(matrix, 2) * np.eye(72), np.eye(3)[labels].reshape(-1))
    np.testing.assert_allclose(model.predict(other), (other[0].reshape(72, 120).T @ alpha).reshape(40, 3), rtol=1e-6)
    assert model.rank == 72 and 1 < model.condition <= 101.1


def test_an_asymmetric_kernel_is_fitted_by_its_columns():
    """f(x_j) = sum_i alpha_i K[i, j]: the train predictions have to be the targets."""
    rng = np.random.default_rng(0)
    kernel = rng.normal(size=(1, 5, 1, 5, 1))
    labels = np.array([0, 1, 1, 0, 1])
    model = solved(SolverOptions(Solver.LSTSQ), kernel, labels)
    np.testing.assert_allclose(model.predict(kernel), 2.0 * labels[:, None] - 1, atol=1e-10)


def test_kernel_with_float32_rounding_counts_as_symmetric():
    features = np.random.default_rng(0).normal(size=(20, 30)).astype(np.float32)
    matrix = (features @ features.T).astype(float)
    assert isinstance(matrix_of(matrix * (1 + 1e-7 * np.tri(20))), SymmetricMatrix)
    assert isinstance(matrix_of(matrix * (1 + 1e-2 * np.tri(20))), GeneralMatrix)


@pytest.mark.parametrize("solver", [Solver.LSTSQ, Solver.SVR])
@pytest.mark.parametrize("scalars", [1, 2])
def test_regression_fits_scores(solver, scalars):
    rng = np.random.default_rng(0)
    train, test, weights = rng.normal(size=(40, 5)), rng.normal(size=(30, 5)), rng.normal(size=(5, scalars))
    kernel, other = (np.einsum("ij,ab->iajb", train @ x.T, np.eye(scalars))[None] for x in (train, test))
    options = SolverOptions(solver, regularization=1e-6, svm_c=100.0, regression=True)
    model = solved(options, kernel, train @ weights)
    truth = test @ weights
    for c in range(scalars):
        assert np.corrcoef(model.predict(other)[:, c], truth[:, c])[0, 1] > 0.99
    assert model.loss(model.predict(other), truth) < 0.1 * scalars
    with pytest.raises(InputError, match=f"each row has {scalars + 1} labels, but the kernel has {scalars} scalars"):
        solved(options, kernel, np.zeros((40, scalars + 1)))


def test_initial_outputs_are_subtracted_and_added():
    kernel, labels, other, _ = problem(2, 2)
    start, begin = np.random.default_rng(1).normal(size=(24, 2)), np.ones((40, 2))
    kernel = kernel + np.eye(48).reshape(1, 24, 2, 24, 2)  # of full rank
    model = solved(SolverOptions(Solver.LSTSQ), kernel, labels, start)
    np.testing.assert_allclose(model.predict(kernel, start), np.eye(2)[labels], atol=1e-10)
    np.testing.assert_allclose(model.predict(other, begin) - model.predict(other), 1, rtol=1e-10)


def test_ill_conditioned_kernel_is_warned_about(caplog):
    kernel, labels, other, _ = problem(2, 1, n=24)  # rank 6
    model = solved(SolverOptions(Solver.LSTSQ), kernel, labels)
    assert model.rank == 6 and model.condition > 1e12
    assert "ill-conditioned: rank 6 of 24" in caplog.text and "kernel_regularization" in caplog.text
    assert np.isfinite(model.predict(other)).all()
