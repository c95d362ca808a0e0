"""Quality of several methods on one or more tasks, learning rates tuned equally: runs `run_glue.py`, reads `run.json`.

    python benchmarks/quality.py --output_dir runs/quality-cola --task_name cola \
        --rates full=1e-4,3e-4,1e-3 lora=1e-3,3e-3,1e-2 sparse=1e-4,3e-4,1e-3 \
        -- --dataset_name path/to/glue --max_seq_length 64 --per_device_train_batch_size 16
    python benchmarks/quality.py benchmarks/studies/sparse.yaml --output_dir runs/quality-sst2 --task_name sst2 \
        --seeds 1 2 3 -- --dataset_name path/to/glue --max_train_samples 4000

A study file is a mapping from the name of a variant to its arguments (`method` and what that method takes), with a
list of learning rates as `learning_rate`; arguments under `all` go to every variant, unless it sets them to null, and
those under `tasks` to the runs of that task, unless the variant sets them.
For each variant every learning rate (unless there is one only) is tried for `--tune_epochs` (or `--tune_steps`) with
the first seed; the best one by the task's primary metric on the validation set (ties: by its loss) is then run for
`--epochs` with every seed. A variant with `max_steps` takes this number of steps in the trials and in the final runs;
one without a learning rate has nothing to try.

    python benchmarks/quality.py benchmarks/studies/kernel.yaml --few_shot --output_dir runs/few --task_name sst2 \
        --seeds 13 21 42 87 100 -- --dataset_name path/to/glue --num_k 16 --few_shot_split k-shot-1k-test

With `--few_shot` a seed also draws the data, and every learning rate is run in full with every seed. Of the runs of a
seed, the one that is best on the dev split counts, with its score on the test split.

Every variant is tuned and run with one seed before any has two. Each run is a process of its own, `--workers` of them
at a time with their share of the threads. Runs that are there already (with the same command) are not repeated, so an
interrupted study continues; a run that fails is named and left out. `table.md` in the output folder and the result
file (`--result`, see `results.py`) are written after every run: the study can be stopped at any time. Weights are
deleted once a run is recorded. What follows `--` goes to `run_glue.py` as it is.

`--known NAME` goes on with a study whose output folder is gone: the rates that stand in result file `NAME` count as
tried, and the seeds as run. The settings have to be those of that file's commands. `--rates_of TASK` tries nothing:
each variant takes the rate that was best on that task, by the scores in `NAME`; with `FILE:TASK` by those of another
result file, for example of the same study with fewer rows.
"""

import argparse
import multiprocessing
import os
import shlex
import signal
import statistics
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path

import results
import torch
import yaml

from hf_ft_ext.compare.process import Outcome, log_of, run_or_find
from hf_ft_ext.data.tasks import get_task
from hf_ft_ext.metrics import primary_key

_MIB = 2**20


@dataclass
class Variant:
    """One method with its settings on one task, and the records of its runs so far.

    Attributes:
        score: key of the metric that chooses among rates.
        report: key of the metric of the table.
        tried: record by rate, of the runs that the rate is chosen by; with `--few_shot` by (rate, seed).
        records: record by seed.
        known: by quantity and seed, what an earlier part of the study measured (`--known`).
        known_tries: score by rate, of an earlier part.
        failed: what failed, as the launcher said it.
    """

    name: str
    task: str
    settings: dict
    rates: list[str | None]
    folder: Path
    score: str
    report: str
    tried: dict = field(default_factory=dict)
    records: dict[int, dict] = field(default_factory=dict)
    known: dict[str, dict[int, float]] = field(default_factory=dict)
    known_tries: dict[str | None, float] = field(default_factory=dict)
    failed: list[str] = field(default_factory=list)

    def by_seed(self) -> bool:
        """Whether each seed has a rate of its own (`--few_shot`)."""
        return any(isinstance(key, tuple) for key in self.tried)

    def best(self, seed: int | None = None) -> str | None:
        """The rate of the best run that was tried; with `seed` among those of that seed."""

        def quality(rate: str | None) -> tuple[float, float]:
            record = self.tried.get(rate if seed is None else (rate, seed))
            if record is None:  # known scores have no loss, and are not those of a seed
                return (self.known_tries.get(rate, float("-inf")) if seed is None else float("-inf")), 0.0
            loss = record["metrics"].get("eval_loss")  # null if it was not finite
            return record["metrics"][self.score], float("-inf") if loss is None else -loss

        return max(self.rates, key=quality, default=None)

    def read_known(self, rows: list[dict]) -> None:
        """Take what result file rows say about this variant: the scores of its rates, and its seeds."""
        for row in rows:
            if row.get("variant") != self.name or row.get("task") != self.task:
                continue
            if row["quantity"] == "tuning score":
                self.known_tries[row["rate"]] = row["value"]
            else:
                self.known[row["quantity"]] = dict(zip(row["seeds"], row["values"], strict=True))

    def take_rate(self, rows: list[dict], task: str) -> None:
        """Keep only the rate that was best on `task`, by the tuning scores among these rows.

        Raises:
            SystemExit: none of this variant's rates was tried there.
        """
        if len(self.rates) < 2:
            return
        mine = [row for row in rows if (row.get("variant"), row.get("task"), "rate" in row) == (self.name, task, True)]
        self.known_tries = {row["rate"]: row["value"] for row in mine}
        if not self.known_tries.keys() & set(self.rates):
            raise SystemExit(
                f"{self.name} has no tuning score on {task!r} in the result file for one of its rates "
                f"{', '.join(map(str, self.rates))}; tune it on {task!r} first, or leave out --rates_of"
            )
        self.rates, self.known_tries = [self.best()], {}  # the scores are not those of this study


