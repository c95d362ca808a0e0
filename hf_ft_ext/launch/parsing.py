"""Parsing the command line and a recipe into the argument dataclasses."""

import argparse
import copy
import functools
import logging
import os
import re
import sys
from collections.abc import Callable
from dataclasses import fields
from typing import Any, NoReturn, get_type_hints

from transformers import HfArgumentParser, TrainingArguments

from hf_ft_ext.arguments import (
    DataArguments,
    FewShotArguments,
    LanguageArguments,
    MethodTrainingArguments,
    ModelArguments,
    RunArguments,
    own_fields,
)
from hf_ft_ext.errors import InputError, did_you_mean
from hf_ft_ext.launch.choice import Choice, read_choice
from hf_ft_ext.launch.values import checked, unsettable
from hf_ft_ext.methods import METHODS, Method, find_method, list_methods
from hf_ft_ext.training.sharing.privacy import hide_tokens

logger = logging.getLogger(__name__)

_CHOICES_AS_PLACEHOLDER = 10  # longer lists follow the help text
_CHOICES_SHOWN = 20  # even longer lists (optimizers) appear only in the error for a wrong value
_TRAINING = "training (transformers.TrainingArguments)"
_ALL_ARGUMENTS = "all"  # `--help all`
# arguments that users may know from elsewhere -> why they do not exist here
_REMOVED_ARGUMENTS = {"low_cpu_mem_usage": "transformers 5 always loads a model without a second copy of its weights"}
# What most people set among the arguments of transformers; `--help` shows these, `--help all` shows all.
_MOST_USED = frozenset(
    """
    do_train do_eval do_predict output_dir learning_rate num_train_epochs max_steps per_device_train_batch_size
    per_device_eval_batch_size gradient_accumulation_steps activation_checkpointing lr_scheduler_type
    warmup_steps weight_decay bf16 fp16 seed eval_strategy eval_steps save_strategy save_steps
    load_best_model_at_end logging_steps report_to push_to_hub resume_from_checkpoint use_cpu disable_tqdm
    """.split()
)
# Help texts of transformers' arguments for which the launcher does more than transformers.
_HELP = {
    "do_train": "Train. Without any of do_train, do_eval and do_predict the run trains and evaluates.",
    "do_eval": "Evaluate the result on the validation split.",
    "do_predict": "Write predictions for the test split.",
    "output_dir": "Folder of the run; none = runs/METHOD-TASK-seedSEED.",
    "resume_from_checkpoint": "true = resume from the last complete checkpoint in output_dir; or a checkpoint folder.",
    "push_to_hub": "Push the finished run to the Hub, with a model card.",
}


