"""Which solver solves the task with a kernel, how, and which combinations of settings work."""

import enum
import logging
from dataclasses import dataclass

from hf_ft_ext.errors import InputError
from hf_ft_ext.kernel.formulas import Formula
from hf_ft_ext.kernel.solvers.coupling import Coupling

logger = logging.getLogger(__name__)


class Solver(enum.StrEnum):
    """How the task is solved with the kernel.

    LSTSQ: least squares on one-hot targets (or -1 and 1; scores in regression): kernel regression. Any task.
    LOGISTIC: logistic regression on kernel rows as features, its penalty chosen by cross-validation. Classification.
    SVR: support vector regression on the same targets as LSTSQ. Any task; symmetric kernels.
    SVC: support vector classification with the kernel summed over classes. Symmetric kernels.
    ASYM: the coupled least squares SVM of an asymmetric kernel and its flip, one class against the rest.
    """

    LSTSQ = "lstsq"
    LOGISTIC = "logistic"
    SVR = "svr"
    SVC = "svc"
    ASYM = "asym"

    @property
    def couplings(self) -> tuple[Coupling, ...]:
        """The couplings that the solver works with, the first one its own."""
        return _COUPLINGS[self]


_COUPLINGS = {
    Solver.LSTSQ: (Coupling.FULL, Coupling.BY_CLASS, Coupling.SHARED, Coupling.PSEUDO),
    Solver.LOGISTIC: (Coupling.FULL, Coupling.SHARED, Coupling.PSEUDO),
    Solver.SVR: (Coupling.FULL, Coupling.BY_CLASS, Coupling.SHARED, Coupling.PSEUDO),
    Solver.SVC: (Coupling.SHARED, Coupling.PSEUDO),
    Solver.ASYM: (Coupling.BY_CLASS,),
}
# Unknowns N C up to which all scalars are coupled unless something else is asked for: a matrix of 0.5 GB, whose
# eigendecomposition takes minutes on one core.
FULL_UNKNOWNS = 8192


@dataclass(frozen=True)
class SolverOptions:
    """Settings of the solvers, with the published code's defaults where it has any.

    Attributes:
        solver: see `Solver`.
        regularization: times the operator norm of the matrix that is solved with, on its diagonal.
        gamma: of `asym`, weight of the errors.
        mix: of `asym`, share of the kernel's prediction; the rest is the flip's.
        svm_c: penalty C of `svr` and `svc`.
        regression: targets are scores.
        multi_label: targets are -1 and 1 for each of several labels; every label is solved by itself.
        coupling: see `Coupling`; `None` = the solver's own, and `BY_CLASS` with several labels per row.
        time: of `lstsq`, where gradient flow stops (see `least_squares`); `None` = never.
    """

    solver: Solver = Solver.LOGISTIC
    regularization: float = 0.0
    gamma: float = 1.0
    mix: float = 0.5
    svm_c: float = 1.0
    regression: bool = False
    multi_label: bool = False
    coupling: Coupling | None = None
    time: float | None = None

    def __post_init__(self):
        object.__setattr__(self, "solver", Solver(self.solver))
        own = Coupling.BY_CLASS if self.multi_label else self.solver.couplings[0]
        object.__setattr__(self, "coupling", Coupling(self.coupling or own))


def chosen_coupling(
    solver: Solver, asked: str, multi_label: bool, rows: int, scalars: int, needs_logits: str | None = None
) -> Coupling:
    """The coupling that `kernel_classes` asks for, `auto` by the number of unknowns.

    Args:
        needs_logits: the argument that needs each class's own scalar, so that `PSEUDO` is out; `None` = none does.

    Raises:
        InputError: the solver, or a task with several labels per row, works with another one.
    """
    if multi_label:
        if asked not in ("auto", Coupling.BY_CLASS):
            raise InputError(
                f"kernel_classes={asked}: with several labels per row each label is solved by itself; leave it out"
            )
        return Coupling.BY_CLASS
    if asked != "auto":
        if asked == Coupling.PSEUDO and (needs_logits or scalars == 1):
            cause = f"{needs_logits} needs each class's own" if needs_logits else "this task has but one"
            raise InputError(
                f"kernel_classes=pseudo adds the logits up to one scalar, and {cause}; pass shared, or auto"
            )
        if asked not in solver.couplings:
            raise InputError(
                f"kernel_classes={asked} is not for kernel_solver={solver.value}; choose from: auto, "
                f"{', '.join(solver.couplings)}"
            )
        return Coupling(asked)
    coupling = solver.couplings[0]
    if coupling is Coupling.FULL and scalars > 1 and rows * scalars > FULL_UNKNOWNS:
        instead = Coupling.SHARED if needs_logits else Coupling.PSEUDO
        logger.warning(
            "%d rows times %d scalars are a system of %d unknowns, more than %d: one kernel for all classes takes its "
            "place (kernel_classes=%s; pass full for the whole system)",
            rows, scalars, rows * scalars, FULL_UNKNOWNS, instead.value,
        )  # fmt: skip
        return instead
    return coupling


def check_combination(
    solver: Solver,
    formula: Formula,
    regression: bool,
    adjust_for_init: bool,
    classes: int,
    binary: bool,
    multi_label: bool = False,
    time: float | None = None,
) -> None:
    """Refuse what cannot work, before any kernel is computed.

    Raises:
        InputError: the combination cannot work.
    """
    name = f"kernel_solver={solver.value}"
    if regression and solver not in (Solver.LSTSQ, Solver.SVR):
        raise InputError(f"{name} classifies, but the task is regression; pass kernel_solver=lstsq or svr")
    if binary and (regression or multi_label or classes != 2):
        kind = "scores" if regression else "several labels per row" if multi_label else f"{classes} classes"
        raise InputError(f"binary_classification needs two classes, but the task has {kind}; leave it out")
    if solver is Solver.ASYM and formula is not Formula.ASYMMETRIC_SIGNGD:
        raise InputError(
            f"{name} solves with a kernel and its flip, which kernel_formula={formula.value} does not give; pass "
            "kernel_formula=asymmetric_signgd or another solver"
        )
    if solver in (Solver.SVR, Solver.SVC) and formula is Formula.ASYMMETRIC_SIGNGD:
        raise InputError(
            f"{name} needs a symmetric kernel, which asymmetric_signgd is not; pass kernel_solver=asym, lstsq or "
            "logistic"
        )
    if adjust_for_init and solver in (Solver.SVC, Solver.LOGISTIC):
        raise InputError(
            f"{name} predicts classes, from which the logits at the start cannot be subtracted; leave "
            "adjust_for_init out, or pass kernel_solver=lstsq"
        )
    if time is not None and (solver is not Solver.LSTSQ or formula is not Formula.SGD):
        raise InputError(
            f"kernel_time={time:g} is about gradient flow on the squared loss: it needs kernel_solver=lstsq and "
            f"kernel_formula=sgd, not {solver.value} and {formula.value}"
        )
    if time is not None and not adjust_for_init:
        raise InputError(
            f"kernel_time={time:g}: training starts from the model's own outputs; pass adjust_for_init too, or leave "
            "kernel_time out"
        )
