"""Losses per example, and the draws of labels over which a Fisher information is an expectation."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from hf_ft_ext.errors import InputError

LABELS = TRUE, EXPECTED = ("true", "expected")
REGRESSION, SINGLE_LABEL, MULTI_LABEL = ("regression", "single_label_classification", "multi_label_classification")
_IGNORED = -100  # a label that counts for nothing, as in transformers

PerExampleLoss = Callable[[Any, dict], torch.Tensor]


@dataclass(frozen=True)
class WholeLoss:
    """A loss that runs the model by itself, such as a Trainer's `compute_loss`; one example at a time.

    Attributes:
        compute: `compute(model, batch)` -> the loss of a batch, a scalar.
    """

    compute: Callable[[nn.Module, dict], torch.Tensor]


Loss = PerExampleLoss | WholeLoss


def base_model(model: nn.Module) -> nn.Module:
    """The model inside peft's wrapper."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def is_classifier(model: nn.Module) -> bool:
    """Whether transformers' losses for sequence classifiers are the model's."""
    inner = base_model(model)
    return type(inner).__name__.endswith("ForSequenceClassification") and hasattr(inner, "config")


def problem_type_of(model: nn.Module, labels: torch.Tensor | None) -> str:
    """What a sequence classifier predicts, found out as transformers does: by its config, else by the labels.

    Raises:
        InputError: labels of a kind that the model cannot learn.
    """
    config = base_model(model).config
    problem = config.problem_type
    floating = labels is not None and labels.is_floating_point()
    if problem is None:
        several = floating and labels.ndim == 2
        problem = REGRESSION if config.num_labels == 1 else MULTI_LABEL if several else SINGLE_LABEL
    if labels is None:
        return problem
    if problem == SINGLE_LABEL and floating:
        raise InputError(
            f"labels are {_named(labels)} numbers, and the model has {config.num_labels} classes; pass the numbers of "
            "classes as integers, or set problem_type (regression, multi_label_classification) in the model's config"
        )
    if problem == SINGLE_LABEL and labels.numel() != len(labels):
        raise InputError(
            f"labels have the shape {tuple(labels.shape)}, and the model gives each example one of "
            f"{config.num_labels} classes; pass one integer each, or set "
            "problem_type=multi_label_classification in the model's config"
        )
    if problem == MULTI_LABEL and tuple(labels.shape[1:]) != (config.num_labels,):
        raise InputError(
            f"labels have the shape {tuple(labels.shape)}, and a multi-label model with {config.num_labels} labels "
            f"needs one 0 or 1 for each: [batch, {config.num_labels}]"
        )
    return problem


