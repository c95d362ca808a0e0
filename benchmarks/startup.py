"""Start-up cost: the import of the package, and `run_glue.py --help`, against `import transformers, torch, peft`.

    python benchmarks/startup.py --repeats 7 --result startup

Every command is a process of its own; the commands take turns, so that a busy machine is busy for all of them. Shown
are minimum and median of user CPU seconds, and each one's ratio to the imports. `--result NAME` writes the ratios
within a round to `results/NAME.json`.
"""

import argparse
import os
import resource
import statistics
import subprocess
import sys
from pathlib import Path

import results

from hf_ft_ext.methods import METHODS

ROOT = Path(__file__).resolve().parents[1]
IMPORTS = "import transformers, torch, peft"
IMPORTS_ALONE = "imports alone"
LAUNCHER = str(ROOT / "run_glue.py")


def user_seconds(*words: str) -> float:
    """User CPU seconds of `python words`."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, *words], stdout=subprocess.DEVNULL, env=environment, check=True)
    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument(
        "--only", nargs="+", metavar="NAME", help="commands to measure, such as 'help sparse'; default: all"
    )
    parser.add_argument("--result", metavar="NAME", help="result file to write to, results/NAME.json")
    args = parser.parse_args()
    commands = {
        IMPORTS_ALONE: ("-c", IMPORTS),
        "import hf_ft_ext": ("-c", f"{IMPORTS}, hf_ft_ext"),
        "help": (LAUNCHER, "--help"),
        **{f"help {name}": (LAUNCHER, "--method", name, "--help") for name in METHODS},
    }
    if unknown := set(args.only or ()) - set(commands):
        parser.error(f"--only names {sorted(unknown)[0]!r}; choose from: {', '.join(commands)}")
    if args.only:
        commands = {name: words for name, words in commands.items() if name in (IMPORTS_ALONE, *args.only)}
    for words in commands.values():  # compiles, and fills the disk's cache
        user_seconds(*words)
    times: dict[str, list[float]] = {name: [] for name in commands}
    for _ in range(args.repeats):
        for name, words in commands.items():
            times[name].append(user_seconds(*words))
    base = times[IMPORTS_ALONE]
    width = max(map(len, times))
    print(f"{'':<{width}}  {'min s':>6}  {'median s':>8}  {'ratio of min':>12}  {'of medians':>10}")
    for name, seconds in times.items():
        least, middle = min(seconds), statistics.median(seconds)
        ratios = f"{least / min(base):>12.3f}  {middle / statistics.median(base):>10.3f}"
        print(f"{name:<{width}}  {least:>6.2f}  {middle:>8.2f}  {ratios}")
    if args.result:
        rows = []
        for name, seconds in times.items():
            ratios = [own / imports for own, imports in zip(seconds, base, strict=True)]
            rows.append({"what": name, "quantity": "user s", **results.summary(seconds)})
            rows.append({"what": name, "quantity": "time / imports", **results.summary(ratios)})
        results.save(args.result, rows)


if __name__ == "__main__":
    main()
