"""A disk that fills up while a run saves: what was complete stays, the run says so, and goes on when there is room."""

import resource
import shutil
import subprocess
from pathlib import Path
from random import Random

from outcomes import Fault, Unbroken, new_folder, recover, shown
from processes import launch
from workload import differences

from hf_ft_ext.training.saved.checkpoints import checkpoint_folders, checkpoint_problem, read_checksums

KINDS = ("full disk", "file too large")


def can_mount(folder: Path) -> bool:
    """Whether this user may mount a tmpfs."""
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", folder], capture_output=True, check=False
    )
    if done.returncode == 0:
        subprocess.run(["umount", folder], check=True)
    return done.returncode == 0


def fill_and_recover(unbroken: Unbroken, kind: str, seed: int) -> Fault:
    """A run in a small tmpfs, or with a bound on the size of files, that is then made large enough."""
    workload, random = unbroken.workload, Random(f"{unbroken.workload.method} {kind} {seed}")
    folder = new_folder(unbroken, kind.replace(" ", "-"), seed)
    everything = sum(path.stat().st_size for path in unbroken.folder.rglob("*") if path.is_file())
    mounted, moment = False, {}
    try:
        if kind == "full disk":
            size = random.randint(16 * 1024, everything)
            options, mounted = f"size={size // 1024}k", True
            subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], check=True)
        else:
            size = random.randint(1000, unbroken.largest)
            moment = {"fault": lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))}
        first = launch(workload.argv, folder, **moment)
        what, found = f"{size:,} bytes of {everything:,}", ""
        if first.status == 0:
            return Fault(workload.method, kind, what, False, not differences(folder, unbroken.folder))
        if first.status != 2 or not first.clean or "error: " not in first.err:
            found = f"no clear error, {shown(first)}"
        for checkpoint in checkpoint_folders(folder / "out")[1:]:
            if read_checksums(checkpoint) is None or checkpoint_problem(checkpoint):
                found = found or f"{checkpoint.name} did not survive: {checkpoint_problem(checkpoint)}"
        if mounted:
            subprocess.run(["mount", "-o", "remount,size=512m", folder], check=True)
        ended = recover(workload, folder)
        if ended.status != 0:
            found = f"not recovered, {shown(ended)}"
        elif unequal := differences(folder, unbroken.folder):
            found = f"differs: {unequal[:3]}"
        return Fault(workload.method, kind, what, True, not found, first.hung or ended.hung, found)
    finally:
        if mounted:
            subprocess.run(["umount", folder], check=True)
        shutil.rmtree(folder, ignore_errors=True)
