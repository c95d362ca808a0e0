"""Two processes, one of which dies: the other ends with an error, soon, and both go on from what was saved."""

import copy
import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from random import Random

from accelerate.state import AcceleratorState, GradientState, PartialState
from forked import Ended, launch
from kills import Events, kill
from outcomes import Fault, Unbroken, finished, new_folder, shown
from workload import differences

import run_glue

KINDS = ("rank dies",)
BOUND = 60  # seconds from the death of one process to the end of the other


def as_rank(rank: int, world: int, port: int, fault: Callable[[], None] | None = None) -> Callable[[], None]:
    """What makes a fork one of `world` processes, and installs `fault` in it."""

    def install() -> None:
        about = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
        os.environ.update({key: str(value) for key, value in about.items()})
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), GLOO_SOCKET_IFNAME="lo")
        AcceleratorState._reset_state(True)  # this process may have been a single one before
        PartialState._reset_state()
        GradientState._reset_state()
        if fault is not None:
            fault()

    return install


def launch_two(argv: list[str], folder, faults=(None, None), seconds: float = 90, main=run_glue.main) -> list[Ended]:
    """Run `main(argv)` as two processes in `folder`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ended: list[Ended | None] = [None, None]

    def run(rank: int) -> None:
        fault = as_rank(rank, 2, port, faults[rank])
        ended[rank] = launch(argv, folder, fault, seconds=seconds, main=main, log=f".{rank}")

    threads = [threading.Thread(target=run, args=(rank,)) for rank in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return ended


def lose_one_and_recover(unbroken: Unbroken, kind: str, seed: int) -> Fault:
    """One of two processes is killed at a random module call; `unbroken` is a run of two processes."""
    workload, random = unbroken.workload, Random(f"{unbroken.workload.method} {kind} {seed}")
    folder, victim = new_folder(unbroken, "rank", seed), seed % 2
    at = random.randint(1, unbroken.counts["work"] // 2)
    what = f"process {victim} at work {at}"
    faults = [None, None]
    faults[victim] = Events("work", at, kill).install
    start = time.monotonic()
    both = launch_two(workload.argv, folder, faults, BOUND)
    if all(ended.status == 0 for ended in both):
        return finished(Fault(workload.method, kind, what, False, True), folder)
    survivor, found = both[1 - victim], ""
    if survivor.status in (0, None) and survivor.killed_by != signal.SIGABRT:
        found = f"the survivor ended wrongly after {time.monotonic() - start:.0f} s, {shown(survivor)}"
    ended = launch_two(workload.resumed, folder)
    if any(e.status == 2 and "checkpoint" in e.err for e in ended):
        ended = launch_two(workload.anew, folder)
    if bad := [e for e in ended if e.status != 0]:
        found = f"not recovered, {shown(bad[0])}"
    elif unequal := differences(folder, unbroken.folder):
        found = f"differs: {unequal[:3]}"
    hung = any(e.hung for e in (*both, *ended))
    return finished(Fault(workload.method, kind, what, True, not found and not hung, hung, found), folder)


def two(single: Unbroken) -> Unbroken:
    """The unbroken run of two processes that belongs to the run of one, which it is made beside once."""
    folder = single.folder.with_name(f"{single.folder.name}-two")
    both = copy.copy(single)
    both.folder = folder
    if not folder.exists():
        folder.mkdir()
        if bad := [ended for ended in launch_two(single.workload.argv, folder) if ended.status != 0]:
            raise RuntimeError(f"{single.workload.method}: two processes failed: {shown(bad[0])}")
    return both
