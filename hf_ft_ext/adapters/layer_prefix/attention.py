"""Attention with a prefix, through transformers' attention interface.

An attention module looks up its attention function by `self.config`. While a prefixed module runs, its `config` is
replaced by a proxy that selects our function. That function puts the prefix in front of keys and values, extends the
mask, and calls the function of the model. Other modules and the model's masks are not changed.
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
    """Whether `module` is an attention that gets its function from `ALL_ATTENTION_FUNCTIONS`."""
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    return code is not None and "ALL_ATTENTION_FUNCTIONS" in code.co_names and hasattr(module, "config")


@contextmanager
def prefixed(attention: nn.Module, keys: torch.Tensor, values: torch.Tensor) -> Iterator[None]:
    """Put `keys` and `values`, `[batch, heads, length, size]`, in front of those of `attention`."""
    config = attention.config
    if config._attn_implementation not in SUPPORTED:
        raise InputError(
            f"a prefix works with attn_implementation eager and sdpa, and this model uses "
            f"{config._attn_implementation!r}; load the model with one of the two"
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
    """Attention function with the interface of transformers that also attends to the prefix.

    Args:
        query: `[batch, heads, q, size]`; `key`, `value`: `[batch, key heads, k, size]`.
        attention_mask: `[batch, 1 or heads, q, k]`, bool (sdpa) or added to scores (eager), or `None`.
    """
    config = module.config
    keys, values = config.prefix_keys.to(key.dtype), config.prefix_values.to(value.dtype)
    if keys.shape[0] != key.shape[0] or keys.shape[1] != key.shape[1] or keys.shape[3] != key.shape[3]:
        raise InputError(
            f"the prefix has the shape {tuple(keys.shape)} and the attention's keys {tuple(key.shape)} "
            "([batch, heads, length, size]); the model's attention does not match its config, so choose another "
            "adapter"
        )
    length, (q, k) = keys.shape[2], (query.shape[2], key.shape[2])
    if attention_mask is None:
        causal = kwargs.get("is_causal")
        causal = getattr(module, "is_causal", True) if causal is None else causal
        # Without a mask, eager attention is not causal. sdpa is (`is_causal`), but would count from the first key of
        # the prefix, so pass the causal mask explicitly.
        if config.original == SDPA and causal and q > 1:
            attention_mask = torch.ones(q, k, dtype=torch.bool, device=key.device).tril(k - q)[None, None]
    if attention_mask is not None:
        # every query attends to the whole prefix: True in a boolean mask, 0 in a mask added to scores
        visible = True if attention_mask.dtype == torch.bool else 0.0
        attention_mask = nn.functional.pad(attention_mask[..., -k:], (length, 0), value=visible)
    if kwargs.get("position_bias") is not None:
        kwargs["position_bias"] = nn.functional.pad(kwargs["position_bias"], (length, 0))
    key, value = torch.cat([keys, key], 2), torch.cat([values, value], 2)
    return _function(module, config.original)(module, query, key, value, attention_mask, **kwargs)


class _Prefixed:
    """Proxy of a model's config that selects our attention function and holds the prefix."""

    def __init__(self, config, keys: torch.Tensor, values: torch.Tensor):
        self._config, self.prefix_keys, self.prefix_values = config, keys, values
        self._attn_implementation = NAME

    def __getattr__(self, name: str):
        return getattr(self.__dict__["_config"], name)

    @property
    def original(self) -> str:
        """The attention that the model uses."""
        return self._config._attn_implementation


def _function(module: nn.Module, name: str) -> Callable:
    if name == EAGER:  # each model file defines its own
        return sys.modules[type(module).__module__].eager_attention_forward
    return ALL_ATTENTION_FUNCTIONS[name]


AttentionInterface.register(NAME, prefix_attention)
