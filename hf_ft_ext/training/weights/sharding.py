"""Weights sharded over processes (FSDP, DeepSpeed): detection, and refusal for methods that need whole weights."""

import torch
from accelerate.utils import parse_flag_from_env
from transformers import TrainingArguments

from hf_ft_ext.errors import InputError

FSDP, DEEPSPEED = "FSDP", "DeepSpeed"


def sharding(args: TrainingArguments) -> str | None:
    """The library that shards the weights in this run: `FSDP`, `DeepSpeed` or `None`.

    Either the arguments request it, or a configuration file of `accelerate launch`, which sets environment variables
    but not the arguments.
    """
    if args.deepspeed or parse_flag_from_env("ACCELERATE_USE_DEEPSPEED"):
        return DEEPSPEED
    if args.fsdp or parse_flag_from_env("ACCELERATE_USE_FSDP"):
        return FSDP
    return None


def refuse_sharding(args: TrainingArguments, reason: str) -> None:
    """Refuse sharded weights, for methods that read or write whole weights.

    Args:
        reason: what needs whole weights, as the subject of the message: "a search".

    Raises:
        InputError: the weights would be sharded.
    """
    if (kind := sharding(args)) is not None:
        raise InputError(
            f"{reason} needs whole weights on every process, and {kind} spreads them; run it without fsdp and "
            "deepspeed: `accelerate launch --config_file configs/ddp.yaml` uses as many processes"
        )


def refuse_sharding_on_cpu(args: TrainingArguments) -> None:
    """Refuse FSDP and DeepSpeed on the CPU, where accelerate silently ignores them.

    Raises:
        InputError: the weights are to be sharded, but no accelerator is used.
    """
    kind = sharding(args)
    if kind is not None and args.use_cpu:
        raise InputError(
            f"{kind} needs accelerators, and --use_cpu trains without; leave one of the two out (several processes "
            "on CPUs hold the whole model each: configs/cpu.yaml)"
        )


def whole_shape(parameter: torch.Tensor) -> torch.Size:
    """The full shape of a parameter, even if sharded (ZeRO-3 leaves an empty tensor in its place)."""
    return torch.Size(getattr(parameter, "ds_shape", parameter.shape))


def entries(parameter: torch.Tensor) -> int:
    """Number of entries of a parameter over all processes."""
    return whole_shape(parameter).numel()
