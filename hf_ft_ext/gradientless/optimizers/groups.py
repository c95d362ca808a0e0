"""Settings of a parameter group of `DirectSearch`: what they cost, and what cannot work."""

import logging

import torch

from hf_ft_ext.errors import InputError
from hf_ft_ext.gradientless.optimizers.options import parse_options
from hf_ft_ext.gradientless.optimizers.selection import ALL, RANDOM, SELECTIONS

logger = logging.getLogger(__name__)


def evaluations(group: dict) -> int:
    """Losses that one block of the group evaluates in a step, at most."""
    options, k = parse_options(group["options"]), group["num_candidates"]
    return k if options is None else options[0] ** options[1] * (k + 1) + 1


def check_group(group: dict) -> None:
    """Raise an `InputError` if a value is out of range or two contradict each other."""
    if group["num_candidates"] < 1:
        raise InputError(f"num_candidates={group['num_candidates']} leaves nothing to compare; pass 1 or more")
    if group["sampling_size"] is not None and group["sampling_size"] < 1:
        raise InputError(f"sampling_size={group['sampling_size']} leaves nothing to search; pass 1 or more")
    if group["sampling_steps"] < 1:
        raise InputError(f"sampling_steps={group['sampling_steps']} is no number of steps; pass 1 or more")
    if group["selection"] not in SELECTIONS:
        raise InputError(f"selection={group['selection']!r} is unknown; choose from: {', '.join(SELECTIONS)}")
    check_block(group["block"], group["params"])
    if group["block"] > 1 and group["selection"] != ALL:
        raise InputError(f"block={group['block']} ties neighbours, and selection {group['selection']!r} tears them "
                         "apart; select 'all'")  # fmt: skip
    for name in ("lr", "weight_decay"):
        if not group[name] >= 0:
            raise InputError(f"{name}={group[name]} is below 0; pass 0 or more")
    if group["selection"] == ALL and group["sampling_size"] is not None:
        raise InputError(f"selection 'all' takes every entry; leave sampling_size={group['sampling_size']} out")
    options = parse_options(group["options"])
    if options is not None and options[0] > group["num_candidates"] + 1:
        raise InputError(
            f"options {options[0]}x{options[1]} keep {options[0]} changes of the {group['num_candidates'] + 1} that "
            "are scored; take fewer options or more candidates"
        )
    if group["selection"] != ALL and group["sampling_size"] is None and group["selection"] != RANDOM:
        raise InputError(f"selection {group['selection']!r} needs a sampling_size; pass one, or select 'all'")


def check_block(block: int, parameters: list[torch.Tensor]) -> None:
    """Raise an `InputError` if blocks of `block` entries do not fill the tensors."""
    if block < 1:
        raise InputError(f"block={block} holds no entry; pass 1 or more")
    for parameter in parameters:
        if parameter.numel() % block:
            raise InputError(
                f"blocks of {block} do not divide the {parameter.numel()} entries of a searched tensor of shape "
                f"{tuple(parameter.shape)}; take another size, or search fewer tensors"
            )


def warn_of_sampling_size(group: dict, largest: int) -> None:
    """Say so if no tensor has as many entries as are to be sampled."""
    if group["sampling_size"] is not None and group["sampling_size"] > largest:
        logger.warning(
            "sampling_size=%d is more than the %d entries of the largest tensor: all entries are searched",
            group["sampling_size"],
            largest,
        )
