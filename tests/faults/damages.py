"""Files that were truncated, damaged, emptied, replaced or swapped: refused by name, never accepted as undamaged."""

import shutil
from pathlib import Path
from random import Random

from outcomes import Fault, Unbroken, finished, new_folder, shown
from processes import Ended, launch
from quick import SOLVER_METHODS
from workload import differences

KINDS = ("damaged checkpoint", "damaged cache", "damaged model")
DAMAGES = ("truncated", "bit flipped", "emptied", "wrong JSON", "another file", "removed")
_NO_OBJECTS = ("[]", "null", "17", '"text"', "{")


def damage(path: Path, how: str, random: Random, other: Path | None = None, within: int | None = None) -> None:
    """Damage the file at `path`.

    Args:
        how: one of `DAMAGES`.
        other: for `another file`.
        within: flip a bit of the first so many bytes; `None` = anywhere.
    """
    content = bytearray(path.read_bytes())
    if how == "truncated":
        path.write_bytes(content[: random.randrange(len(content))])
    elif how == "bit flipped":
        content[random.randrange(min(len(content), within or len(content)))] ^= 1 << random.randrange(8)
        path.write_bytes(content)
    elif how == "emptied":
        path.write_bytes(b"")
    elif how == "wrong JSON":
        # Every object configures some tokenizer: a readable file for other inputs, and so for another kernel.
        objects = () if path.name == "tokenizer_config.json" else ('{"a": 1}', '{"plan": {}, "about": []}')
        path.write_text(random.choice([*_NO_OBJECTS, *objects]))
    elif how == "another file":
        path.write_bytes(other.read_bytes())
    else:
        path.unlink()


def damage_and_run(unbroken: Unbroken, kind: str, seed: int, other: Unbroken) -> Fault:
    """Damage one file that a run reads, and run: it ends as the unbroken one, or refuses the file by its name.

    Args:
        other: another run, whose files are put in place of this one's.
    """
    workload, random = unbroken.workload, Random(f"{unbroken.workload.method} {kind} {seed}")
    folder = new_folder(unbroken, kind.replace(" ", "-"), seed)
    shutil.copytree(unbroken.folder, folder, dirs_exist_ok=True)
    how = DAMAGES[seed % len(DAMAGES)]
    if kind == "damaged checkpoint":
        files = sorted(path for path in (folder / "out/checkpoint-4").iterdir() if path.is_file())
        shutil.rmtree(folder / "out/checkpoint-6")
        named = seed % 2
        argv = [*workload.argv, "--resume_from_checkpoint", "out/checkpoint-4" if named else "true"]
    elif kind == "damaged cache":
        files = sorted([*folder.glob("features/*.safetensors"), *folder.glob("out/kernels/*/*")])
        argv = workload.anew
    else:
        shutil.copytree(workload.root / "model", folder / "model")
        names = ("model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json")
        files = [folder / "model" / name for name in names]
        how = "truncated" if how in ("bit flipped", "removed") else how  # a flipped bit is another number
        argv = [*workload.anew, "--model_name_or_path", str(folder / "model")]
    path = random.choice(files)
    twin = _twin(path, folder, other, random)
    if how == "another file" and twin is None:
        how = "emptied"
    header = 8 + int.from_bytes(path.read_bytes()[:8], "little") if path.suffix == ".safetensors" else None
    whole = (
        kind == "damaged checkpoint"
    )  # it has checksums: every damage is found; other files are recognised by their header
    damage(path, how, random, twin, None if whole else header)
    ended = launch(argv, folder)
    what = f"{path.relative_to(folder)} {how}"
    return finished(_judged(unbroken, kind, what, ended, path, folder), folder)


def _judged(unbroken: Unbroken, kind: str, what: str, ended: Ended, path: Path, folder: Path) -> Fault:
    found = ""
    if ended.status == 0:
        unequal = differences(folder, unbroken.folder)
        found = f"another result: {unequal[:3]}" if unequal else ""
    elif ended.status != 2 or not ended.clean:
        found = f"no clear error, {shown(ended)}"
    elif path.name not in ended.err and path.parent.name not in ended.err:
        found = f"the error does not name the file, {shown(ended)}"
    return Fault(unbroken.workload.method, kind, what, True, not found, ended.hung, found)


def _twin(path: Path, folder: Path, other: Unbroken, random: Random) -> Path | None:
    """A file of the same kind that is another one: a neighbour, or the other run's."""
    found = [p for p in path.parent.glob(f"*{path.suffix}") if p != path and p.read_bytes() != path.read_bytes()]
    same = other.folder / path.relative_to(folder)
    if same.is_file() and same.read_bytes() != path.read_bytes():
        found.append(same)
    return random.choice(sorted(found)) if found else None


def kinds_for(method: str) -> tuple[str, ...]:
    """The kinds of files that a method reads."""
    caches = ("damaged cache",) if method in ("gradientless", "linearhead", "kernel") else ()
    return (*(() if method in SOLVER_METHODS else ("damaged checkpoint",)), *caches, "damaged model")
