"""What numbers the arguments of `transformers.TrainingArguments` can be: found out before anything is loaded.

transformers checks few of them; a library deep inside would refuse the others, or nobody would.
"""

import math
from typing import Any

from hf_ft_ext.errors import InputError

_MANY = math.inf
_SEEDS = 2**32 - 1  # numpy takes no larger ones
# name -> lowest, highest, whether the highest itself is allowed
_RANGES: dict[str, tuple[float, float, bool]] = {
    "learning_rate": (0, _MANY, False),
    "weight_decay": (0, _MANY, False),
    "adam_beta1": (0, 1, False),
    "adam_beta2": (0, 1, False),
    "adam_epsilon": (0, _MANY, False),
    "max_grad_norm": (0, _MANY, False),
    "num_train_epochs": (0, _MANY, False),
    "warmup_steps": (0, _MANY, False),
    "label_smoothing_factor": (0, 1, False),
    "neftune_noise_alpha": (0, _MANY, False),
    "eval_delay": (0, _MANY, False),
    "logging_steps": (0, _MANY, False),
    "save_steps": (0, _MANY, False),
    "eval_steps": (0, _MANY, False),
    "per_device_train_batch_size": (1, _MANY, False),
    "per_device_eval_batch_size": (1, _MANY, False),
    "gradient_accumulation_steps": (1, _MANY, False),
    "eval_accumulation_steps": (1, _MANY, False),
    "save_total_limit": (1, _MANY, False),
    "torch_empty_cache_steps": (1, _MANY, False),
    "dataloader_prefetch_factor": (1, _MANY, False),
    "dataloader_num_workers": (0, _MANY, False),
    "seed": (0, _SEEDS, True),
    "data_seed": (0, _SEEDS, True),
}


def check_ranges(given: dict[str, Any]) -> None:
    """Raise an `InputError` if a number among `given`, what the user set by name, cannot be used."""
    for name, (low, high, closed) in _RANGES.items():
        value = given.get(name)
        if not isinstance(value, int | float) or isinstance(value, bool):
            continue
        if not (low <= value < high or (closed and value == high)):
            edge = "finite" if high == _MANY else f"{'at most' if closed else 'below'} {high:,}"
            raise InputError(f"{name}={value} cannot work: pass a number that is {low} or more and {edge}")
    steps = given.get("max_steps")
    if isinstance(steps, int) and steps < 1 and steps != -1:
        raise InputError(f"max_steps={steps} cannot work: pass 1 or more, or leave it out and set num_train_epochs")