@dataclass(frozen=True)
class Job:
    """A run that is to be there: of which variant, at which rate and seed, and the launcher's words."""

    variant: Variant
    rate: str | None
    seed: int
    folder: Path
    words: list[str]
    tuning: bool = False


def stages(variants: list[Variant], args: argparse.Namespace, passed_on: list[str]) -> Iterator[list[Job]]:
    """Jobs that can run beside each other, stage by stage: for each variant the tries and a run, then seed by seed."""

    def job(variant: Variant, rate: str | None, seed: int, folder: str, length: dict, tuning: bool = False) -> Job:
        path = variant.folder / folder
        own = {**variant.settings, "task_name": variant.task, "seed": seed, "output_dir": path}
        own |= {"save_strategy": "no", "disable_tqdm": True}
        if args.data_seeds or args.few_shot:
            own["data_seed"] = seed
        if rate is not None:
            own["learning_rate"] = rate
            own |= {} if "max_steps" in variant.settings else length
        words = [word for key, value in own.items() for word in (f"--{key}", str(value))]
        words += ["--overwrite_output_dir", *(["--do_predict"] if args.few_shot else []), *passed_on]
        return Job(variant, rate, seed, path, words, tuning)

    whole = {"num_train_epochs": args.epochs}
    tune = {"num_train_epochs": args.tune_epochs} if args.tune_steps is None else {"max_steps": args.tune_steps}
    if args.few_shot:
        for seed in args.seeds:
            yield [
                job(variant, rate, seed, "-".join(filter(None, (variant.name, str(seed), rate))), whole, tuning=True)
                for variant in variants
                if seed not in variant.known.get("score", {})
                for rate in variant.rates
            ]
        return

    def tries(variant: Variant) -> list[Job]:
        if len(variant.rates) == 1:  # nothing to choose from
            return []
        wanted = [rate for rate in variant.rates if rate not in variant.known_tries]
        return [job(variant, rate, args.seeds[0], f"{variant.name}-tune-{rate}", tune, True) for rate in wanted]

    def runs(some: list[Variant], seed: int) -> list[Job]:
        jobs = []
        for variant in some:
            if seed in variant.known.get("score", {}) or not variant.rates:
                continue
            best = variant.best()
            same = "max_steps" in variant.settings or tune == whole
            if same and seed == args.seeds[0] and best in variant.tried:
                variant.records[seed] = variant.tried[best]  # that very run
            else:
                jobs.append(job(variant, best, seed, f"{variant.name}-{seed}", whole))
        return jobs

    # One variant after the other, so that a study which is left early has whole rows; its tries beside the run of
    # the variant before, so that all workers have something to do.
    tuned = [variant for variant in variants if not tries(variant)]
    for variant in [variant for variant in variants if variant not in tuned]:
        yield runs(tuned, args.seeds[0]) + tries(variant)
        tuned = [variant]
    yield runs(tuned, args.seeds[0])
    for seed in args.seeds[1:]:
        yield runs(variants, seed)


