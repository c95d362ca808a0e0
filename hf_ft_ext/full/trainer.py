"""`FullTrainer`: a Trainer for plain fine-tuning, with the choices of the kernel paper."""

import logging
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers import Trainer, TrainingArguments

from hf_ft_ext.errors import InputError
from hf_ft_ext.full.arguments import SIGNGD, FullTrainingArguments
from hf_ft_ext.full.freeze import fix_layers
from hf_ft_ext.full.signgd import SignGD
from hf_ft_ext.peft_models import PREFIX_TUNING, wrap_with_peft
from hf_ft_ext.training.finite import StopAtNaN
from hf_ft_ext.training.loss_scale import declare_mean_loss

logger = logging.getLogger(__name__)


class FullTrainer(StopAtNaN, Trainer):
    """`transformers.Trainer` with a choice of optimizer, frozen low layers, squared loss, or a peft method.

    Args:
        model, args, and all else: as for `Trainer`. Plain `TrainingArguments` are completed with the
            defaults of `FullTrainingArguments`.

    Raises:
        InputError: an option that the model cannot honour, or that contradicts what was passed.

    Source: the settings of Malladi et al., ICML 2023 (arXiv 2210.05643), princeton-nlp/LM-Kernel-FT.
    """

    def __init__(self, model: nn.Module | None = None, args: TrainingArguments | None = None, *positional, **kwargs):
        args = FullTrainingArguments.complete(args)
        own = kwargs.get("optimizers", (None, None))[0] is not None or kwargs.get("optimizer_cls_and_kwargs")
        if args.optimizer is not None and own:
            raise InputError(f"optimizer={args.optimizer} and an optimizer were both passed; leave one of them out")
        if args.optimizer == SIGNGD:
            settings = {"lr": args.learning_rate, "weight_decay": args.weight_decay}
            kwargs["optimizer_cls_and_kwargs"] = (SignGD, settings)
        if args.l2_loss:
            if kwargs.get("compute_loss_func") is not None:
                raise InputError("l2_loss and compute_loss_func are two losses; pass one of them")
            kwargs["compute_loss_func"] = l2_loss
        if model is not None:
            model = self._prepared(model, args)
        super().__init__(model, args, *positional, **kwargs)

    def call_model_init(self, trial: Any = None) -> nn.Module:
        return self._prepared(super().call_model_init(trial), self.args)

    @staticmethod
    def _prepared(model: nn.Module, args: FullTrainingArguments) -> nn.Module:
        declare_mean_loss(model)
        config = getattr(model, "config", None)
        if args.l2_loss and getattr(config, "problem_type", None) == "regression":
            raise InputError("l2_loss is for classes, and this task is a regression, whose loss it is; leave it out")
        if args.fix_layers:
            fix_layers(model, args.fix_layers)
        if args.peft is not None:
            if args.peft.lower() == PREFIX_TUNING and args.gradient_checkpointing:
                raise InputError(
                    "peft=prefix_tuning hands keys and values to the layers, and gradient_checkpointing drops them; "
                    "leave one of the two out"
                )
            model = wrap_with_peft(model, args.peft, args.peft_config, args.seed)
        return model


def l2_loss(outputs, labels: torch.Tensor, num_items_in_batch: torch.Tensor | int | None = None) -> torch.Tensor:
    """Mean squared distance of the logits from the one-hot labels, over rows and classes.

    Args:
        outputs: with `logits` `[rows, classes]`.
        labels: class ids `[rows]`.
        num_items_in_batch: rows of the whole step, of which these are a part.
    """
    logits = outputs["logits"].float()
    target = functional.one_hot(labels.reshape(-1), logits.shape[-1]).to(logits.dtype)
    losses = (logits - target).square().mean(-1)
    return losses.mean() if num_items_in_batch is None else losses.sum() / num_items_in_batch
