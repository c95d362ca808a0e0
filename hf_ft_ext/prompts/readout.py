"""The position that gives the class: the mask, the last token, or the first decoder position."""

import inspect
import logging
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

logger = logging.getLogger(__name__)


class Reading(StrEnum):
    """The position whose vocabulary logits are read.

    Attributes:
        MASK: the mask token of a masked language model.
        LAST: the last non-padding token: a causal language model predicts the next word there.
        DECODER: the first free position of an encoder-decoder's decoder.
    """

    MASK = "mask"
    LAST = "last"
    DECODER = "decoder"

    @property
    def auto_class(self) -> Any:
        """The Auto class that loads a language model of this kind."""
        return {
            Reading.MASK: AutoModelForMaskedLM,
            Reading.LAST: AutoModelForCausalLM,
            Reading.DECODER: AutoModelForSeq2SeqLM,
        }[self]


def reading_of(config: PreTrainedConfig, name: str) -> Reading:
    """Return where the language model of `config` gives the class.

    A model type with both heads (BERT also exists as a decoder) counts as a masked language model.

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


def keep_mask_position(mask_token_id: int, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
    """Forward hook of the encoder: reduce its last hidden state to the mask position, `[rows, 1, hidden]`."""
    ids = kwargs.get("input_ids", args[0] if args else None)
    if ids is None:
        raise InputError("a prompt model finds the mask in input_ids; pass them, not inputs_embeds")
    is_mask = ids == mask_token_id
    _check_one_mask(is_mask)
    position = is_mask.to(torch.int8).argmax(-1)
    hidden = output.last_hidden_state
    index = position[:, None, None].expand(-1, 1, hidden.shape[-1])
    output.last_hidden_state = torch.take_along_dim(hidden, index, 1)
    return output


def _check_one_mask(is_mask: torch.Tensor) -> None:
    if torch.compiler.is_compiling() or torch._C._functorch.is_functorch_wrapped_tensor(is_mask):
        return  # tensors have no readable values there
    count = is_mask.sum(-1)
    if bool((count != 1).any()):
        row = int((count != 1).nonzero()[0, 0])
        raise InputError(
            f"row {row} of the batch has {int(count[row])} mask tokens, but a prompt model reads one; tokenise the "
            "rows with the model's template (PromptEncoder)"
        )


def causal_network(model: PreTrainedModel) -> nn.Module:
    """Return the network of a causal language model, whose last hidden state its head reads."""
    network = model.get_decoder()  # OPT's head reads the decoder, not the base model around it
    if isinstance(network, nn.Linear):  # ModernBERT's head has this name
        network = model.base_model
    if network is not model:
        return network
    embeddings = model.get_input_embeddings()  # Llama 4 has no module of the name that its class gives
    return next(part for part in model.children() if any(module is embeddings for module in part.modules()))


def last_positions(attention_mask: torch.Tensor | None, ids: torch.Tensor) -> torch.Tensor:
    """Return the position of each row's last non-padding token, with padding on either side: `[rows]`.

    Args:
        attention_mask: `[rows, length]`, possibly with columns for a prefix before them; `None` = no padding.
        ids: `[rows, length]` or embeddings `[rows, length, hidden]`.
    """
    length = ids.shape[1]
    if attention_mask is None:
        return torch.full(ids.shape[:1], length - 1, device=ids.device)
    order = torch.arange(1, length + 1, device=ids.device)
    return (attention_mask[:, -length:] * order).argmax(-1)


def add_position_ids(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
    """Forward pre-hook of a causal network: count positions from each row's first non-padding token.

    Otherwise padding before a row, or between virtual tokens and a row, would shift learned position embeddings
    (GPT-2). Networks that count by the mask themselves, or have no absolute positions, do not have this argument.

    Raises:
        InputError: the mask has another shape, which does not show the last token.
    """
    mask = kwargs.get("attention_mask")
    if mask is None:
        return None
    if mask.ndim != 2:
        raise InputError(
            f"a decoder's last token is found by an attention mask [rows, length], got {list(mask.shape)}; pass the "
            "tokenizer's mask"
        )
    if kwargs.get("position_ids") is not None:
        return None
    if "position_ids" not in inspect.signature(module.forward).parameters:
        return None
    ids = kwargs.get("input_ids", args[0] if args else None)
    length = (kwargs["inputs_embeds"] if ids is None else ids).shape[1]
    positions = (mask.long().cumsum(-1) - 1).clamp(min=0)
    return args, {**kwargs, "position_ids": positions[:, -length:]}


def padding_right(config: PreTrainedConfig, inputs: dict[str, Any]) -> dict[str, Any]:
    """Return the inputs of a decoder or an encoder-decoder with all padding moved to the right.

    Left padding would be read by networks that ignore the mask in a recurrence or a convolution (RecurrentGemma,
    RWKV), and would move positions that are counted by columns (Bart, Pegasus). Inputs of masked models are unchanged.
    """
    mask = inputs.get("attention_mask")
    if config.reading == Reading.MASK.value or mask is None or mask.ndim != 2:
        return inputs
    length = next(inputs[name].shape[1] for name in ("input_ids", "inputs_embeds") if name in inputs)
    before, own = mask[:, :-length], mask[:, -length:]  # a prefix has columns of its own
    first = own.ne(0).to(torch.uint8).argmax(-1, keepdim=True)
    order = (torch.arange(length, device=mask.device) + first) % length  # [rows, length]
    moved = {"attention_mask": torch.cat([before, torch.take_along_dim(own, order, 1)], 1)}
    for name, value in inputs.items():
        if name in ("input_ids", "token_type_ids", "position_ids") and value.shape == order.shape:
            moved[name] = torch.take_along_dim(value, order, 1)
        elif name == "inputs_embeds":
            moved[name] = torch.take_along_dim(value, order[..., None], 1)
    return {**inputs, **moved}


def warn_of_other_rows(config: PreTrainedConfig, inputs: dict[str, Any]) -> bool:
    """Log a warning if the first row does not end as the template's rows do; return whether that could be seen."""
    ids, end = inputs.get("input_ids"), config.row_end
    if not end:
        return True
    if ids is None or torch.compiler.is_compiling() or torch._C._functorch.is_functorch_wrapped_tensor(ids):
        return False
    mask = inputs.get("attention_mask")
    last = int(last_positions(mask if mask is not None and mask.ndim == 2 else None, ids)[0])
    found = ids[0, max(0, last + 1 - len(end)) : last + 1].tolist()
    if found != list(end):
        logger.warning(
            "The rows do not end as those of the template %r do, so they are predicted without it; make rows by "
            "PromptEncoder with this template (a text-classification pipeline reads the bare texts).",
            config.template,
        )
    return True