def study(variants: list[Variant], args: argparse.Namespace, passed_on: list[str]) -> None:
    """Run what is missing, and write the tables after every run."""
    threads = max(args.threads // args.workers, 1)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(args.workers, context, _begin, (threads,)) as pool:
        for jobs in stages(variants, args, passed_on):
            running = {pool.submit(_run, job.folder, job.words): job for job in jobs}
            for done in as_completed(running):
                _accept(running[done], done.result(), args)
                write(variants, args)
    write(variants, args)


def _begin(threads: int) -> None:
    """In a worker: runs take `threads`, and a stopped study stops them (`run_or_find` ends its run)."""
    os.environ["OMP_NUM_THREADS"] = str(threads)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    threading.Thread(target=_stop_with_the_study, daemon=True).start()


def _stop_with_the_study() -> None:
    """In a worker: end it, and its run, when the process of the study has ended in whatever way."""
    multiprocessing.parent_process().join()
    os.kill(os.getpid(), signal.SIGTERM)


def _run(folder: Path, words: list[str]) -> Outcome:
    try:
        return run_or_find(folder, words)
    except SystemExit:  # the pool would take it for the outcome of this run, and begin the next one
        os._exit(1)


def _accept(job: Job, outcome: Outcome, args: argparse.Namespace) -> None:
    """Take the record of a finished run to its variant."""
    variant, record, reason = job.variant, outcome.record, outcome.reason
    where = f"{variant.task} {job.folder.name}"
    shown = variant.score if job.tuning and not args.few_shot else variant.report
    if record is not None:
        for weights in job.folder.rglob("*.safetensors"):
            weights.unlink()
        needed = {variant.score, shown} if job.tuning else {shown}
        if missing := [key for key in needed if record["metrics"].get(key) is None]:
            reason = f"no finite {missing[0]} among its metrics: {', '.join(record['metrics'])}"
    if reason:
        variant.failed.append(f"{where}: {reason}; see {log_of(job.folder)}")
        print(f"FAILED {variant.failed[-1]}", flush=True)
        if job.tuning and not args.few_shot:
            variant.rates = [rate for rate in variant.rates if rate != job.rate]
        return
    if not job.tuning:
        variant.records[job.seed] = record
    elif args.few_shot:
        variant.tried[job.rate, job.seed] = record
        if all((rate, job.seed) in variant.tried for rate in variant.rates):
            variant.records[job.seed] = variant.tried[variant.best(job.seed), job.seed]
    else:
        variant.tried[job.rate] = record
    print(f"{where}: {shown} {record['metrics'][shown]:.4f}, {outcome.seconds:.0f} s", flush=True)


# --- what is written ----------------------------------------------------------------------------------


def write(variants: list[Variant], args: argparse.Namespace) -> None:
    """Write `table.md`, and the result file that `--result` names."""
    args.output_dir.mkdir(parents=True, exist_ok=True)
    (args.output_dir / "table.md").write_text(table(variants))
    if args.result:
        results.save(args.result, [row for variant in variants for row in measured(variant)], found=True)


def quantities(variant: Variant) -> dict[str, dict[int, float]]:
    """By quantity and seed: the score, seconds and peak memory (every preparation included), parameters, bytes."""
    found = {quantity: dict(values) for quantity, values in variant.known.items()}
    for seed, record in sorted(variant.records.items()):
        values = {
            "score": record["metrics"][variant.report],
            "seconds": record["train_seconds"],  # preparation included
            "preparation seconds": record["preparation_seconds"],
            "peak MiB": None if record["peak_memory_bytes"] is None else record["peak_memory_bytes"] / _MIB,
            "trained parameters": record["trainable_parameters"],
            "saved MB": record["artefact_bytes"] / 1e6,
        }
        if variant.by_seed() and (rate := variant.best(seed)) is not None:
            values["rate"] = float(rate)
        for name, value in values.items():
            if value is not None:
                found.setdefault(name, {})[seed] = value
    return found


def measured(variant: Variant) -> Iterator[dict]:
    """The variant's rows of a result file."""
    for quantity, values in quantities(variant).items():
        row = {"task": variant.task, "variant": variant.name, "quantity": quantity, "metric": variant.report}
        yield {"what": f"{variant.name} on {variant.task}", **row, **results.over_seeds(values)}
    for rate, run in variant.tried.items():  # scores by which the rate was chosen, of the first seed
        if isinstance(rate, str):
            row = {"task": variant.task, "variant": variant.name, "quantity": "tuning score", "metric": variant.score}
            row |= {"rate": rate, "value": run["metrics"][variant.score]}
            yield {"what": f"{variant.name} on {variant.task}, rate {rate}", **row}


def table(variants: list[Variant]) -> str:
    """Markdown: per task one line per variant, mean and standard deviation over seeds."""
    lines = []
    for task in dict.fromkeys(variant.task for variant in variants):
        mine = [variant for variant in variants if variant.task == task]
        lines += [
            f"{task}: {mine[0].report}",
            "",
            "| variant | score | lr (tried) | seconds | preparation s | peak MiB | trained | saved MB | seeds |",
            "| --- | ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
        ]
        lines += [f"| {' | '.join(_cells(variant))} |" for variant in mine if quantities(variant)]
        lines += ["", *(f"failed: {text}" for variant in mine for text in variant.failed), ""]
    return "\n".join(lines).rstrip() + "\n"


def _cells(variant: Variant) -> list[str]:
    found = quantities(variant)

    def spread(name: str, digits: int) -> str:
        values = list(found.get(name, {}).values())
        if not values:  # nothing was trained
            return "-"
        deviation = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
        return f"{statistics.mean(values):,.{digits}f}{deviation}"

    by_seed = variant.by_seed()
    scores = {rate: record["metrics"][variant.score] for rate, record in ({} if by_seed else variant.tried).items()}
    tried = ", ".join(f"{rate}: {score:.3f}" for rate, score in (variant.known_tries | scores).items())
    rate = "by seed" if by_seed and len(variant.rates) > 1 else variant.best() or "-"
    return [
        variant.name, spread("score", 4), f"{rate} ({tried})" if tried else rate, spread("seconds", 1),
        spread("preparation seconds", 1), spread("peak MiB", 0), spread("trained parameters", 0),
        spread("saved MB", 1), str(len(found.get("score", {}))),
    ]  # fmt: skip


# --- what is asked for ----------------------------------------------------------------------------------


def variants_of(args: argparse.Namespace) -> list[Variant]:
    """The variants of every task, from the study file or from `--rates`."""
    if (args.study is None) == (args.rates is None):
        raise SystemExit("pass a study file or --rates, one of the two")
    shared: dict = {}
    tasks: dict[str, dict] = {}
    if args.study is None:
        split = (item.partition("=") for item in args.rates)
        named = {method: {"method": method, "learning_rate": rates.split(",")} for method, _, rates in split}
    else:
        named = yaml.safe_load(args.study.read_text())
        shared, tasks = named.pop("all", {}), named.pop("tasks", {})
        if unknown := set(args.only or ()) - named.keys():
            raise SystemExit(f"{args.study} has no variant {sorted(unknown)[0]!r}; it has {', '.join(named)}")
        named = {name: own for name, own in named.items() if not args.only or name in args.only}
    found = []
    wanted = args.task_name or list(tasks)
    if not wanted:
        raise SystemExit("pass --task_name, or a study file with tasks")
    for task in wanted:
        folder = args.output_dir / task if len(wanted) > 1 else args.output_dir
        score = f"eval_{primary_key(get_task(task).metric)}"
        report = args.report or (score.replace("eval", "test", 1) if args.few_shot else score)
        for name, own in named.items():
            settings = {**shared, **tasks.get(task, {}), **own}
            settings = {key: value for key, value in settings.items() if value is not None}
            rates = settings.pop("learning_rate", [None])
            rates = rates if isinstance(rates, list) else [rates]
            variant = Variant(name, task, settings, rates, folder, score, report)
            variant.read_known(results.read(args.known) if args.known else [])
            if args.rates_of:
                file, _, other = args.rates_of.rpartition(":")
                variant.take_rate(results.read(file or args.known), other)
            found.append(variant)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path, nargs="?", help="YAML file of variants")
    parser.add_argument("--only", nargs="+", metavar="VARIANT", help="of a study file: these variants")
    parser.add_argument("--task_name", nargs="+", help="none = the tasks of the study file")
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--rates", nargs="+", metavar="METHOD=LR,LR,...", help="methods and their learning rates")
    parser.add_argument("--epochs", type=float, default=3)
    parser.add_argument("--tune_epochs", type=float, default=1)
    parser.add_argument("--tune_steps", type=int, help="in place of --tune_epochs")
    parser.add_argument("--few_shot", action="store_true", help="tune each seed on its own dev split: see above")
    parser.add_argument("--seeds", type=int, nargs="+", default=[42])
    parser.add_argument("--data_seeds", action="store_true", help="the seeds choose the few-shot rows too")
    parser.add_argument("--report", metavar="METRIC", help="metric of the table; none = the one that chose the rate")
    parser.add_argument("--workers", type=int, default=1, help="runs at a time")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of all runs together")
    parser.add_argument("--known", metavar="NAME", help="result file with an earlier part of this study")
    parser.add_argument("--rates_of", metavar="[FILE:]TASK", help="take the best rates there; no FILE = --known")
    parser.add_argument("--result", metavar="NAME", help="result file to write to, results/NAME.json")
    words = sys.argv[1:]
    cut = words.index("--") if "--" in words else len(words)
    args = parser.parse_args(words[:cut])
    if args.rates_of and (args.few_shot or not (args.known or ":" in args.rates_of)):
        parser.error("--rates_of needs --known or FILE:TASK, and no --few_shot (which chooses rates for each seed)")
    print(shlex.join(["python", "benchmarks/quality.py", *words]), flush=True)
    variants = variants_of(args)
    study(variants, args, words[cut + 1 :])
    print((args.output_dir / "table.md").read_text())
    if failed := [text for variant in variants for text in variant.failed]:
        raise SystemExit(f"{len(failed)} runs failed, the first: {failed[0]}")


if __name__ == "__main__":
    main()
