"""Arguments of `--method kernel`."""

from dataclasses import dataclass, field
from typing import Any, ClassVar

from hf_ft_ext.arguments import Gradients
from hf_ft_ext.arguments.completion import chosen
from hf_ft_ext.errors import InputError
from hf_ft_ext.kernel.formulas import Formula
from hf_ft_ext.kernel.options import DIMENSION, Engine, KernelOptions, as_engine, as_formula, signs_of_projections
from hf_ft_ext.kernel.solvers import FULL_UNKNOWNS, Coupling, Solver, SolverOptions
from hf_ft_ext.training.solver_arguments import SolverTrainingArguments

AUTO, LEAVE_ONE_OUT = "auto", "loo"
# Default for least squares without a closed form for leave-one-out. Well-conditioned kernels predict the same as with
# 0; ill-conditioned ones predict noise with 0 (docs/kernel.md).
ASYMMETRIC_REGULARIZATION = 1e-3
# Arguments without effect: the kernel has the weights' precision, and all predictions are made at once.
_MODEL_OUTPUT_ARGUMENTS = (
    "batch_eval_metrics", "bf16", "eval_accumulation_steps", "fp16", "include_for_metrics", "label_smoothing_factor",
    "torch_compile", "torch_compile_backend", "torch_compile_mode",
)  # fmt: skip
# Argument -> the solvers that use it.
_SOLVERS_OF_ARGUMENT = {"kernel_gamma": ("asym",), "kernel_lambda": ("asym",), "kernel_svm_c": ("svr", "svc")}
# Arguments that say how a kernel is computed, and over which parameters. `kernel_memory_gb` is a limit of the machine,
# which may stay in a recipe.
_OF_COMPUTATION = (
    "kernel_engine", "kernel_dimension", "kernel_dir", "kernel_parameters", "exclude_embeddings",
    "exclude_head", "only_biases",
)  # fmt: skip
_DIMENSION_MESSAGE = "kernel_dimension applies only to kernel_engine=projected; pass that engine too, or leave it out"


