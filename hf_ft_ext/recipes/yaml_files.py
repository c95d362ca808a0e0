"""Load YAML files of recipes: YAML 1.1 with stricter keys and more numbers."""

import re
from pathlib import Path
from typing import Any

import yaml

from hf_ft_ext.errors import InputError

_HELPERS = (".", "_", "x-")  # top-level keys with these prefixes set no argument
_MERGE = "tag:yaml.org,2002:merge"


class _Loader(yaml.SafeLoader):
    """YAML loader that reads `1e-4` as a number (YAML 1.1: text), and refuses duplicate keys and recursive anchors.

    Keys are checked when a mapping is composed, before merges (`<<: *anchor`) add keys of other mappings, which may
    be the same.
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


def _error(problem: str, node: yaml.Node | yaml.Event) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)[eE][-+]?[0-9]+$"),
    list("-+.0123456789"),
)


def load(path: Path) -> dict[str, Any]:
    """Return the mapping in the YAML file `path`; empty for an empty file.

    Anchors, aliases and merge keys work. Top-level keys that start with `.`, `_` or `x-` are left out: use them for
    mappings that are merged elsewhere.

    Raises:
        InputError: invalid YAML, a duplicate key, or something other than a mapping.
    """
    try:
        recipe = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"recipe {path} is not valid YAML: {' '.join(str(error).split())}") from error
    if recipe is None:
        return {}
    if not isinstance(recipe, dict):
        raise InputError(
            f"recipe {path} contains a {type(recipe).__name__}; it needs lines of the form `argument: value`"
        )
    return {key: value for key, value in recipe.items() if not key.startswith(_HELPERS)}
