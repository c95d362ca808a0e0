"""Stopping a training run that diverges: at a loss of NaN or infinity, and before weights that hold one are saved."""

import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import TrainingArguments

from hf_ft_ext.errors import DivergedError, InputError
from hf_ft_ext.training.checks import check_full_batch
from hf_ft_ext.training.refusals import model_errors_as_input_errors
from hf_ft_ext.training.saved.saving import CompleteSaves
from hf_ft_ext.training.weights.devices import refuse_data_parallel
from hf_ft_ext.training.weights.precision import refuse_fp16_on_cpu, warn_of_lost_updates
from hf_ft_ext.training.weights.quantized import is_readable

_PATIENCE_FP16 = 20  # steps; loss scaling skips single steps with overflow and lowers its factor


class StopAtNaN(CompleteSaves):
    """Mixin for a `Trainer` (before it in the bases) that raises a `DivergedError` at a NaN loss or NaN weights.

    It is the base class of all trainers that take steps, so it also refuses `torch.nn.DataParallel` and an epoch
    without a batch (see `check_full_batch`).

    transformers keeps training and by default hides such losses from the log (`logging_nan_inf_filter`). It reads the
    loss of each step to do so; the check here costs the same.
    """

    _not_finite = 0

    def __init__(
        self, model: nn.Module | str | None = None, args: TrainingArguments | None = None, *positional, **kwargs
    ):
        super().__init__(model, args, *positional, **kwargs)
        refuse_data_parallel(self.args)

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        refuse_fp16_on_cpu(self.accelerator)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        trained = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        if not trained:
            raise InputError(
                "no parameter of the model trains; load an adapter with PeftModel.from_pretrained(..., "
                "is_trainable=True), or unfreeze parameters (requires_grad_)"
            )
        if self.optimizer is None:
            warn_of_lost_updates(trained)
        return super().create_optimizer(model)

    def get_train_dataloader(self) -> DataLoader:
        check_full_batch(self.args, self.train_dataset)
        return super().get_train_dataloader()

    def training_step(self, *positional, **kwargs) -> torch.Tensor:
        with model_errors_as_input_errors(_plain(self.model), first=self.state.global_step == 0):
            loss = super().training_step(*positional, **kwargs)
        return self.finite_loss(loss)

    def finite_loss(self, loss: torch.Tensor) -> torch.Tensor:
        """Return `loss`, if it is finite.

        Raises:
            DivergedError: it is not finite (with float16: twenty steps in a row).
        """
        if bool(torch.isfinite(loss).all()):
            self._not_finite = 0
            return loss
        self._not_finite += 1
        if not self.args.fp16 or self._not_finite >= _PATIENCE_FP16:
            raise DivergedError(
                f"the loss is {loss.float().mean().item()} in step {self.state.global_step + 1}: {self._advice()}"
            )
        return loss

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        if self.state.global_step > 0 and (name := first_not_finite(self.model)) is not None:
            raise DivergedError(f"{name} holds NaN or infinity after step {self.state.global_step}: {self._advice()}")
        super().save_model(output_dir, _internal_call)

    def _advice(self) -> str:
        return (
            f"lower --learning_rate ({self.args.learning_rate:g}) or check the data and the model; earlier "
            "checkpoints are kept"
        )


def first_not_finite(model: nn.Module) -> str | None:
    """Name of the first parameter that holds NaN or infinity, or `None`."""
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and is_readable(parameter) and not bool(torch.isfinite(parameter).all()):
            return name
    return None


def _plain(model: nn.Module) -> nn.Module:
    return model.get_base_model() if hasattr(model, "get_base_model") else model
