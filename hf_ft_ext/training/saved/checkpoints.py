"""Checking that a checkpoint is complete and undamaged before it is loaded.

A run that is killed while it saves leaves an incomplete folder; a disk or a copy can damage a complete one. Our
launcher writes a file of checksums last: sizes and SHA-256 of all other files. A folder with this file is checked
against it. In a folder without it, as other Trainers write, each file is checked for being readable.
"""

import contextlib
import hashlib
import json
import logging
import os
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from peft import PeftModel, get_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import PreTrainedModel, TrainerCallback
from transformers.core_model_loading import revert_weight_conversion
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import CONFIG_NAME

from hf_ft_ext.adapters.folder import ADAPTER_CONFIG
from hf_ft_ext.adapters.layer_prefix.model import keep_projection
from hf_ft_ext.errors import InputError, first_line
from hf_ft_ext.files import tensor_hash, write_json
from hf_ft_ext.offload import reader_of

logger = logging.getLogger(__name__)

CHECKSUM_FILE = "checkpoint_checksums.json"
_FORMER_FILE = "checkpoint_seal.json"  # its name in checkpoints of earlier versions
_FORMAT = "hf_ft_ext checkpoint 1"
_STATE = "trainer_state.json"
_ADAPTER = "adapter_model.safetensors"
_MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer")


class WriteChecksums(TrainerCallback):
    """Writes the checksums of each checkpoint. Register it after all callbacks that write files into a checkpoint.

    Args:
        method: name of the method; a resumed run must use the same one.
    """

    def __init__(self, method: str):
        self.method = method
        self._base: str | None = None

    def on_save(self, args, state, control, model=None, **kwargs):
        if args.world_size > 1:
            PartialState().wait_for_everyone()  # each process writes its random state
        if args.should_save:
            if self._base is None and model is not None:
                self._base = frozen_hash(model)
            folder = Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
            if folder.is_dir():
                write_checksums(folder, self.method, self._base)


def write_checksums(folder: Path, method: str, base: str | None) -> None:
    """Write the method, the hash of the frozen weights, and size and checksum of each file into `folder`."""
    files = {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": _sha256(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != CHECKSUM_FILE
    }
    write_json(folder / CHECKSUM_FILE, {"format": _FORMAT, "method": method, "base": base, "files": files})


def frozen_hash(model: nn.Module) -> str | None:
    """SHA-256 of a PEFT model's weights that neither train nor stand in its checkpoints; `None` for other models.

    Also `None` for sharded weights, of which no process holds all. A search freezes everything while it runs, so what
    peft saves is left out whether it is frozen or not.
    """
    if not isinstance(model, PeftModel) or any(_in_shards(parameter) for parameter in model.parameters()):
        return None
    digest, read, saved = hashlib.sha256(), reader_of(model), _saved_with_adapter(model)
    for name, parameter in sorted(model.named_parameters()):
        # `original_module` is the unused copy of a module in `modules_to_save`; a fitted head may differ there.
        if not (parameter.requires_grad or id(parameter) in saved or ".original_module." in name):
            digest.update(f"{name} {tensor_hash(read(name, parameter))}\n".encode())
    return digest.hexdigest()


def _saved_with_adapter(model: PeftModel) -> set[int]:
    """The identities of the parameters that a checkpoint of `model` holds."""
    with keep_projection(model):
        saved = get_peft_model_state_dict(model, state_dict=model.state_dict(keep_vars=True))
    # The parameters of virtual tokens are saved as what they compute.
    prompts = [p for name, p in model.named_parameters() if name.startswith("prompt_encoder.")]
    return {id(tensor) for tensor in (*saved.values(), *prompts)}


def _in_shards(parameter: nn.Parameter) -> bool:
    return hasattr(parameter, "full_tensor") or hasattr(parameter, "ds_id")  # FSDP2's, ZeRO-3's


# --- before a checkpoint is loaded ------------------------------------------------------------------