def inputs_of_decoder(config: PreTrainedConfig, inputs: dict[str, Any]) -> dict[str, Any]:
    """Return the inputs that a causal model or an encoder-decoder needs besides the rows."""
    if config.reading == Reading.MASK.value:
        return {}
    # only one position is read, so cached keys and values are not needed
    own = {} if "past_key_values" in inputs or "use_cache" in inputs else {"use_cache": False}
    if config.reading == Reading.DECODER.value and "decoder_input_ids" not in inputs:
        first = next(value for key, value in inputs.items() if key in ("input_ids", "inputs_embeds"))
        own["decoder_input_ids"] = torch.tensor(config.decoder_prefix, device=first.device).expand(first.shape[0], -1)
    return own


def first_token_logits(model: Any, inputs: dict[str, Any]) -> tuple[torch.Tensor, Any]:
    """Return the logits of the label words' first tokens, `[rows, words]`, and the outputs of the language model."""
    positions = None
    if model.config.reading == Reading.LAST.value:  # found here: RWKV does not pass the mask on to its network
        ids = inputs.get("input_ids", inputs.get("inputs_embeds"))
        positions = last_positions(inputs.get("attention_mask"), ids)
    model._positions = positions
    try:
        outputs = model.masked_lm(**inputs, **inputs_of_decoder(model.config, inputs), return_dict=True)
    finally:
        model._positions = None
    logits = outputs.logits
    if positions is not None and logits.shape[1] > 1:  # the hook did not reduce the head's input
        logits = take_positions(logits, positions)
    logits = logits[:, -1]
    return (logits if model.config.untied_words else logits[:, model.config.word_ids]), outputs


def take_positions(hidden: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Select positions `[rows]` or `[rows, positions]` of `[rows, length, hidden]`: `[rows, positions, hidden]`."""
    index = positions.reshape(len(positions), -1)[..., None].expand(-1, -1, hidden.shape[-1])
    return torch.take_along_dim(hidden, index, 1)


def has_one_head(model: PreTrainedModel) -> bool:
    """Whether the model ends in a linear layer over the vocabulary."""
    return isinstance(model.get_output_embeddings(), nn.Linear)


def wide(logits: torch.Tensor) -> torch.Tensor:
    """Return the logits in float32 or wider: 16 bits are too few for the sum in the softmax."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
