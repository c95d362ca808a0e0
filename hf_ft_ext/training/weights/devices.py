"""Where a run is: the name of its device, and the refusal of one process that drives several GPUs."""

import contextlib
import os
import platform
from collections.abc import Iterator

import torch
from transformers import TrainingArguments

from hf_ft_ext.errors import InputError


def refuse_data_parallel(args: TrainingArguments) -> None:
    """Refuse to train in one process on several GPUs, which transformers does by `torch.nn.DataParallel`.

    It copies the model to every GPU in every step and calls the copies with parts of the batch. Hooks, replaced
    layers, row counts and measured memory go wrong. A model that `device_map` spreads over GPUs is accepted; as only
    `Trainer.__init__` finds out about it, call this after it.

    Raises:
        InputError: `args` would lead to it.
    """
    if args.n_gpu > 1:
        raise InputError(
            f"one process sees {args.n_gpu} GPUs and would copy the model to all of them in every step "
            "(torch.nn.DataParallel), which is not supported; start the script with `accelerate launch "
            f"--num_processes {args.n_gpu}` (notebooks: accelerate.notebook_launcher) to use all, or set "
            "CUDA_VISIBLE_DEVICES=0 before torch is loaded to use one"
        )


def device_name(device: torch.device) -> str:
    """The device's name for people: `NVIDIA H100 80GB HBM3`, or `cpu, 8 threads`."""
    if device.type == "cpu":
        return f"cpu, {torch.get_num_threads()} threads"
    get_name = getattr(torch.get_device_module(device), "get_device_name", None)
    if get_name is not None:
        return get_name(device)
    return f"{device.type}, {platform.processor() or platform.machine()}"


# Variables that say which devices a process sees, as lists with commas.
_VISIBLE = (
    "CUDA_VISIBLE_DEVICES",
    "HIP_VISIBLE_DEVICES",
    "ROCR_VISIBLE_DEVICES",
    "ZE_AFFINITY_MASK",
    "ASCEND_RT_VISIBLE_DEVICES",
    "MLU_VISIBLE_DEVICES",
    "MUSA_VISIBLE_DEVICES",
    "HABANA_VISIBLE_MODULES",
)
_OF_CUDA = _VISIBLE[:3]  # ROCm's torch reads all three


def one_device() -> dict[str, str]:
    """Environment variables by which a process sees one accelerator: the first of those that the user allows.

    Lists that the user set keep their first entry, empty ones (no accelerator) stay. Where nothing is set, this is the
    first CUDA device; of the other kinds a process without a launcher takes one by itself.
    """
    chosen = {name: os.environ[name].split(",")[0].strip() for name in _VISIBLE if name in os.environ}
    if "HIP_VISIBLE_DEVICES" in chosen or "CUDA_VISIBLE_DEVICES" in chosen:
        chosen.pop("ROCR_VISIBLE_DEVICES", None)  # the others count within its list
    elif not set(_OF_CUDA) & chosen.keys():
        chosen["CUDA_VISIBLE_DEVICES"] = "0"
    return chosen


@contextlib.contextmanager
def seeing_one_device() -> Iterator[None]:
    """A context whose processes, this one too if CUDA was not in use yet, see one accelerator (see `one_device`)."""
    chosen = one_device()
    before = {name: os.environ.get(name) for name in chosen}
    os.environ.update(chosen)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
