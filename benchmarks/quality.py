"""Quality of several methods on one task, learning rates tuned equally: runs `run_glue.py`, reads `run.json`.

    python benchmarks/quality.py --output_dir runs/quality-cola --task_name cola \
        --rates full=1e-4,3e-4,1e-3 lora=1e-3,3e-3,1e-2 sparse=1e-4,3e-4,1e-3 \
        -- --dataset_name path/to/glue --max_seq_length 64 --per_device_train_batch_size 16
    python benchmarks/quality.py benchmarks/studies/sparse.yaml --output_dir runs/quality-sst2 --task_name sst2 \
        --seeds 1 2 3 -- --dataset_name path/to/glue --max_train_samples 4000

A study file is a mapping from the name of a variant to its arguments (`method` and what that method takes), with
a list of learning rates as `learning_rate`; arguments under `all` go to every variant, unless it sets them to null.
For each variant every learning rate (unless there is one only) is tried for `--tune_epochs` with the first seed; the
best one by the task's primary metric on the validation set (ties: by its loss) is then run for `--epochs` with every
seed. A variant with `max_steps` takes as many in both; one without a learning rate has nothing to try. Each run is a
process of its own; runs that are there already (with the same command) are not repeated, so an interrupted study
continues, and several processes can share one with `--only`. What follows `--` goes to `run_glue.py` as it is. The
table goes to standard output and to `table.md` in the output folder.

    python benchmarks/quality.py benchmarks/studies/kernel.yaml --few_shot --output_dir runs/few --task_name sst2 \
        --seeds 13 21 42 87 100 -- --dataset_name path/to/glue --num_k 16 --few_shot_split k-shot-1k-test

With `--few_shot` a seed draws the data too, every learning rate is run in full with every seed, the run that is best
on the dev split counts, and what counts of it is the test score. Weights are deleted once a run is recorded.
"""

import argparse
import shlex
import statistics
import sys
from pathlib import Path

import yaml

from hf_ft_ext.compare.process import log_of, run_or_find
from hf_ft_ext.data.tasks import get_task
from hf_ft_ext.metrics import primary_key


def run(folder: Path, words: list[str]) -> dict:
    """The run record of `run_glue.py` with `words`, from `folder` if it was run before."""
    outcome = run_or_find(folder, words)
    if outcome.record is None:
        raise SystemExit(f"run_glue.py {shlex.join(words)} failed: {outcome.reason}; see {log_of(folder)}")
    return outcome.record


def few_shot_records(args: argparse.Namespace, name: str, rates: list[str | None], words, score: str) -> list[dict]:
    """For each seed the record of the run that is best on the dev split."""
    best = []
    for seed in args.seeds:
        found = []
        for rate in rates:
            folder = args.output_dir / "-".join(filter(None, (name, str(seed), rate)))
            record = run(folder, [*words(rate, seed, args.epochs, folder), "--do_predict"])
            for weights in folder.glob("*.safetensors"):
                weights.unlink()
            found.append((record["metrics"][score], -record["metrics"]["eval_loss"], len(found), record))
        best.append(max(found)[-1])
        test = best[-1]["metrics"][score.replace("eval", "test", 1)]
        print(f"{name} lr {rates[max(found)[2]]}, seed {seed}: test {test:.4f}", flush=True)
    return best


