"""Losses per example, and the scalars whose gradients a Fisher information sums."""

import inspect
import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from hf_ft_ext.classifier_losses import classifier_losses, returns_classifier_loss
from hf_ft_ext.errors import InputError
from hf_ft_ext.label_tokens import (
    IGNORED,
    label_tokens,
    other_labels,
    predicts_next_tokens,
    spread_logits,
    zero_without_tokens,
)
from hf_ft_ext.moved import former_classes
from hf_ft_ext.per_example.outputs import logits_of, loss_of
from hf_ft_ext.problem_types import CLASSIFICATION, MULTI_LABEL, REGRESSION

LABELS = TRUE, EXPECTED = ("true", "expected")

PerExampleLoss = Callable[[Any, dict], torch.Tensor]


@dataclass(frozen=True)
class ModelLoss:
    """A loss that runs the model itself, such as a Trainer's `compute_loss`; called with one example at a time.

    Attributes:
        compute: `compute(model, batch)` -> the scalar loss of a batch.
    """

    compute: Callable[[nn.Module, dict], torch.Tensor]


Loss = PerExampleLoss | ModelLoss


__getattr__ = former_classes(__name__, WholeLoss=ModelLoss)


def base_model(model: nn.Module) -> nn.Module:
    """The model inside peft's wrapper."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def is_classifier(model: nn.Module) -> bool:
    """Whether the model has transformers' loss for sequence classifiers."""
    inner = base_model(model)
    return type(inner).__name__.endswith("ForSequenceClassification") and hasattr(inner, "config")


def problem_type_of(model: nn.Module, labels: torch.Tensor | None) -> str:
    """Return the problem type of a sequence classifier as transformers does: from its config, or from the labels.

    Raises:
        InputError: the labels do not fit the problem type.
    """
    config = base_model(model).config
    problem = config.problem_type
    floating = labels is not None and labels.is_floating_point()
    if problem is None:
        several = labels is not None and floating and labels.ndim == 2
        problem = REGRESSION if config.num_labels == 1 else MULTI_LABEL if several else CLASSIFICATION
    if labels is None:
        return problem
    if problem == CLASSIFICATION and floating:
        raise InputError(
            f"labels have dtype {_dtype_name(labels)}, but the model has {config.num_labels} classes; pass class "
            "indices as integers, or set problem_type (regression, multi_label_classification) in the model's config"
        )
    if problem == CLASSIFICATION and labels.numel() != len(labels):
        raise InputError(
            f"labels have shape {tuple(labels.shape)}, but the model predicts one of {config.num_labels} classes per "
            "example; pass one integer per example, or set problem_type=multi_label_classification in the model's "
            "config"
        )
    if problem == MULTI_LABEL and tuple(labels.shape[1:]) != (config.num_labels,):
        raise InputError(
            f"labels have shape {tuple(labels.shape)}, but a multi-label model with {config.num_labels} labels needs "
            f"0 or 1 for each label: [batch, {config.num_labels}]"
        )
    return problem


