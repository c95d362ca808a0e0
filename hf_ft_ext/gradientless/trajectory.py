"""Save an SPSA run as its trajectory: slopes and learning rates of each step, and the seed of the directions.

A step takes about 5 bytes: 20,000 steps with one direction are below 0.1 MB, for a model of any size.
"""

import json
import logging
import os
import zlib
from pathlib import Path
from typing import Any

import numpy
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from transformers import TrainerState
from transformers.trainer import OPTIMIZER_NAME

from hf_ft_ext.errors import InputError
from hf_ft_ext.gradientless.optimizers.base import sample_sum
from hf_ft_ext.gradientless.optimizers.spsa import SPSA
from hf_ft_ext.offload import hold_offloaded

logger = logging.getLogger(__name__)

FILE = "trajectory.safetensors"
_FORMAT, _OLDER = "hf_ft_ext trajectory 2", "hf_ft_ext trajectory 1"  # the older rounded 16-bit weights differently


def save_trajectory(optimizer: SPSA, model: nn.Module, path: str | os.PathLike) -> Path:
    """Write all steps that `optimizer` has taken to a file.

    Args:
        optimizer: an `SPSA` search with all its steps since the first one (resumed or not).
        model: the model that it searched; the file names the searched parameters.
        path: a file, or a folder that gets `trajectory.safetensors`.

    Returns:
        Path of the file.

    Raises:
        InputError: a searched parameter that `model` does not have; a search with masks (no seed reproduces them).
    """
    if not isinstance(optimizer, SPSA):
        raise InputError(
            f"a trajectory stores the slopes of an SPSA search, got {type(optimizer).__name__}; save the model instead"
        )
    if optimizer.directions.masks is not None:
        raise InputError("a trajectory cannot store masks; save the model, or search with small=... instead of masks")
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = []
    for group in optimizer.param_groups:
        if any(id(parameter) not in names for parameter in group["params"]):
            raise InputError(
                "the search changes parameters that the model does not have; pass the model it was made for"
            )
        groups.append([names[id(parameter)] for parameter in group["params"]])
    rule = optimizer.weight_updates.rule
    about = {
        "groups": groups,
        "types": [str(parameter.dtype).removeprefix("torch.") for parameter in optimizer.searched],
        "device": optimizer.perturbed_forward.tensors.device(0).type,
        "weight_decay": [float(group["weight_decay"]) for group in optimizer.param_groups],
        "directions": optimizer.directions.settings(),
        "num_directions": optimizer.num_directions,
        "update": optimizer.update,
        "momentum": rule.momentum,
        "betas": list(rule.betas),
        "adam_eps": rule.adam_eps,
        "moments": rule.moments,
        "carry": optimizer.weight_updates.rounding.carry,
        "unseen": sorted(optimizer.perturbed_forward.unread),
        "first_steps": list(optimizer.weight_updates.first_steps.items()),
        "seed": optimizer.first_seed,
        "start": optimizer.start,
        "end": sample_sum(optimizer.perturbed_forward.tensors),
    }
    kind = numpy.float64 if optimizer.double else numpy.float32
    slopes = numpy.array([slopes for slopes, _ in optimizer.record], dtype=kind)
    rates = numpy.array([rates for _, rates in optimizer.record], dtype=kind)
    tensors = {
        "slopes": torch.from_numpy(slopes.reshape(len(slopes), optimizer.num_directions)),
        "rates": _packed(rates.reshape(len(rates), len(groups))),
        "about": torch.frombuffer(bytearray(zlib.compress(json.dumps(about).encode(), 9)), dtype=torch.uint8),
    }
    path = Path(path)
    path = path / FILE if path.is_dir() else path
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        save_file(tensors, temporary, metadata={"format": _FORMAT})
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def rewind_to_best(optimizer: torch.optim.Optimizer, state: TrainerState) -> None:
    """Take a search back to the step of the best model, once `Trainer` has loaded it.

    Weights and record have to end at one step, also if another training goes on from there: directions follow from
    the number of steps, and moments from the steps.
    """
    if not isinstance(optimizer, SPSA) or state.best_global_step is None:
        return
    taken = len(optimizer.record) - (state.global_step - state.best_global_step)
    saved = Path(state.best_model_checkpoint) / OPTIMIZER_NAME
    if saved.is_file():
        optimizer.load_state_dict(torch.load(saved, map_location="cpu", weights_only=True))
        return
    if optimizer.weight_updates.remembers_steps():
        logger.warning(
            "%s holds no optimizer state (save_only_model), so the search's moments and rounding errors are those of "
            "the last step; the trajectory of another training with this trainer cannot be repeated.",
            state.best_model_checkpoint,
        )
    del optimizer.record[taken:]
    optimizer.generator.manual_seed(optimizer.first_seed)
    optimizer.steps = 0
    for _ in optimizer.record:
        optimizer.steps += 1
        optimizer._draws()  # moves the generator