def checkpoint_folders(output_dir: str | os.PathLike) -> list[Path]:
    """The checkpoints in `output_dir`, complete or not, latest first."""
    found = [
        (int(match[1]), path)
        for path in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*")
        if path.is_dir() and (match := re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)", path.name))
    ]
    return [path for _, path in sorted(found, reverse=True)]


def last_complete_checkpoint(output_dir: str | os.PathLike, problems: list[str] | None = None) -> Path | None:
    """The latest checkpoint in `output_dir` that is complete and undamaged, or `None`.

    Args:
        problems: a list to which the problems of later checkpoints are appended.
    """
    for folder in checkpoint_folders(output_dir):
        if (problem := checkpoint_problem(folder)) is None:
            return folder
        if problems is not None:
            problems.append(f"{folder}: {problem}")
    return None


def checkpoint_problem(folder: str | os.PathLike) -> str | None:
    """What is wrong with the checkpoint `folder`, or `None` if it is complete and undamaged."""
    folder = Path(folder)
    if not (folder / _STATE).is_file():
        return f"no {_STATE}, so the run was ended while it was written"
    try:
        state = json.loads((folder / _STATE).read_text(encoding="utf-8"))
        if not isinstance(state, dict) or not isinstance(state.get("global_step"), int):
            return f"{_STATE} is not what a Trainer writes"
    except (OSError, ValueError) as error:
        return f"{_STATE} cannot be read ({error})"
    if (checksums := _checksum_file(folder)) is not None:
        return _checksum_mismatch(checksums)
    return _unreadable(folder)


def steps_done(folder: str | os.PathLike) -> int:
    """The training step at which the checkpoint `folder` was written; 0 if unknown."""
    try:
        return int(json.loads((Path(folder) / _STATE).read_text(encoding="utf-8"))["global_step"])
    except (OSError, ValueError, KeyError, TypeError):
        return 0


def read_checksums(folder: str | os.PathLike) -> dict[str, Any] | None:
    """What `write_checksums` wrote into a checkpoint, or `None` if it has no such file.

    Raises:
        InputError: it cannot be read.
    """
    path = _checksum_file(Path(folder))
    return None if path is None else _read_checksums(path)


