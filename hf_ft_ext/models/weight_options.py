"""Options for loading a model's weights: number format, attention, quantization, devices."""

import copy
import importlib.util
import json
import logging
import os
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoModelForSequenceClassification,
    BitsAndBytesConfig,
    PreTrainedConfig,
    PreTrainedModel,
    TorchAoConfig,
)

from hf_ft_ext.arguments import (
    AUTO,
    BITSANDBYTES_8BIT,
    TORCHAO_8BIT,
    Gradients,
    MethodTrainingArguments,
    ModelArguments,
)
from hf_ft_ext.errors import InputError, first_line
from hf_ft_ext.features import encoder_path
from hf_ft_ext.prompts.readout import reading_of
from hf_ft_ext.training.weights.precision import HALF
from hf_ft_ext.training.weights.quantized import is_quantized

logger = logging.getLogger(__name__)

_PLACEMENTS = ("auto", "balanced", "balanced_low_0", "sequential")  # transformers' placements over several devices
_OFFLOAD_FOLDER = "_offloaded"  # in the run's folder, for changed weights; `push_to_hub` leaves out names with _


def weight_options(
    model_args: ModelArguments,
    config: PreTrainedConfig,
    args: MethodTrainingArguments | None,
    name: str,
    *,
    as_prompt: bool = False,
) -> dict[str, Any]:
    """Arguments of `from_pretrained`: `dtype`, and on request attention, quantization and device map.

    Args:
        config: the model's configuration.
        args: determines which parameters train and on which device; `None` = all weights, on the CPU.
        name: name of the model, for error messages.
        as_prompt: whether a language model is loaded rather than a classifier.

    Raises:
        InputError: the model, the method or this environment does not support an option.
    """
    options: dict[str, Any] = {"dtype": wanted_dtype(model_args.dtype, args, getattr(config, "dtype", None))}
    if model_args.device_map is not None:
        options["device_map"] = placed = _device_map(model_args.device_map, args)
        if args is not None and args.do_train and isinstance(placed, dict) and "disk" in placed.values():
            options["offload_folder"] = os.path.join(args.output_dir, _OFFLOAD_FOLDER)
    if model_args.attn_implementation is None and model_args.quantization is None:
        return options
    if model_args.quantization is not None:
        _check_installed(model_args.quantization)
    if model_args.quantization is not None and getattr(config, "quantization_config", None) is not None:
        raise InputError(
            f"model {name!r} is quantized already; leave out quantization={model_args.quantization}, or pass the "
            "model with full weights"
        )
    skeleton = _skeleton(config, name, as_prompt, model_args)
    if model_args.attn_implementation is not None:
        options["attn_implementation"] = model_args.attn_implementation
    if model_args.quantization is not None:
        if model_args.dtype == AUTO:  # for weights outside the quantized layers, as in QLoRA
            options["dtype"] = torch.float32
        options["quantization_config"] = _quantizer(model_args.quantization, skeleton, options["dtype"], args)
        device = _device(args)
        if device.type != "cpu" and model_args.device_map is None:
            options["device_map"] = {"": device}
    return options


def wanted_dtype(
    requested: str, args: MethodTrainingArguments | None, stored: torch.dtype | None
) -> torch.dtype | str:
    """The number format of the weights; `"auto"` = the stored one.

    Weights that gradients change are float32: in 16 bits an update below half a unit in the last place is rounded
    away. Frozen weights keep their format. Float16 weights under adapters keep theirs on accelerators only: on a CPU
    float16 is slower than float32, and gradients that pass through it underflow without loss scaling.

    Args:
        requested: `ModelArguments.dtype`.
        stored: format of the stored weights, if known.

    Raises:
        InputError: float16 for weights that an optimizer changes.
    """
    gradients = Gradients.WEIGHTS if args is None else args.gradients
    if args is not None and not args.do_train:
        gradients = Gradients.NONE
    if requested != AUTO:
        if requested == "float16" and gradients is Gradients.WEIGHTS:
            raise InputError(
                "dtype=float16: gradients change these weights, and AdamW's epsilon is 0 in float16; pass "
                "dtype=float32 (with fp16=True on an accelerator), or bfloat16"
            )
        return getattr(torch, requested)
    if gradients is Gradients.WEIGHTS and stored != torch.float64:
        return torch.float32
    if gradients is Gradients.ADAPTERS and stored == torch.float16 and _device(args).type == "cpu":
        return torch.float32
    return AUTO