@torch.no_grad()
def apply_trajectory(base: nn.Module, path: str | os.PathLike) -> nn.Module:
    """Repeat the steps of a trajectory on the initial model, without data and without a loss.

    The final weights equal those of the search bit for bit, on the same model of device and version of torch. Others
    may draw other random numbers, as CUDA cards with another number of processors do. A warning says so if the weights
    differ from those at the time of saving.

    Args:
        base: the model as it was before the search, its head included; changed in place.
        path: the file of `save_trajectory`, or its folder.

    Returns:
        `base`.

    Raises:
        InputError: the file is not a trajectory, or `base` has other parameters, types or values than the initial
            model.
    """
    about, slopes, rates = _read(path)
    hold_offloaded(base)
    named = dict(base.named_parameters())
    missing = [name for group in about["groups"] for name in group if name not in named]
    if missing:
        raise InputError(
            f"the trajectory changes {missing[0]}, and {type(base).__name__} has no such parameter; pass the model "
            "that the search started from"
        )
    groups = [
        {"params": [named[name] for name in names], "weight_decay": decay}
        for names, decay in zip(about["groups"], about["weight_decay"], strict=True)
    ]
    types = [str(parameter.dtype).removeprefix("torch.") for group in groups for parameter in group["params"]]
    if types != about["types"]:
        wanted, found = next(pair for pair in zip(about["types"], types, strict=True) if pair[0] != pair[1])
        raise InputError(
            f"the trajectory is of {wanted} weights, and these are {found}; load the model with dtype={wanted}"
            + (" and convert the other weights" if len(set(about["types"])) > 1 else "")
        )
    directions = dict(about["directions"])
    optimizer = SPSA(
        groups, base, direction=directions.pop("kind"), num_directions=about["num_directions"],
        update=about["update"], momentum=about["momentum"], betas=tuple(about["betas"]), adam_eps=about["adam_eps"],
        moments=about["moments"] if about["update"] in ("momentum", "adam") else None, carry=about["carry"],
        seed=about["seed"], max_evaluations=2**62, **directions,
    )  # fmt: skip
    device = optimizer.perturbed_forward.tensors.device(0).type  # where an offloaded tensor is computed with
    if device != about["device"]:
        raise InputError(
            f"the trajectory was recorded on {about['device']}, and the model is on {device}, where random numbers "
            f"differ; move it there with model.to({about['device']!r}) first"
        )
    if optimizer.start != about["start"]:
        raise InputError(
            "these are not the weights that the search started from; pass the same base model, with its head "
            "initialized from the same seed"
        )
    optimizer.repeat(
        list(zip(slopes.tolist(), rates.tolist(), strict=True)), about["unseen"], dict(about["first_steps"])
    )
    if about.get("end") not in (None, sample_sum(optimizer.perturbed_forward.tensors)):  # None: an older file
        logger.warning(
            "The repeated weights are not those with which %s was saved: the model was changed after its search, or "
            "this device or torch draws other random numbers. Repeat it where it was recorded, or load the model.",
            path,
        )
    return base


def _read(path: str | os.PathLike) -> tuple[dict[str, Any], torch.Tensor, numpy.ndarray]:
    path = Path(path)
    path = path / FILE if path.is_dir() else path
    try:
        with safe_open(path, "pt") as file:
            written = (file.metadata() or {}).get("format")
            if written not in (_FORMAT, _OLDER):
                raise InputError(f"{path} is not a trajectory of a search; pass a file that save_trajectory wrote")
            tensors = {name: file.get_tensor(name) for name in ("slopes", "rates", "about")}
        about = json.loads(zlib.decompress(tensors["about"].numpy().tobytes()))
        shape = (len(tensors["slopes"]), len(about["groups"]))
        rates = _unpacked(tensors["rates"], shape, tensors["slopes"].numpy().dtype)
    except FileNotFoundError:
        raise InputError(f"{path} does not exist; pass the file or folder of a trajectory") from None
    except (SafetensorError, zlib.error, KeyError, ValueError, OSError) as error:
        raise InputError(f"{path} cannot be read as a trajectory: {error}") from None
    if written == _OLDER and not {"float16", "bfloat16"}.isdisjoint(about["types"]):
        raise InputError(
            f"{path} is of an earlier version of hf_ft_ext, which rounded 16-bit weights differently; repeat it with "
            "that version, and save the model there"
        )
    return about, tensors["slopes"], rates


def _packed(rates: numpy.ndarray) -> torch.Tensor:
    """Compress rates as differences of their bit patterns: a schedule changes little from step to step."""
    bits = rates.view(numpy.int64 if rates.dtype == numpy.float64 else numpy.int32)
    differences = numpy.diff(bits, axis=0, prepend=numpy.zeros((1, bits.shape[1]), bits.dtype))
    # Group bytes of equal significance: they compress better.
    planes = differences.T.copy().view(numpy.uint8).reshape(-1, bits.itemsize).T.copy()
    return torch.frombuffer(bytearray(zlib.compress(planes.tobytes(), 9)), dtype=torch.uint8)


def _unpacked(packed: torch.Tensor, shape: tuple[int, int], dtype: numpy.dtype) -> numpy.ndarray:
    kind = numpy.dtype(numpy.int64 if dtype == numpy.float64 else numpy.int32)
    planes = numpy.frombuffer(zlib.decompress(packed.numpy().tobytes()), numpy.uint8).reshape(kind.itemsize, -1)
    differences = planes.T.copy().view(kind).reshape(shape[1], shape[0]).T
    return numpy.cumsum(differences, axis=0, dtype=kind).view(dtype)