def _read_checksums(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read ({error}); resume from another checkpoint") from error
    if not isinstance(found, dict) or found.get("format") != _FORMAT or not isinstance(found.get("files"), dict):
        raise InputError(f"{path} is not a file of checksums of this version; resume from another checkpoint")
    return found


def _checksum_file(folder: Path) -> Path | None:
    return next((folder / name for name in (CHECKSUM_FILE, _FORMER_FILE) if (folder / name).exists()), None)


def _checksum_mismatch(checksums: Path) -> str | None:
    """The first file of a checkpoint that differs from its checksum, or `None`."""
    try:
        for name, about in _read_checksums(checksums)["files"].items():
            path = checksums.parent / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != about["bytes"]:
                return f"{name} has {path.stat().st_size:,} bytes and had {about['bytes']:,}: truncated or replaced"
            if _sha256(path) != about["sha256"]:
                return f"{name} is not what was saved (its SHA-256 differs): damaged or replaced"
    except InputError as error:
        return str(error)
    except (KeyError, TypeError, ValueError) as error:
        return f"{checksums.name} is damaged ({error!r})"
    except OSError as error:
        return f"{error.filename} cannot be read ({error.strerror})"
    return None


def _unreadable(folder: Path) -> str | None:
    """The problem of the first unreadable file in a folder without checksums, or `None`."""
    for path in sorted(folder.iterdir()):
        try:
            if path.suffix == ".safetensors":
                with safe_open(path, framework="pt"):
                    pass
            elif path.suffix in (".pt", ".pth", ".bin"):
                with zipfile.ZipFile(path) as archive:  # torch's format since 1.6, with a checksum per member
                    if (bad := archive.testzip()) is not None:
                        return f"{path.name} is damaged ({bad})"
            elif path.suffix == ".json":
                json.loads(path.read_text(encoding="utf-8"))
        except (SafetensorError, zipfile.BadZipFile, OSError, ValueError, EOFError) as error:
            return f"{path.name} cannot be read ({first_line(error)}): truncated or not a file of this type"
        except Exception as error:  # zlib and struct errors of archives with a damaged directory
            return f"{path.name} cannot be read ({first_line(error)})"
    ranks = int(os.environ.get("WORLD_SIZE", 1))
    states = {path.name for path in folder.glob("rng_state_*.pth")}
    if states and (absent := [i for i in range(ranks) if f"rng_state_{i}.pth" not in states]):
        return f"rng_state_{absent[0]}.pth is missing, so the run was ended while it was written"
    return None


# --- whether a checkpoint fits the model ------------------------------------------------------------


def check_fits(folder: str | os.PathLike, model: nn.Module, method: str) -> None:
    """Raise an `InputError` unless the checkpoint `folder` fits `model` and `method`."""
    found = read_checksums(folder)
    if found is not None and found.get("method") not in (None, method):
        raise InputError(
            f"--resume_from_checkpoint: {os.fspath(folder)!r} was written by method {found['method']!r}, not "
            f"{method!r}; resume with the method that wrote it"
        )
    if found is not None and found.get("base") is not None and found["base"] != frozen_hash(model):
        raise InputError(
            f"--resume_from_checkpoint: {os.fspath(folder)!r} belongs to another base model: the frozen weights "
            "differ; pass the --model_name_or_path that the run started with"
        )
    check_weights(folder, model)


def check_weights(folder: str | os.PathLike, model: nn.Module) -> None:
    """Raise an `InputError` unless the checkpoint `folder` holds the model's labels and weights, of equal shapes."""
    check_labels(folder, model)
    adapter, whole = Path(folder) / _ADAPTER, sorted(Path(folder).glob("model*.safetensors"))
    if isinstance(model, PeftModel):
        _check_adapter_settings(folder, model)
        with keep_projection(model):
            wanted = get_peft_model_state_dict(model)
        if whole and not any(Path(folder).glob("adapter_model.*")):
            raise _other_model(folder, "it holds a whole model, and an adapter trains here")
        files = [adapter] if adapter.is_file() else []
    else:
        unsaved = getattr(model, "_keys_to_ignore_on_save", None) or ()
        wanted = {name: tensor for name, tensor in saved_state_dict(model).items() if name not in unsaved}
        files = whole
        if adapter.is_file() and not files:
            raise _other_model(folder, "it holds an adapter, and the model itself trains here")
    if not files:
        return  # pickled weights, or shards of FSDP: transformers reads or refuses them
    shapes = _shapes(files)
    shared = {tensor.data_ptr() for name, tensor in wanted.items() if name in shapes}
    buffers = {name for name, _ in model.named_buffers()}
    for name, tensor in wanted.items():
        if name not in shapes:
            if tensor.data_ptr() not in shared and name not in buffers:
                raise _other_model(folder, f"it has no {name}")
        elif shapes[name] != tuple(tensor.shape):
            raise _other_model(folder, f"its {name} has shape {shapes[name]}, here {tuple(tensor.shape)}")
    if unknown := sorted(shapes.keys() - wanted.keys()):
        raise _other_model(folder, f"this one has no {unknown[0]}")


# Settings of adapters that change what the same weights compute.
_ADAPTER_SETTINGS = (
    "lora_alpha", "alpha_pattern", "use_rslora", "scaling", "learned_scaling", "activation", "layer_norm", "placement",
)  # fmt: skip


def _check_adapter_settings(folder: str | os.PathLike, model: PeftModel) -> None:
    try:
        found = json.loads((Path(folder) / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return  # `checkpoint_problem` says what is wrong with the file
    own = model.active_peft_config.to_dict()
    for name in _ADAPTER_SETTINGS:
        if name in found and name in own and found[name] != own[name]:
            raise _other_model(folder, f"its adapter has {name}={found[name]}, here {own[name]}")


def check_moments(optimizer: torch.optim.Optimizer) -> None:
    """Raise a `ValueError` if a loaded moment has another shape than its parameter.

    A fused step does not compare the shapes, and would write past the end of the shorter tensor.
    """
    plain = getattr(optimizer, "optimizer", optimizer)  # accelerate wraps it
    if not isinstance(plain, torch.optim.Adam | torch.optim.AdamW | torch.optim.SGD):
        return  # others keep rows, columns or projections
    for parameter, state in plain.state.items():
        if "indices" in state:
            continue  # moments of chosen entries
        for key in _MOMENTS:
            if isinstance(state.get(key), torch.Tensor) and state[key].shape != parameter.shape:
                raise ValueError(
                    f"{key} has shape {tuple(state[key].shape)}, and its parameter here {tuple(parameter.shape)}"
                )


def saved_state_dict(model: nn.Module) -> dict[str, torch.Tensor]:
    """A model's weights as `save_pretrained` writes them.

    transformers renames or splits those of some models: GPT-NeoX's head, Mixtral's experts.
    """
    weights = dict(model.state_dict())
    return revert_weight_conversion(model, weights) if isinstance(model, PreTrainedModel) else weights


@contextlib.contextmanager
def loading_saved_state_dict(model: nn.Module, folder: str | os.PathLike) -> Iterator[None]:
    """A context in which `model.load_state_dict` loads `folder`, whose weights have the names of `saved_state_dict`.

    `Trainer` passes the weights of a file on under the file's names and skips names that the model does not have.
    """
    if not isinstance(model, PreTrainedModel) or saved_state_dict(model).keys() == model.state_dict().keys():
        yield
        return
    weights = type(model).from_pretrained(folder).state_dict()  # converted; needs a second copy on the CPU
    plain = model.load_state_dict
    model.load_state_dict = lambda state_dict, *args, **kwargs: plain(weights, *args, **kwargs)
    try:
        yield
    finally:
        del model.load_state_dict


def check_labels(folder: str | os.PathLike, model: nn.Module) -> None:
    """Compare the names of the classes in a checkpoint's configuration with the model's.

    A head identifies classes by index only. Under other names it would load without an error and be saved with wrong
    names.

    Raises:
        InputError: the number of classes is the same, but their names or order differ.
    """
    path = Path(folder) / CONFIG_NAME
    config = getattr(model, "config", None)
    if config is None or not path.is_file() or not getattr(config, "id2label", None):
        return
    try:
        found = json.loads(path.read_text(encoding="utf-8")).get("id2label")
    except (OSError, ValueError, AttributeError):
        return  # `checkpoint_problem` says what is wrong with the file
    if not isinstance(found, dict):
        return
    there, here = ([str(names[i]) for i in sorted(names, key=int)] for names in (found, config.id2label))
    if len(there) == len(here) and there != here:
        raise InputError(
            f"--resume_from_checkpoint: {os.fspath(folder)!r} was trained for the labels {', '.join(there[:10])}, and "
            f"here they are {', '.join(here[:10])}; pass the data that the run started with, or start a new run with "
            "the checkpoint as --model_name_or_path"
        )


def _other_model(folder: str | os.PathLike, reason: str) -> InputError:
    return InputError(
        f"--resume_from_checkpoint: {os.fspath(folder)!r} was written with another model or other settings: {reason}; "
        "pass the arguments that the run started with"
    )


def _shapes(files: list[Path]) -> dict[str, tuple[int, ...]]:
    shapes = {}
    for path in files:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (not a mapping)
                shapes[name] = tuple(file.get_slice(name).get_shape())
    return shapes


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
