"""Exceptions for bad input and failed pushes, and helpers for their messages."""

import difflib


class InputError(ValueError):
    """Invalid input of the user.

    The message names the value, the cause and the next action. It is raised before training whenever the error can be
    detected by then. The launcher prints it without a traceback and exits with status 2.
    """


class DivergedError(InputError):
    """Training has diverged: a loss or a weight is NaN or infinite."""


class PushError(Exception):
    """A finished run could not be pushed to the Hub.

    The message gives the reason, the folder of the result, and the command that pushes it. The launcher prints it
    without a traceback and exits with status 3.
    """


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or the name of its class without one."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def did_you_mean(word: object, known) -> str:
    """`; did you mean 'x'?` with the member of `known` closest to `word`; empty if none is close."""
    near = difflib.get_close_matches(str(word), [str(item) for item in known], n=1, cutoff=0.6)
    return f"; did you mean {near[0]!r}?" if near else ""
