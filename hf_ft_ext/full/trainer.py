"""`FullTrainer`: a Trainer for plain fine-tuning, with the options of Malladi et al. 2023."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from hf_ft_ext.errors import InputError
from hf_ft_ext.full.arguments import FullTrainingArguments
from hf_ft_ext.full.freeze import fix_layers
from hf_ft_ext.full.signgd import SignGD
from hf_ft_ext.models.peft import PREFIX_TUNING, wrap_with_peft
from hf_ft_ext.training.checks import is_regression
from hf_ft_ext.training.finite import StopAtNaN
from hf_ft_ext.training.loss_scale import declare_mean_loss
from hf_ft_ext.training.method_trainer import MethodTrainer, overridden
from hf_ft_ext.training.weights.quantized import refuse_quantized


class FullTrainer(StopAtNaN, MethodTrainer):
    """`transformers.Trainer` with SignGD, frozen lowest layers, a squared loss, or a peft method as options.

    Args:
        model, args, and all others: as for `Trainer`. Other `TrainingArguments` are completed with the
            defaults of `FullTrainingArguments`.

    Raises:
        InputError: an option that the model does not support, or that contradicts another argument.

    Source: the settings of Malladi et al., ICML 2023 (arXiv 2210.05643), princeton-nlp/LM-Kernel-FT.
    """

    arguments_class = FullTrainingArguments
    several_devices = True

    def check_passed(self, passed: Mapping[str, Any]) -> None:
        if self.args.peft is not None or self.args.fix_layers:
            super().check_passed(passed)  # without these options, trl may wrap the model itself
        ready = (passed.get("optimizers") or (None,))[0] is not None
        if self.args.optimizer is not None and (ready or passed.get("optimizer_cls_and_kwargs") is not None):
            raise InputError(
                f"optimizer={self.args.optimizer} and an optimizer were both passed; leave one of them out"
            )
        if ready and self.args.peft is not None:
            raise InputError(
                f"optimizers: peft={self.args.peft} freezes the model and adds parameters, which an optimizer created "
                "before does not contain; pass optimizer_cls_and_kwargs, or leave it out"
            )
        if self.args.l2_loss and passed.get("compute_loss_func") is not None:
            raise InputError("l2_loss and compute_loss_func are two losses; pass one of them")

    def apply_arguments(self) -> None:
        super().apply_arguments()
        if self.args.l2_loss:
            if self.compute_loss_func not in (None, l2_loss) or overridden(self, "compute_loss"):
                raise InputError("l2_loss and your compute_loss are two losses; leave one of them out")
            self.compute_loss_func: Callable | None = l2_loss
        elif self.compute_loss_func is l2_loss:
            self.compute_loss_func = None
        if self.optimizer is not None and self.model_init is None:
            self._check_optimizer_trains()

    def _check_optimizer_trains(self) -> None:
        trained = {id(p) for p in self.model.parameters() if p.requires_grad}
        if not any(id(p) in trained for group in self.optimizer.param_groups for p in group["params"]):
            raise InputError(
                "optimizers: the optimizer contains none of the trainable parameters; create it from the same model, "
                "or pass optimizer_cls_and_kwargs"
            )

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Create `SignGD` if it was chosen, with the current learning rate; else `Trainer`'s optimizer."""
        if not self.args.sign_descent or self.optimizer is not None:
            return super().create_optimizer(model)
        settings = {"lr": self.args.learning_rate, "weight_decay": self.args.weight_decay}
        self.optimizer_cls_and_kwargs: tuple[type[SignGD], dict[str, Any]] | None = (SignGD, settings)
        try:
            return super().create_optimizer(model)
        finally:
            self.optimizer_cls_and_kwargs = None  # the next trial of a search may have another learning rate

    @property
    def gives_probabilities(self) -> bool:
        """Whether softmax or sigmoid of the logits are probabilities; with a squared loss, logits are plain scores."""
        return not self.args.l2_loss

    def prepare_model(self, model: nn.Module) -> nn.Module:
        args = self.args
        declare_mean_loss(model)
        if args.l2_loss and is_regression(model):
            raise InputError(
                "l2_loss is for classification, and this task is regression, which uses a squared loss anyway; leave "
                "it out"
            )
        if args.fix_layers:
            fix_layers(model, args.fix_layers)
        if args.peft is None and not hasattr(model, "get_base_model"):
            refuse_quantized(model, "plain fine-tuning changes")
        if args.peft is not None:
            if args.peft.lower() == PREFIX_TUNING and args.gradient_checkpointing:
                raise InputError(
                    "peft=prefix_tuning passes keys and values to the layers, and gradient_checkpointing drops them; "
                    "leave one of the two out"
                )
            model = wrap_with_peft(model, args.peft, args.peft_config, args.seed)
        return model


def l2_loss(outputs, labels: torch.Tensor, num_items_in_batch: torch.Tensor | int | None = None) -> torch.Tensor:
    """Mean squared distance between logits and one-hot labels; for several labels per row, from targets -1 and 1.

    With several labels per row, a label is predicted if its logit is 0 or more (a sigmoid of 0.5), so 0 has to lie
    between the two targets.

    Args:
        outputs: with `logits` `[rows, classes]`.
        labels: class ids `[rows]`, or several labels per row, 0 and 1 `[rows, labels]`.
        num_items_in_batch: number of entries of `labels` in the whole optimizer step; `None` = this batch is all.
    """
    logits = outputs["logits"].float()
    if labels.ndim == 2 and labels.shape == logits.shape:
        target = 2 * labels.to(logits.dtype) - 1
        losses = (logits - target).square()  # mean over rows and labels, which are the items here
    else:
        target = functional.one_hot(labels.reshape(-1), logits.shape[-1]).to(logits.dtype)
        losses = (logits - target).square().mean(-1)
    return losses.mean() if num_items_in_batch is None else losses.sum() / num_items_in_batch
