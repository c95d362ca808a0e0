"""Copying and pickling optimizers with all the state that their next step depends on."""

from typing import Any

import torch

# Attributes that torch and its schedulers keep in an optimizer; torch recreates them in a copy.
_TORCH_ATTRIBUTES = {*vars(torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)), "step", "_opt_called"}


class CopyableOptimizer(torch.optim.Optimizer):
    """Base class of optimizers with attributes of their own, which `copy.deepcopy` and `pickle` keep too.

    `torch.optim.Optimizer` keeps only its state and its parameter groups. As in torch, a copied optimizer trains
    copies of the parameters, so copy model and optimizer together: `copy.deepcopy((model, optimizer))`.
    """

    def __getstate__(self) -> dict[str, Any]:
        own = {name: value for name, value in vars(self).items() if name not in _TORCH_ATTRIBUTES}
        return {**super().__getstate__(), **own}
