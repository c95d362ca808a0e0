"""Accuracy against seconds on a real task: direct search, its extensions, SPSA and Adam on the same head.

The encoder runs once over training and validation data (their features are kept as in training); then each variant
trains the head from the same start. Seconds are those of the steps alone; with one thread on the CPU, seconds of
processor time, which other work on a shared machine changes little. What a variant is, is one row of `VARIANTS`.
"""

import argparse
import json
import math
import statistics
import time
from functools import partial
from pathlib import Path

import results as result_files
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, DataCollatorWithPadding

from hf_ft_ext import SPSA, DirectSearch, NodePerturbation, demo_encoder
from hf_ft_ext.arguments import DataArguments
from hf_ft_ext.data.loading import load_data
from hf_ft_ext.data.preprocess import tokenize
from hf_ft_ext.features import HeadReader
from hf_ft_ext.features.cache import cached_features
from hf_ft_ext.features.rows import read_in_order
from hf_ft_ext.gradientless.scoring.evaluation import HeadEvaluation
from hf_ft_ext.gradientless.scoring.objectives import make_objective, row_losses
from hf_ft_ext.models import seeded_init
from hf_ft_ext.training.head_adam import HeadAdam

_GLD = {"lr": 7.5e-3, "weight_decay": 0.05, "options": "1x1", "sampling_size": "2h"}
_FREE = {**_GLD, "options": None, "weight_decay": 0.0}
# name -> (optimizer, its settings, batch, share of the rate at the end)
VARIANTS = {
    "gld-plain": (DirectSearch, {**_GLD, "lr": 5e-3, "weight_decay": 0.0}, 64, 1.0),
    "gld-preferred": (DirectSearch, _GLD, 64, 0.1),
    "gld-preferred-256": (DirectSearch, _GLD, 256, 0.1),
    "gld-no-norm": (DirectSearch, {**_GLD, "weight_decay": 0.0}, 64, 0.1),
    "gld-wide": (DirectSearch, {**_GLD, "lr": 2e-2, "weight_decay": 0.0}, 64, 0.1),
    "gld-none": (DirectSearch, {**_GLD, "options": None}, 64, 0.1),
    "gld-3x2": (DirectSearch, {**_GLD, "options": "3x2"}, 64, 0.1),
    "gld-antithetic": (DirectSearch, {**_GLD, "options": None, "antithetic": True, "num_candidates": 6}, 64, 0.1),
    "gld-pool": (DirectSearch, {**_GLD, "options": None, "pool": True}, 64, 0.1),
    "gld-1024": (DirectSearch, {**_FREE, "lr": 2e-2}, 1024, 0.1),
    "gld-1024-pairs": (DirectSearch, {**_FREE, "lr": 1e-2, "num_candidates": 2, "antithetic": True}, 1024, 0.1),
    "gld-2048-pairs": (DirectSearch, {**_FREE, "lr": 1.5e-2, "num_candidates": 2, "antithetic": True}, 2048, 0.05),
    "gld-512-few": (DirectSearch, {**_FREE, "lr": 4e-2, "sampling_size": 256}, 512, 0.1),
    "spsa": (SPSA, {"lr": 1e-3, "num_directions": 4}, 64, 0.1),
    "spsa-1024": (SPSA, {"lr": 2e-2, "num_directions": 4}, 1024, 0.1),
    "node-signs-256": (NodePerturbation, {"lr": 3e-4, "num_directions": 4, "directions": "signs"}, 256, 0.03),
    "node": (NodePerturbation, {"lr": 1e-4}, 64, 0.1),
    "node-256": (NodePerturbation, {"lr": 1e-4}, 256, 0.1),
    "adam": (HeadAdam, {"lr": 1e-4}, 64, 0.1),
    "adam-256": (HeadAdam, {"lr": 1e-4}, 256, 0.1),
}


def add_curve_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", help="--curve: data set folder or Hub id")
    parser.add_argument("--task", default="sst2")
    parser.add_argument("--model", help="--curve: none = the demo encoder")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--seconds", type=float, help="--curve: end each run after so much time instead of --steps")
    parser.add_argument("--points", type=int, default=20, help="--curve: evaluations per run")
    parser.add_argument("--picture", help="--curve: PNG of accuracy against seconds")
    parser.add_argument("--max_rows", type=int, help="--curve: training rows")


def load(args: argparse.Namespace):
    """The reader, and features and labels of both splits."""
    name = args.model or demo_encoder()
    tokenizer = AutoTokenizer.from_pretrained(name)
    data_args = DataArguments(task_name=args.task, dataset_name=args.data, max_train_samples=args.max_rows)
    data_args.max_seq_length = 64
    data = tokenize(load_data(data_args), tokenizer, data_args)
    with seeded_init(0):
        model = AutoModelForSequenceClassification.from_pretrained(
            name, num_labels=len(data.label_names), dtype=torch.float32
        ).eval()
    collate, splits = DataCollatorWithPadding(tokenizer), []
    sample = data.train.remove_columns("labels")
    reader = HeadReader.find(model, dict(collate([sample[i] for i in range(8)])))
    for rows in (data.train, next(iter(data.validation.values()))):
        inputs = rows.remove_columns("labels")
        features = cached_features(
            reader, rows, lambda start, inputs=inputs: read_in_order(reader.features, inputs, collate, 64, start=start)
        )
        splits.append((torch.as_tensor(features[:]), torch.as_tensor(rows["labels"][:])))
    return reader, splits


