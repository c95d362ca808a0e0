"""`SavedKernel`: the files of a solved kernel, stored in the folder of its model.

Files: `kernel_solution.json` (settings, hashes), `kernel_solution.safetensors` (coefficients) and
`kernel_training.safetensors` (inputs of the training rows). Labels and texts are not stored, but the token ids can be
decoded with the tokenizer.
"""

import hashlib
import json
import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from hf_ft_ext.errors import InputError, first_line
from hf_ft_ext.files import atomic_write, tensor_hash, write_json
from hf_ft_ext.kernel.saved.training_data import KINDS, TrainingData
from hf_ft_ext.kernel.solvers import Coupling, KernelModel, SolverOptions, arrays_of, solution_of
from hf_ft_ext.per_example.capture import Function

logger = logging.getLogger(__name__)

SOLUTION = "kernel_solution.json"
COEFFICIENTS = "kernel_solution.safetensors"
TRAINING = "kernel_training.safetensors"
FILES = (SOLUTION, COEFFICIENTS, TRAINING)
# The weights file holds a tensor with this name. No model has it, so transformers reports it in every plain load.
NOT_TRAINED = "this_model_alone_predicts_as_before_training.the_kernel_predicts.see_kernel_solution_json"
_FORMAT = 1
# The arguments that a saved kernel needs to predict the same.
SAVED_ARGUMENTS = (
    "adjust_for_init", "binary_classification", "exclude_embeddings", "exclude_head", "f0_scaling", "kernel_classes",
    "kernel_dimension", "kernel_formula", "kernel_gamma", "kernel_lambda", "kernel_parameters", "kernel_peft",
    "kernel_peft_config", "kernel_regularization", "kernel_solver", "kernel_svm_c", "kernel_time", "only_biases",
    "random_model_init",
)  # fmt: skip
_REQUIRED = ("format", "arguments", "solver", "solution", "scalars", "parameters", "weights", "training", "files")