class Parser(HfArgumentParser):
    """`HfArgumentParser` for one method: grouped help, errors as `InputError`, and only given options."""

    def __init__(self, method: Method):
        self.hints: dict[str, Any] = {}
        self.choices: dict[str, list[str]] = {}
        arguments = method.arguments_class()
        self._name = method.name
        self._own = f"method {method.name}: {method.help}"
        self._advanced = f"method {method.name}, advanced: for studies of the method itself"
        super().__init__(
            (RunArguments, ModelArguments, DataArguments, arguments),
            allow_abbrev=False,
            add_help=False,
            usage=f"run_glue.py [recipe.yaml[#ROW]] [--method {{{','.join(METHODS)}}}] [--argument value ...]",
            formatter_class=_HelpFormatter,
        )
        shared = (RunArguments, ModelArguments, DataArguments, FewShotArguments, LanguageArguments)
        titles = [self._own, self._advanced, *(t._argument_group_name for t in shared)]
        order = {title: position for position, title in enumerate(titles)}
        self._action_groups.sort(key=lambda group: order.get(group.title, len(order)))

    def _add_dataclass_arguments(self, dtype: type) -> None:
        hints, own = get_type_hints(dtype), {field.name for field in own_fields(dtype)}
        groups: dict[str, Any] = {}
        for original in fields(dtype):
            if not original.init:
                continue
            field = copy.copy(original)
            field.type = hints[field.name]
            self.hints[field.name] = field.type
            title = self._group_title(dtype, field.name, own)
            if title not in groups:
                groups[title] = self.add_argument_group(title)
            before = len(self._actions)
            self._parse_dataclass_field(groups[title], field)
            shown, *complements = self._actions[before:]
            shown.help = _HELP.get(field.name, shown.help)
            if shown.type is not None and unsettable(self.hints[field.name]):
                shown.type = _or_none(shown.type)
            if shown.choices is not None:
                self.choices[field.name] = [str(choice) for choice in shown.choices]
                shown.choices = None  # checked later, together with the recipe's values
                self._show_choices(shown, self.choices[field.name])
            for action in complements:  # --no_x: accepted, not listed
                action.help = argparse.SUPPRESS

    @staticmethod
    def _show_choices(action: argparse.Action, choices: list[str]) -> None:
        if len(choices) <= _CHOICES_AS_PLACEHOLDER:
            action.metavar = f"{{{','.join(choices)}}}"
        elif len(choices) <= _CHOICES_SHOWN:
            action.help = f"{(action.help or '').rstrip('. ')}. One of: {', '.join(choices)}."

    def help_text(self, everything: bool) -> str:
        """The text of `--help`.

        Args:
            everything: with all arguments of transformers, not only the most used ones.
        """
        hidden = 0
        for group in self._action_groups:
            for action in group._group_actions if group.title == _TRAINING and not everything else ():
                if action.dest not in _MOST_USED and action.help != argparse.SUPPRESS:
                    action.help = argparse.SUPPRESS
                    hidden += 1
        if hidden:
            self.epilog = (
                f"{hidden} more arguments of transformers.TrainingArguments work as well; `--method {self._name} "
                f"--help {_ALL_ARGUMENTS}` lists them."
            )
        return self.format_help()

    def _group_title(self, dtype: Any, name: str, own: set[str]) -> str:
        if not issubclass(dtype, TrainingArguments):
            owner = next(base for base in reversed(dtype.__mro__) if name in getattr(base, "__annotations__", ()))
            return owner._argument_group_name
        if name not in own:
            return _TRAINING
        return self._advanced if name in dtype.advanced_fields else self._own

    def error(self, message: str) -> NoReturn:
        raise InputError(re.sub(r"argument (--\w+)/--\S+:", r"\1:", message))

    def given(self, argv: list[str], recipe: dict[str, Any]) -> dict[str, Any]:
        """The options that the user set: the checked values of the recipe, overridden by the command line.

        A word `none` of the command line takes a recipe's number or boolean back.

        Raises:
            InputError: unknown argument or key, or a value that cannot work.
        """
        line, rest = self.words(argv)
        if rest:
            raise InputError(self._unknown(rest))
        values = {}
        for key, value in recipe.items():
            if key not in self.hints:
                raise InputError(f"unknown recipe key {key!r}{self._hint_for(key)}")
            if value is not None:
                values[key] = checked(key, value, self.hints[key])
        values |= vars(line)  # `--name none` takes back what the recipe sets
        values = {key: value for key, value in values.items() if value is not None}
        for key, choices in self.choices.items():
            if key in values and str(values[key]) not in choices:
                raise InputError(
                    f"{key} cannot be {values[key]!r}{did_you_mean(values[key], choices)}; "
                    f"choose from: {', '.join(choices)}"
                )
        return values

    def words(self, argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
        """The options that the words `argv` set, and the words that are none of this method."""
        for action in self._actions:
            action.default = argparse.SUPPRESS
        return self.parse_known_args(argv)

    def _unknown(self, rest: list[str]) -> str:
        option = next((word for word in rest if word.startswith("-")), None)
        if option is None:
            return f"unexpected word {hide_tokens(rest[0])!r}: a recipe comes first, values follow their --argument"
        name = option.split("=")[0].lstrip("-").replace("-", "_")
        return f"unknown argument {option.split('=')[0]!r}{self._hint_for(name, '--')}"

    def _hint_for(self, key: str, dashes: str = "") -> str:
        for method in METHODS.values():
            if key in {f.name for f in fields(method.arguments_class()) if f.init}:
                return f": it belongs to method {method.name!r}; pass --method {method.name} or leave it out"
        if key in _REMOVED_ARGUMENTS:
            return f": {_REMOVED_ARGUMENTS[key]}; leave it out"
        near = did_you_mean(key, self.hints).replace("'", f"'{dashes}", 1)
        return near or "; `--help` lists all arguments"

    def build(self, given: dict[str, Any]) -> tuple:
        """The dataclasses, in the order run, model, data, training.

        Raises:
            InputError: a dataclass rejects its values.
        """
        built = []
        for dtype in self.dataclass_types:
            names = {f.name for f in fields(dtype) if f.init}
            try:
                built.append(dtype(**{key: value for key, value in given.items() if key in names}))
            except InputError:
                raise
            except (ValueError, TypeError, ImportError, OSError) as error:
                raise InputError(str(error)) from error
        return tuple(built)


def parse_arguments(
    argv: list[str] | None = None,
) -> tuple[RunArguments, ModelArguments, DataArguments, MethodTrainingArguments]:
    """Parse `[recipe.yaml[#ROW]] [--argument value ...]`; the command line overrides the recipe.

    Args:
        argv: the words after the program's name; `None` = those of this process.

    Returns:
        The arguments of run, model, data and training, with the launcher's defaults filled in
        (see `complete_arguments`). `run_args.given` holds the options that the user set.

    Raises:
        InputError: the input is invalid.
        SystemExit: `--help` or `--help all` was given and printed (status 0).
    """
    return parse_choice(read_choice(list(sys.argv[1:] if argv is None else argv)))


def parse_choice(
    choice: Choice,
) -> tuple[RunArguments, ModelArguments, DataArguments, MethodTrainingArguments]:
    """Parse the words of `choice`, with the parser of its method.

    Returns and raises the same as `parse_arguments`.
    """
    if choice.help:
        everything = choice.help == _ALL_ARGUMENTS
        sys.stdout.write(list_methods() if choice.method is None else Parser(choice.method).help_text(everything))
        raise SystemExit(0)
    method, recipe = choice.method, choice.recipe
    if method is None and (method := _method_of_run(choice)) is not None:
        recipe = {**recipe, "method": method.name}
    method = find_method(RunArguments.method) if method is None else method
    return arguments_of(_parser(method, method.arguments_class()), choice.argv, recipe)


def arguments_of(
    parser: Parser, argv: list[str], recipe: dict[str, Any]
) -> tuple[RunArguments, ModelArguments, DataArguments, MethodTrainingArguments]:
    """Build the arguments from a recipe's settings and the words `argv`, with the parser of their method.

    Returns and raises the same as `parse_arguments`.
    """
    # imports `Trainer`, which is slow and not needed for --help or a misspelt method
    from hf_ft_ext.launch.defaults import complete_arguments

    given = parser.given(argv, recipe)
    run_args, model_args, data_args, training_args = parser.build(given)
    run_args.given = given
    training_args.check_given(given)
    complete_arguments(run_args, model_args, data_args, training_args)
    return run_args, model_args, data_args, training_args


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """One spelling and one short placeholder for each argument."""

    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=30)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        kind = getattr(action.type, "__name__", "text")
        word = action.metavar or {"int": "INTEGER", "float": "NUMBER", "string_to_bool": "[true|false]"}.get(
            kind, "TEXT"
        )
        return f"{action.option_strings[0]} {word}{' ...' if action.nargs == '+' else ''}"

    def _get_help_string(self, action: argparse.Action) -> str:
        text = super()._get_help_string(action) or ""
        return text.replace("(default: %(default)s)", f"(default: {_plain(action.default)})").strip()