def run(name: str, seed: int, reader: HeadReader, splits, args: argparse.Namespace) -> list[dict]:
    """One run: points of steps, seconds, loss and accuracy on the validation split."""
    optimizer_class, settings, batch, last = VARIANTS[name]
    (features, labels), (held_out, truth) = splits
    head = reader.head_parameters()
    generator = torch.Generator().manual_seed(seed)
    for parameter in head.values():  # the start of a fresh classifier, as transformers draws it
        parameter.requires_grad_(False)
        if parameter.ndim > 1:
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * reader.model.config.initializer_range)
        else:
            parameter.zero_()
    settings = dict(settings)
    if settings.get("sampling_size") == "2h":
        settings["sampling_size"] = 2 * reader.hidden
    extra = {"module": reader.model} if optimizer_class is SPSA else {}
    if optimizer_class is not HeadAdam:
        extra["seed"] = seed
    optimizer = optimizer_class(list(head.values()), **extra, **settings)
    scoring = HeadEvaluation(
        reader,
        {id(p): n for n, p in head.items()},
        make_objective("loss", None, reader.model.config.num_labels),
        of_rows=partial(row_losses, problem_type=None),
    )
    rate, seconds, points, step = settings["lr"], 0.0, [], 0
    order = iter(())
    alone = torch.get_num_threads() == 1 and features.device.type == "cpu"
    clock = time.process_time if alone else time.perf_counter
    while True:
        share = seconds / args.seconds if args.seconds else step / args.steps
        if share >= len(points) / args.points or share >= 1:
            with torch.no_grad():
                logits = reader.logits(held_out)
            accuracy = float((logits.argmax(-1) == truth).float().mean())
            loss = float(torch.nn.functional.cross_entropy(logits, truth))
            points.append({"step": step, "seconds": round(seconds, 3), "accuracy": accuracy, "loss": loss})
            if share >= 1:
                return points
        start = clock()
        rows = next(order, None)
        if rows is None or len(rows) < batch:
            order = iter(torch.randperm(len(features), generator=generator).split(batch))
            rows = next(order)
        for group in optimizer.param_groups:
            group["lr"] = rate * (1 - min(share, 1) * (1 - last))
        scoring.load([(features[rows], labels[rows])])
        optimizer.step(scoring.closure, scoring)
        seconds += clock() - start
        step += 1


def curve(args: argparse.Namespace) -> str:
    """All variants and seeds; the points go to `--output` (JSON), the ends are returned as a table."""
    reader, splits = load(args)
    results: dict[str, dict[int, list[dict]]] = {}
    path = Path(args.output) if args.output else None
    if path and path.exists():  # an interrupted study continues
        results = {name: {int(s): p for s, p in runs.items()} for name, runs in json.loads(path.read_text()).items()}
    for seed in args.seeds:
        for name in args.variants or VARIANTS:
            if seed in results.get(name, {}):
                continue
            points = run(name, seed, reader, splits, args)
            results.setdefault(name, {})[seed] = points
            print(f"{name}, seed {seed}: {points[-1]}", flush=True)
            if path:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(json.dumps(results))
            result_files.save("gradientless-curve", rows_of(results, args))
    if args.picture:
        draw(results, Path(args.picture))
    lines = ["| variant | accuracy at the end | best | seconds | ms a step |", "| --- | ---: | ---: | ---: | ---: |"]
    for name, runs in results.items():
        last = [points[-1] for points in runs.values()]
        ends = [point["accuracy"] for point in last]
        error = f" ± {statistics.stdev(ends):.4f}" if len(ends) > 1 else ""
        best = statistics.mean(max(point["accuracy"] for point in points) for points in runs.values())
        seconds = statistics.mean(point["seconds"] for point in last)
        each = 1e3 * seconds / max(1, math.floor(statistics.mean(point["step"] for point in last)))
        lines.append(f"| {name} | {statistics.mean(ends):.4f}{error} | {best:.4f} | {seconds:.1f} | {each:.2f} |")
    return "\n".join(lines)


def rows_of(results: dict[str, dict[int, list[dict]]], args: argparse.Namespace) -> list[dict]:
    """Rows of the result file: the ends of the runs so far."""
    rows = []
    for name, runs in results.items():
        about = {
            "what": name,
            "rows": args.max_rows or "all",
            "seconds": args.seconds,
            "steps": None if args.seconds else args.steps,
        }
        for measure, scale in (("accuracy", 100), ("loss", 1)):
            ends = {seed: scale * points[-1][measure] for seed, points in runs.items()}
            rows.append({**about, "measure": measure, **result_files.over_seeds(ends)})
        steps = {seed: points[-1]["step"] for seed, points in runs.items()}
        rows.append({**about, "measure": "steps taken", **result_files.over_seeds(steps)})
    return rows


def draw(results: dict[str, dict[int, list[dict]]], path: Path) -> None:
    """Accuracy on the validation split against seconds of the steps: mean over seeds, and their range as a band."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.2), layout="constrained")
    for name, runs in results.items():
        points = list(zip(*runs.values(), strict=False))
        seconds = [statistics.mean(p["seconds"] for p in at) for at in points]
        scores = [[100 * p["accuracy"] for p in at] for at in points]
        (line,) = axes.plot(seconds, [statistics.mean(s) for s in scores], label=f"{name} ({len(runs)} seeds)")
        axes.fill_between(seconds, list(map(min, scores)), list(map(max, scores)), alpha=0.15, color=line.get_color())
    axes.set(xlabel="seconds of one core", ylabel="accuracy, validation split (%)")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
