"""Replace the layer over the vocabulary by one with only the rows of the label words."""

from collections.abc import Sequence

import torch
from torch import nn
from transformers import PreTrainedModel


def set_word_rows(language_model: PreTrainedModel, path: str, word_ids: Sequence[int], copy_rows: bool) -> None:
    """Replace the layer over the vocabulary by a layer `[words, hidden]`.

    Args:
        path: dotted name of the layer over the vocabulary.
        word_ids: rows of the vocabulary that the new layer has.
        copy_rows: copy weight and bias of these rows; else they are loaded from a file later.
    """
    old, rows = language_model.get_output_embeddings(), list(word_ids)
    holder = language_model.get_submodule(path.rpartition(".")[0])
    # Some heads have the vocabulary's bias outside of the layer, tied to its bias or added after it.
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
        if old.bias is None:  # the head's forward adds it
            holder.bias, new.bias = new.bias, None
        else:
            del holder.bias
