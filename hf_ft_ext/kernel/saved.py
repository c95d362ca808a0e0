"""A solved kernel in a folder: coefficients, training side and settings beside the model that the kernel is of.

Files: `kernel_solution.json` (settings, hashes), `kernel_solution.safetensors` (coefficients) and
`kernel_training.safetensors` (the training rows' inputs). No labels and no texts are kept, but token ids
can be decoded with the tokenizer.
"""

import contextlib
import hashlib
import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from hf_ft_ext.adapters.folder import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from hf_ft_ext.errors import InputError, first_line
from hf_ft_ext.kernel.solution import Coupling, arrays_of, solution_of
from hf_ft_ext.kernel.solvers import KernelModel, SolverOptions
from hf_ft_ext.kernel.training_side import KINDS, TrainingSide
from hf_ft_ext.models import seeded_init
from hf_ft_ext.per_example.capture import Function
from hf_ft_ext.prompts.configuration import PROMPT_FILE, PromptConfig
from hf_ft_ext.prompts.model import PromptForSequenceClassification
from hf_ft_ext.training.files import replacing, tensor_hash, write_json
from hf_ft_ext.training.precision import train_in_float32

logger = logging.getLogger(__name__)

SOLUTION = "kernel_solution.json"
COEFFICIENTS = "kernel_solution.safetensors"
TRAINING = "kernel_training.safetensors"
FILES = (SOLUTION, COEFFICIENTS, TRAINING)
# A tensor under this name lies in the weights' file. No model has it, so every plain load reports it.
NOT_TRAINED = "this_model_alone_predicts_as_before_training.the_kernel_predicts.see_kernel_solution_json"
_FORMAT = 1
_NEEDED = ("format", "arguments", "solver", "solution", "scalars", "parameters", "weights", "training", "files")


