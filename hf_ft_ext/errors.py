"""The one exception type for input that cannot work."""


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
