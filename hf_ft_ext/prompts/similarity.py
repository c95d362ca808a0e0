"""Similarity of texts by a sentence encoder, for choosing demonstrations."""

import functools

import numpy as np
import torch
from transformers import AutoModel, AutoTokenizer

from hf_ft_ext.demo.encoder import demo_encoder
from hf_ft_ext.errors import InputError, first_line

_BATCH = 64
_LENGTH = 512  # tokens of a text, for models without a number of positions


def similarities(model: str | None, texts: list[str], others: list[str]) -> np.ndarray:
    """Return cosine similarities of mean-pooled last hidden states: `[texts, others]`.

    Args:
        model: Hub id or folder of an encoder such as a sentence-transformers model; `None` = the demo encoder.

    Raises:
        InputError: the model cannot be loaded.
    """
    return embeddings(model, tuple(texts)) @ _cached(model, tuple(others)).T


@torch.no_grad()
def embeddings(model: str | None, texts: tuple[str, ...]) -> np.ndarray:
    """Return normalised mean-pooled last hidden states: `[texts, hidden]`, float32."""
    try:
        tokenizer, encoder = _encoder(model)
        return _pooled(tokenizer, encoder, texts)
    except (AttributeError, IndexError, OverflowError, RuntimeError, TypeError) as error:
        raise _unusable(model, error) from error
    except ValueError as error:
        raise error if isinstance(error, InputError) else _unusable(model, error) from error


def _unusable(model: str | None, error: Exception) -> InputError:
    return InputError(
        f"demo_filter_model={model!r} gives no hidden states of texts ({first_line(error)}); pass an encoder, such as "
        "a sentence-transformers model"
    )


def _pooled(tokenizer, encoder, texts: tuple[str, ...]) -> np.ndarray:
    positions = getattr(encoder.config, "max_position_embeddings", None) or 0
    limit = min(tokenizer.model_max_length, positions if positions > 0 else _LENGTH)
    parts = []
    for start in range(0, len(texts), _BATCH):
        batch = tokenizer(
            list(texts[start : start + _BATCH]), padding=True, truncation=True, max_length=limit, return_tensors="pt"
        )
        hidden = encoder(**batch).last_hidden_state
        mask = batch["attention_mask"][..., None].to(hidden.dtype)
        parts.append(torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1))
    return torch.cat(parts).numpy()


@functools.lru_cache(maxsize=2)
def _cached(model: str | None, texts: tuple[str, ...]) -> np.ndarray:
    return embeddings(model, texts)


@functools.lru_cache(maxsize=1)
def _encoder(model: str | None):
    name = demo_encoder() if model is None else model
    try:
        return AutoTokenizer.from_pretrained(name), AutoModel.from_pretrained(name, dtype=torch.float32).eval()
    except (OSError, ValueError, KeyError) as error:
        reason = first_line(error)
        raise InputError(f"demo_filter_model={name!r} cannot be loaded ({reason}); pass a folder or Hub id") from error
