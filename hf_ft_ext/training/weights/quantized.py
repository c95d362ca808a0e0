"""Quantized base models: detection, refusal for methods that need the weights, and preparation for training."""

import contextlib
from collections.abc import Iterator

import torch
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from hf_ft_ext.errors import InputError


def is_quantized(model: nn.Module | None) -> bool:
    """Whether transformers loaded the model, or what PEFT wraps in it, with a `quantization_config`."""
    inner = model.get_base_model() if model is not None and hasattr(model, "get_base_model") else model
    return bool(getattr(inner, "is_quantized", False))


def is_readable(tensor: torch.Tensor) -> bool:
    """Whether the entries of a tensor can be read in this process.

    They cannot for weights that `device_map` offloads, nor for a quantizer's tensor subclass (torchao), which supports
    matrix products only. A tensor sharded over several processes can be read.
    """
    if tensor.is_meta:
        return False
    return not is_traceable_wrapper_subclass(tensor) or hasattr(tensor, "full_tensor")


def refuse_quantized(model: nn.Module | None, reason: str) -> None:
    """Refuse a quantized model, for methods that read or write the weights themselves.

    Args:
        reason: subject and verb of the message: "sparse training changes" (the model's weights).

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
    """A context in which `Trainer` accepts a quantized model without adapters.

    `Trainer.__init__` refuses such a model. It cannot know that adapters are added later, or that only the head, which
    is not quantized, is trained.
    """
    if model is None or not is_quantized(model) or hasattr(model, "get_base_model"):
        yield
        return
    keep_differentiable(model)
    before = getattr(model, "_hf_peft_config_loaded", False)
    model._hf_peft_config_loaded = True  # the attribute that Trainer checks
    try:
        yield
    finally:
        model._hf_peft_config_loaded = before


def move(model: nn.Module, device: torch.device) -> nn.Module:
    """`model.to(device)`; a quantized model stays where it was loaded, because its libraries require that."""
    return model if is_quantized(model) else model.to(device)


def keep_differentiable(model: nn.Module) -> nn.Module:
    """Keep bitsandbytes from repacking 4-bit weights during evaluation on the CPU; return the model.

    On processors with AVX512-BF16 the first forward pass in evaluation mode repacks them for a kernel without
    gradients. Later training would fail or lose the gradients of all layers below.

    Raises:
        InputError: an earlier evaluation has already repacked them.
    """
    for name, module in model.named_modules():
        if not hasattr(module, "support_avx512bf16_for_cpu"):
            continue
        if getattr(getattr(module.weight, "quant_state", None), "packing_format_for_cpu", False):
            raise InputError(
                f"{name} was repacked by an evaluation on the CPU and no longer passes gradients; load the "
                "model again, and train before the first evaluation"
            )
        module.support_avx512bf16_for_cpu = False
    return model
