"""How a run ends: by a signal, and how a process of several leaves."""

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
_AGAIN = 0.05  # seconds


class Interrupted(KeyboardInterrupt):
    """The run was asked to end by the signal `number`.

    A `KeyboardInterrupt`, so that no `except Exception` on the way takes it for a failure.
    """

    def __init__(self, number: int):
        super().__init__(number)
        self.number = number

    @property
    def name(self) -> str:
        return signal.Signals(self.number).name

    @property
    def status(self) -> int:
        """The exit status that shells use for it: 143 for SIGTERM, 130 for Ctrl-C."""
        return 128 + self.number


class Signals:
    """A context in which SIGTERM and SIGINT raise `Interrupted`, or are noted while somebody else will act on them.

    Attributes:
        waits: somebody looks at `requested` and ends the run soon; the same signal once more raises all the same.
        requested: the first signal that came while `waits`.
        raised: the signal that `Interrupted` was raised for. Libraries turn that into errors of their own.
        output_dir: the run's folder as soon as it is known.
    """

    def __init__(self):
        self.waits = False
        self.requested: int | None = None
        self.raised: int | None = None
        self.output_dir: str | None = None
        self._owner = os.getpid()
        self._before: dict[int, Any] = {}  # handlers as `signal.signal` returns them

    def __enter__(self) -> "Signals":
        if threading.current_thread() is threading.main_thread():  # others may not set handlers
            self._before = {number: signal.signal(number, self._handle) for number in _NUMBERS}
            self._unraisable, sys.unraisablehook = sys.unraisablehook, self._send_again
        return self

    def __exit__(self, *exception) -> None:
        if self._before:
            sys.unraisablehook = self._unraisable
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def _send_again(self, unraisable) -> None:
        """A destructor or weak reference was running, and Python lets none of them raise: send it once more, later."""
        if isinstance(unraisable.exc_value, Interrupted) and os.getpid() == self._owner:
            threading.Timer(_AGAIN, os.kill, (self._owner, unraisable.exc_value.number)).start()
        else:
            self._unraisable(unraisable)

    def check(self) -> None:
        """Raise `Interrupted` again if a library has swallowed it."""
        if self.raised is not None:
            raise Interrupted(self.raised)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._owner:  # a data worker has inherited the handler
            if number == signal.SIGTERM:
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)
            return  # Ctrl-C goes to the whole group: the first process decides
        # torchrun passes Ctrl-C on as SIGTERM, which must not count as a second order.
        if self.waits and self.requested != number:
            if self.requested is None:
                self.requested = number
                if Process.this().first and not another_failed():
                    os.write(2, b"interrupted: a checkpoint follows this step; once more ends the run at once\n")
            return
        self.raised = number
        raise Interrupted(number)


_kept: list[object] = []


def keep(thing: object) -> None:
    """Hold `thing`, which may hold a DDP model, until the process leaves.

    Once the process group is destroyed, a DDP model that is freed holds the GIL and waits for gloo's thread, which may
    want the GIL to free the tensors of the last barrier: a deadlock (torch 2.13).
    """
    _kept.append(thing)


def leave(status: int) -> NoReturn:
    """End this process with `status`, once other threads, exit handlers and output are done.

    Threads of gloo and autograd that wake up while the interpreter is torn down abort the process (pytorch issue
    190489, open with torch 2.13). `multiprocessing` ends its forked processes in the same way.
    """
    threading._shutdown()  # type: ignore[attr-defined]  # waits for threads that are no daemons, as the interpreter does
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # a closed pipe
            stream.flush()
    os._exit(status)
