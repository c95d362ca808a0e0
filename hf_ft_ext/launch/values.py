"""Checking each value of a recipe against the type of its argument."""

import datetime
import enum
import types
from typing import Any, Literal, Union, get_args, get_origin

from hf_ft_ext.errors import InputError
from hf_ft_ext.training.sharing.privacy import is_secret

_TRUTHS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}


def checked(key: str, value: Any, hint: Any) -> Any:
    """Convert `value` to the type `hint`.

    Args:
        key: name of the argument, for the message.
        value: the value that YAML read; not `None`.
        hint: type of the dataclass field.

    Raises:
        InputError: the value has another type, such as a number or a boolean where text is needed.
    """
    if is_secret(key) and not isinstance(value, str):
        raise InputError(f"{key} must be text; put it in quotes (its value is not shown here)")
    kinds = _members(hint)
    if key == "resume_from_checkpoint" and isinstance(value, bool):
        return "true" if value else None
    if isinstance(value, bool):
        if bool in kinds or any(get_origin(kind) is Literal and value in get_args(kind) for kind in kinds):
            return value
    elif isinstance(value, int | float):
        if int in kinds and float(value).is_integer():
            return int(value)
        if float in kinds:
            return float(value)
        if int in kinds:
            raise InputError(f"{key} needs a whole number, got {value}")
    elif isinstance(value, str):
        return _checked_text(key, value, kinds)
    elif isinstance(value, list):
        return _checked_list(key, value, kinds)
    elif isinstance(value, dict):
        if not any(kind is dict or get_origin(kind) is dict for kind in kinds):
            raise InputError(f"{key} takes no mapping, got {value}; give it {_needed(kinds)}")
        return value
    elements = _element_type(kinds)
    if elements is not None and isinstance(value, bool | int | float):
        return [checked(key, value, elements)]
    if _takes_text(kinds):
        raise InputError(_unquoted(key, value))
    raise InputError(f"{key} needs {_needed(kinds)}, got {value!r}")


def unsettable(hint: Any) -> bool:
    """Whether the word `none` can only mean no value: `hint` allows `None`, and else numbers or booleans."""
    return type(None) in get_args(hint) and set(_members(hint)) <= {int, float, bool}


def _members(hint: Any) -> list[Any]:
    """The types that `hint` allows, except `None`."""
    if get_origin(hint) in (Union, types.UnionType):
        return [member for arg in get_args(hint) for member in _members(arg)]
    return [] if hint is type(None) else [hint]


def _takes_text(kinds: list[Any]) -> bool:
    return any(
        kind is str
        or (isinstance(kind, type) and issubclass(kind, enum.Enum))
        or (get_origin(kind) is Literal and any(isinstance(choice, str) for choice in get_args(kind)))
        for kind in kinds
    )


def _element_type(kinds: list[Any]) -> Any:
    return next((get_args(kind)[0] for kind in kinds if get_origin(kind) is list), None)


def _checked_text(key: str, value: str, kinds: list[Any]) -> Any:
    if _takes_text(kinds):
        return value
    for number in (int, float):
        if number in kinds:
            try:
                return number(value)
            except ValueError:
                continue
    if bool in kinds and value.lower() in _TRUTHS:
        return _TRUTHS[value.lower()]
    elements = _element_type(kinds)
    if elements is not None:
        return [checked(key, value, elements)]
    raise InputError(f"{key} needs {_needed(kinds)}, got the text {value!r}")


def _checked_list(key: str, value: list, kinds: list[Any]) -> list:
    elements = _element_type(kinds)
    if elements is None:
        raise InputError(f"{key} takes one value, got the list {value}; give it {_needed(kinds)}")
    if not value or any(item is None for item in value):
        raise InputError(f"{key} needs a non-empty list of values, got {value}; leave the line out for the default")
    return [checked(key, item, elements) for item in value]


def _unquoted(key: str, value: Any) -> str:
    if isinstance(value, bool):
        words = "no, off or false" if value is False else "yes, on or true"
        example = '"no"' if value is False else '"yes"'
        return (
            f"{key} needs text, got the boolean {str(value).lower()} (YAML reads {words} as a boolean); "
            f"quote it, for example {key}: {example}"
        )
    kind = "date" if isinstance(value, datetime.date) else "number"
    return f'{key} needs text, got the {kind} {value}; quote it: {key}: "{value}"'


def _needed(kinds: list[Any]) -> str:
    if _takes_text(kinds):
        return "text"
    if int in kinds and float not in kinds:
        return "a whole number"
    if int in kinds or float in kinds:
        return "a number"
    if bool in kinds:
        return "true or false"
    if _element_type(kinds) is not None:
        return "a list"
    return "a mapping" if any(kind is dict or get_origin(kind) is dict for kind in kinds) else "another value"
