"""`load_kernel`: a solved kernel as a plain object that maps batches to predictions."""

import os
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from hf_ft_ext.errors import InputError
from hf_ft_ext.kernel.engines.projected import MemoryChunks, divide_rows, features_product
from hf_ft_ext.kernel.ntk import KernelComputation, outputs_at_start, pseudo_logit
from hf_ft_ext.kernel.options import Engine, KernelOptions
from hf_ft_ext.kernel.rows import ExampleRows
from hf_ft_ext.kernel.saved.model import load_model, load_tokenizer
from hf_ft_ext.kernel.saved.record import SavedKernel
from hf_ft_ext.kernel.saved.training_data import TrainingFeatures
from hf_ft_ext.kernel.solvers import Coupling, Solver
from hf_ft_ext.metrics import probabilities
from hf_ft_ext.per_example.capture import Function
from hf_ft_ext.per_example.state import Batch


@dataclass(frozen=True)
class KernelPrediction:
    """Predictions of a solved kernel.

    Attributes:
        logits: `[n, classes]` in float64, also with two classes; in a regression the predicted values `[n, C]`. Least
            squares and support vectors give scores whose order matters; their softmax is not a probability.
        labels: the class name of each example by the model's `id2label`; a list of names with several labels per row;
            `None` in a regression.
        probabilities: `[n, classes]` with `kernel_solver=logistic`, otherwise `None`.
    """

    logits: torch.Tensor
    labels: list[str] | list[list[str]] | None
    probabilities: torch.Tensor | None


class KernelPredictor:
    """A solved kernel that predicts; made by `load_kernel`.

    Attributes:
        model: the model whose kernel was solved; solving does not change it.
        saved: the solution, the training rows and the settings.
    """

    def __init__(
        self,
        folder: Path,
        saved: SavedKernel,
        model: nn.Module,
        function: Function | None,
        memory_gb: float | None,
        batch_size: int,
        trust_remote_code: bool = False,
    ):
        self.folder, self.saved, self.model, self._own_code = folder, saved, model, trust_remote_code
        self.batch_size, self._options = batch_size, saved.model.options
        settings = saved.arguments
        self._binary = bool(settings["binary_classification"])
        projected = isinstance(saved.training, TrainingFeatures)
        options = KernelOptions(
            formula=settings["kernel_formula"],
            binary_classification=self._binary,
            class_diagonal=self._options.coupling in (Coupling.BY_CLASS, Coupling.SHARED) and not self._binary,
            batch_size=batch_size,
            memory_gb=memory_gb,
            engine=Engine.PROJECTED if projected else Engine.AUTO,
            dimension=settings["kernel_dimension"] if projected else None,
            seed=settings["seed"] if projected else None,
        )
        if self._options.coupling is Coupling.PSEUDO:
            function = pseudo_logit(saved.model.scalars, settings["seed"])
        self._computation = KernelComputation(model, options, function)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer in the folder.

        Raises:
            InputError: there is none.
        """
        tokenizer = load_tokenizer(self.folder, self._own_code)
        if tokenizer is None:
            raise InputError(
                f"{str(self.folder)!r} holds no tokenizer; save the trainer's processing_class there, or tokenize "
                "with the model's own"
            )
        return tokenizer

    def __call__(self, batches: Batch | Iterable[Batch]) -> KernelPrediction:
        """Predict the examples of one or more batches.

        Args:
            batches: mappings from input names to tensors, on any device; labels are ignored.

        Raises:
            InputError: there are no examples, or their inputs differ from those of the training rows.
        """
        rows = ExampleRows(batches, self.saved.arguments.get("pad_token_id"))
        kernel = self._kernel(rows).numpy()
        start = None
        if self.saved.arguments["adjust_for_init"]:
            start = outputs_at_start(self._computation, rows, self.batch_size) / self.saved.arguments["f0_scaling"]
        scores = self.saved.model.predict(kernel, start)
        if self._options.regression:
            return KernelPrediction(torch.from_numpy(scores), None, None)
        scores = self.saved.model.class_scores(scores)
        config = self.model.config
        shares = None
        if self._options.solver is Solver.LOGISTIC:
            shares = torch.from_numpy(probabilities(scores, config.problem_type))
        return KernelPrediction(torch.from_numpy(scores), self._names(scores), shares)

    def _kernel(self, rows: ExampleRows) -> torch.Tensor:
        """`[kernels, N, C, n, C]` between the training data and `rows`."""
        training = self.saved.training
        if isinstance(training, TrainingFeatures):
            chunks = MemoryChunks(divide_rows(len(rows)))
            self._computation.project(rows, chunks)
            return features_product(
                MemoryChunks.of(training.features), chunks, self._computation.options.class_diagonal
            )[None]
        own, wanted = set(rows.batch([0])), set(training.rows.batch([0]))
        if own != wanted:
            raise InputError(
                f"the batches hold {', '.join(sorted(own))}, but the kernel was solved with rows of "
                f"{', '.join(sorted(wanted))}; pass these"
            )
        return self._computation.run(training.rows, rows, disable_tqdm=True)

    def _names(self, scores: np.ndarray) -> list[str] | list[list[str]]:
        names = {int(i): str(name) for i, name in self.model.config.id2label.items()}
        if not self._options.multi_label:
            return [names[int(i)] for i in scores.argmax(1)]
        thresholds = getattr(self.model.config, "multi_label_thresholds", None)
        # The thresholds were chosen for sigmoid(score), which also applies to scores that are no logits.
        chosen = scores >= 0 if thresholds is None else 1 / (1 + np.exp(-scores)) >= np.asarray(thresholds)
        return [[names[int(c)] for c in np.flatnonzero(row)] for row in chosen]


def load_kernel(
    folder: str | os.PathLike,
    *,
    model: nn.Module | None = None,
    function: Function | None = None,
    device: torch.device | str | None = None,
    memory_gb: float | None = None,
    batch_size: int = 16,
    trust_remote_code: bool = False,
) -> KernelPredictor:
    """Load a solved kernel as an object that maps tokenized batches to logits, labels and probabilities.

    `load_kernel(folder)(batch).labels` predicts what the trainer that solved the kernel predicts. Each call runs all
    training rows again, forward and backward, to compute their kernel with the new rows: pass many examples at once.
    With projected gradients only the new rows run, because the folder holds those of the training rows.

    Args:
        folder: written by `KernelTrainer.save_model`, or by the launcher with `--method kernel`.
        model: the model that the kernel was solved with; `None` = load it from the folder.
        function: the function of the scalars, if the kernel was solved with one.
        device: device of the model; `None` = the CPU, where it is loaded.
        memory_gb: memory limit above the loaded model, in 10^9 bytes; `None` = as `empirical_ntk`.
        batch_size: largest number of examples in a forward pass.
        trust_remote_code: whether to run model and tokenizer code that comes with the folder.

    Raises:
        InputError: the folder holds no solved kernel, a damaged one, or one of another model.
    """
    path = Path(folder).expanduser()
    saved = SavedKernel.read(path)
    saved.check_function(function, path)
    model = load_model(path, saved, trust_remote_code) if model is None else model
    saved.fit_model(model, path)
    if device is not None:
        model.to(device)
    return KernelPredictor(path, saved, model.eval(), function, memory_gb, batch_size, trust_remote_code)
