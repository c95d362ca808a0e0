"""Find the positive class: by its name, or inferred from the names of two classes, never from their order."""

import logging
import re
from collections.abc import Sequence

from hf_ft_ext.errors import InputError, did_you_mean

# Pairs of names (negative, positive) with a conventional meaning.
_PAIRS = (
    ("0", "1"), ("-1", "1"), ("label_0", "label_1"), ("false", "true"), ("f", "t"), ("no", "yes"), ("n", "y"),
    ("neg", "pos"), ("negative", "positive"), ("unacceptable", "acceptable"), ("incorrect", "correct"),
    ("absent", "present"), ("off", "on"),
)  # fmt: skip
_NEGATION = re.compile(r"^(?:not|non|no)[ _-]+")

logger = logging.getLogger(__name__)


def evident_positive(names: Sequence[str]) -> str | None:
    """Infer the positive class of two from their names: `1` of 0 and 1, `spam` of `not_spam` and `spam`; or `None`."""
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
    """Return the id of the positive class.

    Args:
        names: of the classes by id; `None` = unknown: then it is class 1.
        wanted: its name, in any case of letters if that is unambiguous; `None` = inferred by `evident_positive`.
        metric: the metric that needs it, for messages.

    Raises:
        InputError: there is no such class, or it cannot be inferred from the names.
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
        other = "" if len(names) == 2 else ", or use an average over the classes, such as f1_macro"
        raise InputError(
            f"metric '{metric}' needs a positive class, which cannot be inferred from the labels {shown}; pass "
            f"--positive_label (positive_label=){other}"
        )
    return list(names).index(evident)


def _found(names: Sequence[str], wanted: str) -> int:
    exact = [i for i, name in enumerate(names) if str(name) == wanted]
    near = exact or [i for i, name in enumerate(names) if str(name).strip().lower() == wanted.strip().lower()]
    if len(near) != 1:
        shown = ", ".join(map(str, names[:10])) + (", ..." if len(names) > 10 else "")
        raise InputError(f"positive_label={wanted!r} is not a label{did_you_mean(wanted, names)}; they are: {shown}")
    return near[0]
