"""`KernelTrainer`: a Trainer that solves the task with the model's kernel instead of fine-tuning it."""

import contextlib
import copy
import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.data import DataLoader
from transformers import AutoConfig, EvalPrediction, PreTrainedTokenizerBase, TrainingArguments
from transformers.trainer_utils import EvalLoopOutput, TrainOutput
from transformers.utils import CONFIG_NAME

from hf_ft_ext.adapters.folder import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from hf_ft_ext.errors import InputError, first_line
from hf_ft_ext.feature_rows import labels_of
from hf_ft_ext.kernel.arguments import (
    ASYMMETRIC_REGULARIZATION,
    AUTO,
    LEAVE_ONE_OUT,
    KernelTrainingArguments,
)
from hf_ft_ext.kernel.formulas import Formula
from hf_ft_ext.kernel.ntk import Engine
from hf_ft_ext.kernel.parameters import kernel_parameters
from hf_ft_ext.kernel.saved import (
    COEFFICIENTS,
    FILES,
    NOT_TRAINED,
    SOLUTION,
    TRAINING,
    SavedKernel,
    holds_kernel,
    load_model,
    load_tokenizer,
    weights_hash,
    without_report,
)
from hf_ft_ext.kernel.solution import Coupling
from hf_ft_ext.kernel.solvers import (
    KernelModel,
    KernelSystem,
    Solver,
    check_combination,
    check_labels,
    chosen_coupling,
)
from hf_ft_ext.kernel.source import KernelSource, pseudo_logit
from hf_ft_ext.kernel.training_side import TrainingFeatures, TrainingRows
from hf_ft_ext.metrics import MULTI_LABEL, REGRESSION
from hf_ft_ext.models import seeded_init
from hf_ft_ext.peft_models import wrap_with_peft
from hf_ft_ext.per_example.capture import Function
from hf_ft_ext.training.at_once import AtOnceTrainer
from hf_ft_ext.training.completion import chosen
from hf_ft_ext.training.files import replacing, write_json
from hf_ft_ext.training.loss_scale import declare_mean_loss
from hf_ft_ext.training.method_trainer import overridden
from hf_ft_ext.training.plan import TrainedWeight
from hf_ft_ext.training.quantized import refuse_quantized
from hf_ft_ext.training.sharing import FinishedRun, rerun_code

logger = logging.getLogger(__name__)

