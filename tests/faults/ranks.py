"""Two processes, one of which dies: the other ends with an error, soon, and both go on from what was saved."""

import copy
import signal
import time
from random import Random

from kills import Events, kill
from outcomes import Fault, Unbroken, finished, new_folder, shown
from processes import launch_two
from workload import differences

KINDS = ("rank dies",)
BOUND = 60  # seconds from the death of one process to the end of the other


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