def _dtype_name(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


# --- models with a label per token --------------------------------------------------------------------


def token_losses(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Cross-entropy, averaged over each example's labelled tokens: `[batch]`; labels of -100 are ignored."""
    losses = nn.functional.cross_entropy(
        _at_least_float32(logits).transpose(1, 2), labels, ignore_index=IGNORED, reduction="none"
    )
    # 1 / T_n sum_t -log p(y_nt), over the T_n labelled tokens of example n; 0 for an example without a label
    return losses.sum(1) / (labels != IGNORED).sum(1).clamp(min=1)


def class_losses(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Cross-entropy with one class per example: `[batch]`."""
    return nn.functional.cross_entropy(_at_least_float32(logits), labels.reshape(-1), reduction="none")


def next_token_losses(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """As `token_losses`, for a causal language model: position t predicts the label at t + 1."""
    return token_losses(logits[:, :-1], labels[:, 1:])


def _at_least_float32(logits: torch.Tensor) -> torch.Tensor:
    """Convert to float32 or wider, as transformers' language-model losses do."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def own_loss(model: nn.Module, batch: Mapping[str, torch.Tensor]) -> Loss | None:
    """Return a loss per example that equals the loss which the model itself returns for a single example.

    If one of the usual formulas equals the model's loss on the first labelled example of `batch`, it is used, so that
    examples can run together; `None` = the loss of transformers' sequence classifiers. Otherwise the model's own loss
    is used, one example at a time: a classifier may compute another one, such as that of a prompt on a scale, or have
    its `loss_function` replaced.

    Raises:
        InputError: the model returns no loss and is not a sequence classifier.
    """
    one = _first_with_label(batch, predicts_next_tokens(model))
    if is_classifier(model):
        problem, classes = problem_type_of(model, one["labels"]), base_model(model).config.num_labels
        usual = returns_classifier_loss(model, [one, _with_other_labels(one, classes)], problem)
        return None if usual else _by_model()
    with torch.no_grad():
        output = model(**one)
        if loss_of(output) is None:
            raise InputError(
                f"{type(base_model(model)).__name__} returns no loss, so its loss per example is not known; pass "
                "loss, a function of the model's output and the batch that returns one value per example"
            )
        logits, labels = _logits_if_any(output), one.get("labels")
        forms = _candidate_losses(logits, labels)
        classes = logits.shape[-1] if forms and logits is not None else 0
        for form in forms:
            if all(_is_mean_of(form, model, batch, classes) for batch in (one, _with_other_labels(one, classes))):
                return lambda output, batch, form=form: form(logits_of(output), batch["labels"])
    return _by_model()


def _is_mean_of(
    form: Callable[..., torch.Tensor], model: nn.Module, batch: Mapping[str, torch.Tensor], classes: int
) -> bool:
    """Whether the model's loss of a batch is the mean of `form(logits, labels)`."""
    with torch.no_grad(), spread_logits(model, classes):
        output = model(**batch)
    own = loss_of(output)
    return own is not None and _same(form(logits_of(output), batch["labels"]).mean(0, keepdim=True), own)


def _with_other_labels(one: Mapping[str, Any], classes: int) -> dict[str, Any]:
    """The example with other labels: once for each class (at most `_CLASSES`) if it has one label.

    A loss that treats classes differently may equal the usual one on an example with its own label.
    """
    labels = one["labels"]
    if labels.is_floating_point() or labels.numel() > 1:
        return {**one, "labels": other_labels(labels, classes)}
    n = min(classes, _CLASSES)
    repeated = {
        k: v.repeat(n, *[1] * (v.ndim - 1)) if isinstance(v, torch.Tensor) and v.ndim else v for k, v in one.items()
    }
    return {**repeated, "labels": torch.arange(n, device=labels.device).view(n, *labels.shape[1:])}


_CLASSES = 64


def _same(found: torch.Tensor, own: torch.Tensor) -> bool:
    rtol = 1e-4 if found.dtype.itemsize > 2 else 3e-2
    return torch.allclose(found.double(), own.double().reshape(1), rtol=rtol, atol=1e-9)


def _by_model() -> ModelLoss:
    return ModelLoss(lambda model, batch: loss_of(model(**batch)))


def _first_with_label(batch: Mapping[str, Any], shifted: bool) -> dict[str, Any]:
    """The first example whose loss is defined, as a batch of one; the first one if there is none."""
    sized = [v for v in batch.values() if isinstance(v, torch.Tensor) and v.ndim]
    ones = (
        {k: v[i : i + 1] if isinstance(v, torch.Tensor) and v.ndim else v for k, v in batch.items()}
        for i in range(len(sized[0]))
    )
    first = next(ones)
    return next((one for one in itertools.chain([first], ones) if label_tokens(one, shifted) != 0), first)


def _logits_if_any(output: Any) -> torch.Tensor | None:
    try:
        return logits_of(output)
    except InputError:
        return None


def _candidate_losses(logits: Any, labels: Any) -> tuple[Callable, ...]:
    """The usual losses per example that fit the shapes of logits and labels."""
    if not (isinstance(logits, torch.Tensor) and isinstance(labels, torch.Tensor)) or labels.is_floating_point():
        return ()
    if labels.ndim == 2 and logits.ndim == 3 and logits.shape[:2] == labels.shape:
        return next_token_losses, token_losses
    return (class_losses,) if logits.ndim == 2 and labels.numel() == len(logits) else ()


# --- scalars to differentiate -------------------------------------------------------------------------


class FisherScalars:
    """The scalars s and weights w of a Fisher information `sum_n sum_c w_nc |d s_nc / d theta|^power`.

    An object is a function of model and batch that returns the scalars.

    Args:
        labels: `true`: the batch's labels. `expected`: the expectation over the model's own distribution.
        power: 2 or 1.
        problem_type: problem type of a sequence classifier, if `loss` is `None`.
        loss: loss per example, used instead of the model's.

    Attributes:
        weights: w of the last batch, `[n, c]`; `None` = all 1.
    """

    def __init__(self, labels: str, power: int, problem_type: str | None, loss: Loss | None):
        self.labels, self.power, self.problem_type, self.loss = labels, power, problem_type, loss
        self.weights: torch.Tensor | None = None

    def __call__(self, model: nn.Module, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Scalars `[n, c]`."""
        if isinstance(self.loss, ModelLoss):
            compute, shifted = self.loss.compute, predicts_next_tokens(model)
            return zero_without_tokens(lambda one: compute(model, dict(one)), batch, shifted).reshape(1, 1)
        if self.loss is not None:
            return self.loss(model(**_taken_by(model, batch)), dict(batch))[:, None]
        # Called without labels: the model would compute its own loss, averaged over the batch.
        logits = logits_of(model(**{key: value for key, value in batch.items() if key != "labels"}))
        if self.labels == TRUE:
            assert self.problem_type is not None  # given where `loss` is not
            return classifier_losses(logits.reshape(len(logits), -1), batch["labels"], self.problem_type)[:, None]
        return self._expected(logits)

    def _expected(self, logits: torch.Tensor) -> torch.Tensor:
        if self.problem_type == CLASSIFICATION:
            # E_y |d(-log p_y)/dtheta|^power = sum_k p_k |d(-log p_k)/dtheta|^power
            losses = -logits.log_softmax(-1)
            self.weights = (-losses).detach().exp()
            return losses
        outputs = logits.reshape(len(logits), -1)
        n = outputs.shape[1]
        if self.problem_type == REGRESSION:
            # The mean squared error over n outputs is -log N(y; f, n/2) up to a constant, so y ~ N(f, n/2).
            # power 2: E (2 (f - y) / n)^2 = 2 / n. power 1 (n = 1): E |2 (f - y)| = 2 / sqrt(pi).
            factor = 2.0 / n if self.power == 2 else 2.0 / math.sqrt(math.pi)
            self.weights = torch.full_like(outputs.detach(), factor)
        else:
            # dL/df_k = (p_k - y_k) / n with independent labels y_k, and E (p_k - y_k)^2 = p_k (1 - p_k).
            shares = outputs.detach().sigmoid()
            self.weights = shares * (1 - shares) / n**2
        return outputs


def _taken_by(model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of a batch that the model's `forward` takes; others are for the user's loss."""
    parameters = inspect.signature(base_model(model).forward).parameters.values()
    if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters):
        return dict(batch)
    names = {parameter.name for parameter in parameters}
    return {key: value for key, value in batch.items() if key in names}


def refuse_expectation(labels: str, power: int, problem_type: str | None, outputs: int) -> None:
    """Raise an `InputError` for an expectation over labels without a closed form."""
    if labels == EXPECTED and problem_type is None:
        raise InputError("labels='expected' needs the model's distribution of labels, which is known only for "
                         "sequence classifiers with their own loss; pass labels='true'")  # fmt: skip
    many = problem_type == MULTI_LABEL or (problem_type == REGRESSION and outputs > 1)
    if labels == EXPECTED and power == 1 and many:
        raise InputError(
            f"the expected absolute gradient of a {problem_type} model with {outputs} outputs has no closed form; "
            "pass power=2, or labels='true'"
        )
