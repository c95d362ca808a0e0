"""`SolvedKernelTrainer`: a Trainer that predicts with a solved kernel, saves it to a folder and loads it from one."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.data import DataLoader
from transformers import EvalPrediction, TrainingArguments
from transformers.trainer_utils import EvalLoopOutput

from hf_ft_ext.adapters.folder import ADAPTER_WEIGHTS
from hf_ft_ext.errors import InputError
from hf_ft_ext.features.rows import has_labels, labels_of
from hf_ft_ext.files import atomic_write, write_json
from hf_ft_ext.kernel.arguments import KernelTrainingArguments
from hf_ft_ext.kernel.ntk import pseudo_logit
from hf_ft_ext.kernel.saved.loading import arguments_as_saved, load_finished, loading_code
from hf_ft_ext.kernel.saved.model import load_model, load_tokenizer
from hf_ft_ext.kernel.saved.record import (
    COEFFICIENTS,
    FILES,
    NOT_TRAINED,
    SAVED_ARGUMENTS,
    SOLUTION,
    TRAINING,
    SavedKernel,
    holds_kernel,
    weights_hash,
)
from hf_ft_ext.kernel.solvers import Coupling, KernelModel, Solver
from hf_ft_ext.kernel.trainer.source import KernelSource
from hf_ft_ext.label_tokens import check_row_labels
from hf_ft_ext.per_example.capture import Function
from hf_ft_ext.problem_types import CLASSIFICATION, MULTI_LABEL, REGRESSION
from hf_ft_ext.training.sharing import own_code_argument
from hf_ft_ext.training.solver_trainer import SolverTrainer

_SPLITS = {"eval": "dev", "test": "test"}  # the authors' names


class SolvedKernelTrainer(SolverTrainer):
    """A Trainer with a solved kernel: it predicts, and saves and loads the solved kernel.

    Attributes:
        function: function of the kernel's scalars; `None` = the logits.
        solved: the fitted solver; `None` = nothing was solved yet.
        saved: the solved kernel as it is saved in a folder.
        source: computes kernels with other data.
        coupling, regularization: those that the kernel was solved with.
        binary, regression, multi_label: the kind of task.
    """

    own_files: ClassVar[tuple[str, ...]] = FILES  # without kernel_dir, whose blocks the next run can use
    shared_files: ClassVar[tuple[str, ...]] = FILES
    arguments_class = KernelTrainingArguments

    function: Function | None = None
    solved: KernelModel | None = None
    saved: SavedKernel | None = None
    source: KernelSource
    coupling: Coupling
    regularization = 0.0
    binary: bool
    regression: bool
    multi_label: bool

    @classmethod
    def from_folder(
        cls,
        folder: str | os.PathLike,
        args: TrainingArguments | None = None,
        *,
        model: nn.Module | None = None,
        function: Function | None = None,
        given: Mapping[str, Any] | None = None,
        trust_remote_code: bool = False,
        **kwargs: Any,
    ) -> Self:
        """Make a trainer that predicts with the kernel that `save_model` wrote to `folder`, without training data.

        `predict` and `evaluate` compute the kernel between the saved training rows and the new ones; the train kernel
        is not needed. Without `args` nothing is written to disk.

        Args:
            args: as for the trainer. Settings that the kernel was solved with may be omitted, and must not differ.
            model: the model that the kernel was solved with; `None` = load it from the folder.
            function: as for the trainer; required if the kernel was solved with one, because it is not saved.
            given: arguments that the user set by name.
            trust_remote_code: whether to run model and tokenizer code that comes with the folder.
            kwargs: as for `Trainer`, except the training data. `processing_class` defaults to the tokenizer in the
                folder.

        Raises:
            InputError: the folder holds no solved kernel, a damaged one, or one of another model; or `args` differ.
        """
        folder = Path(folder).expanduser()
        saved = SavedKernel.read(folder)
        if kwargs.get("train_dataset") is not None:
            raise InputError(
                f"the kernel in {str(folder)!r} is solved and predicts with its own training rows; leave "
                "train_dataset out, or make a KernelTrainer with it to solve again"
            )
        saved.check_function(function, folder)
        own = cls.arguments_class(str(folder)) if args is None else cls.arguments_class.complete(args)
        own = arguments_as_saved(own, saved, folder, given or {})
        if model is None:
            model = load_model(folder, saved, trust_remote_code)
        saved.fit_model(model, folder)
        if kwargs.get("processing_class") is None:
            kwargs["processing_class"] = load_tokenizer(folder, trust_remote_code)
        trainer = cls(model, own, function=function, **kwargs)
        saved.fit_model(trainer.model, folder)
        trainer.use_saved(saved, keep=args is not None)
        return trainer

    # What the launcher and the model card ask the class for (see `hf_ft_ext.training.sharing.run_files`).
    holds_result = staticmethod(holds_kernel)
    load_finished = staticmethod(load_finished)
    loading_code = staticmethod(loading_code)

    def use_saved(self, saved: SavedKernel, keep: bool) -> None:
        """Predict with a saved kernel instead of training; with `keep`, store computed kernels in `kernel_dir`."""
        self.saved, self.solved, self.train_dataset = saved, saved.model, saved.training
        self.regularization, self.coupling = saved.model.options.regularization, saved.model.options.used_coupling
        self.source = self._source(keep)

    def _source(self, keep: bool) -> KernelSource:
        options = self.args.options(self.binary, self.coupling)
        if self.coupling is Coupling.PSEUDO:
            classes, seed = self.model.config.num_labels, self.args.seed
            return KernelSource(self, options, pseudo_logit(classes, seed), keep, f"pseudo {classes} {seed}")
        return KernelSource(self, options, self.function, keep and self.function is None)

    def _start(self, dataset: Any, split: str) -> np.ndarray | None:
        """The model's scaled outputs before training with `adjust_for_init`, otherwise `None`."""
        return self.source.start(dataset, split) / self.args.f0_scaling if self.args.adjust_for_init else None

    def _labels(self, dataset: Any) -> np.ndarray:
        """Class ids `[N]`, numbers, or 0 and 1 for each label `[N, C]`.

        Raises:
            InputError: the rows have no labels, or labels that are not of these kinds.
        """
        found = labels_of(dataset)
        if self.regression:
            check_row_labels(found, 1, REGRESSION)
            return found.numpy()
        classes = self.model.config.num_labels
        if self.multi_label:
            check_row_labels(found, classes, MULTI_LABEL)
            return found.numpy()
        if found.numel() != len(found):
            raise InputError(
                f"labels of shape {tuple(found.shape)} are not one class id for each row; for several labels per row "
                'set config.problem_type = "multi_label_classification"'
            )
        check_row_labels(found, classes, CLASSIFICATION)
        return found.flatten().long().numpy()

    # --- evaluation -----------------------------------------------------------------------------------

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Predict with the kernel between the training data and the data loader's data set, in its order.

        Raises:
            InputError: nothing was solved yet.
        """
        if self.solved is None:
            raise InputError(
                "a kernel predicts from training data, but none was solved yet: call train() first, or add --do_train"
            )
        dataset = dataloader.dataset
        if not hasattr(dataset, "__len__"):
            raise InputError("a kernel needs data of known length, but this is a stream; pass a data set")
        split = _SPLITS.get(metric_key_prefix, metric_key_prefix)
        predictions = self.solved.predict(self.source.kernel(dataset, split), self._start(dataset, split))
        self.source.forget()
        labels, metrics = labels_of(dataset).numpy() if has_labels(dataset) else None, {}
        shown = self.solved.class_scores(predictions)
        if labels is not None:
            metrics["loss"] = self.solved.loss(predictions, self._labels(dataset))
            if self.compute_metrics is not None and not prediction_loss_only:
                metrics |= self.compute_metrics(EvalPrediction(predictions=shown, label_ids=labels))
        metrics = {f"{metric_key_prefix}_{key}": float(value) for key, value in metrics.items()}
        output = None if prediction_loss_only else shown
        return EvalLoopOutput(output, None if prediction_loss_only else labels, metrics, len(shown))

    # --- saving ---------------------------------------------------------------------------------------

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the unchanged model, the solution and the training rows.

        `from_folder` and `load_kernel` predict from this folder. The weights file holds one extra tensor, whose name
        says that the model itself is not trained: transformers reports unknown tensors when the folder is loaded as a
        plain model. Kernels from files (`load_kernels`) may belong to another model, so then only a record of the
        settings is written.
        """
        super().save_model(output_dir, _internal_call)
        if self.solved is None or not self.args.should_save:
            return
        folder = Path(output_dir or self.args.output_dir)
        if self.args.load_kernels is None:
            if self.saved is None:
                self.saved = self._to_save(self.solved)
            self.saved.write(folder)
            return
        for name in (COEFFICIENTS, TRAINING):  # remove those of an earlier solution
            (folder / name).unlink(missing_ok=True)
        write_json(folder / SOLUTION, {**self._about(), "rank": self.solved.rank, "condition": self.solved.condition})

    def _about(self) -> dict[str, Any]:
        """The main settings, for a human reader of the saved record."""
        args = self.args
        return {
            "kernel_formula": args.kernel_formula,
            "kernel_solver": args.kernel_solver,
            "kernel_regularization": self.regularization,
            "training_rows": len(self.source.train),
            "binary_classification": self.binary,
            "adjust_for_init": args.adjust_for_init,
        }

    def _to_save(self, solved: KernelModel) -> SavedKernel:
        arguments = {name: getattr(self.args, name) for name in SAVED_ARGUMENTS}
        arguments |= {
            "kernel_regularization": str(self.regularization),
            "kernel_classes": self.coupling.value,
            "binary_classification": self.binary,
            "seed": self.args.seed,  # random_model_init, kernel_classes=pseudo and the projection depend on it
        }
        pad = getattr(getattr(self.model, "config", None), "pad_token_id", 0)
        return SavedKernel(
            arguments={**arguments, "pad_token_id": pad},
            model=solved,
            training=self.source.training_data(),
            parameters=sorted(self.source.computation.parameters),
            weights=weights_hash(self.model),
            function=None if self.function is None else getattr(self.function, "__qualname__", repr(self.function)),
            about=self._about(),
        )

    @property
    def gives_probabilities(self) -> bool:
        """Whether softmax or sigmoid of the predictions are probabilities; least squares and SVMs give scores."""
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
        if self.args.should_save and path.is_file():  # peft saves only the adapter's own tensors
            tensors = load_file(path)
            with atomic_write(path) as temporary:
                save_file({**tensors, **mark}, temporary, metadata={"format": "pt"})

    def loading_line(self) -> str:
        """One line that says how to predict: the saved model itself is not trained."""
        folder = self.args.output_dir
        if self.args.load_kernels is not None:
            return "the same command: the kernels come from load_kernels, and the model itself is not trained"
        if self.function is not None:
            return f"KernelTrainer.from_folder({folder!r}, function=...)"
        return f"load_kernel({folder!r}{own_code_argument(self.model)})"
