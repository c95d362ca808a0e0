"""Select the entries of a tensor that a search changes."""

from collections.abc import Callable, Sequence

import torch

from hf_ft_ext.errors import InputError

SELECTIONS = ALL, RANDOM, MAGNITUDE, FISHER = ("all", "random", "magnitude", "fisher")


def select_indices(
    parameters: Sequence[torch.Tensor],
    size: int | None,
    selection: str,
    generator: torch.Generator,
    importance: Callable[[torch.Tensor, torch.Generator], torch.Tensor] | None = None,
) -> torch.Tensor | None:
    """Return ascending positions (int64, `[size]`) of the selected entries in the concatenated tensors; `None` = all.

    Args:
        size: number of entries; `None`, or at least the number of all entries, = all.
        selection: `all`; `random`: without replacement; `magnitude`: the largest; `fisher`: those of largest
            `importance`.
        importance: `importance(parameter, generator)` -> one score per entry; for `fisher`.

    Raises:
        InputError: `fisher` without `importance`.
    """
    n, device = sum(parameter.numel() for parameter in parameters), parameters[0].device
    if selection == ALL or size is None or size >= n:
        return None
    if selection == RANDOM:
        return random_subset(n, size, generator).to(device)
    if selection == MAGNITUDE:
        scores = [parameter.detach().abs().flatten() for parameter in parameters]
    elif importance is not None:
        scores = [importance(parameter, generator).flatten() for parameter in parameters]
    else:
        raise InputError(
            "selection='fisher' ranks entries by their effect on the logits, which a closure does not return; pass an "
            "`evaluate` that has `importance(parameter, generator)`, or use selection='random'"
        )
    return torch.cat(scores).topk(size).indices.sort().values


def random_subset(n: int, size: int, generator: torch.Generator) -> torch.Tensor:
    """Draw `size` different numbers below `n`, ascending; every subset is equally likely.

    Time and memory grow with `size`, not with `n`: numbers are drawn until enough of them differ. The draw differs
    from `entries.choice.random_entries`, so the same seed gives other numbers there.
    """
    if size > n // 2:
        return torch.randperm(n, generator=generator)[:size].sort().values
    chosen = torch.randint(n, (size,), generator=generator).unique()
    while chosen.numel() < size:
        more = torch.randint(n, (size - chosen.numel(),), generator=generator)
        chosen = torch.cat([chosen, more]).unique()
    return chosen
