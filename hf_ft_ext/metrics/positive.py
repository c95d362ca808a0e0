"""Which of two classes is the positive one: as named, or by what the names themselves say. Never by their order."""

import logging
import re
from collections.abc import Sequence

from hf_ft_ext.errors import InputError, did_you_mean

# Pairs of which the second one is the positive class wherever they are used.
_PAIRS = (
    ("0", "1"), ("-1", "1"), ("label_0", "label_1"), ("false", "true"), ("f", "t"), ("no", "yes"), ("n", "y"),
    ("neg", "pos"), ("negative", "positive"), ("unacceptable", "acceptable"), ("incorrect", "correct"),
    ("absent", "present"), ("off", "on"),
)  # fmt: skip
_NEGATION = re.compile(r"^(?:not|non|no)[ _-]+")

logger = logging.getLogger(__name__)


def evident_positive(names: Sequence[str]) -> str | None:
    """The positive class of two by their names (`1` of 0 and 1, `spam` of `not_spam` and `spam`), or `None`."""
    if len(names) != 2:
        return None
    first, second = (str(name).strip().lower() for name in names)
    for negative, positive in _PAIRS:
        if {first, second} == {negative, positive}:
            return names[0] if first == positive else names[1]
    for negative, positive, name in ((first, second, names[1]), (second, first, names[0])):
        if _NEGATION.match(negative) and _NEGATION.sub("", negative) == positive:
            return name
    return None


def positive_id(names: Sequence[str] | None, wanted: str | None, metric: str) -> int:
    """Id of the positive class.

    Args:
        names: of the classes by id; `None` = unknown, so that ids are all there is: class 1.
        wanted: its name, case aside where that leaves no doubt; `None` = the one that `evident_positive` finds.
        metric: what needs it, for the message.

    Raises:
        InputError: there is no such class, or the names do not say which it is.
    """
    if names is None:
        if wanted is not None:
            raise InputError(f"positive_label={wanted!r} needs label_names, the names of the classes by id")
        return 1
    if wanted is not None:
        return _found(names, str(wanted))
    evident = evident_positive(names)
    if evident is None:
        shown = ", ".join(map(str, names[:10])) + (", ..." if len(names) > 10 else "")
        other = "" if len(names) == 2 else ", or take an average over the classes, such as f1_macro"
        raise InputError(
            f"metric '{metric}' is about one class, the positive one, and the labels do not say which of them it is: "
            f"{shown}; name it with --positive_label (positive_label=){other}"
        )
    return list(names).index(evident)


def _found(names: Sequence[str], wanted: str) -> int:
    exact = [i for i, name in enumerate(names) if str(name) == wanted]
    near = exact or [i for i, name in enumerate(names) if str(name).strip().lower() == wanted.strip().lower()]
    if len(near) != 1:
        shown = ", ".join(map(str, names[:10])) + (", ..." if len(names) > 10 else "")
        raise InputError(f"positive_label={wanted!r} is not a label{did_you_mean(wanted, names)}; they are: {shown}")
    return near[0]
