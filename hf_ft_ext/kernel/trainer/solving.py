"""`KernelTrainer`: a Trainer that solves the task with the model's kernel instead of fine-tuning the model."""

import contextlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import TrainingArguments
from transformers.trainer_utils import TrainOutput

from hf_ft_ext.errors import InputError
from hf_ft_ext.kernel.arguments import ASYMMETRIC_REGULARIZATION, AUTO, LEAVE_ONE_OUT
from hf_ft_ext.kernel.formulas import Formula
from hf_ft_ext.kernel.options import kernel_parameters
from hf_ft_ext.kernel.saved.training_data import TrainingFeatures, TrainingRows
from hf_ft_ext.kernel.solvers import (
    GRID,
    LEAVE_ONE_OUT_GRID,
    Coupling,
    KernelSystem,
    Solver,
    check_combination,
    check_labels,
    chosen_coupling,
)
from hf_ft_ext.kernel.trainer.solved import SolvedKernelTrainer
from hf_ft_ext.models import seeded_init
from hf_ft_ext.models.peft import carries_adapters, wrap_with_peft
from hf_ft_ext.per_example.capture import Function
from hf_ft_ext.problem_types import MULTI_LABEL, REGRESSION
from hf_ft_ext.training.loss_scale import declare_mean_loss
from hf_ft_ext.training.method_trainer import overridden
from hf_ft_ext.training.runs.plan import TrainedWeight
from hf_ft_ext.training.weights.quantized import refuse_quantized

logger = logging.getLogger(__name__)


