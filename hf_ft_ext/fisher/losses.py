"""Losses per example, and the draws of labels over which a Fisher information is an expectation."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from hf_ft_ext.errors import InputError

LABELS = TRUE, EXPECTED = ("true", "expected")
REGRESSION, SINGLE_LABEL, MULTI_LABEL = ("regression", "single_label_classification", "multi_label_classification")

PerExampleLoss = Callable[[Any, dict], torch.Tensor]


@dataclass(frozen=True)
class WholeLoss:
    """A loss that runs the model by itself, such as a Trainer's `compute_loss`; one example at a time.

    Attributes:
        compute: `compute(model, batch)` -> the loss of a batch, a scalar.
    """

    compute: Callable[[nn.Module, dict], torch.Tensor]


Loss = PerExampleLoss | WholeLoss


def problem_type_of(model: nn.Module) -> str:
    """What a sequence classifier predicts, as transformers would find out.

    Raises:
        InputError: the model is no sequence classifier.
    """
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    config = getattr(inner, "config", None)
    if config is None or not type(inner).__name__.endswith("ForSequenceClassification"):
        raise InputError(
            f"{type(inner).__name__} is no sequence classifier, so its loss per example is not known; pass loss, a "
            "function of the model's output and the batch that gives one number per example"
        )
    if config.problem_type is not None:
        return config.problem_type
    return REGRESSION if config.num_labels == 1 else SINGLE_LABEL


def losses_of_logits(logits: torch.Tensor, labels: torch.Tensor, problem_type: str) -> torch.Tensor:
    """The loss that the model would give each example alone: `[batch]`."""
    if problem_type == REGRESSION:
        return (logits.reshape(len(logits), -1) - labels.reshape(len(logits), -1).to(logits.dtype)).square().mean(1)
    if problem_type == SINGLE_LABEL:
        return nn.functional.cross_entropy(logits, labels.reshape(-1), reduction="none")
    targets = labels.to(logits.dtype)
    return nn.functional.binary_cross_entropy_with_logits(logits, targets, reduction="none").mean(1)


def draws(
    output: Any, batch: dict, labels: str, power: int, problem_type: str | None, loss: PerExampleLoss | None
) -> Iterator[tuple[torch.Tensor | float, torch.Tensor]]:
    """Pairs (weights, losses): the Fisher information sums `weight * |gradient of the example's loss|^power`.

    Args:
        output: the model's output; `logits` are read where `loss` is `None`.
        batch: the model's inputs; `labels` are read.
        labels: `true`: the batch's labels. `expected`: the expectation over the model's own distribution.
        power: 2 or 1.

    Yields:
        Weights `[batch]` or one number for all, and losses `[batch]` to differentiate.
    """
    if loss is not None:
        yield 1.0, loss(output, batch)
    elif labels == TRUE:
        yield 1.0, losses_of_logits(output.logits, batch["labels"], problem_type)
    elif problem_type == SINGLE_LABEL:
        logs = output.logits.log_softmax(-1)
        weights = logs.detach().exp()
        for k in range(logs.shape[1]):
            yield weights[:, k], -logs[:, k]
    elif problem_type == REGRESSION:
        # The mean squared error is -log N(y; f, n/2) of n outputs, constants left out.
        values = output.logits.reshape(len(output.logits), -1)
        n = values.shape[1]
        for k in range(n):
            yield 2.0 / n if power == 2 else 2.0 / math.sqrt(math.pi), values[:, k]
    else:
        shares = output.logits.detach().sigmoid()
        n = shares.shape[1]
        for k in range(n):
            yield shares[:, k] * (1 - shares[:, k]) / n**2, output.logits[:, k]


def refuse_expectation(labels: str, power: int, problem_type: str | None, outputs: int, own_loss: bool) -> None:
    """Raise an `InputError` for an expectation over labels that has no closed form here."""
    if labels == EXPECTED and own_loss:
        raise InputError("labels='expected' needs the model's distribution of labels, and loss= gives none; leave "
                         "one of them out")  # fmt: skip
    many = problem_type == MULTI_LABEL or (problem_type == REGRESSION and outputs > 1)
    if labels == EXPECTED and power == 1 and many:
        raise InputError(
            f"the expected absolute gradient of a {problem_type} model with {outputs} outputs has no closed form; "
            "take power=2 or the true labels"
        )