def study(args: argparse.Namespace, passed_on: list[str]) -> list[dict]:
    """Tune, then train: one row per variant."""
    score = f"eval_{primary_key(get_task(args.task_name).metric)}"
    report = args.report or score
    rows = []
    for method, arguments in args.variants.items():
        settings = {key: value for key, value in arguments.items() if value is not None}
        settings["task_name"] = args.task_name
        rates = settings.pop("learning_rate", [None])
        same_length = "max_steps" in settings or args.tune_epochs == args.epochs

        def words(rate: str, seed: int, epochs: float, folder: Path, settings: dict = settings) -> list[str]:
            own = {**settings, "seed": seed, "output_dir": folder, "save_strategy": "no", "disable_tqdm": True}
            if args.data_seeds or args.few_shot:
                own["data_seed"] = seed
            if rate is not None:
                own["learning_rate"] = rate
                own |= {} if "max_steps" in settings else {"num_train_epochs": epochs}
            return [word for key, value in own.items() for word in (f"--{key}", str(value))] + [
                "--overwrite_output_dir",
                *passed_on,
            ]

        if args.few_shot:
            records = few_shot_records(args, method, rates, words, score)
            test = score.replace("eval", "test", 1)
            rows.append({"method": method, "rate": "by seed", "score": test, "tuned": {}, "records": records})
            continue
        tuned, losses, tried = {}, {}, {}
        for rate in rates if len(rates) > 1 else ():  # nothing to choose from one
            folder = args.output_dir / f"{method}-tune-{rate}"
            tried[rate] = run(folder, words(rate, args.seeds[0], args.tune_epochs, folder))
            metrics = tried[rate]["metrics"]
            tuned[rate], losses[rate] = metrics[score], metrics["eval_loss"]
            print(f"{method} lr {rate}, {args.tune_epochs:g} epoch: {score} {tuned[rate]:.4f}", flush=True)
        best = max(rates, key=lambda rate: (tuned.get(rate, 0), -losses.get(rate, 0)))
        records = []
        for seed in args.seeds:
            folder = args.output_dir / f"{method}-{seed}"
            if same_length and seed == args.seeds[0] and best in tried:
                records.append(tried[best])  # that very run
            else:
                records.append(run(folder, words(best, seed, args.epochs, folder)))
            print(f"{method} lr {best}, seed {seed}: {report} {records[-1]['metrics'][report]:.4f}", flush=True)
        rows.append({"method": method, "rate": best, "score": report, "tuned": tuned, "records": records})
    return rows


def table(rows: list[dict]) -> str:
    """Markdown: one line per variant, mean and standard deviation over seeds."""

    def spread(values: list[float], digits: int) -> str:
        if None in values:  # nothing was trained
            return "-"
        deviation = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
        return f"{statistics.mean(values):.{digits}f}{deviation}"

    lines = [
        f"| variant | {rows[0]['score']} | lr (tried) | train s | preparation s | peak MiB | trainable | saved MB |",
        "| --- | ---: | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        records = row["records"]
        tried = ", ".join(f"{rate}: {value:.3f}" for rate, value in row["tuned"].items())
        cells = [
            row["method"],
            spread([r["metrics"][row["score"]] for r in records], 4),
            f"{row['rate']} ({tried})" if tried else row["rate"] or "-",
            spread([r["train_seconds"] for r in records], 1),
            spread([r["preparation_seconds"] for r in records], 1),
            spread([None if (peak := r["peak_memory_bytes"]) is None else peak / 2**20 for r in records], 0),
            f"{records[0]['trainable_parameters']:,}",
            f"{records[0]['artefact_bytes'] / 1e6:.1f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def variants_of(args: argparse.Namespace) -> dict[str, dict]:
    """Arguments by name of variant, from the study file or from `--rates`."""
    if (args.study is None) == (args.rates is None):
        raise SystemExit("pass a study file or --rates, one of the two")
    if args.study is None:
        split = (item.partition("=") for item in args.rates)
        return {method: {"method": method, "learning_rate": rates.split(",")} for method, _, rates in split}
    study = yaml.safe_load(args.study.read_text())
    shared = study.pop("all", {})
    if unknown := set(args.only or ()) - study.keys():
        raise SystemExit(f"{args.study} has no variant {sorted(unknown)[0]!r}; it has {', '.join(study)}")
    return {name: {**shared, **own} for name, own in study.items() if not args.only or name in args.only}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path, nargs="?", help="YAML file of variants")
    parser.add_argument("--only", nargs="+", metavar="VARIANT", help="of a study file: these variants")
    parser.add_argument("--task_name", required=True)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--rates", nargs="+", metavar="METHOD=LR,LR,...", help="methods and their learning rates")
    parser.add_argument("--epochs", type=float, default=3)
    parser.add_argument("--tune_epochs", type=float, default=1)
    parser.add_argument("--few_shot", action="store_true", help="tune each seed on its own dev split: see above")
    parser.add_argument("--seeds", type=int, nargs="+", default=[42])
    parser.add_argument("--data_seeds", action="store_true", help="the seeds choose the few-shot rows too")
    parser.add_argument("--report", metavar="METRIC", help="metric of the table; none = the one that chose the rate")
    words = sys.argv[1:]
    cut = words.index("--") if "--" in words else len(words)
    args = parser.parse_args(words[:cut])
    args.variants = variants_of(args)
    text = table(study(args, words[cut + 1 :]))
    (args.output_dir / "table.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
