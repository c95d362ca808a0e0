"""Runs that are killed, or stopped by SIGTERM and Ctrl-C, go on as a user would, to the end of the unbroken run.

At a signal the state is saved, and the exit status says what happened.
"""

import os
import re
import signal
from random import Random

from kills import Events, draw
from outcomes import Fault, Unbroken, finished, new_folder, recover, shown
from processes import launch
from quick import ITERATIVE_METHODS
from workload import differences

KINDS = ("SIGTERM", "SIGINT")
_STATUS = {"SIGTERM": 143, "SIGINT": 130}


def kill_and_recover(unbroken: Unbroken, kind: str, seed: int) -> Fault:
    """One kill of `kind` (see `kills`), drawn from `seed`; every third is followed by another one while recovering."""
    workload, random = unbroken.workload, Random(f"{unbroken.workload.method} {kind} {seed}")
    folder = new_folder(unbroken, kind, seed)
    moment, what = draw(kind, random, unbroken.counts, unbroken.seconds, unbroken.largest)
    first = launch(workload.argv, folder, **moment)
    if first.status == 0:
        return finished(Fault(workload.method, kind, what, False, not differences(folder, unbroken.folder)), folder)
    ended = first
    if seed % 3 == 0 and first.killed_by:
        moment, again = draw(kind, random, unbroken.counts, unbroken.seconds, unbroken.largest)
        ended, what = recover(workload, folder, **moment), f"{what}, again {again}"
    if ended.status != 0 and not ended.hung:
        ended = recover(workload, folder)
    found = "" if first.killed_by else f"ended by itself, {shown(first)}"
    if ended.status != 0:
        found = f"not recovered, {shown(ended)}"
    elif unequal := differences(folder, unbroken.folder):
        found = f"differs: {unequal[:3]}"
    return finished(Fault(workload.method, kind, what, True, not found, first.hung or ended.hung, found), folder)


def interrupt_and_recover(unbroken: Unbroken, kind: str, seed: int) -> Fault:
    """The signal `kind` at a random module call (even seeds) or a random time."""
    workload, random = unbroken.workload, Random(f"{unbroken.workload.method} {kind} {seed}")
    folder, number = new_folder(unbroken, kind, seed), signal.Signals[kind]
    if seed % 2:
        after = random.uniform(0.05, 1.0) * unbroken.seconds
        moment, what = {"kill_after": after, "send": number}, f"after {after:.2f} s"
    else:
        at = random.randint(1, unbroken.counts["work"])
        moment = {"fault": Events("work", at, lambda: os.kill(os.getpid(), number)).install}
        what = f"at work {at} of {unbroken.counts['work']}"
    first = launch(workload.argv, folder, **moment)
    if first.status == 0:
        return finished(Fault(workload.method, kind, what, False, not differences(folder, unbroken.folder)), folder)
    found = _wrong(first, kind, workload.method)
    ended = recover(workload, folder) if not first.hung else first
    if ended.status != 0:
        found = f"not recovered, {shown(ended)}"
    elif unequal := differences(folder, unbroken.folder):
        found = f"differs: {unequal[:3]}"
    return finished(Fault(workload.method, kind, what, True, not found, first.hung or ended.hung, found), folder)


def _wrong(ended, kind: str, method: str) -> str:
    """What is wrong with the end of an interrupted run, if anything."""
    if ended.status != _STATUS[kind] or not ended.clean:
        return f"ended wrongly, {shown(ended)}"
    said = re.findall(rf"^stopped by {kind}: .*run the same command again.*$", ended.err, flags=re.MULTILINE)
    if len(said) != 1:
        return f"said nothing, {shown(ended)}"
    if (
        "interrupted: a checkpoint follows" in ended.err
        and "is complete" not in said[0]
        and method in ITERATIVE_METHODS
    ):
        return f"no checkpoint, {shown(ended)}"
    return ""
