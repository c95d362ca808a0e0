"""Cost and checks of the settings of a `DirectSearch` parameter group."""

import logging

import torch

from hf_ft_ext.errors import InputError
from hf_ft_ext.gradientless.optimizers.base import check_rates
from hf_ft_ext.gradientless.optimizers.options import parse_options
from hf_ft_ext.gradientless.optimizers.selection import ALL, RANDOM, SELECTIONS

logger = logging.getLogger(__name__)


def evaluations(group: dict) -> int:
    """Largest number of losses that one block of the group evaluates in a step.

    Without options K; with options m^l leaves, each with itself and K candidates, and the current tensor. With
    several levels also the m options of the first one, as far as the best of their subtrees are candidates to move to.
    """
    options, k = parse_options(group["options"]), group["num_candidates"]
    if options is None:
        return k
    width, levels = options
    return width**levels * (k + 1) + 1 + (width if levels > 1 else 0)


def check_group(group: dict) -> None:
    """Raise an `InputError` if a value is out of range or two settings contradict each other."""
    for name in ("num_candidates", "sampling_size", "sampling_steps"):
        if group[name] is not None and group[name] < 1:
            raise InputError(f"{name} must be 1 or more, got {group[name]}")
    if group["selection"] not in SELECTIONS:
        raise InputError(f"selection={group['selection']!r} is unknown; choose from: {', '.join(SELECTIONS)}")
    check_block(group["block"], group["params"])
    if group["block"] > 1 and group["selection"] != ALL:
        raise InputError(
            f"block={group['block']} changes consecutive entries together, and selection={group['selection']!r} "
            "selects single ones; pass selection='all'"
        )
    check_rates(group["lr"], group["weight_decay"])
    if group["selection"] == ALL and group["sampling_size"] is not None:
        raise InputError(f"selection='all' changes every entry; leave sampling_size={group['sampling_size']} out")
    options = parse_options(group["options"])
    if options is not None and options[0] > group["num_candidates"] + 1:
        raise InputError(
            f"options={options[0]}x{options[1]} would keep {options[0]} changes per leaf, but only "
            f"{group['num_candidates'] + 1} are evaluated; use fewer options or more candidates"
        )
    if group["selection"] != ALL and group["sampling_size"] is None and group["selection"] != RANDOM:
        raise InputError(f"selection={group['selection']!r} needs a sampling_size; pass one, or selection='all'")


def check_block(block: int, parameters: list[torch.Tensor]) -> None:
    """Raise an `InputError` if `block` does not divide the size of every tensor."""
    if block < 1:
        raise InputError(f"block must be 1 or more, got {block}")
    for parameter in parameters:
        if parameter.numel() % block:
            raise InputError(
                f"block={block} does not divide the {parameter.numel()} entries of a searched tensor of shape "
                f"{tuple(parameter.shape)}; pass another size, or search fewer tensors"
            )


def warn_of_sampling_size(group: dict, largest: int) -> None:
    """Log a warning if `sampling_size` exceeds the size of every tensor."""
    if group["sampling_size"] is not None and group["sampling_size"] > largest:
        logger.warning(
            "sampling_size=%d is more than the %d entries of the largest tensor: all entries are searched",
            group["sampling_size"],
            largest,
        )