class KernelTrainer(SolvedKernelTrainer):
    """`transformers.Trainer` whose `train()` computes the train kernel and solves the task with it.

    The model's weights do not change. `evaluate` and `predict` compute the kernel between the training data and the
    given data, and return the solver's predictions with the usual metrics; `eval_loss` is the solver's loss (see
    `KernelModel.loss`). Kernels are stored on disk block by block (`kernel_dir`), so an interrupted run continues, and
    a repeated run computes nothing. `save_model` stores the solution with the training rows: `from_folder` makes a
    trainer that predicts without training data.

    Args:
        model, args, and all other arguments: as for `Trainer`. Other `TrainingArguments` are completed with the
            defaults of `KernelTrainingArguments`. The kernel of a PEFT model is taken over its trainable parameters.
        function: maps model and batch to the scalars of each example, `[n]` or `[n, C]`, which replace the logits.
            Labels are then numbers, `[N]` or `[N, C]`, and a regression is solved. These kernels stay in memory,
            because files could not distinguish two functions.

    Raises:
        InputError: combinations of formula, solver and task that do not work; in `train`: a class without rows.

    Source: Malladi et al., ICML 2023, arXiv 2210.05643.
    """

    solution = "a kernel"
    parameters_text = "parameters of the kernel (no weight changes)"
    start_over = "run again with the same kernel_dir: finished blocks are reused"

    def __init__(
        self,
        model: nn.Module | None = None,
        args: TrainingArguments | None = None,
        *positional: Any,
        function: Function | None = None,
        **kwargs: Any,
    ):
        self.function = function
        super().__init__(model, args, *positional, **kwargs)
        if function is not None:
            self.label_names = ["labels"]  # independent of the signature of the model's forward

    def check_passed(self, passed: Mapping[str, Any]) -> None:
        super().check_passed(passed)
        if passed.get("preprocess_logits_for_metrics") is not None:
            raise InputError(
                "a kernel does not predict from the model's outputs; leave preprocess_logits_for_metrics out"
            )

    def check_arguments(self) -> None:
        super().check_arguments()
        if overridden(self, "prediction_step"):
            raise InputError(
                f"{type(self).__name__} overrides prediction_step, which a kernel does not call: it predicts all rows "
                "at once; leave it out"
            )
        args = self.args
        if self.function is not None:
            for name in ("kernel_dir", "load_kernels", "export_kernels"):
                if getattr(args, name) is not None:
                    raise InputError(
                        f"{name}={getattr(args, name)}: kernels of a user's function are not stored in files, which "
                        "could not distinguish two functions; leave it out"
                    )

    def prepare_model(self, model: nn.Module) -> nn.Module:
        self.solved = self.saved = None
        args = self.args
        declare_mean_loss(model)
        refuse_quantized(model, "a kernel is computed in float32 or float64 from")
        if getattr(model, "is_activation_checkpointing", False):
            raise InputError(
                "gradient checkpointing is on, which runs modules twice; call "
                "model.gradient_checkpointing_disable() first"
            )
        if args.random_model_init:
            model = _with_random_weights(model, args.seed)
        if args.kernel_peft is not None:
            model = wrap_with_peft(model, args.kernel_peft, args.kernel_peft_config, args.seed, "kernel_peft")
        config = getattr(model, "config", None)
        if self.function is None and not hasattr(config, "num_labels"):
            raise InputError(
                f"{type(model).__name__} has no configuration that says how many labels it has (config.num_labels, "
                "config.id2label); use a transformers model, or pass function"
            )
        problem, classes = getattr(config, "problem_type", None), getattr(config, "num_labels", 1)
        one_number = problem == REGRESSION or (classes == 1 and problem != MULTI_LABEL)
        self.regression = self.function is not None or one_number
        self.multi_label = problem == MULTI_LABEL and not self.regression
        if args.binary_classification is None:
            self.binary = not self.regression and not self.multi_label and classes == 2
        else:
            self.binary = args.binary_classification
        check_combination(
            Solver(args.kernel_solver), Formula(args.kernel_formula), self.regression, args.adjust_for_init,
            classes, self.binary, self.multi_label, args.kernel_time,
        )  # fmt: skip
        kernel_parameters(model, args.kernel_parameters, args.exclude_embeddings, args.exclude_head, args.only_biases)
        return model

    # --- training -------------------------------------------------------------------------------------

    def train(self, *positional: Any, **kwargs: Any) -> TrainOutput:
        """As `SolverTrainer.train`.

        Raises:
            InputError: the trainer came from a folder.
        """
        if isinstance(self.train_dataset, (TrainingRows, TrainingFeatures)):
            raise InputError(
                "this trainer was made from a folder with a solved kernel and has no labels to solve with; make a "
                "KernelTrainer with training data"
            )
        return super().train(*positional, **kwargs)

    def solve(self) -> dict[str, float]:
        """Compute the train kernel and fit the solver."""
        labels = self._training_labels(self.train_dataset)
        scalars = int(np.prod(labels.shape[1:])) if self.regression else self.model.config.num_labels
        self.coupling = chosen_coupling(
            Solver(self.args.kernel_solver), self.args.kernel_classes, self.multi_label, len(labels),
            1 if self.binary else scalars, self._needs_logits(),
        )  # fmt: skip
        self.saved = None
        self.source = self._source(keep=self.function is None)
        kernel, start = self.source.kernel(self.train_dataset, "train"), self._start(self.train_dataset, "train")
        options = self.args.solver_options(0.0, self.regression, self.multi_label, self.coupling)
        classes = self.model.config.num_labels if self.coupling is Coupling.PSEUDO else None
        system = KernelSystem(options, kernel, labels, start, classes)
        self.regularization = self._regularization(system)
        self.solved = system.solve(self.regularization)
        metrics = {"train_loss": self.solved.loss(self.solved.predict(kernel, start), labels)}
        metrics["kernel_regularization"] = self.regularization
        for name in ("rank", "condition"):
            if getattr(self.solved, name) is not None:
                metrics[f"kernel_{name}"] = getattr(self.solved, name)
        return metrics

    def _needs_logits(self) -> str | None:
        """The name of an argument that needs each class's own scalar (see `chosen_coupling`), or `None`."""
        if self.function is not None:
            return "function"
        names = ("adjust_for_init", "export_kernels", "load_kernels")
        return next((name for name in names if getattr(self.args, name)), None)

    def _training_labels(self, dataset: Any) -> np.ndarray:
        """The labels of training rows, among which no class is missing."""
        labels = self._labels(dataset)
        if not (self.regression or self.multi_label):
            config = self.model.config
            check_labels(labels, [str(config.id2label[i]) for i in range(config.num_labels)])
        return labels

    def _regularization(self, system: KernelSystem) -> float:
        value = self.args.regularization
        if value == AUTO:
            return self._chosen(system)
        if value != LEAVE_ONE_OUT:
            return float(value)
        if not system.has_leave_one_out:  # a kernel from a file may be asymmetric with any formula
            return ASYMMETRIC_REGULARIZATION
        best = system.best_by_leave_one_out(LEAVE_ONE_OUT_GRID)
        logger.info("kernel_regularization: %g, chosen by leave-one-out on the training rows", best)
        return best

    def _chosen(self, system: KernelSystem) -> float:
        """Choose the regularization that predicts the evaluation data best: by accuracy, then by the solver's loss."""
        data = self.eval_dataset
        if data is None or isinstance(data, dict):
            raise InputError(
                "kernel_regularization=auto chooses on evaluation data; pass a single eval_dataset, or a number"
            )
        best = system.best_on(self.source.kernel(data, "dev"), self._labels(data), self._start(data, "dev"))
        logger.info(
            "kernel_regularization: %g, the best of %s on the evaluation data", best, ", ".join(map(str, GRID))
        )
        return best

    def linearize(self, times: Sequence[float], dataset: Any = None, regularization: float = 0.0) -> np.ndarray:
        """Predict as the linearized model, trained for each of `times` from the model's own outputs.

        `f_t(x) = f_0(x) + K(x, X) M^-1 (I - exp(-M t / N)) (y - f_0(X))` with `M = K + r ||K|| I`: gradient flow on
        half the mean squared error of the N training rows, where `t` is the learning rate times the number of small
        steps. An infinite time gives kernel regression. All times share one eigendecomposition. Classes are coupled
        as in the solver (see `kernel_classes`).

        Args:
            times: each 0 or more; 0 gives the model's own outputs.
            dataset: rows to predict, such as `trainer.train_dataset`; `None` = the evaluation data.
            regularization: r, 0 or more, relative to the operator norm of `K`.

        Returns:
            `[times, rows, C]`. With two classes C is 1: the difference of the logits (see `binary_classification`),
            fitted to -1 and 1.

        Raises:
            InputError: a formula other than `sgd`, a trainer from a folder, or a negative time.

        Source: Lee et al. 2019, arXiv 1902.06720, equations 10 and 11.
        """
        if Formula(self.args.kernel_formula) is not Formula.SGD:
            raise InputError(
                f"linearize describes training by sgd, but kernel_formula={self.args.kernel_formula}; pass sgd"
            )
        if self.solved is None or isinstance(self.source.train, (TrainingRows, TrainingFeatures)):
            raise InputError(
                "linearize needs the train kernel and the labels; use a trainer with training data, and call train()"
            )
        if self.coupling is Coupling.PSEUDO:
            raise InputError("linearize needs each class's own scalar; pass kernel_classes=shared, or another one")
        if bad := [time for time in times if not time >= 0]:
            raise InputError(f"times must be 0 or more, got {bad[0]}")
        data = self.eval_dataset if dataset is None else dataset
        if data is None or isinstance(data, dict):
            raise InputError("linearize predicts a single data set, but there is none; pass dataset")
        train = self.source.train
        labels, start = self._training_labels(train), self.source.start(train, "train")
        options = replace(
            self.solved.options, solver=Solver.LSTSQ, regularization=regularization, coupling=self.coupling, time=None
        )
        system = KernelSystem(options, self.source.kernel(train, "train"), labels, start)
        kernel, begin = self.source.kernel(data, "linearize"), self.source.start(data, "linearize")
        self.source.forget()
        found = [system.solve(quiet=True, time=float(time)).predict(kernel, begin) for time in times]
        return np.stack(found)

    def trained_weights(self) -> list[TrainedWeight]:
        """The parameters that the kernel is taken over; they have no stored gradients and no moments."""
        args = self.args
        parameters = kernel_parameters(
            self.model, args.kernel_parameters, args.exclude_embeddings, args.exclude_head, args.only_biases
        )
        return [TrainedWeight(name, tuple(p.shape), p.numel(), 0, 0) for name, p in parameters.items()]

    @contextlib.contextmanager
    def planning(self) -> Iterator[None]:
        """Disable autograd: there is no training step whose backward pass needs memory."""
        with torch.no_grad():
            yield


def _with_random_weights(model: nn.Module, seed: int) -> nn.Module:
    """A model of the same class with weights drawn from `seed`; what was frozen stays frozen."""
    if carries_adapters(model):
        raise InputError(
            "random_model_init makes the model anew, without its adapters; pass the model without them, and the "
            "adapter by kernel_peft"
        )
    with seeded_init(seed):
        fresh = type(model)(model.config).to(next(model.parameters()).device)
    for own, drawn in zip(model.parameters(), fresh.parameters(), strict=True):
        drawn.requires_grad_(own.requires_grad)
    return fresh
