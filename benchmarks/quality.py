"""Quality of several methods on one task, learning rates tuned equally: runs `run_glue.py`, reads `run.json`.

    python benchmarks/quality.py --output_dir runs/quality-cola --task_name cola \
        --rates full=1e-4,3e-4,1e-3 lora=1e-3,3e-3,1e-2 sparse=1e-4,3e-4,1e-3 \
        -- --dataset_name path/to/glue --max_seq_length 64 --per_device_train_batch_size 16

For each method every learning rate is tried for `--tune_epochs` with the first seed; the best one by the
task's primary metric on the validation set (ties: by its loss) is then run for `--epochs` with every seed. Each
run is a process of its own; runs that are there already (with the same command) are not repeated, so an
interrupted study continues. What follows `--` goes to `run_glue.py` as it is. The table goes to standard output
and to `table.md` in the output folder.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

from hf_ft_ext.data.tasks import get_task
from hf_ft_ext.metrics import primary_key

LAUNCHER = Path(__file__).resolve().parents[1] / "run_glue.py"


def run(folder: Path, words: list[str]) -> dict:
    """The run record of `run_glue.py` with `words`, from `folder` if it was run before."""
    record = folder / "run.json"
    if record.exists():
        found = json.loads(record.read_text())
        if found["command"][1:] == words:
            return found
    command = [sys.executable, str(LAUNCHER), *words]
    log = folder.with_suffix(".log")
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "w") as output:
        done = subprocess.run(command, stdout=output, stderr=subprocess.STDOUT)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed with status {done.returncode}; see {log}")
    return json.loads(record.read_text())


def study(args: argparse.Namespace, passed_on: list[str]) -> list[dict]:
    """Tune, then train: one row per method."""
    score = f"eval_{primary_key(get_task(args.task_name).metric)}"
    rows = []
    for method, rates in args.rates.items():

        def words(rate: str, seed: int, epochs: float, folder: Path, method: str = method) -> list[str]:
            own = {"method": method, "task_name": args.task_name, "learning_rate": rate, "seed": seed}
            own |= {"num_train_epochs": epochs, "output_dir": folder, "save_strategy": "no", "disable_tqdm": True}
            return [word for key, value in own.items() for word in (f"--{key}", str(value))] + [
                "--overwrite_output_dir",
                *passed_on,
            ]

        tuned, losses = {}, {}
        for rate in rates:
            folder = args.output_dir / f"{method}-tune-{rate}"
            metrics = run(folder, words(rate, args.seeds[0], args.tune_epochs, folder))["metrics"]
            tuned[rate], losses[rate] = metrics[score], metrics["eval_loss"]
            print(f"{method} lr {rate}, {args.tune_epochs:g} epoch: {score} {tuned[rate]:.4f}", flush=True)
        best = max(tuned, key=lambda rate: (tuned[rate], -losses[rate]))
        records = []
        for seed in args.seeds:
            folder = args.output_dir / f"{method}-{seed}"
            records.append(run(folder, words(best, seed, args.epochs, folder)))
            print(f"{method} lr {best}, seed {seed}: {score} {records[-1]['metrics'][score]:.4f}", flush=True)
        rows.append({"method": method, "rate": best, "score": score, "tuned": tuned, "records": records})
    return rows


def table(rows: list[dict]) -> str:
    """Markdown: one line per method, mean and standard deviation over seeds."""

    def spread(values: list[float], digits: int) -> str:
        deviation = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
        return f"{statistics.mean(values):.{digits}f}{deviation}"

    lines = [
        f"| method | {rows[0]['score']} | lr (tried) | train s | preparation s | peak MiB | trainable | saved MB |",
        "| --- | ---: | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        records = row["records"]
        tried = ", ".join(f"{rate}: {value:.3f}" for rate, value in row["tuned"].items())
        cells = [
            row["method"],
            spread([r["metrics"][row["score"]] for r in records], 4),
            f"{row['rate']} ({tried})",
            spread([r["train_seconds"] for r in records], 1),
            spread([r["preparation_seconds"] for r in records], 1),
            spread([r["peak_memory_bytes"] / 2**20 for r in records], 0),
            f"{records[0]['trainable_parameters']:,}",
            f"{records[0]['artefact_bytes'] / 1e6:.1f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task_name", required=True)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument(
        "--rates", nargs="+", required=True, metavar="METHOD=LR,LR,...", help="methods and their learning rates"
    )
    parser.add_argument("--epochs", type=float, default=3)
    parser.add_argument("--tune_epochs", type=float, default=1)
    parser.add_argument("--seeds", type=int, nargs="+", default=[42])
    words = sys.argv[1:]
    cut = words.index("--") if "--" in words else len(words)
    args = parser.parse_args(words[:cut])
    args.rates = {method: rates.split(",") for method, _, rates in (item.partition("=") for item in args.rates)}
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    text = table(study(args, words[cut + 1 :]))
    (args.output_dir / "table.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
