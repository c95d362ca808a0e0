"""Labels of a batch: how many tokens they predict, a loss of 0 for a batch that predicts none, and other labels."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from hf_ft_ext.errors import InputError
from hf_ft_ext.problem_types import MULTI_LABEL, REGRESSION

IGNORED = -100  # the label of tokens that are not predicted, as in transformers
_NOT_SHIFTED = ("XLNetLMHeadModel", "XLMWithLMHeadModel")  # transformers calls them causal; they predict in place
_KEYS = ("shift_labels", "labels")


def predicts_next_tokens(model: nn.Module) -> bool:
    """Whether the loss is that of a causal language model, which does not predict the first label of a row.

    A subclass of a transformers class predicts as that class does.
    """
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    if getattr(getattr(inner, "config", None), "is_encoder_decoder", False):
        return False
    names, known = [kind.__name__ for kind in type(inner).__mro__], _causal_classes()
    if any(name in _NOT_SHIFTED for name in names):
        return False
    return any(name.endswith(("ForCausalLM", "LMHeadModel")) or name in known for name in names)


def _causal_classes() -> set[str]:
    found: set[str] = set()
    for names in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
        found.update([names] if isinstance(names, str) else names)
    return found


def label_tokens(batch: Mapping[str, Any], shifted: bool) -> int | None:
    """Number of tokens that a batch's loss is the mean over; `None` if its labels are not those of tokens.

    Args:
        shifted: whether each token is predicted from those before it, so that the first label of a row is not used;
            `shift_labels` are shifted already.
    """
    labels = batch.get("shift_labels")
    shifted = shifted and labels is None
    labels = batch.get("labels") if labels is None else labels
    if not isinstance(labels, torch.Tensor) or labels.ndim < 2 or labels.is_floating_point():
        return None
    return int((labels[..., 1:] if shifted else labels).ne(IGNORED).sum())


def label_count(batch: Mapping[str, Any], shifted: bool) -> int:
    """Number of labels that a batch's mean loss is a mean over: label tokens, or rows if a row has one label.

    It is the weight of the loss in the mean over several batches: `sum_b (n_b / n) loss_b`.

    Args:
        shifted: see `label_tokens`.
    """
    tokens = label_tokens(batch, shifted)
    return len(next(iter(batch.values()))) if tokens is None else tokens


def zero_without_tokens(
    loss: Callable[[Mapping[str, Any]], torch.Tensor], batch: Mapping[str, Any], shifted: bool
) -> torch.Tensor:
    """Return `loss(batch)`, or 0 with gradient 0 if no token is predicted: the mean over none would be NaN.

    The model runs in both cases, which other processes and hooks may wait for.
    """
    if label_tokens(batch, shifted) != 0:
        return loss(batch)
    return 0 * loss(with_a_label(batch))


def with_a_label(batch: Mapping[str, Any]) -> dict[str, Any]:
    """Return a copy of the batch in which the last token of each row has a label, so that the loss is finite."""
    changed = dict(batch)
    for key in _KEYS:
        if isinstance(batch.get(key), torch.Tensor):
            changed[key] = batch[key].clone()
            changed[key][..., -1] = 0
    return changed


def check_row_labels(labels: torch.Tensor, classes: int, problem_type: str | None, soft: bool = False) -> None:
    """Refuse labels of rows that do not fit the problem type of a classifier: its own, or what transformers infers.

    Args:
        labels: class ids `[rows]`, numbers, or 0 and 1 for each label `[rows, classes]`.
        classes: number of outputs of the classifier.
        soft: whether several labels per row may be anything from 0 to 1.

    Raises:
        InputError: a label that is not a class id (with several labels per row: not 0 or 1), or not finite.
    """
    several = problem_type is None and labels.is_floating_point() and labels.ndim == 2 and classes > 1
    if problem_type == REGRESSION or (problem_type is None and classes == 1):
        wrong, expected = ~labels.isfinite(), "a finite number"
    elif problem_type == MULTI_LABEL or several:
        wrong = ~((labels >= 0) & (labels <= 1)) if soft else (labels != 0) & (labels != 1)
        expected = "from 0 to 1" if soft else "0 or 1"
    else:
        whole = labels.long() == labels
        wrong = (labels < 0) | (labels >= classes) | ~whole
        expected = f"a class id (0 to {classes - 1})"
    if wrong.any():
        row = int(wrong.reshape(len(wrong), -1).any(1).nonzero()[0])
        raise InputError(
            f"label {labels[wrong][0].item():g} of row {row} is not {expected}; correct it, or remove rows without a "
            "label"
        )


# --- what tells a loss from another one ---------------------------------------------------------------


def other_labels(labels: torch.Tensor, classes: int) -> torch.Tensor:
    """Return other labels of the same shape: class ids move on by 1, 2, 3, ..., so that all classes occur.

    A loss that treats classes differently may equal the usual one on rows of one class, or without any label. Numbers
    are raised by 1, labels of 0 and 1 are exchanged, and ignored tokens stay ignored.
    """
    if labels.is_floating_point():
        return labels + 1 if labels.ndim < 2 or labels.shape[-1] == 1 else 1 - labels
    steps = torch.arange(1, labels.numel() + 1, device=labels.device).view(labels.shape)
    return torch.where(labels == IGNORED, labels, (labels + steps) % classes)


@contextlib.contextmanager
def spread_logits(model: nn.Module, classes: int) -> Iterator[None]:
    """Inside, layers with one output per class add random numbers to their outputs.

    A new head's logits are almost equal, and then losses with and without class weights or smoothing are too.
    """

    def spread(module: nn.Module, inputs: Any, output: Any) -> Any:
        if not isinstance(output, torch.Tensor) or not output.is_floating_point():
            return output
        numbers = torch.randn(output.shape, generator=torch.Generator().manual_seed(0))
        return output + _SPREAD * numbers.to(output.device, output.dtype)

    layers = [module for module in model.modules() if getattr(module, "out_features", None) == classes]
    hooks = [layer.register_forward_hook(spread) for layer in layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


_SPREAD = 2.0
