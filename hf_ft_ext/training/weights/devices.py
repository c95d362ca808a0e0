"""The device of a run: its name, and the refusal of one process with several GPUs."""

import contextlib
import os
import platform
from collections.abc import Iterator

import torch
from transformers import TrainingArguments

from hf_ft_ext.errors import InputError


def refuse_data_parallel(args: TrainingArguments) -> None:
    """Refuse to train in one process on several GPUs, for which transformers uses `torch.nn.DataParallel`.

    It copies the model to every GPU in every step and calls the copies with parts of the batch. Hooks, replaced
    layers, row counts and memory measurements are wrong then. A model that `device_map` spreads over GPUs is accepted.
    Only `Trainer.__init__` detects that, so call this function after it.

    Raises:
        InputError: `args` would lead to `DataParallel`.
    """
    if args.n_gpu > 1:
        raise InputError(
            f"one process sees {args.n_gpu} GPUs and would copy the model to all of them in every step "
            "(torch.nn.DataParallel), which is not supported; start the script with `accelerate launch "
            f"--num_processes {args.n_gpu}` (notebooks: accelerate.notebook_launcher) to use all, or set "
            "CUDA_VISIBLE_DEVICES=0 before torch is loaded to use one"
        )


def device_name(device: torch.device) -> str:
    """The device's readable name: `NVIDIA H100 80GB HBM3`, or `cpu, 8 threads`."""
    if device.type == "cpu":
        count = torch.get_num_threads()
        return f"cpu, {count} thread{'s' * (count != 1)}"
    get_name = getattr(torch.get_device_module(device), "get_device_name", None)
    if get_name is not None:
        return get_name(device)
    return f"{device.type}, {platform.processor() or platform.machine()}"


# Environment variables with comma-separated lists of the devices that a process sees.
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
_CUDA_VARIABLES = _VISIBLE[:3]  # ROCm's torch reads all three


def one_device() -> dict[str, str]:
    """Environment variables that limit a process to one accelerator: the first one that the user allows.

    Lists that the user set keep their first entry; empty ones (no accelerator) stay empty. If nothing is set, the
    first CUDA device is chosen. On other device types a process without a launcher uses a single one anyway.
    """
    chosen = {name: os.environ[name].split(",")[0].strip() for name in _VISIBLE if name in os.environ}
    if "HIP_VISIBLE_DEVICES" in chosen or "CUDA_VISIBLE_DEVICES" in chosen:
        chosen.pop("ROCR_VISIBLE_DEVICES", None)  # the other variables index into its list
    elif not set(_CUDA_VARIABLES) & chosen.keys():
        chosen["CUDA_VISIBLE_DEVICES"] = "0"
    return chosen


@contextlib.contextmanager
def seeing_one_device() -> Iterator[None]:
    """A context whose child processes see one accelerator; so does this one, if it has not used CUDA yet."""
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
