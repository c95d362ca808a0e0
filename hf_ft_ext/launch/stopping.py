"""Ending a run by a signal, and ending one of several processes."""

import atexit
import contextlib
import os
import signal
import sys
import threading
from types import FrameType
from typing import Any, NoReturn

from hf_ft_ext.launch.processes import Process, another_failed

_NUMBERS = (signal.SIGTERM, signal.SIGINT)
_RESEND_AFTER = 0.05  # seconds


class Interrupted(KeyboardInterrupt):
    """The signal `number` asked the run to end.

    It derives from `KeyboardInterrupt`, so that no `except Exception` catches it as a failure.
    """

    def __init__(self, number: int):
        super().__init__(number)
        self.number = number

    @property
    def name(self) -> str:
        return signal.Signals(self.number).name

    @property
    def status(self) -> int:
        """The exit status of shells for this signal: 143 for SIGTERM, 130 for Ctrl-C."""
        return 128 + self.number


class Signals:
    """A context in which SIGTERM and SIGINT raise `Interrupted`, or are only recorded while `waits` is set.

    Attributes:
        waits: whether a callback checks `requested` and ends the run soon. The same signal again still raises.
        requested: the first signal received while `waits` was set.
        raised: the signal for which `Interrupted` was raised; libraries may turn that into other errors.
        output_dir: the run's folder, once it is known.
        found: what a search of hyperparameters has chosen, by argument name; empty without one.
    """

    def __init__(self):
        self.waits = False
        self.requested: int | None = None
        self.raised: int | None = None
        self.output_dir: str | None = None
        self.found: dict[str, Any] = {}
        self._owner = os.getpid()
        self._before: dict[int, Any] = {}  # handlers as `signal.signal` returns them

    def __enter__(self) -> "Signals":
        if threading.current_thread() is threading.main_thread():  # other threads may not set handlers
            self._before = {number: signal.signal(number, self._handle) for number in _NUMBERS}
            self._unraisable, sys.unraisablehook = sys.unraisablehook, self._send_again
        return self

    def __exit__(self, *exception) -> None:
        if self._before:
            sys.unraisablehook = self._unraisable
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def _send_again(self, unraisable) -> None:
        """Send the signal again later, if it arrived in a destructor or weak-reference callback."""
        if isinstance(unraisable.exc_value, Interrupted) and os.getpid() == self._owner:
            threading.Timer(_RESEND_AFTER, os.kill, (self._owner, unraisable.exc_value.number)).start()
        else:
            self._unraisable(unraisable)

    def check(self) -> None:
        """Raise `Interrupted` again if a library has swallowed it."""
        if self.raised is not None:
            raise Interrupted(self.raised)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._owner:  # a data-loader worker inherited the handler
            if number == signal.SIGTERM:
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)
            return  # Ctrl-C reaches the whole process group; the main process handles it
        # torchrun passes Ctrl-C on as SIGTERM, which must not count as a second signal.
        if self.waits and self.requested != number:
            if self.requested is None:
                self.requested = number
                if Process.this().first and not another_failed():
                    os.write(2, b"interrupted: a checkpoint follows this step; once more ends the run at once\n")
            return
        self.raised = number
        raise Interrupted(number)


_alive: list[object] = []


def keep_alive(thing: object) -> None:
    """Keep a reference to `thing`, which may hold a DDP model, until the process ends.

    A DDP model that is freed after the process group is destroyed holds the GIL and waits for gloo's thread. That
    thread may need the GIL to free the tensors of the last barrier: a deadlock (torch 2.13).
    """
    _alive.append(thing)


def end_process(status: int) -> NoReturn:
    """End this process with `status` after other threads, exit handlers and output have finished.

    Threads of gloo and autograd that wake up while the interpreter shuts down abort the process (pytorch issue 190489,
    open with torch 2.13). `multiprocessing` ends its forked processes in the same way.
    """
    threading._shutdown()  # type: ignore[attr-defined]  # waits for non-daemon threads, as the interpreter does
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # a closed pipe
            stream.flush()
    os._exit(status)
