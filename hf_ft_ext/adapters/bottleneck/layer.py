"""A module with bottleneck adapters around it."""

import inspect

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers.activations import ACT2FN
from transformers.pytorch_utils import Conv1D

from hf_ft_ext.adapters.bottleneck.config import PARALLEL, BottleneckConfig
from hf_ft_ext.adapters.tuner import FollowsBaseLayer, like_base_layer
from hf_ft_ext.errors import InputError

BEFORE_NORM, ON_OUTPUT, PARALLEL_TO_MODULE, PARALLEL_TO_RESIDUAL = (
    "before norm",
    "on output",
    "parallel to module",
    "parallel to residual",
)


class BottleneckLayer(FollowsBaseLayer, BaseTunerLayer):
    """A module of the model with adapters `scaling * up(activation(down(x)))`, parallel to it or after it.

    The mode of an adapter is how it is combined with the module's input `x` and output `y`:
        before norm: the module normalises a residual sum `s`; the result is `LN(s + adapter(LN(s)))`.
        on output: `y + adapter(y)`.
        parallel to module: `y + adapter(x)`.
        parallel to residual: the module adds its second input, `input_tensor`, to its result (BERT's output block). It
            is called with `input_tensor + adapter(input_tensor)` instead.
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
        """Add an adapter with new random weights."""
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
        """Output of the adapter `name` for the input `x`, in the dtype of `x`."""
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
        before = [n for n in names if self.modes[n] == PARALLEL_TO_RESIDUAL]
        if before:
            (first, *rest), named = (args or (None,)), "input_tensor" in kwargs
            residual = kwargs["input_tensor"] if named else first
            changed = residual + sum(self.adapter(name, residual) for name in before)
            if named:
                kwargs["input_tensor"] = changed
            else:
                args = (changed, *rest)
        output = self.base_layer(x, *args, **kwargs)
        y = output[0] if isinstance(output, tuple) else output
        inside = [n for n in names if self.modes[n] == BEFORE_NORM]
        if inside:  # LN(s + adapter(LN(s)))
            output = y = self.base_layer(x + sum(self.adapter(name, y) for name in inside), *args, **kwargs)
        others = [n for n in names if self.modes[n] in (ON_OUTPUT, PARALLEL_TO_MODULE)]
        added = [self.adapter(n, y if self.modes[n] == ON_OUTPUT else x) for n in others]
        if added:
            y = y + sum(added)
        return (y, *output[1:]) if isinstance(output, tuple) else y


class Scale(nn.Module):
    """Multiplies by one trained scalar."""

    def __init__(self, start: float):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([float(start)]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.weight


def mode_of(module: nn.Module, config: BottleneckConfig) -> str:
    """The mode of an adapter of this configuration at `module`; see `BottleneckLayer`."""
    if config.placement == PARALLEL:
        return (
            PARALLEL_TO_RESIDUAL
            if "input_tensor" in inspect.signature(module.forward).parameters
            else PARALLEL_TO_MODULE
        )
    own = list(module.parameters(recurse=False))
    if own and all(p.dim() == 1 for p in own) and not any(True for _ in module.children()):
        return BEFORE_NORM  # only vectors as parameters and no submodules: a normalization
    if isinstance(module, nn.LayerNorm) or "norm" in type(module).__name__.lower():  # without parameters
        return BEFORE_NORM
    return ON_OUTPUT


def width_of(module: nn.Module, config: BottleneckConfig, hidden: int | None) -> int:
    """Number of features of an adapter at `module`; `hidden` is the model's hidden size.

    The hidden size counts only for modules that do not show their own: in models with stages it is that of the last.

    Raises:
        InputError: it cannot be found.
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
    if (own := _block_width(module)) is not None:
        return own
    if hidden is None:
        raise InputError(
            f"a bottleneck adapter at a {type(module).__name__} needs the model's hidden size, and the model's config "
            "has no hidden_size; target a linear layer or a LayerNorm"
        )
    return hidden


def _block_width(module: nn.Module) -> int | None:
    """Features that a block of linear layers reads and returns, such as a feed-forward; `None` for other modules."""
    shapes = [shape for inner in module.modules() if (shape := _in_and_out(inner)) is not None]
    widths = {n_in for n_in, inside in shapes if (inside, n_in) in shapes and inside >= n_in}
    return widths.pop() if len(widths) == 1 else None


def _in_and_out(module: nn.Module) -> tuple[int, int] | None:
    if isinstance(module, Conv1D):
        return module.nx, module.nf
    n_in, n_out = getattr(module, "in_features", None), getattr(module, "out_features", None)
    return (n_in, n_out) if isinstance(n_in, int) and isinstance(n_out, int) else None


class _Function(nn.Module):
    """A function as a module."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(x)


def _as_module(activation) -> nn.Module:
    return activation if isinstance(activation, nn.Module) else _Function(activation)
