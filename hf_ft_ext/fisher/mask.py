"""FISH masks: the choice of entries that train (Sung et al. 2021, arXiv 2111.09839; and variants of the thesis)."""

import logging
from collections import Counter

import torch
from torch import nn

from hf_ft_ext.entries.choice import largest_entries, random_entries, without_frozen
from hf_ft_ext.errors import InputError
from hf_ft_ext.fisher.arguments import BIAS_MASK, RANDOM_MASK, SCORED
from hf_ft_ext.fisher.information import fisher_information
from hf_ft_ext.fisher.losses import Loss
from hf_ft_ext.models.peft import trained_in_full

logger = logging.getLogger(__name__)


def body_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that a mask chooses from: all except those of the head, which train in full."""
    heads = trained_in_full(model)
    return {name: p for name, p in model.named_parameters() if not any(name.startswith(f"{head}.") for head in heads)}


def kept_entries(model: nn.Module, keep_ratio: float) -> int:
    """Number of entries in a mask: `keep_ratio` times all parameters, minus the head's (as in the published code).

    Raises:
        InputError: no entries are left.
    """
    total = sum(p.numel() for p in model.parameters())
    head = total - sum(p.numel() for p in body_parameters(model).values())
    kept = int(total * keep_ratio) - head
    if kept < 1:
        raise InputError(
            f"fisher_keep_ratio={keep_ratio} of {total} parameters is {int(total * keep_ratio)}, but the head has "
            f"{head}; raise it above {head / total:.2g}"
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
    """Choose the entries that train: parameter name -> flat indices.

    Args:
        mask: one of `MASKS`; `bias` takes all biases and ignores the ratio.
        data: batches, used only for masks that are chosen by gradients.
        loss: a loss used instead of the model's, as for `fisher_information`.

    Raises:
        InputError: a quantized weight, no biases in the model, a ratio that leaves no entries or asks for more than
            there are, or gradients that are all zero.
    """
    body = _unshared(model, body_parameters(model))
    if quantized := [name for name, p in body.items() if not p.is_floating_point()]:
        raise InputError(
            f"{quantized[0]} is quantized ({body[quantized[0]].dtype}), so its entries cannot train; load the "
            "model in floating point, or train adapters on it (fisher_mode=single with lora)"
        )
    names, frozen = without_frozen(body)
    if frozen:
        logger.info("%d frozen weights (%s, ...) are not part of the mask.", len(frozen), frozen[0])
    body = {name: body[name] for name in names}
    if mask == BIAS_MASK:
        chosen = {name: torch.arange(p.numel()) for name, p in body.items() if name.rpartition(".")[2] == "bias"}
        if not chosen:
            raise InputError(f"{type(model).__name__} has no biases to train; pass another fisher_mask")
        return chosen
    kept = kept_entries(model, keep_ratio)
    available = sum(p.numel() for p in body.values())
    if kept > available:
        raise InputError(
            f"fisher_keep_ratio={keep_ratio} asks for {kept} entries besides the head, but a mask can choose from "
            f"{available} (weights that several modules share, and frozen ones, are not part of it); lower it"
        )
    if mask == RANDOM_MASK:
        return random_entries({name: p.shape for name, p in body.items()}, kept, seed)
    labels, power = SCORED[mask]
    scores = fisher_information(model, data, body, labels=labels, power=power, loss=loss, progress=progress)
    if not any(score.any() for score in scores.values()):
        raise InputError("every gradient is exactly zero, so no entries can be chosen; check the classifier's weights "
                         "and the labels")  # fmt: skip
    return largest_entries(scores, kept)


def _unshared(model: nn.Module, parameters: dict[str, nn.Parameter]) -> dict[str, nn.Parameter]:
    """Remove parameters that several modules share: entries of them cannot train separately."""
    uses = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    shared = [name for name, p in parameters.items() if uses[id(p)] > 1]
    if shared:
        logger.info(
            "%d weights that several modules share (%s, ...) are not part of the mask.", len(shared), shared[0]
        )
    return {name: p for name, p in parameters.items() if name not in shared}
