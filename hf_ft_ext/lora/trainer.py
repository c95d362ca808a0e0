"""`LoraTrainer`: a Trainer that trains low-rank adapters (peft) and the classification head."""

from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from hf_ft_ext.errors import InputError
from hf_ft_ext.lora.arguments import ALL_LINEAR, LoraTrainingArguments
from hf_ft_ext.models.peft import carries_adapters, wrap_with_peft
from hf_ft_ext.training.finite import StopAtNaN
from hf_ft_ext.training.loss_scale import declare_mean_loss
from hf_ft_ext.training.method_trainer import MethodTrainer
from hf_ft_ext.training.runs.plan import fold_layer_numbers


class LoraTrainer(StopAtNaN, MethodTrainer):
    """`transformers.Trainer` with LoRA adapters on the linear layers that `args` names.

    The model's head, and any other part that came without pretrained weights, trains in full and is saved
    with the adapter: `PeftModel.from_pretrained(base, folder)` gives the trained model's logits.

    Args:
        model, args, and all else: as for `Trainer`. Other `TrainingArguments` are completed with the
            defaults of `LoraTrainingArguments`.

    Raises:
        InputError: the model carries adapters already, no layer matches `lora_target_modules`, or `optimizers`.
    """

    arguments_class = LoraTrainingArguments
    several_devices = True
    no_optimizer = "adds the parameters that train, which an optimizer made before does not hold"

    def training_step(self, model: nn.Module, *positional, **kwargs) -> torch.Tensor:
        """As `Trainer`'s; the first one checks that gradients reach the adapters.

        Raises:
            InputError: they do not, so that the head alone would train.
        """
        loss = super().training_step(model, *positional, **kwargs)
        if self.state.global_step == 0 and not (self.is_deepspeed_enabled or self.is_fsdp_enabled):
            adapters = [p for n, p in self.model.named_parameters() if p.requires_grad and ".lora_" in n]
            if adapters and all(parameter.grad is None for parameter in adapters):
                raise InputError(
                    f"no gradient reaches the adapters in {type(self.model.get_base_model()).__name__}, whose layers "
                    "make their gradients by themselves from inputs that train; use --method full or sparse"
                )
        return loss

    def prepare_model(self, model: nn.Module) -> nn.Module:
        return add_lora(model, self.args)


def add_lora(model: PreTrainedModel, args: LoraTrainingArguments) -> PeftModel:
    """Wrap a model with LoRA adapters, drawn from `args.seed`; everything else but a classifier's head is frozen.

    Raises:
        InputError: as for `LoraTrainer`.
    """
    if carries_adapters(model):
        raise InputError("the model carries PEFT adapters already; pass the base model, or merge the adapters first")
    declare_mean_loss(model)
    targets = args.lora_target_modules
    settings: dict[str, Any] = {"r": args.lora_r, "lora_alpha": args.lora_alpha, "lora_dropout": args.lora_dropout}
    if targets is not None:
        settings["target_modules"] = ALL_LINEAR if targets == [ALL_LINEAR] else args.lora_target_pattern or targets
    try:
        return wrap_with_peft(model, "lora", settings, args.seed, option="method")
    except InputError as error:
        if not isinstance(error.__cause__, ValueError):
            raise
        raise InputError(_no_target(model, targets, str(error.__cause__).split(". ")[0])) from error


def _no_target(model: nn.Module, targets: list[str] | None, reason: str) -> str:
    linear = {
        fold_layer_numbers(name): None for name, module in model.named_modules() if isinstance(module, nn.Linear)
    }
    cause = (
        f"the default targets of {type(model).__name__} cannot be used ({reason})"
        if targets is None
        else f"lora_target_modules={targets} cannot be used ({reason})"
    )
    shown = ", ".join(list(linear)[:12]) or "none"
    return f"{cause}; pass lora_target_modules with (the last parts of) names of linear layers, here: {shown}"
