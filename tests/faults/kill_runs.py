"""Kill a run, go on as a user would, and compare the end with that of the unbroken run."""

from random import Random

from kills import draw
from outcomes import Fault, Unbroken, finished, new_folder, recover, shown
from processes import launch
from workload import differences


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
