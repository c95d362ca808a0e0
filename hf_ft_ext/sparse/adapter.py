"""The PEFT adapter (`SparseGradConfig`) that `--method sparse` trains with structured support."""

import logging

import torch
from peft import PeftModel, get_peft_model
from transformers import PreTrainedModel, Trainer

from hf_ft_ext.adapters.layers import plain_name, shown_name
from hf_ft_ext.adapters.sparse_grad.bases import bases_from_steps
from hf_ft_ext.adapters.sparse_grad.config import GRADIENT, PER_KIND, PER_LAYER, Init, SparseGradConfig
from hf_ft_ext.adapters.sparse_grad.config import RANDOM as RANDOM_COLUMNS
from hf_ft_ext.adapters.sparse_grad.config import SVD as SINGULAR_VECTORS
from hf_ft_ext.adapters.sparse_grad.layer import SparseGradColumns
from hf_ft_ext.adapters.sparse_grad.model import layers_by_columns, within_layers
from hf_ft_ext.adapters.sparse_grad.targets import can_be_adapted
from hf_ft_ext.errors import InputError
from hf_ft_ext.label_tokens import predicts_next_tokens, zero_without_tokens
from hf_ft_ext.models import seeded_init
from hf_ft_ext.models.peft import (
    carries_adapters,
    check_heads,
    freeze_others,
    saved_for_statistics,
    task_type_of,
    trained_in_full,
)
from hf_ft_ext.sparse.arguments import HOSVD, NOTHING, RANDOM, SVD, SparseTrainingArguments
from hf_ft_ext.sparse.prepass import own_steps
from hf_ft_ext.sparse.targets import find_targets
from hf_ft_ext.training.method_trainer import loss_of_batch
from hf_ft_ext.training.weights.precision import train_in_float32, training_precision

logger = logging.getLogger(__name__)

INITS: dict[str, Init] = {HOSVD: GRADIENT, RANDOM: RANDOM_COLUMNS, SVD: SINGULAR_VECTORS}


def has_sparse_grad(model: object) -> bool:
    """Whether a model's active adapter is a SparseGrad adapter."""
    return isinstance(model, PeftModel) and isinstance(model.active_peft_config, SparseGradConfig)


def add_sparse_grad(model: PreTrainedModel, args: SparseTrainingArguments) -> PeftModel:
    """Wrap a model with the SparseGrad adapter that `args` describe.

    The head and all other modules without pretrained weights are saved with the adapter. They train unless
    `sparse_train_rest` is `none`.

    Raises:
        InputError: the model already has adapters, or has no layer to adapt.
    """
    if carries_adapters(model):
        raise InputError("the model carries PEFT adapters; pass the base model, or merge the adapters first")
    heads = trained_in_full(model)
    check_heads(model, heads)
    targets = find_targets(model, args.sparse_target_modules, can_be_adapted)
    config = SparseGradConfig(
        task_type=task_type_of(model),
        density=args.sparse_density,
        n_params=args.sparse_n_params,
        init=INITS[args.sparse_basis],
        scope=PER_KIND if args.basis_scope == PER_KIND else PER_LAYER,
        seed=args.seed,
        target_modules=within_layers(model, [plain_name(name) for name in targets]),
        modules_to_save=[*heads, *saved_for_statistics(model, heads)] or None,
    )
    with seeded_init(args.seed):
        wrapped = freeze_others(train_in_float32(get_peft_model(model, config)), heads)
    if args.train_rest == NOTHING:
        for name, parameter in wrapped.named_parameters():
            if ".modules_to_save." in name:
                parameter.requires_grad_(False)
    # All processes have the same columns. Without this list, DistributedDataParallel broadcasts them in every step.
    ignored = [name for name, _ in wrapped.named_buffers() if ".sparse_grad_columns." in name]
    wrapped._ddp_params_and_buffers_to_ignore = [*getattr(wrapped, "_ddp_params_and_buffers_to_ignore", []), *ignored]
    return wrapped


def columns_of(model: PeftModel) -> list[SparseGradColumns]:
    """Return the sets of columns of the active adapter."""
    return [columns for columns, _ in layers_by_columns(model, model.active_adapter)]


def warn_of_untrained(model: PeftModel) -> None:
    """Name the adapted layers whose block is still zero while others were trained: no gradient reached them."""
    adapter = model.active_adapter
    blocks = {
        name: layer.sparse_grad_values[adapter]
        for _, layers in layers_by_columns(model, adapter)
        for name, layer in layers
    }
    untrained = [shown_name(name) for name, block in blocks.items() if not block.detach().any()]
    if 0 < len(untrained) < len(blocks):
        logger.warning(
            "No gradient reached %d of %d adapted layers in training (%s, ...), so their adapters change nothing; the "
            "model may use these weights without calling the layers. Leave them out with sparse_target_modules.",
            len(untrained), len(blocks), untrained[0],
        )  # fmt: skip


def choose_columns(trainer: Trainer) -> None:
    """Run the gradient pre-pass on the batches of `sparse_basis_steps` optimizer steps of the training data.

    Raises:
        InputError: a gradient is not finite, or there is no training data.
    """
    args, shifted = trainer.args, predicts_next_tokens(trainer.model)

    def loss(model: torch.nn.Module, weighted: tuple[dict, float]) -> torch.Tensor:
        batch, weight = weighted
        with training_precision(trainer):
            inputs = trainer._prepare_inputs(batch)
            return weight * zero_without_tokens(lambda batch: loss_of_batch(trainer, model, batch), inputs, shifted)

    bases_from_steps(
        trainer.model,
        own_steps(trainer, args.basis_steps),
        loss,
        accumulated=args.gradient_accumulation_steps > 1,
        gradients=args.basis_steps,
        seed=0,  # must be equal on all processes; `seed` may differ
        progress=not args.disable_tqdm and trainer.is_world_process_zero(),
    )
