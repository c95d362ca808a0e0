"""Score label words, or a row's own options, as whole sequences: the log probability of all their tokens."""

from typing import Any

import torch

from hf_ft_ext.errors import InputError
from hf_ft_ext.prompts.readout import Reading, last_positions, take_positions, wide
from hf_ft_ext.prompts.templates.words import SEQUENCE_MEAN

IGNORED = -100  # padding of label words and of a row's options


def sequence_logits(model: Any, inputs: dict[str, Any], options: torch.Tensor | None) -> tuple[torch.Tensor, Any]:
    """Return log probabilities `[rows, words]` of whole label words or of the rows' own options, and the outputs."""
    ids = inputs.pop("input_ids", None)
    if ids is None or "past_key_values" in inputs:
        raise InputError(
            "label words are scored as sequences after the rows' tokens, which does not support virtual tokens "
            "(prefix and prompt tuning) and inputs_embeds; pass word_scoring=first_token, or use LoRA"
        )
    if options is None:
        if model.config.word_sequences is None:
            raise InputError("each row needs its own options with this model; pass them as option_ids")
        options = padded_words(model.config.word_sequences, ids.device)
    words = options if options.ndim == 3 else options[None].expand(ids.shape[0], -1, -1)
    if len(words) != ids.shape[0]:  # several contexts of each row
        words = words.repeat_interleave(ids.shape[0] // len(words), 0)
    mean = model.config.word_scoring == SEQUENCE_MEAN
    if model.config.reading == Reading.DECODER.value:
        outputs = _behind_decoder_start(model, ids, inputs, words)
    else:
        wide_ids, wide_mask, positions = rows_with_words(ids, inputs.pop("attention_mask", None), words)
        inputs.pop("position_ids", None)  # they are recomputed with the words
        if "token_type_ids" in inputs:
            inputs["token_type_ids"] = _types_with_words(inputs["token_type_ids"], positions)
        model._positions = positions
        try:
            outputs = model.masked_lm(
                input_ids=wide_ids, attention_mask=wide_mask, **{"use_cache": False, **inputs}, return_dict=True
            )
        finally:
            model._positions = None
        if outputs.logits.shape[1] != positions.shape[1]:
            outputs.logits = take_positions(outputs.logits, positions)
    return sequence_scores(outputs.logits[:, -words.shape[-1] :], words, mean), outputs


def padded_words(words: list[list[int]], device: torch.device | None = None) -> torch.Tensor:
    """Return the tokens of the label words, `[words, longest]`, padded with `IGNORED`."""
    longest = max(map(len, words))
    rows = [word + [IGNORED] * (longest - len(word)) for word in words]
    return torch.tensor(rows, device=device)


def rows_with_words(
    ids: torch.Tensor, attention_mask: torch.Tensor | None, words: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Repeat each row once per word, with the word after the row's last token.

    The last token of a word is only predicted, never an input, so it is left out.

    Args:
        ids: `[rows, length]`.
        attention_mask: `[rows, length]`, or `None`.
        words: `[rows, words, longest]`, padded with `IGNORED`.

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
        # positions after the end of a shorter word stay padding
        real = (words[..., 1:] != IGNORED).to(mask.dtype)
        wide_ids = wide_ids.scatter(2, where, fed.clamp(min=0))
        wide_mask = wide_mask.scatter(2, where, real)
    return wide_ids.flatten(0, 1), wide_mask.flatten(0, 1), positions.flatten(0, 1)


def _types_with_words(types: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Token types `[rows x words, length + longest - 1]`: a word has the type of the row's last token.

    Args:
        types: `[rows, length]`.
        positions: as `rows_with_words` returns them.
    """
    longest = positions.shape[1]
    repeated = types.repeat_interleave(len(positions) // len(types), 0)
    wide_types = torch.nn.functional.pad(repeated, (0, longest - 1))
    last = positions[:, :1]
    behind = torch.arange(wide_types.shape[1], device=types.device) > last
    return torch.where(behind, wide_types.gather(1, last), wide_types)


def sequence_scores(logits: torch.Tensor, words: torch.Tensor, mean: bool) -> torch.Tensor:
    """Log probability of each word, `sum_j log p(w_j | row, w_1 .. w_(j-1))`: `[rows, words]`, in float32 or wider.

    Args:
        logits: vocabulary logits, `[rows x words, longest, vocabulary]`.
        words: `[rows, words, longest]`, padded with `IGNORED`.
        mean: divide by the number of tokens.
    """
    tokens = words.flatten(0, 1)
    counted = tokens != IGNORED
    log_p = wide(logits).log_softmax(-1)
    of_tokens = torch.take_along_dim(log_p, tokens.clamp(min=0)[..., None], -1)[..., 0]
    # torch.where, not a product: -inf times 0 at an ignored position would be NaN
    score = torch.where(counted, of_tokens, torch.zeros_like(of_tokens)).sum(-1)
    if mean:
        score = score / counted.sum(-1).clamp(min=1)
    return score.unflatten(0, words.shape[:2])


def _behind_decoder_start(model: Any, ids: torch.Tensor, inputs: dict[str, Any], words: torch.Tensor) -> Any:
    """Run the encoder once per row and the decoder once per word."""
    count = words.shape[1]
    mask = inputs.pop("attention_mask", None)
    encoded = model.masked_lm.get_encoder()(input_ids=ids, attention_mask=mask, return_dict=True)
    encoded.last_hidden_state = encoded.last_hidden_state.repeat_interleave(count, 0)
    prefix = torch.tensor(model.config.decoder_prefix, device=ids.device).expand(ids.shape[0] * count, -1)
    fed = torch.cat([prefix, words.flatten(0, 1)[:, :-1].clamp(min=0)], 1)
    return model.masked_lm(
        encoder_outputs=encoded,
        attention_mask=None if mask is None else mask.repeat_interleave(count, 0),
        decoder_input_ids=fed,
        **{"use_cache": False, **inputs},
        return_dict=True,
    )
