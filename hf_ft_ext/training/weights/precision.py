"""Number formats: mixed precision outside a training loop, weights that train in float32, updates lost to rounding."""

import contextlib
import functools
import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

import torch
from accelerate import Accelerator
from peft import PeftModel
from peft.utils import ModulesToSaveWrapper
from torch import nn
from transformers import Trainer, TrainingArguments

from hf_ft_ext.errors import InputError
from hf_ft_ext.features import encoder_path
from hf_ft_ext.training.weights.quantized import keep_differentiable

logger = logging.getLogger(__name__)

HALF = (torch.float16, torch.bfloat16)
_MIXED = {"bf16": torch.bfloat16, "fp16": torch.float16}


def autocast_of(args: TrainingArguments) -> Callable[[], AbstractContextManager]:
    """Return a function that makes contexts in which forward passes compute in the type of `bf16` or `fp16`, if set.

    accelerate puts autocast around the forward of a model that `Trainer.train` or `Trainer.evaluate` prepares, and
    only there: a pre-pass, and a pass through a part of the model, need a context of their own. Autocast keeps 16-bit
    copies of weights until it is left, so leave it before weights change.
    """
    dtype = _MIXED.get(args.mixed_precision)
    if dtype is None:
        return contextlib.nullcontext
    return functools.partial(torch.autocast, args.device.type, dtype=dtype)


@contextlib.contextmanager
def training_precision(trainer: Trainer, gradients: bool = True) -> Iterator[None]:
    """Compute a batch's loss in the number format of the trainer's steps (see `autocast_of`).

    Args:
        gradients: whether the loss is differentiated. With `fp16` it is then computed in float32, as small gradients
            are 0 in float16 without the loss scale of training.
    """
    in_float32 = gradients and trainer.args.mixed_precision == "fp16"
    with (
        trainer.compute_loss_context_manager(),
        contextlib.nullcontext() if in_float32 else autocast_of(trainer.args)(),
    ):
        yield


def train_in_float32(model: PeftModel) -> PeftModel:
    """Convert modules that train in full beside adapters (the head) to float32, in place, if the base is in 16 bits.

    peft does so for the adapters themselves. In 16 bits an update below half a unit in the last place is rounded
    away. These modules get their inputs in float32. Inside the encoder their outputs are cast back to its format.

    Args:
        model: the result of `get_peft_model`.

    Returns:
        The same model.
    """
    keep_differentiable(model)
    path = encoder_path(model.get_base_model())
    for name, wrapper in model.get_base_model().named_modules():
        if not isinstance(wrapper, ModulesToSaveWrapper):
            continue
        inside = path is not None and name.startswith(f"{path}.")
        for module in wrapper.modules_to_save.values():
            dtype = next((p.dtype for p in module.parameters() if p.dtype in HALF), None)
            if dtype is None:
                continue
            module.float()
            module.register_forward_pre_hook(_inputs_in_float32, with_kwargs=True)
            if inside:
                module.register_forward_hook(_CastOutputs(dtype))
    return model


def warn_of_lost_updates(training: dict[str, nn.Parameter]) -> None:
    """Log one warning if some of these parameters, which gradients train, are stored in 16 bits."""
    half = {name: p for name, p in training.items() if p.dtype in HALF}
    if not half:
        return
    first, parameter = next(iter(half.items()))
    kind = str(parameter.dtype).removeprefix("torch.")
    logger.warning(
        "%d of the %d tensors that train are stored in %s (%s, ...): an update below %.2g of a weight is rounded "
        "away. Load the model with dtype=torch.float32 and pass bf16=True for speed.",
        len(half),
        len(training),
        kind,
        first,
        torch.finfo(parameter.dtype).eps / 2,
    )


def refuse_fp16_on_cpu(accelerator: Accelerator) -> None:
    """Refuse `fp16` on a CPU, where accelerate silently ignores it.

    Raises:
        InputError: mixed precision in float16 on a CPU.
    """
    if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        raise InputError("fp16=True needs an accelerator, and this run is on a CPU; pass bf16=True, or leave it out")


def _inputs_in_float32(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    return _cast(args, HALF, torch.float32), _cast(kwargs, HALF, torch.float32)


class _CastOutputs:
    """A forward hook that casts float32 outputs to `dtype`; a class, so that models with it can be pickled."""

    def __init__(self, dtype: torch.dtype):
        self.dtype = dtype

    def __call__(self, module: nn.Module, args: tuple, output):
        return _cast(output, (torch.float32,), self.dtype)


def _cast(value, kinds: tuple[torch.dtype, ...], dtype: torch.dtype):
    if isinstance(value, torch.Tensor):
        return value.to(dtype) if value.dtype in kinds else value
    if type(value) in (tuple, list):
        return type(value)(_cast(part, kinds, dtype) for part in value)
    if type(value) is dict:
        return {key: _cast(part, kinds, dtype) for key, part in value.items()}
    return value
