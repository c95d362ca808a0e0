"""Choice of what trains: tensors that are not frozen, and entries of several tensors together."""

from collections.abc import Mapping

import torch


def without_frozen(parameters: Mapping[str, torch.Tensor]) -> tuple[list[str], list[str]]:
    """Names of the parameters to choose from, and names of those left out because the user froze them.

    If all are frozen, this says nothing about a part of them: then all are to choose from.
    """
    trained = [name for name, parameter in parameters.items() if parameter.requires_grad]
    frozen = [name for name, parameter in parameters.items() if not parameter.requires_grad]
    return (trained, frozen) if trained else (frozen, [])


def largest_entries(scores: dict[str, torch.Tensor], k: int) -> dict[str, torch.Tensor]:
    """Flat indices of the `k` largest scores of all tensors together, by tensor; tensors without any are omitted."""
    values, where, numbers = None, None, None
    for number, score in enumerate(scores.values()):
        top = score.reshape(-1).topk(min(k, score.numel()), sorted=False)
        number = torch.full_like(top.indices, number)  # which tensor each score is from
        if values is None:
            values, where, numbers = top.values, top.indices, number
            continue
        values = torch.cat([values, top.values.to(values.dtype)])
        where, numbers = torch.cat([where, top.indices]), torch.cat([numbers, number])
        kept = values.topk(min(k, len(values)), sorted=False).indices
        values, where, numbers = values[kept], where[kept], numbers[kept]
    return _by_tensor(list(scores), where, numbers)


def random_entries(shapes: dict[str, torch.Size], k: int, seed: int) -> dict[str, torch.Tensor]:
    """Flat indices of `k` distinct entries of all tensors together, drawn uniformly; `k` is at most their number.

    `gradientless.optimizers.selection.random_subset` also draws distinct numbers, in another way, so that the same
    seed gives other ones. Merging the two would change the results of one of them.
    """
    sizes = torch.tensor([shape.numel() for shape in shapes.values()])
    ends = sizes.cumsum(0)
    total = int(ends[-1])
    generator = torch.Generator().manual_seed(seed)
    if 2 * k > total:  # rejection would take long to find the last entries
        found = torch.randperm(total, generator=generator)[:k]
    else:
        # Draw with replacement until there are at least k distinct entries: nothing of the tensors' size is needed.
        found = torch.empty(0, dtype=torch.long)
        while len(found) < k:
            more = torch.randint(total, (2 * (k - len(found)) + 16,), generator=generator)
            found = torch.cat([found, more]).unique()
        found = found[torch.randperm(len(found), generator=generator)[:k]]
    # Position in the concatenation of all tensors -> tensor, and position within it.
    numbers = torch.searchsorted(ends, found, right=True)
    return _by_tensor(list(shapes), found - (ends - sizes)[numbers], numbers)


def _by_tensor(names: list[str], where: torch.Tensor, numbers: torch.Tensor) -> dict[str, torch.Tensor]:
    chosen = {name: where[numbers == number].sort().values for number, name in enumerate(names)}
    return {name: indices for name, indices in chosen.items() if len(indices)}
