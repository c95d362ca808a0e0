"""Where a language model says the class: at the mask, behind the last token, or at the decoder's first position."""

import inspect
from enum import StrEnum
from typing import Any

import torch
from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    PreTrainedConfig,
    PreTrainedModel,
)

from hf_ft_ext.errors import InputError

IGNORED = -100  # padding of label words and of a row's options


class Reading(StrEnum):
    """The position whose vocabulary logits are read.

    Attributes:
        MASK: the mask token of a masked language model.
        LAST: the last token that is no padding: a causal language model predicts the word that follows.
        DECODER: the first free position of an encoder-decoder's decoder.
    """

    MASK = "mask"
    LAST = "last"
    DECODER = "decoder"

    @property
    def auto_class(self) -> Any:
        """The Auto class that loads such a language model."""
        return {
            Reading.MASK: AutoModelForMaskedLM,
            Reading.LAST: AutoModelForCausalLM,
            Reading.DECODER: AutoModelForSeq2SeqLM,
        }[self]


def reading_of(config: PreTrainedConfig, name: str) -> Reading:
    """How a class is read of the language model that `config` describes.

    A model that has both heads (BERT also exists as a decoder) counts as a masked language model.

    Raises:
        InputError: transformers has no language model of this type.
    """
    if config.is_encoder_decoder:
        if type(config) in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING:
            return Reading.DECODER
    elif type(config) in MODEL_FOR_MASKED_LM_MAPPING:
        return Reading.MASK
    elif type(config) in MODEL_FOR_CAUSAL_LM_MAPPING:
        return Reading.LAST
    raise InputError(
        f"model {name!r} is of type {config.model_type!r}, for which transformers has no language model; prompts need "
        "one, such as roberta-base (masked), facebook/opt-125m (causal) or t5-small: pass one with "
        "--model_name_or_path"
    )


# --- one position of the network -----------------------------------------------------------------------


def last_positions(attention_mask: torch.Tensor | None, ids: torch.Tensor) -> torch.Tensor:
    """Position of each row's last token that is no padding, whichever side the padding is on: `[rows]`.

    Args:
        attention_mask: `[rows, length]`, with columns for a prefix in front at most; `None` = no padding.
        ids: `[rows, length]` or embeddings `[rows, length, hidden]`.
    """
    length = ids.shape[1]
    if attention_mask is None:
        return torch.full(ids.shape[:1], length - 1, device=ids.device)
    order = torch.arange(1, length + 1, device=ids.device)
    return (attention_mask[:, -length:] * order).argmax(-1)


def add_position_ids(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
    """Forward pre-hook of a causal network: count positions from each row's first token that is no padding.

    Learned position embeddings (GPT-2) would otherwise change with the padding in front. Networks that count by the
    mask themselves, or have no absolute positions, have no such argument.

    Raises:
        InputError: a mask of another shape, which does not say which token is the last.
    """
    mask = kwargs.get("attention_mask")
    if mask is None:
        return None
    if mask.ndim != 2:
        raise InputError(
            f"a decoder's last token is found by an attention mask [rows, length], got {list(mask.shape)}; pass the "
            "mask that the tokenizer gives"
        )
    if kwargs.get("position_ids") is not None:
        return None
    if "position_ids" not in inspect.signature(module.forward).parameters:
        return None
    ids = kwargs.get("input_ids", args[0] if args else None)
    length = (kwargs["inputs_embeds"] if ids is None else ids).shape[1]
    positions = (mask.long().cumsum(-1) - 1).clamp(min=0)
    return args, {**kwargs, "position_ids": positions[:, -length:]}


def take_positions(hidden: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """`[rows, positions, hidden]` of `[rows, length, hidden]` by positions `[rows]` or `[rows, positions]`."""
    index = positions.reshape(len(positions), -1)[..., None].expand(-1, -1, hidden.shape[-1])
    return torch.take_along_dim(hidden, index, 1)


# --- whole sequences -----------------------------------------------------------------------------------


def padded_words(words: list[list[int]], device: torch.device | None = None) -> torch.Tensor:
    """Tokens of the label words, `[words, longest]`, filled with `IGNORED`."""
    longest = max(map(len, words))
    rows = [word + [IGNORED] * (longest - len(word)) for word in words]
    return torch.tensor(rows, device=device)


def rows_with_words(
    ids: torch.Tensor, attention_mask: torch.Tensor | None, words: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Each row once for each word, the word behind its last token.

    The last token of a word is predicted and never read, so it is left out.

    Args:
        ids: `[rows, length]`.
        attention_mask: `[rows, length]`, or `None`.
        words: `[rows, words, longest]`, filled with `IGNORED`.

    Returns:
        Ids and attention mask, `[rows x words, length + longest - 1]`, and the positions that predict the word's
        tokens, `[rows x words, longest]`.
    """
    rows, count, longest = words.shape
    mask = torch.ones_like(ids) if attention_mask is None else attention_mask
    last = last_positions(mask, ids)
    behind = torch.arange(longest, device=ids.device)
    positions = last[:, None, None] + behind.expand(rows, count, longest)  # token j is predicted at last + j
    room = ids.new_zeros(rows, longest - 1)
    wide_ids = torch.cat([ids, room], 1)[:, None].expand(-1, count, -1)
    wide_mask = torch.cat([mask, room.to(mask.dtype)], 1)[:, None].expand(-1, count, -1)
    if longest > 1:
        fed, where = words[..., :-1], positions[..., 1:]
        # what lies behind the end of a shorter word stays padding
        real = (words[..., 1:] != IGNORED).to(mask.dtype)
        wide_ids = wide_ids.scatter(2, where, fed.clamp(min=0))
        wide_mask = wide_mask.scatter(2, where, real)
    return wide_ids.flatten(0, 1), wide_mask.flatten(0, 1), positions.flatten(0, 1)


def sequence_scores(logits: torch.Tensor, words: torch.Tensor, mean: bool) -> torch.Tensor:
    """Log probability of each word, `sum_j log p(w_j | row, w_1 .. w_(j-1))`: `[rows, words]`, float32.

    Args:
        logits: of the vocabulary, `[rows x words, longest, vocabulary]`.
        words: `[rows, words, longest]`, filled with `IGNORED`.
        mean: divide by the number of tokens.
    """
    tokens = words.flatten(0, 1)
    counted = tokens != IGNORED
    log_p = logits.float().log_softmax(-1)
    of_tokens = torch.take_along_dim(log_p, tokens.clamp(min=0)[..., None], -1)[..., 0]
    # torch.where, not a product: an impossible token's -inf must not become NaN where it is not counted
    score = torch.where(counted, of_tokens, torch.zeros_like(of_tokens)).sum(-1)
    if mean:
        score = score / counted.sum(-1).clamp(min=1)
    return score.unflatten(0, words.shape[:2])


def has_one_head(model: PreTrainedModel) -> bool:
    """Whether a linear layer over the vocabulary ends the model."""
    return isinstance(model.get_output_embeddings(), nn.Linear)
