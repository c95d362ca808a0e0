"""An attention module with prefixes in front of its keys and values."""

from dataclasses import dataclass

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from hf_ft_ext.adapters.layer_prefix.attention import prefixed
from hf_ft_ext.adapters.layer_prefix.config import LayerPrefixConfig
from hf_ft_ext.adapters.tuner import FollowsBaseLayer, like_base_layer
from hf_ft_ext.errors import InputError

SHARED = ("layer_prefix_embedding", "layer_prefix_hidden")  # modules that all layers of an adapter share


class Table(nn.Module):
    """Trained rows `[length, width]`, returned for a batch.

    With `per_example`, the output has a copy of the rows for each example of the batch, so that the gradient with
    respect to the output is the gradient per example.
    """

    per_example = False

    def __init__(self, length: int, width: int, std: float):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(length, width).normal_(std=std))

    def forward(self, batch: int) -> torch.Tensor:
        """`[batch, length, width]` with `per_example`, else `[1, length, width]`."""
        return self.weight[None].expand(batch, -1, -1) if self.per_example else self.weight[None]


@dataclass(frozen=True)
class PrefixProjection:
    """Embedding and first layer of the network that computes keys and values (Li and Liang 2021, section 4.3).

    All layers of an adapter share the same two modules.
    """

    embedding: Table  # [length, hidden size]
    hidden: nn.Linear  # hidden size -> projection size

    @classmethod
    def draw(cls, config: LayerPrefixConfig, width: int) -> "PrefixProjection":
        """Create one with random weights for an attention of `width` features."""
        return cls(Table(config.prefix_length, width, 1.0), nn.Linear(width, config.projection_size))


class PrefixLayer(FollowsBaseLayer, BaseTunerLayer):
    """A self-attention of the model with prefixes; several active ones are concatenated.

    Attributes:
        heads, size: number of key heads of the attention, and features of each head.
    """

    adapter_layer_names = ("layer_prefix_table", "layer_prefix_out", *SHARED)
    other_param_names = ("dropout",)

    def __init__(
        self, base_layer: nn.Module, adapter_name: str, config: LayerPrefixConfig, projection: PrefixProjection | None
    ):
        super().__init__()
        self.base_layer = base_layer
        self.heads, self.size = key_heads(self.get_base_layer())
        self.in_features = self.out_features = hidden_size(self.get_base_layer())
        self.layer_prefix_table, self.layer_prefix_out = nn.ModuleDict(), nn.ModuleDict()
        self.layer_prefix_embedding, self.layer_prefix_hidden = nn.ModuleDict(), nn.ModuleDict()
        self.dropout: dict[str, float] = {}
        self.merged_adapters = []
        self._disable_adapters = False
        self.update_layer(adapter_name, config, projection)
        self._active_adapter = adapter_name

    def update_layer(self, adapter_name: str, config: LayerPrefixConfig, projection: PrefixProjection | None) -> None:
        """Add a prefix with new random weights.

        Args:
            projection: the network that the layers of this adapter share; `None` = train keys and values directly.
        """
        width = 2 * self.heads * self.size
        if projection is None:
            self.layer_prefix_table[adapter_name] = Table(config.prefix_length, width, config.init_std)
        else:
            self.layer_prefix_out[adapter_name] = nn.Linear(config.projection_size, width)
            self.layer_prefix_embedding[adapter_name] = projection.embedding
            self.layer_prefix_hidden[adapter_name] = projection.hidden
        self.dropout[adapter_name] = config.dropout
        like_base_layer(self, adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def names(self) -> list[str]:
        """The active adapters of this layer."""
        known = self.layer_prefix_table.keys() | self.layer_prefix_out.keys()
        return [] if self.disable_adapters else [name for name in self.active_adapters if name in known]

    def rows(self, name: str, batch: int = 1) -> torch.Tensor:
        """Keys and values, concatenated: `[batch or 1, length, 2 * heads * size]`.

        With a projection `out(tanh(hidden(embedding)))`.
        """
        if name in self.layer_prefix_table:
            return self.layer_prefix_table[name](batch)
        out = self.layer_prefix_out[name]
        projected = torch.tanh(self.layer_prefix_hidden[name](self.layer_prefix_embedding[name](batch)))
        if not out.weight.is_meta:  # accelerate loads an offloaded weight when `out` is called
            projected = projected.to(out.weight.device)  # layers may be on several devices
        return out(projected)

    def projection(self, name: str) -> PrefixProjection | None:
        """The modules that adapter `name` shares with other layers; `None` without projection."""
        if name not in self.layer_prefix_hidden:
            return None
        return PrefixProjection(self.layer_prefix_embedding[name], self.layer_prefix_hidden[name])

    def fold(self, name: str) -> None:
        """Replace the projection of adapter `name` by the keys and values that it computes now."""
        with torch.no_grad():
            rows = self.rows(name)[0]
        length, width = rows.shape
        table = Table(length, width, std=0.0).to(rows.device, rows.dtype)
        if rows.device.type != "meta":
            table.weight.data.copy_(rows)
        table.requires_grad_(any(parameter.requires_grad for parameter in self.layer_prefix_out[name].parameters()))
        self.layer_prefix_table[name] = table
        for part in ("layer_prefix_out", *SHARED):
            del getattr(self, part)[name]

    def keys_and_values(self, name: str, batch: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of adapter `name`: two tensors `[batch, heads, length, size]`."""
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


def hidden_size(attention: nn.Module) -> int:
    """Number of input and output features of an attention module."""
    heads, size = key_heads(attention)
    return getattr(attention.config, "hidden_size", None) or heads * size


def key_heads(attention: nn.Module) -> tuple[int, int]:
    """Number of key heads of an attention module, and features of each head.

    Raises:
        InputError: the model has another number of heads in each stage (Swin).
    """
    config = attention.config
    heads = config.num_attention_heads
    if not isinstance(heads, int):
        raise InputError(
            f"a prefix needs one number of attention heads, and this model's differs by stage ({heads}); choose "
            "another adapter"
        )
    size = getattr(attention, "head_dim", None) or getattr(attention, "attention_head_size", None)
    size = size or getattr(config, "head_dim", None) or config.hidden_size // heads
    return getattr(config, "num_key_value_heads", None) or heads, size
