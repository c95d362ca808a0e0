"""The base class of all methods' arguments, which completes any `TrainingArguments`."""

import copy
import json
from dataclasses import Field, dataclass, field, fields
from enum import Enum
from typing import Any, ClassVar

from transformers import TrainingArguments

from hf_ft_ext.arguments.completion import complete_training_arguments
from hf_ft_ext.errors import InputError, did_you_mean


def own_fields(arguments: type) -> list[Field]:
    """The fields of an arguments dataclass that transformers lacks or gives another default."""
    inherited = {f.name: f.default for f in fields(TrainingArguments)}
    if not issubclass(arguments, TrainingArguments):
        inherited = {}
    return [f for f in fields(arguments) if f.init and (f.name not in inherited or inherited[f.name] != f.default)]


class Gradients(Enum):
    """Which parameters a method's gradients change.

    Attributes:
        WEIGHTS: weights of the pretrained model.
        ADAPTERS: added parameters only; gradients pass through the frozen pretrained weights.
        NONE: the method computes no gradients.
    """

    WEIGHTS = "weights"
    ADAPTERS = "adapters"
    NONE = "none"


@dataclass
class MethodTrainingArguments(TrainingArguments):
    """Base class of all methods' arguments; `complete` converts other `TrainingArguments` to it.

    Attributes:
        needs_all_rows: whether the method needs all training rows at once, so that it cannot read a stream.
        json_fields: names of the method's mapping arguments, given as JSON on the command line.
        advanced_fields: names of arguments for studies of the method, in a separate group of `--help`.
    """

    needs_all_rows: ClassVar[bool] = False
    json_fields: ClassVar[tuple[str, ...]] = ()
    advanced_fields: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self):
        self._read_json()
        super().__post_init__()
        self.validate()

    def _read_json(self) -> None:
        for name in self.json_fields:
            if isinstance(value := getattr(self, name), str):
                try:
                    setattr(self, name, json.loads(value))
                except ValueError as error:
                    raise InputError(f"{name}={value!r} is not valid JSON: {error}") from None

    def validate(self) -> None:
        """Check the method's own values and set derived ones.

        Called when the arguments are created, when other arguments are completed to these, when a trainer receives
        them, and after a hyperparameter search has set values. Repeated calls must give the same result.

        Raises:
            InputError: a value out of range, or values that contradict each other.
        """

    @property
    def gradients(self) -> Gradients:
        """Which parameters gradients change; the launcher chooses the number format of the weights by it."""
        return Gradients.WEIGHTS

    @property
    def needs_validation(self) -> bool:
        """Whether the method itself reads the validation rows, with or without evaluation."""
        return False

    def check_given(self, given: dict[str, Any]) -> None:
        """Refuse arguments that the user set and that the method cannot honour, even at their default values.

        Args:
            given: the options that the user set, by name.

        Raises:
            InputError: there is such an argument.
        """

    def take_positive_label(self, name: str | None) -> bool:
        """Accept the name of the task's positive class, if the method uses one; return whether it does."""
        return False

    @classmethod
    def complete(cls, args: TrainingArguments | None, **values: Any) -> "MethodTrainingArguments":
        """Return `args` as an instance of this class; missing fields get this class's defaults.

        The result is also an instance of the class of `args` (`SFTConfig`, `Seq2SeqTrainingArguments`, your own) and
        keeps all its values and attributes. If this class overrides a default and the field still has the default of
        transformers or trl, the field gets this class's default, and this is logged.

        Args:
            args: arguments of this class (returned unchanged), `TrainingArguments`, any subclass, or `None`.
            values: values to set in the result, by argument name.

        Raises:
            InputError: `args` belong to another method, are not `TrainingArguments`, or hold invalid values.
        """
        if args is None:
            return cls(**values)
        if not isinstance(args, TrainingArguments):
            raise InputError(f"args is a {type(args).__name__}; pass {cls.__name__} or other TrainingArguments")
        if isinstance(args, MethodTrainingArguments) and not isinstance(args, cls):
            raise InputError(
                f"got {type(args).__name__}, which belongs to another method; pass {cls.__name__} or other "
                "TrainingArguments"
            )
        known = {f.name for f in fields(cls) if f.init}
        if unknown := [name for name in values if name not in known]:
            raise InputError(f"{cls.__name__} has no argument {unknown[0]!r}{did_you_mean(unknown[0], known)}")
        completed = complete_training_arguments(args, cls)
        if values and completed is args:
            completed = copy.copy(args)
        vars(completed).update(values)
        if completed is args:
            return args
        completed._read_json()
        if cls.__post_init__ is MethodTrainingArguments.__post_init__:
            completed.validate()
            return completed
        # A class of another package with its own `__post_init__`: create the object again, so that its checks run.
        made = type(completed)(**{f.name: getattr(completed, f.name) for f in fields(completed) if f.init})
        vars(made).update({name: value for name, value in vars(args).items() if name not in vars(made)})
        return made


@dataclass
class FeatureCacheArguments(MethodTrainingArguments):
    """Arguments of methods that read what a frozen encoder computes: where it is kept, and up to which size."""

    feature_cache_gb: float = field(
        default=4.0,
        metadata={
            "help": "With a frozen encoder: compute once the features that the head reads and cache them on disk, if "
            "they take at most this many GB; else, and with 0, gradientless computes them in every step and "
            "linearhead keeps them in memory."
        },
    )
    feature_cache_dir: str | None = field(
        default=None, metadata={"help": "Folder of the feature cache; none = next to the Hub's cache."}
    )

    def validate(self) -> None:
        super().validate()
        if not self.feature_cache_gb >= 0:
            raise InputError(f"feature_cache_gb must be 0 or more, got {self.feature_cache_gb}")
