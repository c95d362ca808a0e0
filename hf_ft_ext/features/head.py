"""Splitting a classifier: the features that its head reads, `[rows, hidden]`, and the head run on them alone."""

import contextlib
import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn
from transformers.modeling_outputs import BaseModelOutputWithPoolingAndCrossAttentions

from hf_ft_ext.errors import InputError
from hf_ft_ext.per_example.outputs import logits_of
from hf_ft_ext.per_example.state import evaluating, own_precision
from hf_ft_ext.structure.heads import encoder_path, names_in_head

logger = logging.getLogger(__name__)

_TOLERANCE = 1e-4
Batch = Mapping[str, torch.Tensor]


class HeadReader:
    """Splits a sequence classifier into encoder and head without touching its code.

    The head is everything outside the base model, plus the base model's pooler. It is run by the model's own forward,
    in which a stand-in that returns stored features replaces the base model. `HeadReader.find` determines how features
    are read from the sequence (first token, last token, mean): it tries each way and compares the logits with those of
    the whole model. Use it to create a reader.

    Args:
        model: a transformers model with `base_model_prefix`, in evaluation mode.
        read: maps the last hidden state `[rows, length, hidden]` and the batch to features `[rows, hidden]`.
        path: name of the encoder in the model.

    Attributes:
        autocast: makes the context in which the encoder runs. The head runs outside of it, in its own number format.
        as_in_model: the head runs in the number format that it has in a pass of the whole model, so that the losses of
            both can be compared.
    """

    def __init__(self, model: nn.Module, read: "Callable[[torch.Tensor, _Context], torch.Tensor]", path: str):
        self.model, self.read = model, read
        self.autocast: Callable[[], AbstractContextManager] = contextlib.nullcontext
        self.as_in_model = False
        holder, _, self.prefix = path.rpartition(".")
        self.holder = model.get_submodule(holder)
        self.feature_model = _FeatureModel(getattr(self.holder, self.prefix))
        self._width: int | None = None

    @classmethod
    def find(
        cls, model: nn.Module, batch: Batch, autocast: Callable[[], AbstractContextManager] = contextlib.nullcontext
    ) -> "HeadReader | None":
        """The reader of `model`, or `None` if its head cannot be run on one vector per row.

        Args:
            batch: some rows of real data without labels, two or more and preferably of different lengths.
            autocast: see the attribute. The comparison of logits is made outside of it.
        """
        path = encoder_path(model)
        if path is None:
            return None
        with torch.no_grad(), evaluating(model), own_precision(model):
            try:
                expected = logits_of(model(**batch))
            except (AttributeError, TypeError, InputError):
                return None
            for read in (_first_token, _last_token, _mean_token):
                reader = cls(model, read, path)
                try:
                    features = reader.features(batch)
                    found = reader.logits(features)
                except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
                    logger.debug("%s does not fit: %s", read.__name__, error)
                    continue
                scale = _TOLERANCE * max(1.0, float(expected.abs().max()))
                if expected.dtype.itemsize < 4:
                    scale *= 100
                if found.shape == expected.shape and float((found - expected).abs().max()) <= scale:
                    reader._width = features.shape[-1]  # Reformer's is twice its hidden size
                    reader.autocast = autocast
                    return reader
        return None

    @property
    def hidden(self) -> int:
        """Width of the features."""
        return self.model.config.hidden_size if self._width is None else self._width

    def head_parameters(self) -> dict[str, nn.Parameter]:
        """The head's parameters by their names in the model."""
        return head_parameters(self.model)

    @torch.no_grad()
    def features(self, batch: Batch) -> torch.Tensor:
        """The features that the head reads of `batch`: `[rows, hidden]`, computed without dropout.

        With mixed precision they are in float32, or in the format of a head that is in 16 bits.
        """
        base = self.feature_model.base
        inputs = {key: value for key, value in batch.items() if key != "labels"}
        pooler = getattr(base, "pooler", None)
        with evaluating(self.model):
            if isinstance(pooler, nn.Module):  # its output is not used, and a search may perturb its weights
                base._modules["pooler"] = None
            try:
                with self.autocast():
                    hidden = base(**inputs).last_hidden_state
                    mixed = torch.is_autocast_enabled(hidden.device.type)
            finally:
                if isinstance(pooler, nn.Module):
                    base._modules["pooler"] = pooler
        if mixed:
            hidden = hidden.to(self._head_type())
        return self.read(hidden, _Context(batch, self.model.config))

    def _head_type(self) -> torch.dtype:
        kinds = (p.dtype for p in self.head_parameters().values() if p.is_floating_point())
        return next(kinds, torch.float32)

    def features_and_labels(self, batches: Sequence[Batch]) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Features and labels of each batch."""
        return [(self.features(batch), batch["labels"]) for batch in batches]

    def logits(self, features: torch.Tensor, rows: int | None = None) -> torch.Tensor:
        """Logits of the model for `features` (`[n, hidden]`), by its own forward: `[n, classes]`.

        Args:
            rows: rows of the result, if the head returns more rows than it reads; `None` = the same number.
        """
        n = features.shape[0] if rows is None else rows
        self.feature_model.features = features
        modules = self.holder._modules
        base, modules[self.prefix] = modules[self.prefix], self.feature_model
        try:
            ids = torch.zeros(1, 1, dtype=torch.long, device=features.device).expand(n, 1)
            with contextlib.nullcontext() if self.as_in_model else own_precision(self.model):
                return logits_of(self.model(input_ids=ids, attention_mask=ids + 1))
        finally:
            modules[self.prefix] = base


def head_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters outside the base model, and those of its pooler, by name; including frozen ones.

    A parameter that the head shares with the base model, such as tied output embeddings, belongs to the base model.
    """
    named, path = dict(model.named_parameters()), encoder_path(model)
    head = names_in_head(model, named)
    return {
        name: parameter
        for name, parameter in named.items()
        if name in head or (path is not None and name.startswith(f"{path}.pooler"))
    }


