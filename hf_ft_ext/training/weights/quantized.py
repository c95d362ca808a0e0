"""Quantized base models: who can train on one, and who needs the weights themselves."""

import contextlib
from collections.abc import Iterator

import torch
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from hf_ft_ext.errors import InputError


def is_quantized(model: nn.Module | None) -> bool:
    """Whether transformers loaded the model, or what PEFT wraps in it, with a `quantization_config`."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    return bool(getattr(inner, "is_quantized", False))


def holds_numbers(tensor: torch.Tensor) -> bool:
    """Whether the entries of a tensor can be looked at here.

    Not those that `device_map` fetches for each forward pass, nor those of a quantizer's own kind of tensor (torchao),
    which does matrix products alone. A tensor that lies on several processes can.
    """
    if tensor.is_meta:
        return False
    return not is_traceable_wrapper_subclass(tensor) or hasattr(tensor, "full_tensor")


def refuse_quantized(model: nn.Module | None, reason: str) -> None:
    """For methods that read or write the weights themselves.

    Args:
        reason: what needs them, as the start of a sentence: "sparse training changes".

    Raises:
        InputError: the model is quantized.
    """
    if is_quantized(model):
        raise InputError(
            f"{reason} the model's weights, and they are quantized; load it without quantization, or train adapters "
            "on it (LoraTrainer, FisherTrainer, FullTrainer with peft)"
        )


@contextlib.contextmanager
def quantized_base(model: nn.Module | None) -> Iterator[None]:
    """Within, `Trainer` takes a quantized model without adapters.

    `Trainer.__init__` refuses such a model, as it cannot know that adapters come later or that only the head, which
    is not quantized, changes.
    """
    if model is None or not is_quantized(model) or hasattr(model, "get_base_model"):
        yield
        return
    keep_differentiable(model)
    before = getattr(model, "_hf_peft_config_loaded", False)
    model._hf_peft_config_loaded = True  # what Trainer asks
    try:
        yield
    finally:
        model._hf_peft_config_loaded = before


def move(model: nn.Module, device: torch.device) -> nn.Module:
    """`model.to(device)`; a quantized model stays where it was loaded, as its libraries want it."""
    return model if is_quantized(model) else model.to(device)


def keep_differentiable(model: nn.Module) -> nn.Module:
    """Keep bitsandbytes from repacking 4-bit weights in an evaluation on the CPU; return the model.

    On processors with AVX512-BF16 the first forward pass in evaluation mode packs them for a kernel without
    gradients, and training behind it would fail or lose the gradients of all layers below.

    Raises:
        InputError: an earlier evaluation has packed them already.
    """
    for name, module in model.named_modules():
        if not hasattr(module, "support_avx512bf16_for_cpu"):
            continue
        if getattr(getattr(module.weight, "quant_state", None), "packing_format_for_cpu", False):
            raise InputError(
                f"{name} was packed by an evaluation on the CPU, and gradients do not pass it any more; load the "
                "model anew, and train before the first evaluation"
            )
        module.support_avx512bf16_for_cpu = False
    return model