def apply_dtype(
    model: PreTrainedModel,
    requested: str,
    args: MethodTrainingArguments | None,
    stored: torch.dtype | None,
    name: str,
) -> None:
    """Convert a model whose configuration does not name the stored format; log a change of format.

    Args:
        stored: the format in the configuration before loading.
    """
    wanted = wanted_dtype(requested, args, model.dtype)
    if wanted not in (AUTO, model.dtype) and not is_quantized(model):
        model.to(wanted)
        for config in (model.config, getattr(model.config, "masked_lm", None)):
            if config is not None:
                config.dtype = wanted
    if stored in HALF and model.dtype == torch.float32:
        logger.info(
            "The weights of %s are stored in %s and train in float32; bf16=True computes in bfloat16.",
            name,
            _plain(stored),
        )
    unscaled = args is not None and args.do_train and args.gradients is Gradients.ADAPTERS and not args.fp16
    if unscaled and model.dtype == torch.float16:
        logger.warning(
            "Gradients pass through float16 weights without loss scaling and may underflow: pass fp16=True on an "
            "accelerator, or dtype=float32."
        )


def _plain(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _device(args: MethodTrainingArguments | None) -> torch.device:
    return torch.device("cpu") if args is None else args.device


def _skeleton(config: PreTrainedConfig, name: str, as_prompt: bool, model_args: ModelArguments) -> nn.Module:
    """The model on the meta device, to check the attention and to find the modules outside the encoder."""
    config = getattr(config, "masked_lm", config)
    kind = reading_of(config, name).auto_class if as_prompt else AutoModelForSequenceClassification
    asked = model_args.attn_implementation
    settings = {} if asked is None else {"attn_implementation": asked}
    try:
        with torch.device("meta"), torch.random.fork_rng(devices=[]):
            return kind.from_config(copy.deepcopy(config), trust_remote_code=model_args.trust_remote_code, **settings)
    except (ValueError, ImportError, TypeError, KeyError, AttributeError, RuntimeError) as error:
        reason = first_line(error)
        if asked is not None:
            raise InputError(
                f"attn_implementation={asked!r} does not work with model {name!r}: {reason}; pass eager or sdpa, or "
                "leave it out"
            ) from error
        raise InputError(f"model {name!r} cannot be quantized: {reason}; leave quantization out") from error


def _device_map(wanted: str, args: MethodTrainingArguments | None) -> str | dict[str, Any]:
    """The `device_map` argument of `from_pretrained`."""
    if args is not None and args.world_size > 1:
        raise InputError(
            f"device_map={wanted} spreads a model over the devices of one process, and this run has "
            f"{args.world_size} processes, each with the whole model; leave it out, or start one process"
        )
    if wanted in _PLACEMENTS:
        return wanted
    try:
        parts = json.loads(wanted) if wanted.startswith("{") else {"": wanted}
    except ValueError as error:
        raise InputError(f"device_map={wanted!r} is not valid JSON: {error}") from None
    return {part: _existing_device(name) for part, name in parts.items()}


def _existing_device(wanted: str | int) -> str | int:
    """Check that a device exists; return it."""
    if wanted == "disk":
        return wanted
    try:
        device = torch.device(wanted)
        known = [] if device.type == "cpu" else list(range(torch.get_device_module(device).device_count()))
    except (RuntimeError, TypeError, AttributeError):
        raise InputError(
            f"device_map: {wanted!r} is not a device; pass {', '.join(_PLACEMENTS)}, a device such as cuda:0, or JSON "
            "of modules to devices"
        ) from None
    if device.type != "cpu" and (device.index or 0) not in known:
        raise InputError(
            f"device_map: there is no device {wanted!r} here ({len(known)} of its kind); pass another one"
        )
    return wanted


def _check_installed(quantization: str) -> None:
    package, extra = ("torchao", "torchao") if quantization == TORCHAO_8BIT else ("bitsandbytes", "quantization")
    if importlib.util.find_spec(package) is None:
        raise InputError(
            f'quantization={quantization} needs {package}: pip install "hf_ft_ext[{extra}]", or leave it out'
        )


def _quantizer(
    quantization: str, skeleton: nn.Module, dtype: torch.dtype | str, args: MethodTrainingArguments | None
) -> BitsAndBytesConfig | TorchAoConfig:
    """The quantization config; modules outside the encoder, and its pooler, are excluded, as they train."""
    path = encoder_path(skeleton) or ""
    encoder = skeleton.get_submodule(path)
    kept = [
        name for name, module in skeleton.named_children() if name != path and any(True for _ in module.parameters())
    ]
    kept += [f"{path}.{name}".strip(".") for name, _ in encoder.named_children() if "pooler" in name]
    if quantization == TORCHAO_8BIT:
        from torchao.quantization import Int8WeightOnlyConfig

        return TorchAoConfig(Int8WeightOnlyConfig(), modules_to_not_convert=kept)
    if quantization == BITSANDBYTES_8BIT:
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=kept)
    compute = torch.float32 if dtype == AUTO else dtype
    if args is not None and (args.bf16 or args.fp16):
        compute = torch.bfloat16 if args.bf16 else torch.float16
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=compute, llm_int8_skip_modules=kept
    )
