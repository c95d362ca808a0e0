"""Completing any `TrainingArguments` with a method's own fields: one object of both classes, all values kept."""

import functools
import itertools
import logging
from dataclasses import MISSING, Field, dataclass, fields
from enum import Enum
from typing import Any

from transformers import TrainingArguments

logger = logging.getLogger(__name__)

# A default of these libraries is not the user's choice: trl's learning rate of 2e-5, for example, is meant for
# training all weights.
_LIBRARIES = ("transformers", "trl")


def complete_training_arguments(args: TrainingArguments, own: type[TrainingArguments]) -> TrainingArguments:
    """Return an instance of both `own` and the class of `args`, with every value and attribute of `args`.

    `args` is not changed. A field of `own` that `args` lacks gets its default. If `own` overrides the default of a
    field and `args` still has the default of transformers or trl, the field gets the default of `own`, and this is
    logged. `__post_init__` is not run again: the user's class has run it, and devices and processes are set up.

    Args:
        args: an instance of `TrainingArguments` or of any subclass.
        own: the dataclass of a method's arguments.
    """
    if isinstance(args, own):
        return args
    completed = _empty(own, type(args))
    state = vars(completed)
    state.update(vars(args))
    theirs, known = library_defaults(type(args)), {f.name: f for f in fields(TrainingArguments)}
    for f in fields(own):
        if f.name not in state:
            state[f.name] = default_of(f)
        elif f.name in known and default_of(f) != default_of(known[f.name]) and state[f.name] == theirs[f.name]:
            logger.info("%s: %s=%s (the default was %s)", own.__name__, f.name, default_of(f), theirs[f.name])
            kind = type(state[f.name])
            state[f.name] = kind(default_of(f)) if issubclass(kind, Enum) else default_of(f)
    return completed


def default_of(f: Field) -> Any:
    """The default of a dataclass field, newly created if it has a factory; `None` if it has no default."""
    if f.default_factory is not MISSING:
        return f.default_factory()
    return None if f.default is MISSING else f.default


def library_defaults(kind: type[TrainingArguments]) -> dict[str, Any]:
    """Defaults by field name of the nearest base class of `kind` from transformers or trl."""
    library = next(c for c in kind.__mro__ if c.__module__.partition(".")[0] in _LIBRARIES)
    return {f.name: default_of(f) for f in fields(library)}


def chosen(args: TrainingArguments, name: str) -> bool:
    """Whether the argument `name` differs from its defaults in all classes of `args`.

    `None`, `False`, 0 and empty values are treated as equal, because transformers replaces one by another.
    """
    value = getattr(args, name, None)
    for kind in type(args).__mro__:
        own = vars(kind).get("__dataclass_fields__", {})
        if name in own and (value == default_of(own[name]) or (not value and not default_of(own[name]))):
            return False
    return hasattr(args, name)


def combined_class(*kinds: type[TrainingArguments]) -> type[TrainingArguments]:
    """A dataclass that derives from all of `kinds`, the first one's fields and methods before the others'."""
    parts = [part for kind in kinds for part in vars(kind).get("_combined_from", (kind,))]
    needed = [p for p in dict.fromkeys(parts) if not any(q is not p and issubclass(q, p) for q in parts)]
    return needed[0] if len(needed) == 1 else _combined(tuple(needed))


@functools.cache
def _combined(parts: tuple[type[TrainingArguments], ...]) -> type[TrainingArguments]:
    first, *others = (part.__name__ for part in parts)
    lists = [getattr(part, "_VALID_DICT_FIELDS", []) for part in reversed(parts)]
    namespace = {
        "__doc__": f"`{'` and `'.join(others)}` completed with the fields of `{first}`.",
        "__module__": parts[0].__module__,
        "__repr__": TrainingArguments.__repr__,
        "_VALID_DICT_FIELDS": list(dict.fromkeys(itertools.chain.from_iterable(lists))),
        "_combined_from": parts,
        # The class exists in this process only, so copying and unpickling rebuild it from its bases.
        "__reduce_ex__": lambda self, protocol: (_empty, parts, dict(vars(self))),
    }
    return dataclass(type(f"{first}With{'And'.join(others)}", parts, namespace))


def _empty(*kinds: type[TrainingArguments]) -> TrainingArguments:
    kind = combined_class(*kinds)
    return object.__new__(kind)
