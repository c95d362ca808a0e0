"""Attention with a prefix, through transformers' attention interface.

An attention module asks `self.config` which function it is to call. While a prefixed module runs, its `config` is a
stand-in that names ours; ours puts the prefix in front of keys and values, opens the mask for it, and calls the
function that the model uses. No other module notices, and the model's masks stay as they are.
"""

import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hf_ft_ext.errors import InputError

NAME = "layer_prefix"
SUPPORTED = EAGER, SDPA = ("eager", "sdpa")


def uses_interface(module: nn.Module) -> bool:
    """Whether `module` is an attention that calls what `ALL_ATTENTION_FUNCTIONS` holds for its config."""
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    return code is not None and "ALL_ATTENTION_FUNCTIONS" in code.co_names and hasattr(module, "config")


class _Prefixed:
    """A model's config that names our attention function and carries the prefix."""

    def __init__(self, config, keys: torch.Tensor, values: torch.Tensor):
        self._config, self.prefix_keys, self.prefix_values = config, keys, values
        self._attn_implementation = NAME

    def __getattr__(self, name: str):
        return getattr(self.__dict__["_config"], name)

    @property
    def original(self) -> str:
        """The attention that the model uses."""
        return self._config._attn_implementation


@contextmanager
def prefixed(attention: nn.Module, keys: torch.Tensor, values: torch.Tensor) -> Iterator[None]:
    """Have `attention` see `keys` and `values`, `[batch, heads, length, size]`, before its own."""
    config = attention.config
    if config._attn_implementation not in SUPPORTED:
        raise InputError(
            f"a prefix works with attn_implementation eager and sdpa, and this model uses "
            f"{config._attn_implementation!r}; load it with one of the two"
        )
    attention.config = _Prefixed(config, keys, values)
    try:
        yield
    finally:
        attention.config = config


def prefix_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **kwargs,
):
    """An attention function of transformers that attends to the prefix too.

    Args:
        query: `[batch, heads, q, size]`; `key`, `value`: `[batch, key heads, k, size]`.
        attention_mask: `[batch, 1 or heads, q, k]`, bool (sdpa) or added to scores (eager), or `None`.
    """
    config = module.config
    keys, values = config.prefix_keys.to(key.dtype), config.prefix_values.to(value.dtype)
    if keys.shape[0] != key.shape[0] or keys.shape[1] != key.shape[1] or keys.shape[3] != key.shape[3]:
        raise InputError(
            f"the prefix has the shape {tuple(keys.shape)} and the attention's keys {tuple(key.shape)} "
            "([batch, heads, length, size]); this model's attention is not what its config says"
        )
    length, (q, k) = keys.shape[2], (query.shape[2], key.shape[2])
    if attention_mask is None:
        causal = kwargs.get("is_causal")
        causal = getattr(module, "is_causal", True) if causal is None else causal
        # With eager attention no mask means none; sdpa reads it as a causal one, counted from the first key on.
        if config.original == SDPA and causal and q > 1:
            attention_mask = torch.ones(q, k, dtype=torch.bool, device=key.device).tril(k - q)[None, None]
    if attention_mask is not None:
        seen = attention_mask.dtype == torch.bool
        attention_mask = nn.functional.pad(attention_mask[..., -k:], (length, 0), value=True if seen else 0.0)
    if kwargs.get("position_bias") is not None:
        kwargs["position_bias"] = nn.functional.pad(kwargs["position_bias"], (length, 0))
    key, value = torch.cat([keys, key], 2), torch.cat([values, value], 2)
    return _function(module, config.original)(module, query, key, value, attention_mask, **kwargs)


def _function(module: nn.Module, name: str) -> Callable:
    if name == EAGER:  # each model file has its own
        return sys.modules[type(module).__module__].eager_attention_forward
    return ALL_ATTENTION_FUNCTIONS[name]


AttentionInterface.register(NAME, prefix_attention)
