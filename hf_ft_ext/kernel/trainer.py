"""`KernelTrainer`: a Trainer that solves the task with the model's kernel instead of fine-tuning it."""

import contextlib
import logging
import os
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.data import DataLoader
from transformers import EvalPrediction
from transformers.trainer_utils import EvalLoopOutput

from hf_ft_ext.adapters.folder import ADAPTER_WEIGHTS
from hf_ft_ext.errors import InputError
from hf_ft_ext.feature_rows import labels_of
from hf_ft_ext.kernel.arguments import AUTO, KernelTrainingArguments
from hf_ft_ext.kernel.formulas import Formula
from hf_ft_ext.kernel.parameters import kernel_parameters
from hf_ft_ext.kernel.solvers import KernelModel, Solver, check_combination, check_labels
from hf_ft_ext.kernel.source import KernelSource
from hf_ft_ext.kernel.store import DESCRIPTION
from hf_ft_ext.metrics import MULTI_LABEL, REGRESSION
from hf_ft_ext.models import seeded_init
from hf_ft_ext.peft_models import wrap_with_peft
from hf_ft_ext.training.at_once import AtOnceTrainer
from hf_ft_ext.training.files import replacing, write_json
from hf_ft_ext.training.loss_scale import declare_mean_loss
from hf_ft_ext.training.method_trainer import overridden
from hf_ft_ext.training.plan import TrainedWeight
from hf_ft_ext.training.quantized import refuse_quantized
from hf_ft_ext.training.sharing import FinishedRun, rerun_code

logger = logging.getLogger(__name__)

