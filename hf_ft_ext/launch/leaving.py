"""How a process of several leaves: all that is due at the end, and no teardown of the interpreter."""

import atexit
import contextlib
import os
import sys
import threading
from typing import NoReturn

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