def _named(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def losses_of_logits(logits: torch.Tensor, labels: torch.Tensor, problem_type: str) -> torch.Tensor:
    """The loss that the model would give each example alone: `[batch]`."""
    if problem_type == REGRESSION:
        return (logits.reshape(len(logits), -1) - labels.reshape(len(logits), -1).to(logits.dtype)).square().mean(1)
    if problem_type == SINGLE_LABEL:
        return nn.functional.cross_entropy(logits, labels.reshape(-1), reduction="none")
    targets = labels.to(logits.dtype)
    return nn.functional.binary_cross_entropy_with_logits(logits, targets, reduction="none").mean(1)


# --- models with a label for each token ---------------------------------------------------------------


def token_losses(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Cross-entropy, the mean over each example's labelled tokens: `[batch]`; labels of -100 count for nothing."""
    losses = nn.functional.cross_entropy(
        _single(logits).transpose(1, 2), labels, ignore_index=_IGNORED, reduction="none"
    )
    return losses.sum(1) / (labels != _IGNORED).sum(1)


def class_losses(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of one class for each example: `[batch]`."""
    return nn.functional.cross_entropy(_single(logits), labels.reshape(-1), reduction="none")


def next_token_losses(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """As `token_losses`, of a causal language model: position t predicts the label at t + 1."""
    return token_losses(logits[:, :-1], labels[:, 1:])


def _single(logits: torch.Tensor) -> torch.Tensor:
    """In single precision at least, as transformers' language-model losses are."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def own_loss(model: nn.Module, batch: Mapping[str, torch.Tensor]) -> Loss:
    """The loss that a model which gives one itself gives each example alone.

    Of the usual forms the one that equals the model's own loss for the first example of `batch`, so that examples can
    run together; where none does, the model's own loss, one example at a time.

    Raises:
        InputError: the model gives no loss.
    """
    one = {k: v[:1] if isinstance(v, torch.Tensor) and v.ndim else v for k, v in batch.items()}
    with torch.no_grad():
        output = model(**one)
        if getattr(output, "loss", None) is None:
            raise InputError(
                f"{type(base_model(model)).__name__} gives no loss, so its loss per example is not known; pass loss, "
                "a function of the model's output and the batch that gives one number per example"
            )
        logits, labels = getattr(output, "logits", None), one.get("labels")
        for form in _forms(logits, labels):
            ours, own = form(logits, labels).double(), output.loss.double().reshape(1)
            if torch.allclose(ours, own, rtol=1e-4 if logits.dtype.itemsize > 2 else 3e-2, atol=0.0):
                return lambda output, batch, form=form: form(output.logits, batch["labels"])
    return WholeLoss(lambda model, batch: model(**batch).loss)


def _forms(logits: Any, labels: Any) -> tuple[Callable, ...]:
    """The usual losses per example for logits and labels of these shapes."""
    if not (isinstance(logits, torch.Tensor) and isinstance(labels, torch.Tensor)) or labels.is_floating_point():
        return ()
    if labels.ndim == 2 and logits.ndim == 3 and logits.shape[:2] == labels.shape:
        return next_token_losses, token_losses
    return (class_losses,) if logits.ndim == 2 and labels.numel() == len(logits) else ()


# --- scalars to differentiate -------------------------------------------------------------------------


class FisherScalars:
    """The scalars whose gradients a Fisher information is made of, as a function of model and batch.

    A Fisher information is `sum_n sum_c w_nc |d s_nc / d theta|^power`.

    Args:
        labels: `true`: the batch's labels. `expected`: the expectation over the model's own distribution.
        power: 2 or 1.
        problem_type: of a sequence classifier, where `loss` is `None`.
        loss: another loss, per example.

    Attributes:
        weights: `w` of the last batch, `[n, c]`; `None` = all 1.
    """

    def __init__(self, labels: str, power: int, problem_type: str | None, loss: Loss | None):
        self.labels, self.power, self.problem_type, self.loss = labels, power, problem_type, loss
        self.weights: torch.Tensor | None = None

    def __call__(self, model: nn.Module, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Scalars `[n, c]`."""
        if isinstance(self.loss, WholeLoss):
            return self.loss.compute(model, dict(batch)).reshape(1, 1)
        if self.loss is not None:
            return self.loss(model(**batch), dict(batch))[:, None]
        # without labels: the model's own loss would cost, and average
        logits = model(**{key: value for key, value in batch.items() if key != "labels"}).logits
        if self.labels == TRUE:
            return losses_of_logits(logits, batch["labels"], self.problem_type)[:, None]
        return self._expected(logits)

    def _expected(self, logits: torch.Tensor) -> torch.Tensor:
        if self.problem_type == SINGLE_LABEL:
            losses = -logits.log_softmax(-1)
            self.weights = (-losses).detach().exp()  # p_k of -log p_k
            return losses
        outputs = logits.reshape(len(logits), -1)
        n = outputs.shape[1]
        if self.problem_type == REGRESSION:
            # The mean squared error is -log N(y; f, n/2) of n outputs, constants left out.
            factor = 2.0 / n if self.power == 2 else 2.0 / math.sqrt(math.pi)
            self.weights = torch.full_like(outputs.detach(), factor)
        else:
            # The gradient in logit k is (p_k - y_k) / n; E (p_k - y_k)^2 = p_k (1 - p_k), and labels are independent.
            shares = outputs.detach().sigmoid()
            self.weights = shares * (1 - shares) / n**2
        return outputs


def refuse_expectation(labels: str, power: int, problem_type: str | None, outputs: int) -> None:
    """Raise an `InputError` for an expectation over labels that has no closed form here."""
    if labels == EXPECTED and problem_type is None:
        raise InputError("labels='expected' needs the model's distribution of labels, which is known of sequence "
                         "classifiers alone and not of a loss of your own; take labels='true'")  # fmt: skip
    many = problem_type == MULTI_LABEL or (problem_type == REGRESSION and outputs > 1)
    if labels == EXPECTED and power == 1 and many:
        raise InputError(
            f"the expected absolute gradient of a {problem_type} model with {outputs} outputs has no closed form; "
            "take power=2 or the true labels"
        )