@dataclass
class SavedKernel:
    """A solved kernel without its neural network.

    Attributes:
        arguments: the fields of `KernelTrainingArguments` in `SAVED_ARGUMENTS`, and `seed`.
        model: the fitted solver.
        training: the training data, in the form that predicting needs.
        parameters: names of the parameters that the kernel is taken over.
        weights: `weights_hash` of the neural network.
        function: name of the user's function of the scalars; `None` = the logits.
        about: further entries for a human reader of the file.
    """

    arguments: dict[str, Any]
    model: KernelModel
    training: TrainingData
    parameters: list[str]
    weights: str
    function: str | None
    about: dict[str, Any]

    def write(self, folder: str | Path) -> None:
        """Write the files into `folder`, the description last, so that every file it names exists."""
        folder = Path(folder)
        arrays = {name: torch.from_numpy(array) for name, array in arrays_of(self.model.solution).items()}
        for name, tensors in ((COEFFICIENTS, arrays), (TRAINING, self.training.tensors())):
            with atomic_write(folder / name) as temporary:
                save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, temporary)
        options = self.model.options
        record = {
            **self.about,
            "rank": self.model.rank,
            "condition": self.model.condition,
            "format": _FORMAT,
            "arguments": self.arguments,
            "solver": {**vars(options), "solver": options.solver.value, "coupling": options.used_coupling.value},
            "solution": self.model.solution.kind,
            "scalars": self.model.scalars,
            "function": self.function,
            "parameters": self.parameters,
            "weights": self.weights,
            "training": self.training.kind,
            "files": {name: _file_hash(folder / name) for name in (COEFFICIENTS, TRAINING)},
        }
        write_json(folder / SOLUTION, record)

    @classmethod
    def read(cls, folder: str | Path) -> "SavedKernel":
        """Read what `write` wrote.

        Raises:
            InputError: the folder holds no solved kernel, one without coefficients, or a damaged one.
        """
        folder = Path(folder)
        record = _record(folder)
        for name in (COEFFICIENTS, TRAINING):
            if not (folder / name).is_file():
                raise InputError(f"{str(folder)!r} lacks {name}, without which its kernel cannot predict; copy it too")
            if _file_hash(folder / name) != record["files"].get(name):
                raise InputError(
                    f"{folder / name} is damaged or from another run: its hash is not the one in {SOLUTION}; copy the "
                    "folder again, or solve the kernel again"
                )
        arrays = {key: tensor.numpy() for key, tensor in _tensors(folder / COEFFICIENTS).items()}
        try:
            solver = {**record["solver"], "coupling": Coupling(record["solver"]["coupling"])}
            model = KernelModel(
                SolverOptions(**solver), int(record["scalars"]), solution_of(record["solution"], arrays)
            )
            kind = KINDS[record["training"]]
            pad = record["arguments"].get("pad_token_id")
            training = kind.from_tensors(_tensors(folder / TRAINING), pad)
        except (TypeError, ValueError, KeyError) as error:
            raise InputError(
                f"{folder / SOLUTION} does not describe a solved kernel ({first_line(error)}); solve the kernel again"
            ) from error
        model.rank, model.condition = record.get("rank"), record.get("condition")
        if len(training) != model.solution.rows:
            raise InputError(
                f"{str(folder)!r} holds {len(training)} training rows, but coefficients for {model.solution.rows}; "
                "copy the folder again, or solve the kernel again"
            )
        about = {key: value for key, value in record.items() if key not in (*_REQUIRED, "function")}
        return cls(
            record["arguments"], model, training, list(record["parameters"]), record["weights"], record["function"],
            about,
        )  # fmt: skip

    def check_function(self, function: Function | None, folder: str | Path) -> None:
        """Check that a function is passed if and only if the kernel was solved with one.

        Raises:
            InputError: the function is missing, or the kernel is that of the logits.
        """
        if function is None and self.function is not None:
            raise InputError(
                f"the kernel in {str(folder)!r} was solved for the scalars of a function ({self.function}), which is "
                "not saved with it; pass it as function="
            )
        if function is not None and self.function is None:
            raise InputError(f"the kernel in {str(folder)!r} was solved for the model's logits; leave function out")

    def fit_model(self, model: nn.Module, folder: str | Path) -> None:
        """Check that the model is the kernel's, and let only the kernel's parameters require gradients.

        Raises:
            InputError: the model is another one, or has other weights.
        """
        own = dict(model.named_parameters())
        missing = [name for name in self.parameters if name not in own]
        if missing:
            raise InputError(
                f"the kernel in {str(folder)!r} needs parameters that this model lacks ({missing[0]}, ...); pass "
                "the model that it was solved with"
            )
        if weights_hash(model) != self.weights:
            raise InputError(
                f"the weights of this model are not those that the kernel in {str(folder)!r} was solved with, and its "
                "coefficients are valid only for those; pass that model unchanged, in the same dtype"
            )
        for name, parameter in own.items():
            parameter.requires_grad_(name in set(self.parameters))


def holds_kernel(folder: str | os.PathLike) -> bool:
    """Whether a local folder holds a solved kernel."""
    return (Path(folder).expanduser() / SOLUTION).is_file()


def weights_hash(model: nn.Module) -> str:
    """SHA-256 over names and values of weights and buffers; 16-bit values are hashed as float32.

    peft's unused copies of the modules that an adapter replaces are skipped.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if ".original_module." in name or not isinstance(tensor, torch.Tensor):
            continue
        values = tensor.float() if tensor.is_floating_point() and tensor.dtype.itemsize < 4 else tensor
        digest.update(f"{name} {tensor_hash(values)}\n".encode())
    return digest.hexdigest()


def _record(folder: Path) -> dict[str, Any]:
    path = folder / SOLUTION
    if not path.is_file():
        raise InputError(
            f"{str(folder)!r} holds no solved kernel (there is no {SOLUTION}); pass the output_dir of a finished "
            "run of method kernel"
        )
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(record, dict):
            raise ValueError("it is not a JSON object")
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read ({first_line(error)}); copy the folder again") from error
    if record.get("format") is None:
        raise InputError(
            f"the kernel in {str(folder)!r} was saved without its coefficients (by an earlier version, or because it "
            "was solved with load_kernels); solve it again from the training data"
        )
    if record["format"] != _FORMAT:
        raise InputError(
            f"{path} has format {record['format']}, but this version of hf_ft_ext reads {_FORMAT}; install the "
            "version that wrote it"
        )
    if missing := [key for key in _REQUIRED if key not in record]:
        raise InputError(f"{path} lacks {missing[0]!r}; copy the folder again, or solve the kernel again")
    return record


def _tensors(path: Path) -> dict[str, torch.Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a mapping)
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} cannot be read ({first_line(error)}); copy the folder again") from error


def _file_hash(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
