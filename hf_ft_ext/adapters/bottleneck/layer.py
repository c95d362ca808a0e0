"""A module with bottleneck adapters around it."""

import inspect

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers.activations import ACT2FN
from transformers.pytorch_utils import Conv1D

from hf_ft_ext.adapters.bottleneck.config import PARALLEL, BottleneckConfig
from hf_ft_ext.adapters.tuner import OwnParts, like_base_layer
from hf_ft_ext.errors import InputError

INSIDE_NORM, ON_OUTPUT, BESIDE, BESIDE_RESIDUAL = ("inside norm", "on output", "beside", "beside residual")


class BottleneckLayer(OwnParts, nn.Module, BaseTunerLayer):
    """A module of the model and, beside or after it, adapters `scaling * up(activation(down(x)))`.

    `mode` says how they meet:
        inside norm: the module normalises a residual sum `s`; the layer gives `LN(s + adapter(LN(s)))`.
        on output: `y + adapter(y)` of the module's output `y`.
        beside: `y + adapter(x)` of its input `x`.
        beside residual: the module adds an input of its own, `input_tensor`, at its end (BERT's output block): it gets
            `input_tensor + adapter(input_tensor)`.
    """

    adapter_layer_names = (
        "bottleneck_down",
        "bottleneck_up",
        "bottleneck_norm_before",
        "bottleneck_norm_after",
        "bottleneck_scale",
        "bottleneck_activation",
    )
    other_param_names = ("modes", "settings")

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: BottleneckConfig, hidden: int):
        super().__init__()
        self.base_layer = base_layer
        self.hidden = hidden
        self.in_features = getattr(base_layer, "in_features", hidden)
        self.out_features = getattr(base_layer, "out_features", hidden)
        self.modes: dict[str, str] = {}
        self.settings: dict[str, tuple[float, float]] = {}  # factor, dropout
        for name in self.adapter_layer_names:
            setattr(self, name, nn.ModuleDict())
        self.merged_adapters = []
        self._disable_adapters = False
        self.update_layer(adapter_name, config)
        self._active_adapter = adapter_name

    def update_layer(self, adapter_name: str, config: BottleneckConfig) -> None:
        """Add an adapter, newly drawn."""
        width = config.width(self.hidden)
        down, up = nn.Linear(self.hidden, width), nn.Linear(width, self.hidden)
        nn.init.normal_(down.weight, std=config.init_std)
        nn.init.normal_(up.weight, std=config.init_std)
        if config.init_weights == "zero":
            nn.init.zeros_(up.weight)
        nn.init.zeros_(down.bias)
        nn.init.zeros_(up.bias)
        self.bottleneck_down[adapter_name], self.bottleneck_up[adapter_name] = down, up
        if config.layer_norm in ("before", "both"):
            self.bottleneck_norm_before[adapter_name] = nn.LayerNorm(self.hidden)
        if config.layer_norm in ("after", "both"):
            self.bottleneck_norm_after[adapter_name] = nn.LayerNorm(self.hidden)
        if config.learned_scaling:
            self.bottleneck_scale[adapter_name] = Scale(config.scaling)
        self.modes[adapter_name] = mode_of(self.get_base_layer(), config)
        scaling = 1.0 if config.learned_scaling else config.scaling
        self.settings[adapter_name] = (scaling, config.dropout)
        self.bottleneck_activation[adapter_name] = _as_module(ACT2FN[config.activation])
        like_base_layer(self, adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def adapter(self, name: str, x: torch.Tensor) -> torch.Tensor:
        """What the adapter `name` adds where it reads `x`, in the dtype of `x`."""
        scaling, dropout = self.settings[name]
        dtype = x.dtype
        x = x.to(self.bottleneck_down[name].weight.dtype)
        if name in self.bottleneck_norm_before:
            x = self.bottleneck_norm_before[name](x)
        x = nn.functional.dropout(x, dropout, self.training) if dropout else x
        x = self.bottleneck_up[name](self.bottleneck_activation[name](self.bottleneck_down[name](x)))
        if name in self.bottleneck_norm_after:
            x = self.bottleneck_norm_after[name](x)
        if name in self.bottleneck_scale:
            x = self.bottleneck_scale[name](x)
        return (x if scaling == 1 else x * scaling).to(dtype)

    def forward(self, x: torch.Tensor, *args, **kwargs):
        names = [] if self.disable_adapters else [n for n in self.active_adapters if n in self.bottleneck_down]
        before = [n for n in names if self.modes[n] == BESIDE_RESIDUAL]
        residual = x
        if before:
            (first, *rest), named = (args or (None,)), "input_tensor" in kwargs
            residual = kwargs["input_tensor"] if named else first
            moved = residual + sum(self.adapter(name, residual) for name in before)
            if named:
                kwargs["input_tensor"] = moved
            else:
                args = (moved, *rest)
        output = self.base_layer(x, *args, **kwargs)
        y = output[0] if isinstance(output, tuple) else output
        inside = [n for n in names if self.modes[n] == INSIDE_NORM]
        if inside:
            return self.base_layer(x + sum(self.adapter(name, y) for name in inside), *args, **kwargs)
        added = [self.adapter(n, y if self.modes[n] == ON_OUTPUT else x) for n in names if n not in before]
        if added:
            y = y + sum(added)
        return (y, *output[1:]) if isinstance(output, tuple) else y


class _Function(nn.Module):
    """A function as a module."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(x)


def _as_module(activation) -> nn.Module:
    return activation if isinstance(activation, nn.Module) else _Function(activation)


class Scale(nn.Module):
    """Multiplies by one trained number."""

    def __init__(self, start: float):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([float(start)]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.weight


def mode_of(module: nn.Module, config: BottleneckConfig) -> str:
    """How an adapter of this configuration meets `module`."""
    if config.placement == PARALLEL:
        return BESIDE_RESIDUAL if "input_tensor" in inspect.signature(module.forward).parameters else BESIDE
    own = list(module.parameters(recurse=False))
    if own and all(p.dim() == 1 for p in own) and not any(True for _ in module.children()):
        return INSIDE_NORM  # scales features and does nothing else: a normalization
    if isinstance(module, nn.LayerNorm) or "norm" in type(module).__name__.lower():  # without parameters
        return INSIDE_NORM
    return ON_OUTPUT


def width_of(module: nn.Module, config: BottleneckConfig, hidden: int | None) -> int:
    """Features that an adapter at `module` reads and changes; `hidden` is the model's hidden size.

    Raises:
        InputError: they are not known.
    """
    if config.placement != PARALLEL:
        if isinstance(module, nn.Linear):
            return module.out_features
        if isinstance(module, Conv1D):
            return module.nf
        weight = getattr(module, "weight", None)
        if weight is not None and weight.dim() == 1:
            return weight.numel()
        if isinstance(getattr(module, "out_features", None), int):  # quantized linear layers
            return module.out_features
    if hidden is None:
        raise InputError(
            f"a bottleneck at a {type(module).__name__} needs the model's hidden size, and its config has no "
            "hidden_size; target a linear layer or a LayerNorm"
        )
    return hidden
