"""Measure every performance row of the pages on this machine, in turn, and fill the tables: make bench

    python benchmarks/bench.py --data path/to/glue
    python benchmarks/bench.py --only sparse kernel --budget_minutes 15
    python benchmarks/bench.py --small                       # tiny sizes, to try it; writes no result of the pages

Each measurement is one of the scripts beside this one, with its result file. On a machine that is too slow for all of
them they have fewer repetitions, by the time that the first ones took. After all have run once, those with noisy rows
(a quartile further than 10 % from the median) or with one repetition run again with twice as many, the shortest first,
for as long as the time lasts; what is noisy then says so in its table (`noisy` in the result file). A script that
would take longer than what is left is stopped; what it measured before stays. `--data` is a folder like the Hub's
`nyu-mll/glue`; without it, what needs real rows is left out. At the end `tables.py` writes the pages.
"""

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import results

HERE = Path(__file__).resolve().parent
REPEATS = "--repeats"


@dataclass(frozen=True)
class Measurement:
    """One command.

    Attributes:
        script: file name, without the ending.
        files: result files that it writes.
        words: arguments besides the repetitions.
        small: arguments of a trial, in place of `words`.
        expected: about how many seconds it takes on one core of a server (AMD EPYC of 2024) with these `repeats`.
        repeats: how often its variants take turns, at first.
        option: that sets it.
        data: whether it needs real rows.
    """

    script: str
    files: tuple[str, ...]
    words: str
    small: str
    expected: float
    repeats: int = 3
    option: str = REPEATS
    data: bool = False

    def command(self, repeats: int, data: str | None, small: bool) -> list[str]:
        words = (self.small if small else self.words).split()
        if self.data and not small:
            words += ["--data", str(data)]
        return [sys.executable, str(HERE / f"{self.script}.py"), *words, self.option, str(repeats)]


MEASUREMENTS = {
    "startup": Measurement("startup", ("startup",), "--result startup", "--result startup --only help", 190, 2),
    "projected": Measurement(
        "projected", ("projected",), "time --size roberta-base --train 64 --test 64 --length 64 --result projected",
        "time --size roberta-base --train 2 --test 2 --length 4 --dimension 64 --result projected", 75, 10, "--every",
    ),
    "fisher": Measurement(
        "fisher", ("fisher",), "--threads 1 --result fisher --examples 16 --forwards 4",
        "--threads 1 --result fisher --examples 2 --length 4 --layers 1 --forwards 2 --batch 2", 240,
    ),
    "sparse": Measurement(
        "sparse", ("sparse_step",), "--size roberta-base --threads 1 --clock processor --save --steps 1 --variants "
        "full lora adapter", "--size small --threads 1 --save --batch 2 --length 8 --variants lora adapter", 450,
    ),
    # a step of these takes minutes with all layers
    "sparse_published": Measurement(
        "sparse", ("sparse_step",), "--size roberta-base --layers 2 --threads 1 --save --steps 1 --variants lora "
        "published dynamic",
        "--size small --layers 1 --threads 1 --save --batch 2 --length 8 --variants lora dynamic", 240,
    ),
    "basis": Measurement(
        "basis", ("basis",), "--threads 1 --shape 384 1536 --gradients 30 --result basis",
        "--threads 1 --shape 16 24 --gradients 4 --leading 4 --result basis", 70,
    ),
    "zeroth_order": Measurement(
        "zeroth_order", ("zeroth-order",), "--threads 1 --steps 1 --variants mezo-published evaluation spsa lozo",
        "--layers 1 --batch 1 --length 4 --steps 1 --variants evaluation mezo-published spsa", 250,
    ),
    "zeroth_order_16_bits": Measurement(
        "zeroth_order", ("zeroth-order",), "--threads 1 --steps 1 --dtype bfloat16 --variants mezo-published "
        "evaluation spsa lozo fzoo-outer-batched",
        "--dtype bfloat16 --layers 1 --batch 1 --length 4 --steps 1 --variants evaluation spsa", 330,
    ),
    "gradientless": Measurement(
        "gradientless", ("gradientless",), "--threads 1 --steps 20 --result gradientless --variants published-1x1 1x1 "
        "none adam published-3x2 3x2 spsa-head",
        "--threads 1 --steps 2 --batch 2 --length 4 --variants adam spsa-head --result gradientless", 200,
    ),
    # last: it takes a third of the time, most of it in the published engine
    "kernel": Measurement(
        "kernel", ("kernel",), "--result kernel --formulas sgd signgd",
        "--result kernel --size roberta-base --train 1 --test 1 --length 4 --variants structured --formulas sgd", 900,
        data=True,
    ),
}  # fmt: skip


