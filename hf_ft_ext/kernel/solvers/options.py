"""Solvers of a task with a kernel, their settings, and the check of combinations."""

import enum
import logging
from dataclasses import dataclass

from hf_ft_ext.errors import InputError
from hf_ft_ext.kernel.formulas import Formula
from hf_ft_ext.kernel.solvers.coupling import Coupling

logger = logging.getLogger(__name__)


class Solver(enum.StrEnum):
    """How the task is solved with the kernel.

    LSTSQ: kernel regression, least squares on one-hot targets (or -1 and 1; scores in regression). Any task.
    LOGISTIC: logistic regression with kernel rows as features and a cross-validated penalty. Classification.
    SVR: support vector regression on the same targets as LSTSQ. Any task; symmetric kernels.
    SVC: support vector classification with the kernel summed over classes. Symmetric kernels.
    ASYM: the coupled least-squares SVM of an asymmetric kernel and its flip, one class against the rest.
    """

    LSTSQ = "lstsq"
    LOGISTIC = "logistic"
    SVR = "svr"
    SVC = "svc"
    ASYM = "asym"

    @property
    def couplings(self) -> tuple[Coupling, ...]:
        """The couplings that the solver supports; the first is its default."""
        return _COUPLINGS[self]


_COUPLINGS = {
    Solver.LSTSQ: (Coupling.FULL, Coupling.BY_CLASS, Coupling.SHARED, Coupling.PSEUDO),
    Solver.LOGISTIC: (Coupling.FULL, Coupling.SHARED, Coupling.PSEUDO),
    Solver.SVR: (Coupling.FULL, Coupling.BY_CLASS, Coupling.SHARED, Coupling.PSEUDO),
    Solver.SVC: (Coupling.SHARED, Coupling.PSEUDO),
    Solver.ASYM: (Coupling.BY_CLASS,),
}
# Largest number of unknowns N C for which all scalars are coupled by default: a matrix of 0.5 GB, whose
# eigendecomposition takes minutes on one core.
FULL_UNKNOWNS = 8192


@dataclass(frozen=True)
class SolverOptions:
    """Settings of the solvers, with the published code's defaults where it has any.

    Attributes:
        solver: see `Solver`.
        regularization: r; `r ||K||` (operator norm) is added to the diagonal of the solved matrix.
        gamma: for `asym`: weight of the errors.
        mix: for `asym`: weight of the kernel's prediction; the flip's has `1 - mix`.
        svm_c: penalty C of `svr` and `svc`.
        regression: whether targets are scores.
        multi_label: whether targets are -1 and 1 for each of several labels; each label is solved separately.
        coupling: see `Coupling`; `None` = the solver's default, or `BY_CLASS` with several labels per row.
        time: for `lstsq`: the time at which gradient flow stops (see `least_squares`); `None` = never.
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

    @property
    def used_coupling(self) -> Coupling:
        """`coupling`, which is set even where `None` was passed."""
        assert self.coupling is not None  # `__post_init__`
        return self.coupling


def chosen_coupling(
    solver: Solver, asked: str, multi_label: bool, rows: int, scalars: int, needs_logits: str | None = None
) -> Coupling:
    """Return the coupling that `kernel_classes` names; `auto` decides by the number of unknowns.

    Args:
        needs_logits: an argument that needs each class's own scalar, which rules out `PSEUDO`; `None` = no such
            argument.

    Raises:
        InputError: the solver, or a task with several labels per row, does not support the coupling.
    """
    if multi_label:
        if asked not in ("auto", Coupling.BY_CLASS):
            raise InputError(
                f"kernel_classes={asked}: with several labels per row each label is solved separately; leave it out"
            )
        return Coupling.BY_CLASS
    if asked != "auto":
        if asked == Coupling.PSEUDO and (needs_logits or scalars == 1):
            cause = f"{needs_logits} needs each class's own" if needs_logits else "this task has only one"
            raise InputError(f"kernel_classes=pseudo sums the logits to one scalar, but {cause}; pass shared, or auto")
        if asked not in solver.couplings:
            raise InputError(
                f"kernel_classes={asked} does not work with kernel_solver={solver.value}; choose from: auto, "
                f"{', '.join(solver.couplings)}"
            )
        return Coupling(asked)
    coupling = solver.couplings[0]
    if coupling is Coupling.FULL and scalars > 1 and rows * scalars > FULL_UNKNOWNS:
        instead = Coupling.SHARED if needs_logits else Coupling.PSEUDO
        logger.warning(
            "%d rows times %d scalars are a system of %d unknowns, more than %d: one kernel is used for all classes "
            "instead (kernel_classes=%s; pass full for the full system)",
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
    """Refuse combinations of settings that do not work, before any kernel is computed.

    Raises:
        InputError: the combination does not work.
    """
    name = f"kernel_solver={solver.value}"
    if regression and solver not in (Solver.LSTSQ, Solver.SVR):
        raise InputError(f"{name} classifies, but the task is regression; pass kernel_solver=lstsq or svr")
    if binary and (regression or multi_label or classes != 2):
        kind = "scores" if regression else "several labels per row" if multi_label else f"{classes} classes"
        raise InputError(f"binary_classification needs two classes, but the task has {kind}; leave it out")
    if solver is Solver.ASYM and formula is not Formula.ASYMMETRIC_SIGNGD:
        raise InputError(
            f"{name} needs a kernel and its flip, which kernel_formula={formula.value} does not give; pass "
            "kernel_formula=asymmetric_signgd or another solver"
        )
    if solver in (Solver.SVR, Solver.SVC) and formula is Formula.ASYMMETRIC_SIGNGD:
        raise InputError(
            f"{name} needs a symmetric kernel, which asymmetric_signgd is not; pass kernel_solver=asym, lstsq or "
            "logistic"
        )
    if adjust_for_init and solver in (Solver.SVC, Solver.LOGISTIC):
        raise InputError(
            f"{name} fits classes, from which the model's initial logits cannot be subtracted; leave "
            "adjust_for_init out, or pass kernel_solver=lstsq"
        )
    if time is not None and (solver is not Solver.LSTSQ or formula is not Formula.SGD):
        raise InputError(
            f"kernel_time={time:g} means gradient flow on the squared loss: it needs kernel_solver=lstsq and "
            f"kernel_formula=sgd, not {solver.value} and {formula.value}"
        )
    if time is not None and not adjust_for_init:
        raise InputError(
            f"kernel_time={time:g}: gradient flow starts from the model's own outputs; pass adjust_for_init too, or "
            "leave kernel_time out"
        )
