"""What solvers are chosen for and saved as, and combinations that are refused."""

import numpy as np
import pytest
from solver_problems import problem, random_problem, solved

from hf_ft_ext.errors import InputError
from hf_ft_ext.kernel.formulas import Formula
from hf_ft_ext.kernel.solvers import (
    FULL_UNKNOWNS,
    Coupling,
    KernelModel,
    Solver,
    SolverOptions,
    arrays_of,
    check_combination,
    check_labels,
    chosen_coupling,
    solution_of,
)


def test_the_coupling_follows_solver_task_and_size(caplog):
    assert chosen_coupling(Solver.LSTSQ, "auto", False, 100, 6) is Coupling.FULL
    assert chosen_coupling(Solver.LSTSQ, "auto", False, 600, 150) is Coupling.PSEUDO
    assert "90000 unknowns" in caplog.text.replace(",", "") and "kernel_classes=pseudo" in caplog.text
    assert chosen_coupling(Solver.LSTSQ, "auto", False, 600, 150, "adjust_for_init") is Coupling.SHARED
    with pytest.raises(InputError, match="sums the logits to one scalar, but adjust_for_init needs each class's own"):
        chosen_coupling(Solver.LSTSQ, "pseudo", False, 600, 150, "adjust_for_init")
    with pytest.raises(InputError, match="but this task has only one"):
        chosen_coupling(Solver.LSTSQ, "pseudo", False, 600, 1)
    assert chosen_coupling(Solver.LSTSQ, "full", False, 600, 150) is Coupling.FULL
    assert chosen_coupling(Solver.LSTSQ, "auto", False, 2 * FULL_UNKNOWNS, 1) is Coupling.FULL  # nothing to leave out
    assert chosen_coupling(Solver.SVC, "auto", False, 10, 3) is Coupling.SHARED
    assert chosen_coupling(Solver.SVR, "auto", True, 10, 3) is Coupling.BY_CLASS
    with pytest.raises(
        InputError, match="kernel_classes=full does not work with kernel_solver=svc; choose from: auto, shared, pseudo"
    ):
        chosen_coupling(Solver.SVC, "full", False, 10, 3)
    with pytest.raises(InputError, match="with several labels per row each label is solved separately"):
        chosen_coupling(Solver.LSTSQ, "full", True, 10, 3)


def test_solution_is_restored_from_its_arrays():
    kernel, other = random_problem(3)
    for solver in Solver:
        model = solved(SolverOptions(solver, 1e-2, svm_c=0.05), kernel, np.arange(15) % 3)
        again = KernelModel(model.options, 3, solution_of(model.solution.kind, arrays_of(model.solution)))
        assert np.array_equal(again.predict(other), model.predict(other))
        with pytest.raises(InputError, match="a kernel with 9 training rows does not fit a solution of 15"):
            model.predict(other.transpose(0, 3, 4, 1, 2))
    with pytest.raises(InputError, match="kind 'unknown' is unknown"):
        solution_of("unknown", {})
    with pytest.raises(InputError, match="coefficients of the kernel are missing, expected coefficients, intercept"):
        solution_of("linear", {})


@pytest.mark.parametrize(
    "options, message",
    [
        ({"solver": Solver.LOGISTIC, "regression": True}, "logistic classifies, but the task is regression; pass"),
        ({"solver": Solver.SVC, "regression": True}, "kernel_solver=svc classifies"),
        ({"solver": Solver.ASYM}, "needs a kernel and its flip, which kernel_formula=sgd does not give"),
        ({"solver": Solver.SVR, "formula": Formula.ASYMMETRIC_SIGNGD}, "svr needs a symmetric kernel"),
        ({"solver": Solver.SVC, "adjust_for_init": True}, "fits classes, from which the model's initial logits"),
        ({"binary": True, "classes": 3}, "binary_classification needs two classes, but the task has 3 classes"),
        ({"binary": True, "regression": True}, "but the task has scores"),
        ({"time": 2.0, "formula": Formula.SIGNGD, "adjust_for_init": True}, "not lstsq and signgd"),
        ({"time": 2.0, "solver": Solver.SVR, "adjust_for_init": True}, "kernel_time=2 means gradient flow"),
        ({"time": 2.0}, "gradient flow starts from the model's own outputs; pass adjust_for_init too"),
    ],
)
def test_invalid_combinations_are_refused(options, message):
    defaults = {"solver": Solver.LSTSQ, "formula": Formula.SGD, "regression": False, "adjust_for_init": False}
    with pytest.raises(InputError, match=message):
        check_combination(**{**defaults, "classes": 2, "binary": False, **options})


def test_labels_that_cannot_be_fitted_are_refused():
    with pytest.raises(InputError, match="no example of 'b', 'd'; a kernel method can only predict"):
        check_labels(np.array([0, 2, 2]), ["a", "b", "c", "d"])
    kernel, _, _, _ = problem(2, 1, n=3)
    with pytest.raises(InputError, match="a class has a single example; pass kernel_solver=lstsq"):
        solved(SolverOptions(Solver.LOGISTIC), kernel, np.array([0, 0, 1]))
