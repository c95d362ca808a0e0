"""The whole fault campaign: `make faults`; `make faults FAULTS=--help` shows its arguments.

Each fault is drawn from its method, kind and number, so that a fault that was lost can be repeated. Outcomes go to a
file line by line; the same command again does what is missing.
"""

import argparse
import json
import logging
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import damages
import disks
import interruptions
import kills
import nan_runs
import ranks
from outcomes import Fault, Unbroken
from transformers.utils import logging as transformers_logging
from workload import Workload, prepare

from hf_ft_ext.methods import METHODS

OTHER = ("--seed", "7", "--max_seq_length", "12")  # a run whose files are put in place of another's


class Runs:
    """The unbroken runs, made when first needed."""

    def __init__(self, folder: Path):
        self.folder, self.root = folder, prepare(folder / "shared")
        self._made: dict[str, Unbroken] = {}

    def __call__(self, method: str, name: str = "", more: tuple[str, ...] = (), **settings) -> Unbroken:
        key = f"{method}{name}"
        if key not in self._made:
            self._made[key] = Unbroken(Workload(method, self.root, more), self.folder / key, **settings)
        return self._made[key]


def faults(runs: Runs, methods: list[str], count: int) -> Iterator[tuple[str, Callable[[], Fault]]]:
    """Names of the faults and what injects them: one number for all methods and kinds, then the next."""
    mount = disks.can_mount(runs.folder)
    for number in range(count):
        for method in methods:
            for kind in kills.KINDS:
                yield _fault(runs, method, kind, number, interruptions.kill_and_recover)
            if number < count // 2:  # two signals, two disks
                for kind in interruptions.KINDS:
                    yield _fault(runs, method, kind, number, interruptions.interrupt_and_recover)
                for kind in disks.KINDS[0 if mount else 1 :]:
                    yield _fault(runs, method, kind, number, disks.fill_and_recover)
            for kind in damages.kinds_for(method):
                yield _fault(runs, method, kind, number, _damage(runs))
            if number < count // 4:
                yield _fault(runs, method, "NaN", number, nan_runs.run_with_nan)
                yield _fault(runs, method, "rank dies", number, _lose(runs))


def _fault(runs: Runs, method: str, kind: str, number: int, inject) -> tuple[str, Callable[[], Fault]]:
    return f"{method}/{kind}/{number}", lambda: inject(runs(method), kind, number)


def _damage(runs: Runs):
    def inject(unbroken: Unbroken, kind: str, number: int) -> Fault:
        return damages.damage_and_run(unbroken, kind, number, runs(unbroken.workload.method, "-other", OTHER))

    return inject


def _lose(runs: Runs):
    def inject(unbroken: Unbroken, kind: str, number: int) -> Fault:
        return ranks.lose_one_and_recover(ranks.two(unbroken), kind, number)

    return inject


def table(found: list[dict]) -> str:
    """Markdown: a row for each kind, and what was lost or hung."""
    kinds = list(dict.fromkeys(fault["kind"] for fault in found))
    lines = ["| fault | methods | injected | recovered | lost | hung |", "| --- | ---: | ---: | ---: | ---: | ---: |"]
    for kind in [*kinds, "all"]:
        rows = [fault for fault in found if kind in (fault["kind"], "all") and fault["injected"]]
        right = sum(fault["recovered"] for fault in rows)
        hung = sum(fault["hung"] for fault in rows)
        methods = len({fault["method"] for fault in rows})
        lines.append(f"| {kind} | {methods} | {len(rows)} | {right} | {len(rows) - right} | {hung} |")
    lines += ["", f"{sum(not fault['injected'] for fault in found)} more runs ended before their fault came."]
    lines += [f"- lost: {f['method']}, {f['kind']}, {f['what']}: {f['found']}" for f in found if not f["recovered"]]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Run what is missing of the campaign; 1 = a fault was lost or hung."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--count", type=int, default=20, help="kills per method and kind (default: 20)")
    parser.add_argument("--methods", default=",".join(METHODS), help="separated by commas (default: all)")
    parser.add_argument("--minutes", type=float, default=120, help="start no fault after so many (default: 120)")
    parser.add_argument("--output", type=Path, default=Path("runs/faults"), help="folder of the outcomes")
    settings = parser.parse_args(argv)
    transformers_logging.set_verbosity_error()
    logging.getLogger("hf_ft_ext").setLevel(logging.ERROR)
    settings.output.mkdir(parents=True, exist_ok=True)
    log, start = settings.output / "faults.jsonl", time.monotonic()
    done = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    names = {fault["name"] for fault in done}
    folder = Path(tempfile.mkdtemp(prefix="faults-"))
    try:
        runs = Runs(folder)
        with open(log, "a") as file:
            for name, inject in faults(runs, settings.methods.split(","), settings.count):
                if name in names:
                    continue
                if time.monotonic() - start > 60 * settings.minutes:
                    print(f"--minutes {settings.minutes:g} are over: the same command goes on from here")
                    break
                done.append({"name": name, **asdict(inject())})
                file.write(json.dumps(done[-1]) + "\n")
                file.flush()
                if not done[-1]["recovered"]:
                    print(f"LOST {name}: {done[-1]['what']}: {done[-1]['found']}", flush=True)
    finally:
        if all(fault["recovered"] for fault in done):
            shutil.rmtree(folder, ignore_errors=True)
        else:
            print(f"what was left of the lost ones is in {folder}")
    text = table(done)
    (settings.output / "faults.md").write_text(text + "\n")
    print(text)
    return int(any(not fault["recovered"] or fault["hung"] for fault in done))


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main())
