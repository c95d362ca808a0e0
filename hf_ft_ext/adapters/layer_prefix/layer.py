"""An attention module with prefixes in front of its keys and values."""

from collections.abc import Callable

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from hf_ft_ext.adapters.layer_prefix.attention import prefixed
from hf_ft_ext.adapters.layer_prefix.config import LayerPrefixConfig
from hf_ft_ext.adapters.tuner import like_base_layer


class Table(nn.Module):
    """Trained rows `[length, width]`, given out for a batch.

    With `per_example`, each example of the batch gets rows of its own in the graph, so that the gradient of what
    comes out is the gradient per example.
    """

    per_example = False

    def __init__(self, length: int, width: int, std: float):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(length, width).normal_(std=std))

    def forward(self, batch: int) -> torch.Tensor:
        """`[batch, length, width]`, or `[1, length, width]` where examples need not be told apart."""
        return self.weight[None].expand(batch, -1, -1) if self.per_example else self.weight[None]


class PrefixLayer(nn.Module, BaseTunerLayer):
    """A self-attention of the model, with prefixes; several active ones stand one after the other.

    Attributes:
        heads, size: key heads of the attention, and features of each.
    """

    adapter_layer_names = ("layer_prefix_table", "layer_prefix_out")

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: LayerPrefixConfig, embed: Callable | None):
        super().__init__()
        self.base_layer = base_layer
        self.heads, self.size = key_heads(self.get_base_layer())
        self.layer_prefix_table, self.layer_prefix_out = nn.ModuleDict(), nn.ModuleDict()
        self.embed: dict[str, Callable] = {}  # the tuner's network, shared by all layers
        self.dropout: dict[str, float] = {}
        self.merged_adapters = []
        self._disable_adapters = False
        self.update_layer(adapter_name, config, embed)
        self._active_adapter = adapter_name

    def update_layer(self, adapter_name: str, config: LayerPrefixConfig, embed: Callable | None) -> None:
        """Add a prefix, newly drawn.

        Args:
            embed: with a projection, `embed(batch)` -> `[batch or 1, length, projection_size]`.
        """
        width = 2 * self.heads * self.size
        if embed is None:
            self.layer_prefix_table[adapter_name] = Table(config.prefix_length, width, config.init_std)
        else:
            self.layer_prefix_out[adapter_name] = nn.Linear(config.projection_size, width)
            self.embed[adapter_name] = embed
        self.dropout[adapter_name] = config.dropout
        like_base_layer(self, adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def names(self) -> list[str]:
        """The adapters of this layer that are on."""
        known = self.layer_prefix_table.keys() | self.layer_prefix_out.keys()
        return [] if self.disable_adapters else [name for name in self.active_adapters if name in known]

    def rows(self, name: str, batch: int = 1) -> torch.Tensor:
        """Keys, then values: `[batch or 1, length, 2 * heads * size]`."""
        if name in self.layer_prefix_table:
            return self.layer_prefix_table[name](batch)
        return self.layer_prefix_out[name](self.embed[name](batch))

    def keys_and_values(self, name: str, batch: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Two tensors `[batch, heads, length, size]`."""
        rows = self.rows(name, batch)
        rows = nn.functional.dropout(rows.expand(batch, -1, -1), self.dropout[name], self.training)
        keys, values = rows.view(batch, -1, 2, self.heads, self.size).permute(2, 0, 3, 1, 4)
        return keys, values

    def forward(self, *args, **kwargs):
        names = self.names()
        if not names:
            return self.base_layer(*args, **kwargs)
        x = args[0] if args else kwargs["hidden_states"]
        parts = [self.keys_and_values(name, x.shape[0]) for name in names]
        keys, values = (torch.cat(part, 2) if len(part) > 1 else part[0] for part in zip(*parts, strict=True))
        with prefixed(self.get_base_layer(), keys, values):
            return self.base_layer(*args, **kwargs)

    def __getattr__(self, name: str):
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_layer":
                raise
            return getattr(self.base_layer, name)  # what the model asks its attention for


def key_heads(attention: nn.Module) -> tuple[int, int]:
    """Key heads of an attention module, and the features of each."""
    config = attention.config
    heads = config.num_attention_heads
    size = getattr(attention, "head_dim", None) or getattr(attention, "attention_head_size", None)
    size = size or getattr(config, "head_dim", None) or config.hidden_size // heads
    return getattr(config, "num_key_value_heads", None) or heads, size