@dataclass
class SavedKernel:
    """A solved kernel without the model that it is of.

    Attributes:
        arguments: fields of `KernelTrainingArguments` that say what was solved, with `seed`.
        model: the fitted solver.
        training: what is kept of the training data.
        parameters: names of the parameters that the kernel is over.
        weights: `weights_hash` of the model.
        function: name of the user's function that gives the scalars; `None` = the logits.
        about: more for the reader of the file.
    """

    arguments: dict[str, Any]
    model: KernelModel
    training: TrainingSide
    parameters: list[str]
    weights: str
    function: str | None
    about: dict[str, Any]

    def write(self, folder: str | Path) -> None:
        """Write the files into `folder`, the description last, so that what is described is there."""
        folder = Path(folder)
        arrays = {name: torch.from_numpy(array) for name, array in arrays_of(self.model.solution).items()}
        for name, tensors in ((COEFFICIENTS, arrays), (TRAINING, self.training.tensors())):
            with replacing(folder / name) as temporary:
                save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, temporary)
        options = self.model.options
        record = {
            **self.about,
            "rank": self.model.rank,
            "condition": self.model.condition,
            "format": _FORMAT,
            "arguments": self.arguments,
            "solver": {**vars(options), "solver": options.solver.value, "coupling": options.coupling.value},
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
        """What `write` left.

        Raises:
            InputError: the folder holds no solved kernel, one that cannot predict by itself, or a damaged one.
        """
        folder = Path(folder)
        record = _record(folder)
        for name in (COEFFICIENTS, TRAINING):
            if not (folder / name).is_file():
                raise InputError(f"{str(folder)!r} lacks {name}, without which its kernel cannot predict; copy it too")
            if _file_hash(folder / name) != record["files"].get(name):
                raise InputError(
                    f"{folder / name} is damaged or of another run: its hash is not the one in {SOLUTION}; copy the "
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
                f"{str(folder)!r} holds {len(training)} training rows, but coefficients of {model.solution.rows}; "
                "copy the folder again, or solve the kernel again"
            )
        about = {key: value for key, value in record.items() if key not in (*_NEEDED, "function")}
        return cls(
            record["arguments"], model, training, list(record["parameters"]), record["weights"], record["function"],
            about,
        )  # fmt: skip

    def check_function(self, function: Function | None, folder: str | Path) -> None:
        """Refuse a missing function, or one where the kernel is of the logits.

        Raises:
            InputError: see above.
        """
        if function is None and self.function is not None:
            raise InputError(
                f"the kernel in {str(folder)!r} is of the scalars of a function ({self.function}), which no file "
                "holds; pass it as function="
            )
        if function is not None and self.function is None:
            raise InputError(f"the kernel in {str(folder)!r} is of the model's logits; leave function out")

    def fit_model(self, model: nn.Module, folder: str | Path) -> None:
        """Let the parameters that the kernel is over, and no others, require gradients.

        Raises:
            InputError: the model is not the one that the kernel is of.
        """
        own = dict(model.named_parameters())
        missing = [name for name in self.parameters if name not in own]
        if missing:
            raise InputError(
                f"the kernel in {str(folder)!r} is over parameters that this model lacks ({missing[0]}, ...); pass "
                "the model that it was solved with"
            )
        if weights_hash(model) != self.weights:
            raise InputError(
                f"the weights of this model are not those that the kernel in {str(folder)!r} was solved with, and its "
                "coefficients fit no others; pass that model as it was, in the same number format"
            )
        for name, parameter in own.items():
            parameter.requires_grad_(name in set(self.parameters))


def holds_kernel(folder: str | Path) -> bool:
    """Whether a local folder holds a solved kernel."""
    return (Path(folder).expanduser() / SOLUTION).is_file()


def weights_hash(model: nn.Module) -> str:
    """SHA-256 over names and values of weights and buffers; 16-bit ones as the float32 values that they stand for.

    peft's copies of the modules that an adapter replaces are left out: nothing reads them.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if ".original_module." in name or not isinstance(tensor, torch.Tensor):
            continue
        values = tensor.float() if tensor.is_floating_point() and tensor.dtype.itemsize < 4 else tensor
        digest.update(f"{name} {tensor_hash(values)}\n".encode())
    return digest.hexdigest()


def load_model(folder: str | Path, saved: SavedKernel) -> PreTrainedModel | PeftModel:
    """The model that the kernel in `folder` is of: a classifier, a prompt model, or one of these with an adapter.

    Raises:
        InputError: it cannot be loaded from the folder alone.
    """
    folder = Path(folder)
    try:
        with without_report():
            if (folder / ADAPTER_CONFIG).is_file():
                return with_adapter(load_base(folder, saved), folder)
            config = AutoConfig.from_pretrained(folder)
            return _class_of(config).from_pretrained(folder, config=config)
    except InputError:
        raise
    except Exception as error:  # of many kinds: transformers', peft's, safetensors'
        raise InputError(
            f"the model of the kernel in {str(folder)!r} cannot be loaded from there ({first_line(error)}); load it "
            "yourself and pass model="
        ) from error


def load_base(folder: Path, saved: SavedKernel) -> PreTrainedModel:
    """The base model of the adapter in `folder`, with the labels that it was trained for."""
    peft_config = PeftConfig.from_pretrained(folder)
    if (folder / PROMPT_FILE).is_file() or isinstance(AutoConfig.from_pretrained(folder), PromptConfig):
        base = PromptForSequenceClassification.from_adapter(folder)
    else:
        config = AutoConfig.from_pretrained(folder)
        name = peft_config.base_model_name_or_path
        if not name:
            raise InputError(
                f"the adapter in {str(folder)!r} names no base model; load the model yourself and pass model="
            )
        base = _class_of(config).from_pretrained(
            name, config=config, revision=peft_config.revision or "main", ignore_mismatched_sizes=True
        )
    if saved.arguments.get("random_model_init"):  # the adapter's file does not hold the base's weights
        with seeded_init(saved.arguments["seed"]):
            base = type(base)(base.config)
    return base


def with_adapter(base: PreTrainedModel, folder: Path) -> PeftModel:
    """The adapter of `folder` on its base model, trainable, in the number format that it was saved from."""
    config = PeftConfig.from_pretrained(folder)
    config.inference_mode = False
    model = train_in_float32(get_peft_model(base, config))
    tensors = {name: tensor for name, tensor in load_file(folder / ADAPTER_WEIGHTS).items() if name != NOT_TRAINED}
    set_peft_model_state_dict(model, tensors)
    return model


def load_tokenizer(folder: str | Path) -> PreTrainedTokenizerBase | None:
    """The tokenizer that lies in `folder`, if there is one."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    # of a model's type alone transformers makes one without a vocabulary
    return tokenizer if len(tokenizer) > len(tokenizer.all_special_tokens) else None


@contextlib.contextmanager
def without_report() -> Iterator[None]:
    """transformers' loading report does not name the tensor that warns whoever loads the model alone."""
    before = PreTrainedModel._keys_to_ignore_on_load_unexpected
    PreTrainedModel._keys_to_ignore_on_load_unexpected = [*(before or []), NOT_TRAINED.replace(".", r"\.")]
    try:
        yield
    finally:
        PreTrainedModel._keys_to_ignore_on_load_unexpected = before


def _class_of(config: PreTrainedConfig) -> Any:
    """The class of a saved model."""
    if isinstance(config, PromptConfig):
        return PromptForSequenceClassification
    name = next(iter(getattr(config, "architectures", None) or ()), "")
    return getattr(transformers, name, AutoModelForSequenceClassification)


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
            raise ValueError("it is no JSON object")
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read ({first_line(error)}); copy the folder again") from error
    if record.get("format") is None:
        raise InputError(
            f"the kernel in {str(folder)!r} was saved without its coefficients (by an earlier version, or because it "
            "was solved with load_kernels); solve it again from the training data"
        )
    if record["format"] != _FORMAT:
        raise InputError(
            f"{path} is of format {record['format']}, and this version of hf_ft_ext reads {_FORMAT}; install the "
            "version that wrote it"
        )
    if missing := [key for key in _NEEDED if key not in record]:
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
