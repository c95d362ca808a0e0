"""Arguments of `--method full`."""

import warnings
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

from transformers import TrainingArguments
from transformers.training_args import OptimizerNames

from hf_ft_ext.arguments import Gradients, MethodTrainingArguments
from hf_ft_ext.errors import InputError

OPTIMIZERS = ADAM, SGD, SIGNGD = ("adam", "sgd", "signgd")
_SIGNS = "sign=true"


@dataclass
class FullTrainingArguments(MethodTrainingArguments):
    """`transformers.TrainingArguments` plus options of fine-tuning: frozen layers, squared loss, a peft method.

    Raises:
        InputError: a value out of range, or two that contradict each other.
    """

    optimizer: str | None = field(
        default=None,
        metadata={
            "help": "Old name of `optim`. adam: `--optim adamw_torch_fused` (Adam, without weight decay). sgd: "
            "`--optim sgd`. signgd: `--optim sgd --optim_args sign=true` (each entry changes by the learning rate, "
            "along the gradient's sign).",
            "choices": OPTIMIZERS,
        },
    )
    fix_layers: int = field(
        default=0,
        metadata={"help": "Freeze the input embeddings and this number of lowest layers; 0 = train everything."},
    )
    l2_loss: bool = field(
        default=False,
        metadata={
            "help": "Classification: squared distance between logits and one-hot labels instead of cross-entropy."
        },
    )
    peft: str | None = field(
        default=None,
        metadata={"help": "Train the parameters of a peft method (prefix_tuning, ia3, ...) and the head instead."},
    )
    peft_config: dict | str | None = field(
        default_factory=dict,
        metadata={"help": 'Settings of peft, as JSON: {"num_virtual_tokens": 5, "init_from_activations": true}.'},
    )

    _VALID_DICT_FIELDS: ClassVar[list[str]] = [*MethodTrainingArguments._VALID_DICT_FIELDS, "peft_config"]

    json_fields: ClassVar[tuple[str, ...]] = ("peft_config",)

    def validate(self) -> None:
        if self.optimizer is not None:
            self._set_optim()
        options = _options(self.optim_args)
        if self.sign_descent and len(options) > 1:
            others = ", ".join(name for name in options if name != "sign")
            raise InputError(
                f"optim_args={self.optim_args}: steps by the gradient's signs have no {others}; leave sign=true "
                "or the others out"
            )
        if options.get("sign", "true").lower() not in ("true", "false"):
            raise InputError(f"optim_args={self.optim_args}: sign must be true or false; pass sign=true")
        if "sign" in options and self.optim != OptimizerNames.SGD:
            raise InputError(
                f"optim_args={self.optim_args} needs optim=sgd, but optim is "
                f"{getattr(self.optim, 'value', self.optim)}; pass optim=sgd, or leave optim_args out"
            )
        if self.fix_layers < 0:
            raise InputError(f"fix_layers must be 0 or more, got {self.fix_layers}")
        if not isinstance(self.peft_config, dict | None):
            raise InputError(
                f"peft_config must be a mapping of settings, got a {type(self.peft_config).__name__}; pass settings "
                'such as {"r": 8}, or wrap the model by get_peft_model and leave peft out'
            )
        if self.peft_config and self.peft is None:
            raise InputError("peft_config needs peft; pass a method of peft, such as peft=prefix_tuning")
        if self.fix_layers and self.peft is not None:
            raise InputError(
                f"peft={self.peft} freezes the whole model, so fix_layers={self.fix_layers} has no effect; leave one "
                "of them out"
            )
        if self.l2_loss and self.label_smoothing_factor:
            raise InputError(
                f"l2_loss and label_smoothing_factor={self.label_smoothing_factor} are two losses; pass one of them"
            )

    def _set_optim(self) -> None:
        if self.optimizer not in OPTIMIZERS:
            raise InputError(f"optimizer={self.optimizer!r} is unknown; choose from: {', '.join(OPTIMIZERS)}")
        default = next(f.default for f in fields(TrainingArguments) if f.name == "optim")
        wanted = {ADAM: OptimizerNames.ADAMW_TORCH_FUSED, SGD: OptimizerNames.SGD, SIGNGD: OptimizerNames.SGD}
        # A value that was set here before may be replaced: a hyperparameter search changes `optimizer`.
        ours = getattr(self, "_optim_set", None)
        if self.optim not in (default, ours, wanted[self.optimizer]):
            raise InputError(_both(self.optimizer, str(getattr(self.optim, "value", self.optim))))
        self.optim = self._optim_set = wanted[self.optimizer]
        if self.optimizer == SIGNGD:
            self.optim_args: str | None = _SIGNS
        elif self.optim_args == _SIGNS:
            self.optim_args = None
        said = f"optim={self.optim.value}" + (f", optim_args={_SIGNS}" if self.optimizer == SIGNGD else "")
        warnings.warn(f"optimizer={self.optimizer} is now {said}", FutureWarning, stacklevel=2)

    @property
    def sign_descent(self) -> bool:
        """Whether steps follow the gradient's signs: `optim=sgd` with `optim_args="sign=true"`."""
        return self.optim == OptimizerNames.SGD and _options(self.optim_args).get("sign", "").lower() == "true"

    @property
    def gradients(self) -> Gradients:
        return Gradients.WEIGHTS if self.peft is None else Gradients.ADAPTERS

    def check_given(self, given: dict[str, Any]) -> None:
        if "optim" in given and "optimizer" in given:
            raise InputError(_both(given["optimizer"], given["optim"]))
        super().check_given(given)


def _options(optim_args: str | None) -> dict[str, str]:
    """The `name=value` pairs of `optim_args`, separated by commas as in transformers."""
    pairs = (pair.partition("=") for pair in (optim_args or "").replace(" ", "").split(","))
    return {name: value for name, _, value in pairs if name}


def _both(optimizer: str, optim: str) -> str:
    return f"optimizer={optimizer} and optim={optim} both choose the optimizer; pass one of them"
