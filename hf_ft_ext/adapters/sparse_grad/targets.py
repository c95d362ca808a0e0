"""The linear layers that SparseGrad trains by default: those of the feed-forwards, found by structure."""

import logging
from collections.abc import Callable

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import resolve_quantization_backend
from peft.utils.quantization_utils import QuantizationBackend
from torch import nn
from transformers.pytorch_utils import Conv1D

from hf_ft_ext.adapters.layers import fold_layer_numbers
from hf_ft_ext.errors import InputError
from hf_ft_ext.structure.find import find_structure
from hf_ft_ext.structure.parts import Structure
from hf_ft_ext.structure.targets import is_plain_linear

logger = logging.getLogger(__name__)

Fits = Callable[[nn.Module], bool]


def can_be_adapted(module: nn.Module) -> bool:
    """Whether a module supports a SparseGrad adapter: a linear layer, plain, quantized, or with adapters."""
    base = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
    if is_plain_linear(base):
        return True
    if isinstance(base, nn.Linear) and not base.weight.is_floating_point():  # a quantizer that peft does not support
        return True
    backend = quantization_of(base)
    return backend is not None and backend.layer_type == "linear"


def quantization_of(base: nn.Module) -> QuantizationBackend | None:
    """peft's backend for a quantized layer; `None` for a layer that is not quantized."""
    # peft needs this argument for merging into torchao weights only, and quantized weights are not merged here.
    return resolve_quantization_backend(base, get_apply_tensor_subclass=lambda: None)


def linear_kinds(model: nn.Module) -> list[str]:
    """Names of a model's linear layers, with `*` for layer numbers."""
    found = {fold_layer_numbers(name) for name, m in model.named_modules() if isinstance(m, (nn.Linear, Conv1D))}
    return sorted(found)


def feed_forward_linears(model: nn.Module, fits: Fits, option: str, rest: str) -> list[str]:
    """Return the names of the linear layers of all feed-forwards.

    If no feed-forward has any (such as experts stored as three-dimensional tensors), return those of the attentions,
    with a warning.

    Args:
        fits: whether the method supports a module.
        option: the argument that selects layers explicitly, for messages.
        rest: what happens to parts of the feed-forwards that are not supported, for messages: "stay frozen".

    Raises:
        InputError: there are none.
    """
    structure = find_structure(model)
    wanted = [name for block in structure.feed_forwards for name in block.projections]
    feed_forward = _fitting(wanted, model, fits)
    left_out = _described([name for name in wanted if name not in feed_forward], structure, model)
    if feed_forward:
        if left_out:
            logger.warning(
                "SparseGrad trains linear layers. These parts of the feed-forwards are not linear layers and %s: %s.",
                rest,
                left_out,
            )
        return feed_forward
    attention = [name for block in structure.attentions for name in block.projections]
    instead = _fitting(attention, model, fits)
    if not instead:
        reason = "no feed-forward was found in it"
        if left_out:
            reason = f"its feed-forwards ({left_out}) are not linear layers"
        shown = ", ".join(linear_kinds(model)) or "none"
        raise InputError(
            f"{structure.model} has no layers that SparseGrad trains by default: {reason}, and its attentions have no "
            f"linear layers either; select layers with {option}, a regular expression that matches some of: {shown}"
        )
    found = f"The feed-forwards of {structure.model} are {left_out}"
    if not left_out:
        found = f"No feed-forward was found in {structure.model}"
    logger.warning(
        "%s, and SparseGrad trains linear layers: it trains %s of the attentions instead. Select others with %s.",
        found,
        ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in instead)),
        option,
    )
    return instead


def _fitting(names: list[str], model: nn.Module, fits: Fits) -> list[str]:
    modules = dict(model.named_modules())
    return [name for name in dict.fromkeys(names) if name in modules and fits(modules[name])]


def _described(names: list[str], structure: Structure, model: nn.Module) -> str:
    """Names and kinds of these projections, for messages: `mlp.experts.down_proj (tensor 8x64x32)`."""
    found = {}
    for name in names:
        kind = structure.kinds.get(name, "tensor")
        if kind == "tensor":
            kind = f"tensor {'x'.join(map(str, model.get_parameter(name).shape))}"
        found[f"{fold_layer_numbers(name)} ({kind})"] = None
    return ", ".join(found)
