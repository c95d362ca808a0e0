"""YAML as recipes are written in it."""

import re
from pathlib import Path
from typing import Any

import yaml

from hf_ft_ext.errors import InputError

_HELPERS = (".", "_", "x-")  # top-level keys that start so set no argument
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


def load(path: Path) -> dict[str, Any]:
    """The mapping that the YAML file `path` holds; an empty file holds none.

    Anchors, aliases and merge keys work. Top-level keys that start with `.`, `_` or `x-` are left out: they are the
    place for what is merged elsewhere.

    Raises:
        InputError: no valid YAML, a key twice, or something else than a mapping.
    """
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
    return {key: value for key, value in recipe.items() if not key.startswith(_HELPERS)}
