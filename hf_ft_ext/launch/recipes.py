"""YAML recipes: reading one, and checking each value against the type of the argument it sets."""

import datetime
import enum
import os
import re
import types
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

import yaml

from hf_ft_ext.errors import InputError
from hf_ft_ext.training.privacy import is_secret

_HELPERS = (".", "_", "x-")  # top-level keys that start so set no argument
_TRUTHS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
_MERGE = "tag:yaml.org,2002:merge"


class _Loader(yaml.SafeLoader):
    """YAML with `1e-4` as a number (YAML 1.1 reads it as text), no key twice, and no anchor within itself.

    Keys are checked when a mapping is composed. Later a merge (`<<: *anchor`) puts the merged mapping's keys beside
    those of the mapping itself, and both may have the same one.
    """

    def __init__(self, stream):
        super().__init__(stream)
        self._open: list[str] = []

    def compose_node(self, parent, index):
        event = self.peek_event()
        anchor = getattr(event, "anchor", None)
        if isinstance(event, yaml.AliasEvent):
            if anchor in self._open:
                raise _error(f"anchor &{anchor} contains itself (*{anchor})", event)
            if anchor not in self.anchors:
                raise _error(f"*{anchor} has no anchor &{anchor} above it", event)
        if anchor is None or isinstance(event, yaml.AliasEvent):
            return super().compose_node(parent, index)
        self._open.append(anchor)
        node = super().compose_node(parent, index)
        self._open.pop()
        return node

    def compose_mapping_node(self, anchor):
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key_node, value_node in node.value:
            merge = key_node.tag == _MERGE
            key = "<<" if merge else self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise _error(f"key {key!r} is not text", key_node)
            if key in seen:
                advice = "; merge several mappings with a list, <<: [*one, *two]" if merge else ""
                raise _error(f"key {key!r} appears twice{advice}", key_node)
            seen.add(key)
            if merge:
                _check_merged(value_node)
        return node


def _check_merged(node: yaml.Node) -> None:
    merged = node.value if isinstance(node, yaml.SequenceNode) else [node]
    for part in merged:
        if not isinstance(part, yaml.MappingNode):
            shown = "a list" if isinstance(part, yaml.SequenceNode) else repr(part.value)
            raise _error(f"<< merges mappings, got {shown}; give it *anchor of a mapping, or a list of such", part)


def _error(problem: str, place: yaml.Node | yaml.Event) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=place.start_mark)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)[eE][-+]?[0-9]+$"),
    list("-+.0123456789"),
)


def read_recipe(path: str | os.PathLike) -> dict[str, Any]:
    """Read the recipe at `path`: a YAML mapping from argument names to values.

    Anchors, aliases and merge keys work. Top-level keys that start with `.`, `_` or `x-` set no argument: they are the
    place for what is merged elsewhere.

    Raises:
        InputError: no such file, no valid YAML, a key twice, or something else than a mapping.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"recipe {str(path)!r} is not a file; pass the path of a YAML file, then the arguments")
    try:
        recipe = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"recipe {path} is not valid YAML: {' '.join(str(error).split())}") from error
    if recipe is None:
        return {}
    if not isinstance(recipe, dict):
        raise InputError(
            f"recipe {path} holds a {type(recipe).__name__}; it needs lines of the form `argument: value`"
        )
    arguments = {key: value for key, value in recipe.items() if not key.startswith(_HELPERS)}
    recipe = {}
    for key, value in arguments.items():
        name = key.replace("-", "_")
        if name in recipe:
            raise InputError(f"recipe {path} sets {name!r} twice, spelt with '-' and with '_'; leave one line out")
        recipe[name] = value
    return recipe


def checked(key: str, value: Any, hint: Any) -> Any:
    """Return `value` as the type `hint` asks for.

    Args:
        key: name of the argument, for the message.
        value: what YAML read; not `None`.
        hint: type of the dataclass field.

    Raises:
        InputError: the value is of another kind, in particular a number or a boolean where text is needed.
    """
    if is_secret(key) and not isinstance(value, str):
        raise InputError(f"{key} must be a text; put it in quotes (its value is not shown here)")
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


def _members(hint: Any) -> list[Any]:
    """The types that `hint` allows, `None` left out."""
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
        raise InputError(f"{key} needs a list without gaps, got {value}; leave the line out for the default")
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
