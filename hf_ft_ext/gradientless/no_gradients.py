"""Refuse arguments about gradients: a search computes none."""

from transformers import TrainingArguments
from transformers.training_args import OptimizerNames

from hf_ft_ext.errors import InputError


def refuse_gradients(args: TrainingArguments) -> None:
    """Check that no argument about gradients is set.

    Raises:
        InputError: an argument about gradients was set.
    """
    if args.max_grad_norm:
        raise InputError(
            f"max_grad_norm={args.max_grad_norm} clips gradients, and a search computes none; leave it out or pass 0"
        )
    if args.gradient_checkpointing:
        raise InputError(
            "gradient_checkpointing saves memory of the backward pass, and a search has none; leave it out, or pass "
            "False if your arguments class turns it on"
        )
    if args.optim not in (OptimizerNames.ADAMW_TORCH, OptimizerNames.ADAMW_TORCH_FUSED):
        raise InputError(
            f"optim={args.optim.value!r} needs gradients; leave it out: search_method selects the optimizer"
        )
    if args.fp16:
        raise InputError("fp16 scales gradients, and a search computes none; pass bf16, or load the model in float16")
    if args.torch_compile:
        raise InputError("torch_compile does not support weights that change between evaluations; leave it out")
