"""Weights spread over processes (FSDP, DeepSpeed): who asked for it, and the refusal of methods that cannot."""

import torch
from accelerate.utils import parse_flag_from_env
from transformers import TrainingArguments

from hf_ft_ext.errors import InputError

FSDP, DEEPSPEED = "FSDP", "DeepSpeed"


def sharding(args: TrainingArguments) -> str | None:
    """What spreads the weights in this run: `FSDP`, `DeepSpeed` or nothing.

    An option of the arguments says so, or a configuration file of `accelerate launch`, which speaks by environment
    variables and leaves no trace in the arguments.
    """
    if args.deepspeed or parse_flag_from_env("ACCELERATE_USE_DEEPSPEED"):
        return DEEPSPEED
    if args.fsdp or parse_flag_from_env("ACCELERATE_USE_FSDP"):
        return FSDP
    return None


def refuse_sharding(args: TrainingArguments, reason: str) -> None:
    """For methods that read or write whole weights.

    Args:
        reason: what needs whole weights, as the start of a sentence: "a search".

    Raises:
        InputError: the weights would be spread.
    """
    if (kind := sharding(args)) is not None:
        raise InputError(
            f"{reason} needs whole weights on every process, and {kind} spreads them; run it without fsdp and "
            "deepspeed: `accelerate launch --config_file configs/ddp.yaml` uses as many processes"
        )


def refuse_sharding_on_cpu(args: TrainingArguments) -> None:
    """accelerate would leave FSDP and DeepSpeed out without a word where training is on the CPU.

    Raises:
        InputError: the weights are to be spread, and there is no accelerator in use.
    """
    kind = sharding(args)
    if kind is not None and args.use_cpu:
        raise InputError(
            f"{kind} needs accelerators, and --use_cpu trains without; leave one of the two out (several processes "
            "on CPUs hold the whole model each: configs/cpu.yaml)"
        )


def whole_shape(parameter: torch.Tensor) -> torch.Size:
    """Shape of a parameter, with what lies on other processes (ZeRO-3 leaves an empty tensor in its place)."""
    return torch.Size(getattr(parameter, "ds_shape", parameter.shape))


def entries(parameter: torch.Tensor) -> int:
    """Entries of a parameter, those on other processes too."""
    return whole_shape(parameter).numel()
