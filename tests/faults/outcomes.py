"""What the campaign knows of a fault, the unbroken run to compare with, and going on after a fault."""

import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from kills import counted, read_counts
from processes import Ended, launch
from workload import Workload, results

import run_glue


@dataclass(frozen=True)
class Fault:
    """What became of one fault.

    Attributes:
        method, kind, what: where it was, and when.
        injected: it came before the run had ended by itself.
        recovered: the end was the unbroken run's.
        hung: a process had to be killed.
        found: what was wrong, if anything.
    """

    method: str
    kind: str
    what: str
    injected: bool
    recovered: bool
    hung: bool = False
    found: str = ""


class Unbroken:
    """The run of a workload that meets no fault; made when it is first asked for."""

    def __init__(self, workload: Workload, folder: Path, start=launch):
        self.workload, self.folder = workload, folder
        folder.mkdir(parents=True)
        ended = start(workload.argv, folder, main=counted(run_glue.main))
        if ended.status != 0:
            raise RuntimeError(f"{workload.method}: the unbroken run failed: {ended.err[-2000:]}")
        self.counts, self.seconds = read_counts(folder), ended.seconds
        self.largest = max(path.stat().st_size for path in (folder / "out").rglob("*") if path.is_file())
        if not results(folder / "out"):
            raise RuntimeError(f"{workload.method}: nothing to compare in {folder}")


def recover(workload: Workload, folder: Path, **moment) -> Ended:
    """Go on as the launcher's messages say: resume, or start anew where nothing was saved."""
    ended = launch(workload.resumed, folder, **moment)
    if ended.status == 2 and ("holds no complete checkpoint" in ended.err or "holds no checkpoint" in ended.err):
        ended = launch(workload.anew, folder, **moment)
    return ended


def new_folder(unbroken: Unbroken, kind: str, seed: int) -> Path:
    """A folder beside the unbroken run's."""
    return Path(tempfile.mkdtemp(dir=unbroken.folder.parent, prefix=f"{unbroken.workload.method}-{kind}-{seed}-"))


def finished(fault: Fault, folder: Path) -> Fault:
    """`fault`; what it left is kept only if something was wrong."""
    if fault.recovered and not fault.hung:
        shutil.rmtree(folder)
    return fault


def shown(ended: Ended) -> str:
    """A process's end, short enough for a report."""
    return f"status {ended.status}, signal {ended.killed_by}: ...{ended.err[-1500:]}"
