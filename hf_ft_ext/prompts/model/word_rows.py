"""The label words' rows of the layer over the vocabulary, as a layer of their own."""

from collections.abc import Sequence

import torch
from torch import nn
from transformers import PreTrainedModel


def set_word_rows(language_model: PreTrainedModel, path: str, word_ids: Sequence[int], copy_rows: bool) -> None:
    """Put a layer `[words, hidden]` in the place of the layer over the vocabulary.

    Args:
        path: dotted name of that layer.
        word_ids: rows of the vocabulary that the new layer stands for.
        copy_rows: take over weight and bias of these rows; else they come from a file.
    """
    old, rows = language_model.get_output_embeddings(), list(word_ids)
    holder = language_model.get_submodule(path.rpartition(".")[0])
    # Some heads keep the vocabulary's bias beside the layer, tied to it or added behind it.
    loose = getattr(holder, "bias", None)
    loose = loose if isinstance(loose, nn.Parameter) and loose.shape == old.weight.shape[:1] else None
    bias = old.bias if old.bias is not None else loose
    new = nn.Linear(
        old.in_features, len(rows), bias=bias is not None, device=old.weight.device, dtype=old.weight.dtype
    )
    if copy_rows:
        with torch.no_grad():
            new.weight.copy_(old.weight[rows])
            if bias is not None:
                new.bias.copy_(bias[rows])
    language_model.set_submodule(path, new)
    if loose is not None:
        if old.bias is None:  # it is added in the head's forward
            holder.bias, new.bias = new.bias, None
        else:
            del holder.bias