def _or_none(kind: Callable[[str], Any]) -> Callable[[str], Any]:
    """The conversion `kind` of a word of the command line, with `none` for no value; help and errors name `kind`."""

    @functools.wraps(kind)
    def convert(word: str) -> Any:
        return None if word == "none" else kind(word)

    return convert


def _plain(value: Any) -> str:
    value = getattr(value, "value", value)  # the value of an enum member
    return "none" if value is None else str(value).replace("%", "%%")


def _method_of_run(choice: Choice) -> Method | None:
    """The method of the run whose folder a command without a method evaluates; `None` if it trains."""
    default = find_method(RunArguments.method)
    line, _ = _parser(default, default.arguments_class()).words(choice.argv)
    given = {**choice.recipe, **vars(line)}
    folder = given.get("model_name_or_path")
    if not isinstance(folder, str) or given.get("do_train") not in (None, False):
        return None
    if not given.get("do_eval") and not given.get("do_predict"):
        return None
    # imports torch
    from hf_ft_ext.training.runs.record import recorded_method

    name = recorded_method(os.path.expanduser(folder))
    if name not in METHODS or name == default.name:
        return None
    logger.info("Using the method of the run in '%s': %s.", folder, name)
    return METHODS[name]


@functools.cache  # several runs in one process share it
def _parser(method: Method, arguments: type) -> Parser:
    """The parser of a method whose arguments are the class `arguments`; not for its help, which changes it."""
    return Parser(method)
