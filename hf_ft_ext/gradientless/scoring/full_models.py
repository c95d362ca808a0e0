"""The objective of one step by forward passes of the whole model."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import nn

from hf_ft_ext.gradientless.scoring.objectives import Objective

Batch = Mapping[str, torch.Tensor]


def rows_of(batch: Batch) -> int:
    """Rows of a collated batch."""
    return len(next(iter(batch.values())))


def objective_of_logits(
    model: nn.Module, objective: Objective, batches: Sequence[Batch]
) -> Callable[[], torch.Tensor]:
    """`objective` of the logits of all micro-batches together."""
    labels = torch.cat([batch["labels"] for batch in batches])

    def evaluate() -> torch.Tensor:
        inputs = [{key: value for key, value in batch.items() if key != "labels"} for batch in batches]
        return objective(torch.cat([model(**batch).logits for batch in inputs]), labels)

    return evaluate


def model_loss(compute: Callable[[Batch], torch.Tensor], batches: Sequence[Batch]) -> Callable[[], torch.Tensor]:
    """Mean of the micro-batches' own losses, by rows."""
    rows = [rows_of(batch) for batch in batches]

    def evaluate() -> torch.Tensor:
        return sum(compute(batch) * n for batch, n in zip(batches, rows, strict=True)) / sum(rows)

    return evaluate


def with_same_masks(evaluate: Callable[[], torch.Tensor], seed: int) -> Callable[[], torch.Tensor]:
    """`evaluate`, with dropout drawing from `seed` every time; the global random state is put back."""

    def evaluate_so() -> torch.Tensor:
        with torch.random.fork_rng():
            torch.random.default_generator.manual_seed(seed)
            if torch.cuda.is_available():
                torch.cuda.manual_seed_all(seed)
            return evaluate()

    return evaluate_so
