"""Arguments of `--method lora`."""

import re
from dataclasses import dataclass, field

from hf_ft_ext.arguments import Gradients, MethodTrainingArguments
from hf_ft_ext.errors import InputError

ALL_LINEAR = "all-linear"
_PLAIN_NAME = re.compile(r"[\w.-]+")


@dataclass
class LoraTrainingArguments(MethodTrainingArguments):
    """`transformers.TrainingArguments` plus the settings of the LoRA adapters.

    Raises:
        InputError: a value out of range.
    """

    lora_r: int = field(default=8, metadata={"help": "Rank of the adapters, 1 or more."})
    lora_alpha: float = field(
        default=16, metadata={"help": "Scale of the adapters, above 0: their output is multiplied by alpha / r."}
    )
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout before the adapters, in [0, 1)."})
    lora_target_modules: list[str] | None = field(
        default=None,
        metadata={
            "help": "Linear layers that get an adapter: the last parts of their dotted names, or one regular "
            "expression that matches full names, or `all-linear`; none = peft's defaults for the model type, else "
            "query and value, found by structure."
        },
    )
    # FishPAL's rate for LoRA on GLUE; transformers' 5e-5 is meant for training all weights.
    learning_rate: float = field(default=5e-4, metadata={"help": "Initial learning rate of the optimizer."})

    def validate(self) -> None:
        if isinstance(self.lora_target_modules, str):  # as peft takes it
            self.lora_target_modules = [self.lora_target_modules]
        if self.lora_r < 1:
            raise InputError(f"lora_r must be 1 or more, got {self.lora_r}")
        if not self.lora_alpha > 0:
            raise InputError(f"lora_alpha must be above 0, got {self.lora_alpha}")
        if not 0 <= self.lora_dropout < 1:
            raise InputError(f"lora_dropout must be in [0, 1), got {self.lora_dropout}")
        targets = self.lora_target_modules
        if (pattern := self.lora_target_pattern) is not None:
            try:
                re.compile(pattern)
            except re.error as error:
                raise InputError(f"lora_target_modules={pattern!r} is not a regular expression: {error}") from None
        if targets is not None and ALL_LINEAR in targets and len(targets) > 1:
            raise InputError(f"lora_target_modules={targets}: {ALL_LINEAR!r} already includes all; pass it alone")

    @property
    def gradients(self) -> Gradients:
        return Gradients.ADAPTERS

    @property
    def lora_target_pattern(self) -> str | None:
        """The regular expression in `lora_target_modules`; `None` if it is a list of names."""
        targets = self.lora_target_modules or []
        return targets[0] if len(targets) == 1 and not _PLAIN_NAME.fullmatch(targets[0]) else None
