"""Leaving one out and gradient flow, against solving without the row and integrating the equation."""

import numpy as np
import pytest
from solver_problems import flat, problem, random_problem, solved

from hf_ft_ext.errors import InputError
from hf_ft_ext.kernel.solvers import (
    KernelSystem,
    Solver,
    SolverOptions,
)


@pytest.mark.parametrize("scalars, coupling", [(1, "full"), (3, "full"), (3, "by_class"), (3, "shared")])
def test_leave_one_out_equals_solving_without_the_row(scalars, coupling):
    kernel, _ = random_problem(scalars)
    labels, r = np.arange(15) % max(scalars, 2), 0.05
    options = SolverOptions(Solver.LSTSQ, coupling=coupling)
    found = KernelSystem(options, kernel, labels).leave_one_out(r)
    norms = {"full": lambda: [np.linalg.norm(flat(kernel[0]), 2)]}.get(coupling)
    if coupling == "by_class":
        norms = lambda: [np.linalg.norm(kernel[0, :, c, :, c], 2) for c in range(3)]  # noqa: E731
    if coupling == "shared":
        norms = lambda: [np.linalg.norm(np.einsum("icjc->ij", kernel[0]) / 3, 2)]  # noqa: E731
    for i in range(15):
        rest = [k for k in range(15) if k != i]
        part, y = kernel[0][rest][:, :, rest], np.eye(3)[labels[rest]] if scalars == 3 else 2.0 * labels[rest] - 1
        across = kernel[0][rest][:, :, [i]]
        if coupling == "full":
            n = 14 * scalars
            alpha = np.linalg.solve(part.reshape(n, n) + r * norms()[0] * np.eye(n), y.reshape(-1))
            expected = across.reshape(n, scalars).T @ alpha
        else:
            own, new = ([k[:, c, :, c] for c in range(3)] for k in (part, across))
            if coupling == "shared":
                own, new = [sum(own) / 3] * 3, [sum(new) / 3] * 3
            lams = norms() * (3 if coupling == "shared" else 1)
            expected = [new[c].T @ np.linalg.solve(own[c] + r * lams[c] * np.eye(14), y[:, c]) for c in range(3)]
            expected = np.concatenate(expected)
        np.testing.assert_allclose(found[i], expected, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("scalars", [1, 3])
@pytest.mark.parametrize("r", [0.0, 0.1])
def test_gradient_flow_equals_the_integrated_differential_equation(scalars, r):
    """d f(x) / dt = -1/N K(x, X) (f(X) - y), plus the regularization: integrated by Runge-Kutta."""
    kernel, other = random_problem(scalars, n=6)
    labels = np.arange(6) % max(scalars, 2)
    y = (np.eye(3)[labels] if scalars == 3 else 2.0 * labels[:, None] - 1).reshape(-1)
    rng = np.random.default_rng(2)
    f0, g0 = rng.normal(size=y.shape), rng.normal(size=9 * scalars)
    k, across = flat(kernel[0]), flat(other[0])
    lam = r * np.linalg.norm(k, 2)

    def change(alpha):  # of theta - theta_0 = sum_i alpha_i J_i: f(X) = f_0 + K alpha
        return -(f0 + k @ alpha - y + lam * alpha) / 6

    alpha, step = np.zeros_like(y), 0.0005
    for _ in range(400):
        a = change(alpha)
        b = change(alpha + step / 2 * a)
        c = change(alpha + step / 2 * b)
        alpha = alpha + step / 6 * (a + 2 * b + 2 * c + change(alpha + step * c))
    options = SolverOptions(Solver.LSTSQ, r, time=0.2)
    system = KernelSystem(options, kernel, labels, f0.reshape(6, -1))
    found = system.solve().predict(other, g0.reshape(9, -1))
    np.testing.assert_allclose(found, (g0 + across.T @ alpha).reshape(9, -1), rtol=1e-7)
    assert np.abs(f0 + k @ alpha - y).max() > 1e-3  # not yet at the end
    for late in (1e9, np.inf):
        end = system.solve(time=late).predict(other)
        np.testing.assert_allclose(end, system.solve(time=np.inf).predict(other), rtol=1e-9)
    np.testing.assert_allclose(system.solve(time=0.0).predict(other), 0, atol=1e-12)


def test_gradient_flow_does_not_move_in_the_null_space():
    kernel, labels, other, _ = problem(2, 1)  # rank 6 of 24
    found = solved(SolverOptions(Solver.LSTSQ, time=1e12), kernel, labels).predict(other)
    np.testing.assert_allclose(found, solved(SolverOptions(Solver.LSTSQ), kernel, labels).predict(other), rtol=1e-2)
    asymmetric = random_problem(1, symmetric=False)[0]
    with pytest.raises(InputError, match="gradient flow needs a symmetric kernel"):
        solved(SolverOptions(Solver.LSTSQ, time=1.0), asymmetric, np.arange(15) % 2)
