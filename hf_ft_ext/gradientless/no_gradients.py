"""Arguments that are about gradients, which a search has none of."""

from transformers import TrainingArguments
from transformers.training_args import OptimizerNames

from hf_ft_ext.errors import InputError


def refuse_gradients(args: TrainingArguments) -> None:
    """What a search cannot honour is an error, not silence.

    Raises:
        InputError: an argument about gradients was set.
    """
    if args.max_grad_norm:
        raise InputError(
            f"max_grad_norm={args.max_grad_norm} clips gradients, and a search has none; leave it out or pass 0"
        )
    if args.gradient_checkpointing:
        raise InputError(
            "gradient_checkpointing saves memory of a backward pass, and a search has none; leave it out, or pass "
            "False where your arguments have it on"
        )
    if args.optim not in (OptimizerNames.ADAMW_TORCH, OptimizerNames.ADAMW_TORCH_FUSED):
        raise InputError(
            f"optim={args.optim.value!r} needs gradients; leave it out: search_method says how weights move"
        )
    if args.fp16:
        raise InputError(
            "fp16 scales gradients, and a search has none; use bf16, or load the model in float16 (its weights do "
            "not drift)"
        )
    if args.torch_compile:
        raise InputError("torch_compile does not see weights that change between evaluations; leave it out")
