"""`LoraTrainer`: a Trainer that trains low-rank adapters (peft) and the classification head."""

import re

from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PreTrainedModel

from hf_ft_ext.errors import InputError
from hf_ft_ext.lora.arguments import ALL_LINEAR, LoraTrainingArguments
from hf_ft_ext.models import seeded_init
from hf_ft_ext.peft_models import lora_targets, trained_in_full
from hf_ft_ext.training.finite import StopAtNaN
from hf_ft_ext.training.loss_scale import declare_mean_loss
from hf_ft_ext.training.method_trainer import MethodTrainer
from hf_ft_ext.training.plan import fold_layer_numbers
from hf_ft_ext.training.precision import train_in_float32


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
    no_optimizer = "adds the parameters that train, which an optimizer made before does not hold"

    def prepare_model(self, model: nn.Module) -> nn.Module:
        return add_lora(model, self.args)


def add_lora(model: PreTrainedModel, args: LoraTrainingArguments) -> PeftModel:
    """Wrap a sequence classifier with LoRA adapters, drawn from `args.seed`; everything else but the head is frozen.

    Raises:
        InputError: as for `LoraTrainer`.
    """
    if hasattr(model, "peft_config") or any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        raise InputError("the model carries PEFT adapters already; pass the base model, or merge the adapters first")
    declare_mean_loss(model)
    heads = trained_in_full(model)
    targets = args.lora_target_modules or lora_targets(model)
    config = LoraConfig(
        task_type=TaskType.SEQ_CLS,
        r=args.lora_r,
        lora_alpha=args.lora_alpha,
        lora_dropout=args.lora_dropout,
        target_modules=ALL_LINEAR if targets == [ALL_LINEAR] else args.lora_target_pattern or targets,
        modules_to_save=heads,
        # a target such as "dense" must not put adapters into what trains in full anyway
        exclude_modules="|".join(rf"{re.escape(name)}(\..*)?" for name in heads) or None,
    )
    try:
        with seeded_init(args.seed):
            return train_in_float32(get_peft_model(model, config))
    except ValueError as error:
        raise InputError(_no_target(model, targets, str(error).split(". ")[0])) from error


def _no_target(model: nn.Module, targets: list[str] | None, reason: str) -> str:
    linear = {
        fold_layer_numbers(name): None for name, module in model.named_modules() if isinstance(module, nn.Linear)
    }
    cause = (
        f"peft knows no default targets for a {model.config.model_type!r} model"
        if targets is None
        else f"lora_target_modules={targets} cannot be used ({reason})"
    )
    shown = ", ".join(list(linear)[:12]) or "none"
    return f"{cause}; pass lora_target_modules with (the last parts of) names of linear layers, here: {shown}"
