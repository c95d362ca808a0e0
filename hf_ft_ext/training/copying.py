"""Optimizers that are copied and pickled with all that their next step depends on."""

from typing import Any

import torch

# What torch and its schedulers keep in an optimizer for themselves; torch makes it anew in a copy.
_OF_TORCH = {*vars(torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)), "step", "_opt_called"}


class CopiedInFull(torch.optim.Optimizer):
    """For optimizers with attributes beside torch's: `copy.deepcopy` and `pickle` keep those too.

    torch's own form holds the moments and groups alone. As with torch's, a copy trains copies of the parameters: copy
    model and optimizer together, `copy.deepcopy((model, optimizer))`.
    """

    def __getstate__(self) -> dict[str, Any]:
        own = {name: value for name, value in vars(self).items() if name not in _OF_TORCH}
        return {**super().__getstate__(), **own}