class Run:
    """The commands that have run, their seconds and the time that is left."""

    def __init__(self, args: argparse.Namespace, folder: Path):
        self.args, self.folder = args, folder
        self.end = time.monotonic() + 60 * args.budget_minutes
        self.seconds: dict[str, float] = {}
        self.repeats: dict[str, int] = {}
        self.recorded: dict[str, set[str]] = {}  # the commands that were run, as the result files have them

    def left(self) -> float:
        return self.end - time.monotonic()

    def first_repeats(self, name: str, later: list[str]) -> int:
        """Repetitions of a measurement with which it and those `later` fit into what is left, at the pace so far."""
        if self.args.small:
            return 1
        own = MEASUREMENTS[name]
        if own.option != REPEATS:
            return own.repeats
        done = [(MEASUREMENTS[other], repeats) for other, repeats in self.repeats.items()]
        expected = sum(one.expected * repeats / one.repeats for one, repeats in done)
        pace = sum(self.seconds.values()) / expected if expected else 1.0
        needed = pace * sum(MEASUREMENTS[other].expected for other in (name, *later))
        return max(1, int(own.repeats * min(1.0, self.left() / needed)))

    def command(self, name: str, repeats: int) -> list[str]:
        """The command of a measurement, whose rows are those of this run from now on."""
        command = MEASUREMENTS[name].command(repeats, self.args.data, self.args.small)
        words = ["python", f"benchmarks/{Path(command[1]).name}", *command[2:]]
        self.recorded.setdefault(name, set()).add(results.as_recorded(words))
        return command

    def measure(self, name: str, repeats: int) -> bool:
        """Run a measurement; whether it came to its end."""
        command = self.command(name, repeats)
        print(f"{name}: {' '.join(Path(word).name for word in command[1:])}", flush=True)
        start = time.monotonic()
        environment = {**os.environ, "HF_FT_EXT_RESULTS": str(self.folder)}
        # a session of its own, so that the processes which a script starts end with it
        process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, start_new_session=True)
        try:
            process.wait(self.left())
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            print(f"{name}: stopped, no time left", flush=True)
            return False
        self.seconds[name], self.repeats[name] = time.monotonic() - start, repeats
        print(f"{name}: {self.seconds[name]:.0f} s, exit status {process.returncode}", flush=True)
        return process.returncode == 0

    def noisy(self, name: str) -> list[dict]:
        """The noisy rows of this run; those of other commands in the same files stay as they are."""
        files = [file for file in MEASUREMENTS[name].files if (self.folder / f"{file}.json").exists()]
        return [row for file in files for row in results.mark_noisy(file, self.recorded[name], self.folder)]

    def unsettled(self, name: str) -> bool:
        """Whether to repeat a measurement: a row is noisy, or has one repetition, which cannot show that."""
        if MEASUREMENTS[name].option != REPEATS:
            return False
        return bool(self.noisy(name)) or (self.repeats[name] == 1 and not self.args.small)


def measure_all(run: Run, names: list[str]) -> list[str]:
    """All measurements once, the noisy ones again while there is time; the names of those that failed."""
    failed = []

    def possible(name: str) -> bool:
        return run.args.small or run.args.data is not None or not MEASUREMENTS[name].data

    for name in [name for name in names if not possible(name)]:
        print(f"{name}: left out, it needs --data")
    names = [name for name in names if possible(name)]
    for number, name in enumerate(names):
        if run.left() <= 0:
            print(f"{name}: left out, no time left")
        elif not run.measure(name, run.first_repeats(name, names[number + 1 :])):
            failed.append(name)
    waiting = [name for name in sorted(run.seconds, key=run.seconds.__getitem__) if name not in failed]
    for name in waiting:
        # Twice the repetitions take about twice as long.
        while run.unsettled(name) and 2 * run.seconds[name] < run.left():
            if not run.measure(name, 2 * run.repeats[name]):
                break
    return failed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="folder with GLUE")
    parser.add_argument("--only", nargs="+", choices=MEASUREMENTS, default=list(MEASUREMENTS))
    parser.add_argument("--budget_minutes", type=float, default=40.0)
    parser.add_argument("--small", action="store_true", help="tiny sizes, to try it; the pages stay as they are")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as trial:
        run = Run(args, Path(trial) if args.small else results.FOLDER)
        failed = measure_all(run, args.only)
        for name in run.seconds:
            for row in run.noisy(name):
                about = ", ".join(str(v) for key, v in row.items() if key not in results.MEASURED)
                print(f"noisy: {name}, {about}: {row['value']:.3g} ({row['low']:.3g}-{row['high']:.3g})")
    for name in failed:
        print(f"failed or stopped: {name}")
    written = 0 if args.small else subprocess.run([sys.executable, str(HERE / "tables.py")]).returncode
    return 1 if failed or written else 0


if __name__ == "__main__":
    sys.exit(main())
