"""What goes wrong by the user's input or on the way to the Hub, and hints in the messages."""

import difflib


class InputError(ValueError):
    """Something the user passed cannot work.

    The message names the value, the cause and the next action. Raised before any training
    starts wherever the fault can be known by then; the launcher prints it without a traceback
    and exits with status 2.
    """


class PushError(Exception):
    """A finished run could not be pushed to the Hub.

    The message says why, where the result lies, and the command that pushes it. The launcher prints it without a
    traceback and exits with status 3.
    """


def first_line(error: BaseException) -> str:
    """The first line of an error's message; its class where it has none."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def did_you_mean(word: object, known) -> str:
    """`; did you mean 'x'?` with the member of `known` nearest to `word`, or nothing if none is near."""
    near = difflib.get_close_matches(str(word), [str(item) for item in known], n=1, cutoff=0.6)
    return f"; did you mean {near[0]!r}?" if near else ""