@dataclass
class KernelTrainingArguments(SolverTrainingArguments):
    """`transformers.TrainingArguments` plus the settings of the kernel and of its solver.

    Arguments of a training loop are refused, because there is none. A forward pass takes at most
    `per_device_eval_batch_size` rows, or `per_device_train_batch_size` if that is set and smaller.

    Raises:
        InputError: a value out of range.
    """

    instead_of_steps: ClassVar[str] = "method kernel has none: the task is solved with the kernel at once"
    also_without_effect: ClassVar[tuple[str, ...]] = _MODEL_OUTPUT_ARGUMENTS

    kernel_formula: str = field(
        default=Formula.SGD.value,
        metadata={
            "help": "The update rule that the kernel describes: sgd, signgd (Adam early in training), or "
            "asymmetric_signgd.",
            "choices": [formula.value for formula in Formula],
        },
    )
    kernel_solver: str = field(
        default=Solver.LSTSQ.value,
        metadata={
            "help": "lstsq: kernel regression. logistic: logistic regression on kernel rows, cross-validated. svr, "
            "svc: support vector regression, classification. asym: the coupled system of asymmetric_signgd and its "
            "flip.",
            "choices": [solver.value for solver in Solver],
        },
    )
    kernel_regularization: str | None = field(
        default=None,
        metadata={
            "help": "r, 0 or more: r times the operator norm of the kernel matrix is added to its diagonal. loo = "
            "chosen from 1e-6 to 1 by leave-one-out on the training rows (lstsq, symmetric kernels). auto = chosen "
            "from 0 and 1e-6 to 1 on the evaluation data. none = loo for lstsq (asymmetric_signgd: "
            f"{ASYMMETRIC_REGULARIZATION:g}); 0 for the other solvers, which have their own penalties, and with "
            "kernel_time."
        },
    )
    kernel_classes: str = field(
        default=AUTO,
        metadata={
            "help": "How lstsq, svr and logistic treat several classes. full: all products of their scalars, one "
            "system of N C unknowns. by_class: each class's own kernel. shared: one kernel, the mean over classes. "
            "pseudo: one kernel, of the logits summed with random signs (from seed), with one backward pass per row. "
            f"auto = full up to {FULL_UNKNOWNS:,} unknowns, pseudo beyond that.",
            "choices": [AUTO, *(coupling.value for coupling in Coupling)],
        },
    )
    kernel_time: float | None = field(
        default=None,
        metadata={
            "help": "lstsq with sgd and adjust_for_init: predict as the linearized model trained for this time by "
            "gradient flow (learning rate times steps, on half the mean squared error), above 0; none = until "
            "convergence."
        },
    )
    kernel_gamma: float = field(default=1.0, metadata={"help": "asym: weight of the errors, above 0."})
    kernel_lambda: float = field(
        default=0.5,
        metadata={"help": "asym: weight of the kernel's prediction, in [0, 1]; its flip's has the remaining weight."},
    )
    kernel_svm_c: float = field(default=1.0, metadata={"help": "svr, svc: the penalty C, above 0."})
    binary_classification: bool | None = field(
        default=None,
        metadata={
            "help": "Use one scalar, the difference of the two logits, instead of both; none = yes if there are two "
            "classes."
        },
    )
    kernel_parameters: str | None = field(
        default=None, metadata={"help": "Take the kernel over parameters whose name matches this regular expression."}
    )
    exclude_embeddings: bool = field(
        default=False,
        metadata={"help": "Leave embedding tables, and parameters with embed in their name, out of the kernel."},
    )
    exclude_head: bool = field(
        default=False, metadata={"help": "Leave parameters outside the encoder out of the kernel."}
    )
    only_biases: bool = field(default=False, metadata={"help": "Take the kernel over biases only."})
    kernel_peft: str | None = field(
        default=None,
        metadata={"help": "Add a peft adapter (lora, ...) and take the kernel over its parameters and the head."},
    )
    kernel_peft_config: dict | str | None = field(
        default_factory=dict, metadata={"help": 'Settings of kernel_peft, as JSON: {"r": 8, "lora_alpha": 16}.'}
    )
    adjust_for_init: bool = field(
        default=False,
        metadata={"help": "Subtract the model's own outputs from the targets, and add them to the predictions."},
    )
    f0_scaling: float = field(
        default=1.0, metadata={"help": "adjust_for_init: the model's own outputs are divided by this, above 0."}
    )
    random_model_init: bool = field(
        default=False,
        metadata={"help": "Initialize all weights at random from `seed`, to measure the effect of pretraining."},
    )
    kernel_engine: str = field(
        default=Engine.AUTO.value,
        metadata={
            "help": "auto: layer by layer, and examples one by one if a layer has no rule. structured: refuse such "
            "models. jacobian: full Jacobians, the reference. projected: random projections of the gradients, for "
            "many rows; formula sgd.",
            "choices": [engine.value for engine in Engine],
        },
    )
    kernel_dimension: int = field(
        default=DIMENSION,
        metadata={
            "help": "projected: dimension of the projection of a scalar's gradient, above 0. The standard deviation "
            "of an entry is about sqrt(2 / kernel_dimension) times the product of the gradients' norms or less."
        },
    )
    kernel_memory_gb: float | None = field(
        default=None,
        metadata={
            "help": "Memory limit above the loaded model, in 10^9 bytes, above 0; none = half of the memory that is "
            "free at the start."
        },
    )
    kernel_dir: str | None = field(
        default=None,
        metadata={
            "help": "Folder for finished blocks of kernels, in subfolders named by a hash of model, data and options; "
            "none = `kernels` in output_dir. An interrupted run continues from it."
        },
    )
    overwrite_kernels: bool = field(
        default=False, metadata={"help": "Compute kernels again even if kernel_dir holds them."}
    )
    load_kernels: str | None = field(
        default=None,
        metadata={
            "help": "Folder with kernels in the format of the paper's authors, {split}_kernels_{task}.pt, to load "
            "instead of computing kernels."
        },
    )
    export_kernels: str | None = field(
        default=None, metadata={"help": "Folder to write kernels to in the same format, for other analysis code."}
    )

    kernel_task_name: str | None = field(
        default=None,
        metadata={
            "help": "Task name in the file names of load_kernels and export_kernels; none = the only task in the "
            "folder when loading, `task` when writing."
        },
    )

    _VALID_DICT_FIELDS: ClassVar[list[str]] = [*SolverTrainingArguments._VALID_DICT_FIELDS, "kernel_peft_config"]

    json_fields: ClassVar[tuple[str, ...]] = ("kernel_peft_config",)

    def validate(self) -> None:
        super().validate()
        for name, kind in (("kernel_formula", Formula), ("kernel_solver", Solver), ("kernel_engine", Engine)):
            if getattr(self, name) not in [member.value for member in kind]:
                choices = ", ".join(member.value for member in kind)
                raise InputError(f"{name}={getattr(self, name)!r}; choose from: {choices}")
        numbers = ("kernel_gamma", "kernel_svm_c", "f0_scaling", "kernel_memory_gb", "kernel_time", "kernel_dimension")
        for name in numbers:
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise InputError(f"{name} must be above 0 and finite, got {value}")
        if self.kernel_engine == Engine.PROJECTED.value:
            if Formula(self.kernel_formula).signs:
                raise InputError(signs_of_projections(Formula(self.kernel_formula)))
        elif chosen(self, "kernel_dimension"):
            raise InputError(_DIMENSION_MESSAGE)
        if self.kernel_classes not in (AUTO, *Coupling):
            choices = ", ".join((AUTO, *Coupling))
            raise InputError(f"kernel_classes={self.kernel_classes!r}; choose from: {choices}")
        if not 0 <= self.kernel_lambda <= 1:
            raise InputError(f"kernel_lambda must be in [0, 1], got {self.kernel_lambda}; pass a value such as 0.5")
        self._check_regularization()
        self._check_together()

    def _check_regularization(self) -> None:
        value = self.kernel_regularization
        if value == AUTO and self.kernel_solver == Solver.LOGISTIC.value:
            raise InputError(
                "kernel_regularization=auto: the logistic solver cross-validates its own penalty; pass a number, or "
                "leave it out"
            )
        if value == LEAVE_ONE_OUT:
            least_squares = self.kernel_solver == Solver.LSTSQ.value and self.kernel_time is None
            if not least_squares or self.kernel_formula == Formula.ASYMMETRIC_SIGNGD.value:
                raise InputError(
                    "kernel_regularization=loo needs kernel_solver=lstsq, a symmetric kernel_formula and no "
                    "kernel_time; pass auto or a number, or leave it out"
                )
        if value in (None, AUTO, LEAVE_ONE_OUT):
            return
        try:
            number = float(value)
        except ValueError:
            number = -1.0
        if not 0 <= number < float("inf"):
            raise InputError(f"kernel_regularization must be a number of 0 or more, auto or loo, got {value!r}")

    def _check_together(self) -> None:
        if self.kernel_peft_config and self.kernel_peft is None:
            raise InputError("kernel_peft_config needs kernel_peft; name a peft method, such as lora")
        if self.load_kernels is not None and (self.overwrite_kernels or self.random_model_init):
            name = "overwrite_kernels" if self.overwrite_kernels else "random_model_init"
            raise InputError(f"load_kernels reads kernels from files and computes none; leave {name} out")
        if self.load_kernels is not None and (given := [name for name in _OF_COMPUTATION if chosen(self, name)]):
            raise InputError(
                f"load_kernels reads kernels from files, and {given[0]}={getattr(self, given[0])} is about computing "
                "them; leave one of the two out"
            )
        if self.kernel_task_name is not None and self.load_kernels is None and self.export_kernels is None:
            raise InputError(
                f"kernel_task_name={self.kernel_task_name} is part of the names of files; pass load_kernels or "
                "export_kernels with it, or leave it out"
            )
        if self.f0_scaling != 1 and not self.adjust_for_init:
            raise InputError(f"f0_scaling={self.f0_scaling} needs adjust_for_init; pass both, or leave it out")
        for name, solvers in _SOLVERS_OF_ARGUMENT.items():
            if self.kernel_solver not in solvers and chosen(self, name):
                raise InputError(_wrong_solver_message(name, self.kernel_solver))
        if not self.eval_do_concat_batches:
            raise InputError("eval_do_concat_batches=false: a kernel predicts all rows at once; leave it out")

    @property
    def gradients(self) -> Gradients:
        return Gradients.NONE

    @property
    def needs_validation(self) -> bool:
        return self.kernel_regularization == AUTO

    def check_given(self, given: dict[str, Any]) -> None:
        if self.random_model_init and given.get("from_linearhead"):
            raise InputError("random_model_init would undo from_linearhead; pass only one of the two")
        for name, solvers in _SOLVERS_OF_ARGUMENT.items():
            if name in given and self.kernel_solver not in solvers:
                raise InputError(_wrong_solver_message(name, self.kernel_solver))
        if "kernel_dimension" in given and self.kernel_engine != Engine.PROJECTED.value:
            raise InputError(_DIMENSION_MESSAGE)
        super().check_given(given)

    @property
    def regularization(self) -> float | str:
        """The value of `kernel_regularization` with its default: a number, or `auto` or `loo`."""
        if self.kernel_regularization in (AUTO, LEAVE_ONE_OUT):
            return self.kernel_regularization
        if self.kernel_regularization is not None:
            return float(self.kernel_regularization)
        if self.kernel_solver != Solver.LSTSQ.value or self.kernel_time is not None:
            return 0.0
        return ASYMMETRIC_REGULARIZATION if self.kernel_formula == Formula.ASYMMETRIC_SIGNGD.value else LEAVE_ONE_OUT

    def options(self, binary: bool, coupling: Coupling = Coupling.FULL) -> KernelOptions:
        """The options of the kernel."""
        projected = self.kernel_engine == Engine.PROJECTED.value
        return KernelOptions(
            formula=as_formula(self.kernel_formula),
            engine=as_engine(self.kernel_engine),
            binary_classification=binary,
            class_diagonal=coupling in (Coupling.BY_CLASS, Coupling.SHARED)
            and not binary
            and self.export_kernels is None,
            parameters=self.kernel_parameters,
            exclude_embeddings=self.exclude_embeddings,
            exclude_head=self.exclude_head,
            only_biases=self.only_biases,
            memory_gb=self.kernel_memory_gb,
            batch_size=self.rows_per_pass,
            dimension=self.kernel_dimension if projected else None,
            seed=self.seed if projected else None,
        )

    def solver_options(
        self, regularization: float, regression: bool, multi_label: bool = False, coupling: Coupling | None = None
    ) -> SolverOptions:
        """The options of the solver."""
        return SolverOptions(
            solver=Solver(self.kernel_solver),
            regularization=regularization,
            gamma=self.kernel_gamma,
            mix=self.kernel_lambda,
            svm_c=self.kernel_svm_c,
            regression=regression,
            multi_label=multi_label,
            coupling=coupling,
            time=self.kernel_time,
        )


def _wrong_solver_message(name: str, solver: str) -> str:
    return (
        f"{name} applies only to kernel_solver={' or '.join(_SOLVERS_OF_ARGUMENT[name])}, not {solver}; leave it out"
    )
