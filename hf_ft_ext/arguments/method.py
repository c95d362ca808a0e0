"""The base of every method's arguments, which completes any `TrainingArguments`."""

import copy
import json
from dataclasses import Field, dataclass, fields
from enum import Enum
from typing import Any, ClassVar

from transformers import TrainingArguments

from hf_ft_ext.arguments.completion import complete_training_arguments
from hf_ft_ext.errors import InputError, did_you_mean


def own_fields(arguments: type) -> list[Field]:
    """The fields that a dataclass of arguments has itself: transformers lacks them, or has another default."""
    inherited = {f.name: f.default for f in fields(TrainingArguments)}
    if not issubclass(arguments, TrainingArguments):
        inherited = {}
    return [f for f in fields(arguments) if f.init and (f.name not in inherited or inherited[f.name] != f.default)]


class Gradients(Enum):
    """What a method's gradients are for.

    Attributes:
        WEIGHTS: they change weights of the pretrained model.
        ADAPTERS: they pass through its weights, which stay as they are, and change what was added.
        NONE: there are none.
    """

    WEIGHTS = "weights"
    ADAPTERS = "adapters"
    NONE = "none"


@dataclass
class MethodTrainingArguments(TrainingArguments):
    """Base of every method's arguments: `transformers.TrainingArguments` and a way in for all subclasses of it.

    Attributes:
        needs_all_rows: whether the method looks at the training data as a whole, so that no stream will do.
        json_fields: the method's own mappings, which the command line gives as JSON.
        advanced_fields: arguments that only studies of the method need, a group of their own in `--help`.
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
                    raise InputError(f"{name}={value!r} is no JSON: {error}") from None

    def validate(self) -> None:
        """Check the method's own values and set what follows from them.

        Called when the arguments are made, when other arguments are completed to these, when a trainer takes them,
        and after a hyperparameter search has set values: so it has to give the same when it is called again.

        Raises:
            InputError: a value out of range, or values that contradict each other.
        """

    @property
    def gradients(self) -> Gradients:
        """What gradients are for: it decides in which number format the launcher loads the weights."""
        return Gradients.WEIGHTS

    @property
    def needs_validation(self) -> bool:
        """Whether the method itself looks at the validation rows, evaluation or not."""
        return False

    def check_given(self, given: dict[str, Any]) -> None:
        """Refuse what the user set, by argument name, and the method cannot honour even at its default value.

        Raises:
            InputError: there is such an argument.
        """

    def take_positive_label(self, name: str | None) -> bool:
        """Take the name of the task's positive class where the method itself asks for one; say whether it does."""
        return False

    @classmethod
    def complete(cls, args: TrainingArguments | None, **values: Any) -> "MethodTrainingArguments":
        """Return `args` as an instance of this class, the fields it lacks filled with this class's defaults.

        The result is of the class of `args` too (`SFTConfig`, `Seq2SeqTrainingArguments`, your own) and keeps all its
        values and attributes. A field that still has transformers' or trl's default where this class has a default of
        its own takes the latter; the log says so.

        Args:
            args: arguments of this class (returned as they are), `TrainingArguments`, any subclass, or `None`.
            values: values of this class's own arguments, for the result.

        Raises:
            InputError: `args` are another method's, are not `TrainingArguments`, or hold values that cannot work.
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
        # A class of another package that does its checks in `__post_init__`: it is made anew.
        made = type(completed)(**{f.name: getattr(completed, f.name) for f in fields(completed) if f.init})
        vars(made).update({name: value for name, value in vars(args).items() if name not in vars(made)})
        return made