SOLUTION = "kernel_solution.json"
STORE = "kernels"  # in the run folder, unless kernel_dir names another one
# A tensor under this name lies in the weights' file. No model has it, so every plain load reports it.
NOT_TRAINED = "this_model_alone_predicts_as_before_training.the_kernel_predicts.see_kernel_solution_json"
_GRID = (0.0, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
_SPLITS = {"eval": "dev", "test": "test"}  # the authors' names


class KernelTrainer(AtOnceTrainer):
    """`transformers.Trainer` whose `train()` computes the train kernel and solves the task with it.

    The model's weights stay as they are. `evaluate` and `predict` compute the kernel between the training data and
    the data given and return the solver's predictions with the usual metrics; `eval_loss` is the solver's (see
    `KernelModel.loss`). Kernels are kept on disk block by block
    (`kernel_dir`), so an interrupted run continues and a repeated one computes nothing.

    Args:
        model, args, and all else: as for `Trainer`. Other `TrainingArguments` are completed with the
            defaults of `KernelTrainingArguments`. A PEFT model's kernel is over its trainable parameters.

    Raises:
        InputError: combinations of formula, solver and task that cannot work; in `train`: a class without rows.

    Source: Malladi et al., ICML 2023, arXiv 2210.05643.
    """

    own_files: ClassVar[tuple[str, ...]] = (SOLUTION,)  # an old store serves the next run
    shared_files: ClassVar[tuple[str, ...]] = (SOLUTION, f"{STORE}/*/*.safetensors", f"{STORE}/*/{DESCRIPTION}")
    solution = "a kernel"
    start_over = "run again with the same kernel_dir, and finished blocks are found there"

    arguments_class = KernelTrainingArguments
    solved: KernelModel | None = None
    regularization = 0.0

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

    def prepare_model(self, model: nn.Module) -> nn.Module:
        self.solved = None
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
        config = model.config
        self.regression = config.problem_type == REGRESSION or config.num_labels == 1
        self.multi_label = config.problem_type == MULTI_LABEL and not self.regression
        if args.binary_classification is None:
            self.binary = not self.regression and not self.multi_label and config.num_labels == 2
        else:
            self.binary = args.binary_classification
        check_combination(
            Solver(args.kernel_solver), Formula(args.kernel_formula), self.regression, args.adjust_for_init,
            config.num_labels, self.binary, self.multi_label,
        )  # fmt: skip
        kernel_parameters(model, args.kernel_parameters, args.exclude_embeddings, args.exclude_head, args.only_biases)
        return model

    # --- training -------------------------------------------------------------------------------------

    def solve(self) -> dict[str, float]:
        """Compute the train kernel and fit the solver."""
        labels = self._labels(self.train_dataset)
        self.source = KernelSource(self, self.args.options(self.binary, self.multi_label))
        return self._solve(self.source.kernel(self.train_dataset, "train"), labels)

    def _labels(self, dataset: Any) -> np.ndarray:
        labels = labels_of(dataset).numpy()
        if not self.regression and not self.multi_label:
            config = self.model.config
            check_labels(labels, [str(config.id2label[i]) for i in range(config.num_labels)])
        return labels

    def _solve(self, kernel: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        start = self._start(self.train_dataset, "train")
        if self.args.kernel_regularization == AUTO:
            self.regularization = self._chosen(kernel, labels, start)
        else:
            self.regularization = float(self.args.kernel_regularization)
        self.solved = self._model(self.regularization, kernel, labels, start)
        metrics = {"train_loss": self.solved.loss(self.solved.predict(kernel, start), labels)}
        metrics["kernel_regularization"] = self.regularization
        for name in ("rank", "condition"):
            if getattr(self.solved, name) is not None:
                metrics[f"kernel_{name}"] = getattr(self.solved, name)
        return metrics

    def _model(self, regularization: float, kernel, labels, start, quiet: bool = False) -> KernelModel:
        options = self.args.solver_options(regularization, self.regression, self.multi_label)
        return KernelModel(options, kernel, labels, start, quiet)

    def _chosen(self, kernel: np.ndarray, labels: np.ndarray, start: np.ndarray | None) -> float:
        """The regularization that predicts the evaluation data best: by accuracy, then by the solver's loss."""
        data = self.eval_dataset
        if data is None or isinstance(data, dict):
            raise InputError(
                "kernel_regularization=auto chooses on evaluation data; pass one eval_dataset, or a number"
            )
        other, truth, begin = self.source.kernel(data, "dev"), labels_of(data).numpy(), self._start(data, "dev")
        results = []
        for value in _GRID:
            model = self._model(value, kernel, labels, start, quiet=True)
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

    # --- what is said about it ------------------------------------------------------------------------

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model that the kernel is of, as it is, and what was solved (`kernel_solution.json`).

        The weights' file holds one tensor more, whose name says that the model alone is untrained: transformers
        reports unknown tensors, so whoever loads the folder as a plain model reads it. The weights stay whole, because
        the kernel is computed again from them.
        """
        super().save_model(output_dir, _internal_call)
        if self.solved is not None and self.args.should_save:
            args = self.args
            record = {
                "kernel_formula": args.kernel_formula,
                "kernel_solver": args.kernel_solver,
                "kernel_regularization": self.regularization,
                "rank": self.solved.rank,
                "condition": self.solved.condition,
                "training_rows": len(self.train_dataset),
                "binary_classification": self.binary,
                "adjust_for_init": args.adjust_for_init,
            }
            write_json(os.path.join(output_dir or args.output_dir, SOLUTION), record)

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
        """How to predict again: the saved model is the one the kernel is of, as it was."""
        folder = self.args.kernel_dir or os.path.join(self.args.output_dir, STORE)
        return (
            f"the same command with --kernel_dir {shlex.quote(folder)} and --do_predict; the model itself is "
            "unchanged and, loaded alone, predicts as before training"
        )

    @classmethod
    def loading_code(cls, run: FinishedRun) -> str:
        """Python that predicts again: the launcher with the run's settings, the pushed model and kernels."""
        words = ["'--kernel_dir', folder + '/" + STORE + "',"] if (run.folder / STORE).is_dir() else []
        if run.has("adapter_config.json"):  # drawn again from the seed, on the model that it was drawn for
            return rerun_code(run, {"model_name_or_path": run.base or run.record["model"]}, words)
        of_the_model = ("model_name_or_path", "model_revision", "tokenizer_name", "from_linearhead")
        return rerun_code(run, dict.fromkeys(of_the_model), ["'--model_name_or_path', folder,", *words])

    def trained_weights(self) -> list[TrainedWeight]:
        """The parameters that the kernel is over: no gradients kept, no moments."""
        args = self.args
        chosen = kernel_parameters(
            self.model, args.kernel_parameters, args.exclude_embeddings, args.exclude_head, args.only_biases
        )
        return [TrainedWeight(name, tuple(p.shape), p.numel(), 0, 0) for name, p in chosen.items()]

    @contextlib.contextmanager
    def planning(self) -> Iterator[None]:
        """No training step keeps anything for a backward pass."""
        with torch.no_grad():
            yield