class _FeatureModel(nn.Module):
    """Replaces the base model: returns stored features as a sequence of one token, with the pooler's output if any."""

    def __init__(self, base: nn.Module):
        super().__init__()
        self.__dict__["base"] = base  # not a submodule, so that the model's parameters keep their names
        self.__dict__["features"] = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["base"], name)

    def forward(self, *args, **kwargs) -> BaseModelOutputWithPoolingAndCrossAttentions:
        hidden = self.__dict__["features"][:, None]
        pooler = getattr(self.__dict__["base"], "pooler", None)
        if pooler is None:
            pooled = None
        elif isinstance(pooler, nn.Linear):  # ALBERT's pooler is a plain linear layer with a separate activation
            pooled = self.__dict__["base"].pooler_activation(pooler(hidden[:, 0]))
        else:
            pooled = pooler(hidden)
        return BaseModelOutputWithPoolingAndCrossAttentions(last_hidden_state=hidden, pooler_output=pooled)


class _Context(dict):
    """A batch with the model's configuration, which holds the padding token."""

    def __init__(self, batch: Batch, config: Any):
        super().__init__(batch)
        self.config = config

    def mask(self, hidden: torch.Tensor) -> torch.Tensor:
        mask = self.get("attention_mask")
        return hidden.new_ones(hidden.shape[:2]) if mask is None else mask


def _first_token(hidden: torch.Tensor, batch: _Context) -> torch.Tensor:
    return hidden[:, 0]


def _last_token(hidden: torch.Tensor, batch: _Context) -> torch.Tensor:
    """The last token that is not padding, as in transformers' decoders with a classification head."""
    padding = getattr(batch.config, "pad_token_id", None)
    ids = batch.get("input_ids")
    real = batch.mask(hidden) if ids is None or padding is None else ids != padding
    last = (torch.arange(hidden.shape[1], device=hidden.device) * real).argmax(-1)
    return hidden[torch.arange(hidden.shape[0], device=hidden.device), last]


def _mean_token(hidden: torch.Tensor, batch: _Context) -> torch.Tensor:
    """The mean over the tokens that are not padding; NaN for a row without tokens, as in transformers' classifiers."""
    mask = batch.mask(hidden).to(hidden.dtype)[..., None]
    return (hidden * mask).sum(1) / mask.sum(1)