_GRID = (0.0, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
LEFT_OUT = (1e-6, 1e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 1.0)
_SPLITS = {"eval": "dev", "test": "test"}  # the authors' names
# What says how a kernel was solved, so that a saved one predicts the same.
_KEPT = (
    "adjust_for_init", "binary_classification", "exclude_embeddings", "exclude_head", "f0_scaling", "kernel_classes",
    "kernel_dimension", "kernel_formula", "kernel_gamma", "kernel_lambda", "kernel_parameters", "kernel_peft",
    "kernel_peft_config", "kernel_regularization", "kernel_solver", "kernel_svm_c", "kernel_time", "only_biases",
    "random_model_init",
)  # fmt: skip


class KernelTrainer(AtOnceTrainer):
    """`transformers.Trainer` whose `train()` computes the train kernel and solves the task with it.

    The model's weights stay as they are. `evaluate` and `predict` compute the kernel between the training data and
    the data given and return the solver's predictions with the usual metrics; `eval_loss` is the solver's (see
    `KernelModel.loss`). Kernels are kept on disk block by block
    (`kernel_dir`), so an interrupted run continues and a repeated one computes nothing. `save_model` keeps the
    solution with the training rows: `from_folder` gives a trainer that predicts without training data.

    Args:
        model, args, and all else: as for `Trainer`. Other `TrainingArguments` are completed with the
            defaults of `KernelTrainingArguments`. A PEFT model's kernel is over its trainable parameters.
        function: from model and batch to the scalars of each example, `[n]` or `[n, C]`, in the place of the logits;
            labels are numbers, `[N]` or `[N, C]`, and a regression is solved. Their kernels stay in memory: nothing
            on disk could tell two functions apart.

    Raises:
        InputError: combinations of formula, solver and task that cannot work; in `train`: a class without rows.

    Source: Malladi et al., ICML 2023, arXiv 2210.05643.
    """

    own_files: ClassVar[tuple[str, ...]] = FILES  # an old store serves the next run
    shared_files: ClassVar[tuple[str, ...]] = FILES
    solution = "a kernel"
    start_over = "run again with the same kernel_dir, and finished blocks are found there"

    arguments_class = KernelTrainingArguments
    solved: KernelModel | None = None
    saved: SavedKernel | None = None
    function: Function | None = None
    regularization = 0.0

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
            self.label_names = ["labels"]  # whatever the model's forward takes

    @classmethod
    def from_folder(
        cls,
        folder: str | os.PathLike,
        args: TrainingArguments | None = None,
        *,
        model: nn.Module | None = None,
        function: Function | None = None,
        given: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> "KernelTrainer":
        """A trainer that predicts by the kernel that `save_model` left in `folder`, without training data.

        `predict` and `evaluate` compute the kernel between the saved training rows and the new ones; the train kernel
        is not needed. Without `args` nothing is written to disk.

        Args:
            args: as for the trainer; what says how the kernel was solved may be left out and must not differ.
            model: the model that was solved with; `None` = from the folder.
            function: as for the trainer; needed if the kernel was solved with one, which no folder can hold.
            given: arguments that the user set by name.
            kwargs: as for `Trainer`, but for the training data. `processing_class` is the tokenizer in the folder
                unless another one is passed.

        Raises:
            InputError: the folder holds no solved kernel, a damaged one, or one of another model; `args` that differ.
        """
        folder = Path(folder).expanduser()
        saved = SavedKernel.read(folder)
        if kwargs.get("train_dataset") is not None:
            raise InputError(
                f"the kernel in {str(folder)!r} is solved and predicts by its own rows; leave train_dataset out, or "
                "make a KernelTrainer with it to solve anew"
            )
        saved.check_function(function, folder)
        keep = args is not None
        args = cls.arguments_class(str(folder)) if args is None else cls.arguments_class.complete(args)
        args = _as_saved(args, saved, folder, given or {})
        if model is None:
            model = load_model(folder, saved)
        saved.fit_model(model, folder)
        if kwargs.get("processing_class") is None:
            kwargs["processing_class"] = load_tokenizer(folder)
        trainer = cls(model, args, function=function, **kwargs)
        saved.fit_model(trainer.model, folder)
        trainer.saved, trainer.solved, trainer.train_dataset = saved, saved.model, saved.training
        trainer.regularization, trainer.coupling = saved.model.options.regularization, saved.model.options.coupling
        trainer.source = trainer._source(keep)
        return trainer

    @classmethod
    def holds_result(cls, folder: str | os.PathLike) -> bool:
        """Whether `folder` holds a solved kernel, so that the launcher predicts with it."""
        return holds_kernel(folder)

    @classmethod
    def load_finished(
        cls,
        folder: str | os.PathLike,
        labels: Sequence[str] | None,
        given: Mapping[str, Any],
        load: Callable[[], tuple],
    ) -> tuple[PreTrainedTokenizerBase, nn.Module]:
        """Tokenizer and model of the solved kernel in `folder`.

        Args:
            labels: names of the data's labels, where it has any.
            given: arguments that the user set by name.
            load: loads a plain model from the folder.

        Raises:
            InputError: the data has other labels than the kernel; an option that an adapter's model cannot take.
        """
        folder = Path(folder)
        saved = SavedKernel.read(folder)
        try:
            own = AutoConfig.from_pretrained(folder)
        except (OSError, ValueError) as error:
            raise InputError(
                f"the configuration of the model in {str(folder)!r} cannot be read ({first_line(error)}); copy the "
                "folder again"
            ) from error
        names = [str(own.id2label[i]) for i in range(own.num_labels)]
        if labels is not None and {name.lower() for name in names} != {name.lower() for name in labels}:
            raise InputError(
                f"the kernel in {str(folder)!r} was solved for the labels {', '.join(names[:10])}, but this data has "
                f"{', '.join(labels[:10])}; pass data with these labels"
            )
        if not (folder / ADAPTER_CONFIG).is_file():
            with without_report():
                return load()
        for name in ("attn_implementation", "device_map", "dtype", "model_revision", "quantization", "tokenizer_name"):
            if name in given:
                raise InputError(
                    f"{name}={given[name]}: the kernel in {str(folder)!r} is of an adapter, which is loaded as it was "
                    "saved; leave it out"
                )
        tokenizer = load_tokenizer(folder)
        if tokenizer is None:
            raise InputError(f"{str(folder)!r} holds no tokenizer; copy its files from the run's folder too")
        return tokenizer, load_model(folder, saved)

    def check_passed(self, passed: Mapping[str, Any]) -> None:
        super().check_passed(passed)
        if passed.get("preprocess_logits_for_metrics") is not None:
            raise InputError("a kernel predicts without the model's outputs; leave preprocess_logits_for_metrics out")

    def check_arguments(self) -> None:
        super().check_arguments()
        if overridden(self, "prediction_step"):
            raise InputError(
                f"{type(self).__name__} overrides prediction_step, and a kernel predicts all rows at once; leave it "
                "out"
            )
        args = self.args
        if self.function is not None:
            for name in ("kernel_dir", "load_kernels", "export_kernels"):
                if getattr(args, name) is not None:
                    raise InputError(
                        f"{name}={getattr(args, name)}: kernels of a function of yours are not kept in files, which "
                        "could not tell two functions apart; leave it out"
                    )

    def prepare_model(self, model: nn.Module) -> nn.Module:
        self.solved = self.saved = None
        args = self.args
        declare_mean_loss(model)
        refuse_quantized(model, "a kernel is computed in float32 or float64 from")
        if getattr(model, "is_activation_checkpointing", False):
            raise InputError(
                "gradient checkpointing is on, which runs modules twice; call model.gradient_checkpointing_disable()"
            )
        if args.random_model_init:
            with seeded_init(args.seed):
                model = type(model)(model.config).to(next(model.parameters()).device)
        if args.kernel_peft is not None:
            model = wrap_with_peft(model, args.kernel_peft, args.kernel_peft_config, args.seed, "kernel_peft")
        config = getattr(model, "config", None)
        problem, classes = getattr(config, "problem_type", None), getattr(config, "num_labels", 1)
        self.regression = self.function is not None or problem == REGRESSION or classes == 1
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
        """As `AtOnceTrainer.train`.

        Raises:
            InputError: the trainer came from a folder.
        """
        if isinstance(self.train_dataset, (TrainingRows, TrainingFeatures)):
            raise InputError(
                "this trainer came from a folder with a solved kernel and has no labels to solve with; make a "
                "KernelTrainer with training data"
            )
        return super().train(*positional, **kwargs)

    def solve(self) -> dict[str, float]:
        """Compute the train kernel and fit the solver."""
        labels = self._labels(self.train_dataset)
        scalars = int(np.prod(labels.shape[1:])) if self.regression else self.model.config.num_labels
        self.coupling = chosen_coupling(
            Solver(self.args.kernel_solver), self.args.kernel_classes, self.multi_label, len(labels),
            1 if self.binary else scalars, self._needs_logits(),
        )  # fmt: skip
        self.saved = None
        self.source = self._source(keep=self.function is None)
        return self._solve(self.source.kernel(self.train_dataset, "train"), labels)

    def _needs_logits(self) -> str | None:
        """The argument, if there is one, that a kernel of one scalar for all classes cannot honour."""
        names = ("adjust_for_init", "export_kernels", "load_kernels")
        return (
            "function"
            if self.function is not None
            else next((name for name in names if getattr(self.args, name)), None)
        )

    def _source(self, keep: bool) -> KernelSource:
        options = self.args.options(self.binary, self.coupling)
        if self.coupling is Coupling.PSEUDO:
            classes, seed = self.model.config.num_labels, self.args.seed
            return KernelSource(self, options, pseudo_logit(classes, seed), keep, f"pseudo {classes} {seed}")
        return KernelSource(self, options, self.function, keep and self.function is None)

    def _labels(self, dataset: Any) -> np.ndarray:
        labels = labels_of(dataset).numpy()
        if not self.regression and not self.multi_label:
            config = self.model.config
            check_labels(labels, [str(config.id2label[i]) for i in range(config.num_labels)])
        return labels

    def _solve(self, kernel: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        start = self._start(self.train_dataset, "train")
        options = self.args.solver_options(0.0, self.regression, self.multi_label, self.coupling)
        scalars = self.model.config.num_labels if self.coupling is Coupling.PSEUDO else None
        system = KernelSystem(options, kernel, labels, start, scalars)
        self.regularization = self._regularization(system)
        self.solved = system.solve(self.regularization)
        metrics = {"train_loss": self.solved.loss(self.solved.predict(kernel, start), labels)}
        metrics["kernel_regularization"] = self.regularization
        for name in ("rank", "condition"):
            if getattr(self.solved, name) is not None:
                metrics[f"kernel_{name}"] = getattr(self.solved, name)
        return metrics

    def _regularization(self, system: KernelSystem) -> float:
        value = self.args.regularization
        if value == AUTO:
            return self._chosen(system)
        if value != LEAVE_ONE_OUT:
            return float(value)
        if not system.leaves_one_out:  # a kernel from a file may be asymmetric whatever its formula
            return ASYMMETRIC_REGULARIZATION
        best = system.best_left_out(LEFT_OUT)
        logger.info("kernel_regularization: %g, by leaving out one training row after the other", best)
        return best

    def _chosen(self, system: KernelSystem) -> float:
        """The regularization that predicts the evaluation data best: by accuracy, then by the solver's loss."""
        data = self.eval_dataset
        if data is None or isinstance(data, dict):
            raise InputError(
                "kernel_regularization=auto chooses on evaluation data; pass one eval_dataset, or a number"
            )
        other, truth, begin = self.source.kernel(data, "dev"), labels_of(data).numpy(), self._start(data, "dev")
        results = []
        for value in _GRID:
            model = system.solve(value, quiet=True)
            found = model.predict(other, begin)
            if self.multi_label:
                right = float(np.mean((found >= 0) == (truth > 0.5)))
            else:
                right = 0.0 if self.regression else float(np.mean(self._logits(found).argmax(-1) == truth))
            results.append((right, -model.loss(found, truth), value))
        best = max(results)[2]
        logger.info(
            "kernel_regularization: %g, the best of %s on the evaluation data", best, ", ".join(map(str, _GRID))
        )
        return best

    def _start(self, dataset: Any, split: str) -> np.ndarray | None:
        """What the model says at the start, scaled, if predictions are to be relative to it."""
        return self.source.start(dataset, split) / self.args.f0_scaling if self.args.adjust_for_init else None

    def linearize(self, times: Sequence[float], dataset: Any = None, regularization: float = 0.0) -> np.ndarray:
        """Predictions of the linearized model, trained for each of `times` from the model's own outputs.

        `f_t(x) = f_0(x) + K(x, X) M^-1 (I - exp(-M t / N)) (y - f_0(X))` with `M = K + r ||K|| I`: gradient flow on
        half the mean squared error of the N training rows; `t` is the learning rate times the number of small steps.
        Infinity gives kernel regression. All times share one eigendecomposition. Classes are coupled as the solver
        couples them (see `kernel_classes`).

        Args:
            times: 0 or more each; 0 gives the model's own outputs.
            dataset: rows to predict, such as `trainer.train_dataset`; `None` = the evaluation data.
            regularization: r, relative to the operator norm of `K`, 0 or more.

        Returns:
            `[times, rows, C]`: with two classes one scalar, the difference of the logits (see
            `binary_classification`), that was fitted to -1 and 1.

        Raises:
            InputError: no gradient flow on the squared loss: another formula than `sgd`; a trainer from a folder; a
                negative time.

        Source: Lee et al. 2019, arXiv 1902.06720, equations 10 and 11.
        """
        if Formula(self.args.kernel_formula) is not Formula.SGD:
            raise InputError(
                f"gradient flow is training by sgd, and kernel_formula={self.args.kernel_formula}; pass sgd"
            )
        if self.solved is None or isinstance(self.train_dataset, (TrainingRows, TrainingFeatures)):
            raise InputError(
                "linearize needs the train kernel and the labels; call train() of a trainer that has them"
            )
        if self.coupling is Coupling.PSEUDO:
            raise InputError("linearize needs each class's own scalar; pass kernel_classes=shared, or another one")
        if bad := [time for time in times if not time >= 0]:
            raise InputError(f"times must be 0 or more, got {bad[0]}")
        data = self.eval_dataset if dataset is None else dataset
        if data is None or isinstance(data, dict):
            raise InputError("linearize predicts one data set, and there is none; pass dataset")
        labels, start = self._labels(self.train_dataset), self.source.start(self.train_dataset, "train")
        options = replace(
            self.solved.options, solver=Solver.LSTSQ, regularization=regularization, coupling=self.coupling, time=None
        )
        system = KernelSystem(options, self.source.kernel(self.train_dataset, "train"), labels, start)
        kernel, begin = self.source.kernel(data, "linearize"), self.source.start(data, "linearize")
        self.source.forget()
        found = [system.solve(quiet=True, time=float(time)).predict(kernel, begin) for time in times]
        return np.stack(found)

    # --- evaluation -----------------------------------------------------------------------------------

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Predict by the kernel between the training data and the data loader's data set, in its order.

        Raises:
            InputError: nothing was solved yet.
        """
        if self.solved is None:
            raise InputError(
                "a kernel predicts from training data, and none was solved yet: call train() first, or add --do_train"
            )
        dataset = dataloader.dataset
        if not hasattr(dataset, "__len__"):
            raise InputError("a kernel needs data of known length, and this is a stream; pass a data set")
        split = _SPLITS.get(metric_key_prefix, metric_key_prefix)
        predictions = self.solved.predict(self.source.kernel(dataset, split), self._start(dataset, split))
        self.source.forget()
        try:
            labels = labels_of(dataset).numpy()
        except InputError:
            labels = None
        metrics = {}
        shown = predictions if self.regression else self._logits(predictions)
        if labels is not None:
            metrics["loss"] = self.solved.loss(predictions, labels)
            if self.compute_metrics is not None and not prediction_loss_only:
                metrics |= self.compute_metrics(EvalPrediction(predictions=shown, label_ids=labels))
        metrics = {f"{metric_key_prefix}_{key}": float(value) for key, value in metrics.items()}
        output = None if prediction_loss_only else shown
        return EvalLoopOutput(output, None if prediction_loss_only else labels, metrics, len(shown))

    def _logits(self, predictions: np.ndarray) -> np.ndarray:
        """`[N, classes]`; one scalar is the difference of two. Of several labels, above 0 says yes."""
        if self.multi_label:
            return predictions
        return np.hstack([-predictions, predictions]) / 2 if predictions.shape[1] == 1 else predictions

    # --- what is kept of it ---------------------------------------------------------------------------

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model that the kernel is of, as it is, with the solution and the training rows.

        `from_folder` and `load_kernel` predict from what is saved. The weights' file holds one tensor more, whose name
        says that the model alone is untrained: transformers reports unknown tensors, so whoever loads the folder as a
        plain model reads it. Kernels that were read from files (`load_kernels`) may be of another model: then the
        record alone is written.
        """
        super().save_model(output_dir, _internal_call)
        if self.solved is None or not self.args.should_save:
            return
        folder = Path(output_dir or self.args.output_dir)
        if self.args.load_kernels is None:
            if self.saved is None:
                self.saved = self._to_save()
            self.saved.write(folder)
            return
        for name in (COEFFICIENTS, TRAINING):  # of an earlier solution
            (folder / name).unlink(missing_ok=True)
        write_json(folder / SOLUTION, {**self._about(), "rank": self.solved.rank, "condition": self.solved.condition})

    def _about(self) -> dict[str, Any]:
        """What a reader of the saved record wants to know first."""
        args = self.args
        return {
            "kernel_formula": args.kernel_formula,
            "kernel_solver": args.kernel_solver,
            "kernel_regularization": self.regularization,
            "training_rows": len(self.train_dataset),
            "binary_classification": self.binary,
            "adjust_for_init": args.adjust_for_init,
        }

    def _to_save(self) -> SavedKernel:
        arguments = {name: getattr(self.args, name) for name in _KEPT}
        arguments |= {
            "kernel_regularization": str(self.regularization),
            "kernel_classes": self.coupling.value,
            "binary_classification": self.binary,
            "seed": self.args.seed,  # random_model_init, kernel_classes=pseudo and the projection drew from it
        }
        pad = getattr(getattr(self.model, "config", None), "pad_token_id", 0)
        return SavedKernel(
            arguments={**arguments, "pad_token_id": pad},
            model=self.solved,
            training=self.source.training_side(),
            parameters=sorted(self.source.computation.parameters),
            weights=weights_hash(self.model),
            function=None if self.function is None else getattr(self.function, "__qualname__", repr(self.function)),
            about=self._about(),
        )

    @property
    def gives_probabilities(self) -> bool:
        """Whether a softmax or sigmoid of the predictions is a probability: least squares and SVMs give scores."""
        return Solver(self.args.kernel_solver) is Solver.LOGISTIC

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        if self.solved is None:
            return super()._save(output_dir, state_dict)
        mark = {NOT_TRAINED: torch.zeros(1)}
        if not isinstance(self.model, PeftModel):
            weights = self.model.state_dict() if state_dict is None else state_dict
            return super()._save(output_dir, {**weights, **mark})
        super()._save(output_dir, state_dict)
        path = Path(output_dir or self.args.output_dir) / ADAPTER_WEIGHTS
        if self.args.should_save and path.is_file():  # peft keeps the adapter's own tensors only
            tensors = load_file(path)
            with replacing(path) as temporary:
                save_file({**tensors, **mark}, temporary, metadata={"format": "pt"})

    def loading_line(self) -> str:
        """How to predict: the saved model is the one the kernel is of, as it was."""
        folder = self.args.output_dir
        if self.args.load_kernels is not None:
            return "the same command: the kernels come from load_kernels, and the model predicts as before training"
        if self.function is not None:
            return f"KernelTrainer.from_folder({folder!r}, function=...)"
        return f"load_kernel({folder!r})"

    @classmethod
    def loading_code(cls, run: FinishedRun) -> str:
        """Python that predicts with what was pushed."""
        if not run.has(COEFFICIENTS):  # the kernels came from files
            if run.has(ADAPTER_CONFIG):  # drawn again from the seed, on the model that it was drawn for
                return rerun_code(run, {"model_name_or_path": run.base or run.record["model"]}, [])
            of_the_model = ("model_name_or_path", "model_revision", "tokenizer_name", "from_linearhead")
            return rerun_code(run, dict.fromkeys(of_the_model), ["'--model_name_or_path', folder,"])
        lines = [
            "from hf_ft_ext import load_kernel",
            "from huggingface_hub import snapshot_download",
            "",
            f"kernel = load_kernel(snapshot_download({run.repo_id!r}))",
            "batch = kernel.tokenizer(['a text', 'another one'], padding=True, return_tensors='pt')",
            "print(kernel(batch).labels)",
        ]
        template = json.loads((run.folder / CONFIG_NAME).read_text(encoding="utf-8")).get("template")
        if template is not None:  # a prompt model: each list holds one text of all rows
            texts = 2 if "sent_1" in template else 1
            length = (run.record.get("arguments") or {}).get("max_seq_length") or 128
            lines[0] = "from hf_ft_ext import PromptEncoder, load_kernel"
            lines[4:5] = [
                f"encode = PromptEncoder(kernel.tokenizer, kernel.model.config.template, {texts}, {length})",
                "rows = encode([" + ", ".join(["['a text', 'another one']"] * texts) + "])",
                "batch = kernel.tokenizer.pad(rows, return_tensors='pt')",
            ]
        return "\n".join(lines)

    def trained_weights(self) -> list[TrainedWeight]:
        """The parameters that the kernel is over: no gradients kept, no moments."""
        args = self.args
        parameters = kernel_parameters(
            self.model, args.kernel_parameters, args.exclude_embeddings, args.exclude_head, args.only_biases
        )
        return [TrainedWeight(name, tuple(p.shape), p.numel(), 0, 0) for name, p in parameters.items()]

    @contextlib.contextmanager
    def planning(self) -> Iterator[None]:
        """No training step keeps anything for a backward pass."""
        with torch.no_grad():
            yield


def _as_saved(
    args: KernelTrainingArguments, saved: SavedKernel, folder: Path, given: Mapping[str, Any]
) -> KernelTrainingArguments:
    """A copy of `args` with what the saved kernel was solved with.

    Raises:
        InputError: the user set another value.
    """
    args = copy.copy(args)
    projected = isinstance(saved.training, TrainingFeatures)
    if projected != (args.kernel_engine == Engine.PROJECTED.value):
        if "kernel_engine" in given or chosen(args, "kernel_engine"):
            kind = "projected gradients" if projected else "an exact kernel"
            raise InputError(
                f"kernel_engine={args.kernel_engine} was passed, but the kernel in {str(folder)!r} was solved with "
                f"{kind}; leave it out, or solve anew from training data"
            )
        args.kernel_engine = Engine.PROJECTED.value
    for name in _KEPT:
        value, passed = saved.arguments.get(name), getattr(args, name)
        if (name in given or chosen(args, name)) and str(passed) != str(value):
            raise InputError(
                f"{name}={passed} was passed, but the kernel in {str(folder)!r} was solved with {name}={value}; leave "
                "it out, or solve anew from training data"
            )
        setattr(args, name, value)
    if projected or saved.model.options.coupling is Coupling.PSEUDO:
        args.seed = saved.arguments["seed"]  # the projection, or the signs, were drawn from it
    # the saved model has its adapter and its drawn weights already
    args.kernel_peft, args.kernel_peft_config, args.random_model_init = None, {}, False
    return args
