"""FISH masks: which entries of the model train (Sung et al. 2021, arXiv 2111.09839; and the thesis's variants)."""

import logging
from collections import Counter

import torch
from torch import nn

from hf_ft_ext.entries.choice import at_random, largest
from hf_ft_ext.errors import InputError
from hf_ft_ext.fisher.arguments import BIAS_MASK, RANDOM_MASK, SCORED
from hf_ft_ext.fisher.information import fisher_information
from hf_ft_ext.fisher.losses import Loss
from hf_ft_ext.models.peft import trained_in_full

logger = logging.getLogger(__name__)


def body_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that a mask chooses from: all but the head's, which train in full."""
    heads = trained_in_full(model)
    return {name: p for name, p in model.named_parameters() if not any(name.startswith(f"{head}.") for head in heads)}


def _of_one_module(model: nn.Module, parameters: dict[str, nn.Parameter]) -> dict[str, nn.Parameter]:
    """`parameters` without those that several modules share: their entries cannot train alone."""
    places = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    shared = [name for name, p in parameters.items() if places[id(p)] > 1]
    if shared:
        logger.info(
            "%d weights that several modules share (%s, ...) are left out of the mask.", len(shared), shared[0]
        )
    return {name: p for name, p in parameters.items() if name not in shared}


def kept_entries(model: nn.Module, keep_ratio: float) -> int:
    """Entries that a mask keeps: `keep_ratio` of all parameters, the head's taken off (as the source counts).

    Raises:
        InputError: none are left.
    """
    total = sum(p.numel() for p in model.parameters())
    head = total - sum(p.numel() for p in body_parameters(model).values())
    kept = int(total * keep_ratio) - head
    if kept < 1:
        raise InputError(
            f"fisher_keep_ratio={keep_ratio} of {total} parameters is {int(total * keep_ratio)}, and the head takes "
            f"{head} of them; raise it above {head / total:.2g}"
        )
    return kept


def choose_entries(
    model: nn.Module,
    mask: str,
    keep_ratio: float,
    data,
    seed: int,
    progress: bool = True,
    loss: Loss | None = None,
):
    """Parameter name -> flat indices of the entries that train.

    Args:
        mask: one of `MASKS`; `bias` takes all biases, whatever the ratio.
        data: batches, read where the mask is scored by gradients.
        loss: another loss than the model's own, as for `fisher_information`.

    Raises:
        InputError: no bias in the model, no entry left, or gradients that are zero everywhere.
    """
    body = _of_one_module(model, body_parameters(model))
    if quantized := [name for name, p in body.items() if not p.is_floating_point()]:
        raise InputError(
            f"{quantized[0]} is quantized ({body[quantized[0]].dtype}), and entries of it cannot train; load the "
            "model in floating point, or train adapters on it (fisher_mode=single with lora)"
        )
    if mask == BIAS_MASK:
        chosen = {name: torch.arange(p.numel()) for name, p in body.items() if name.rpartition(".")[2] == "bias"}
        if not chosen:
            raise InputError(f"{type(model).__name__} has no biases to train; take another fisher_mask")
        return chosen
    kept = kept_entries(model, keep_ratio)
    if mask == RANDOM_MASK:
        return at_random({name: p.shape for name, p in body.items()}, kept, seed)
    labels, power = SCORED[mask]
    scores = fisher_information(model, data, body, labels=labels, power=power, loss=loss, progress=progress)
    if not any(score.any() for score in scores.values()):
        raise InputError("every gradient is exactly zero, so there is nothing to choose by; check the classifier's "
                         "weights and the labels")  # fmt: skip
    return largest(scores, kept)
