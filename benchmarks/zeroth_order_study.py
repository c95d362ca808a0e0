"""Zeroth-order methods on prompts with a masked language model: accuracy against forward passes.

    python benchmarks/zeroth_order_study.py --model path/to/masked-lm --data path/to/data --output study.json
    python benchmarks/zeroth_order_study.py --output study.json --table

`--data` holds `glue` (sst2) and `fewshot` (subj, trec). For each task, number of shots and method, the rate is chosen
from `GRID` times the method's base rate by the dev accuracy of one run (data seed 13) with `--tuning` of the forward
passes; then each seed runs with it. All methods get the same number of forward passes of a batch; Adam's forward and
backward count as one each. Each finished run is in the output file at once: the study continues where it was left, and
the table shows what there is. `passes to MeZO's accuracy`: the first measured point at which a method's mean accuracy
is MeZO's at the end, as a share of the budget.
"""

import argparse
import json
import os
import statistics
import sys
import time
from pathlib import Path

import torch
from transformers import DataCollatorWithPadding

from hf_ft_ext import SPSA
from hf_ft_ext.arguments import PROMPT, DataArguments, ModelArguments
from hf_ft_ext.data.loading import load_data
from hf_ft_ext.gradientless.scoring.full_models import objective_of_logits
from hf_ft_ext.gradientless.scoring.objectives import make_objective
from hf_ft_ext.models import load_tokenizer_and_model
from hf_ft_ext.prompts.preprocess import tokenize_prompts

FOLDERS = {"sst2": "glue", "subj": "fewshot", "trec": "fewshot"}
GRID = (0.1, 0.3, 1.0, 3.0)
# name -> (base rate, settings of SPSA; `None` = Adam by gradients)
METHODS = {
    "mezo": (1e-4, {}),
    "fzoo": (3e-4, {"direction": "rademacher", "estimate": "one-sided", "num_directions": 8}),
    "fzoo-outer": (3e-4, {"direction": "rademacher-outer", "estimate": "one-sided", "num_directions": 8}),
    "lozo": (1e-4, {"direction": "lozo"}),
    "lozo-m": (1e-5, {"direction": "lozo", "update": "momentum"}),
    "subzero": (1e-2, {"direction": "subzero"}),
    "sparse-mezo": (3e-4, {"small": 0.25}),
    "population": (3e-4, {"estimate": "population", "num_directions": 16}),
    "forward": (1e-4, {"estimate": "forward"}),
    "adam": (1e-4, None),
}


class Task:
    """A few-shot split of a task as tokenised rows, and a fresh model for each run."""

    def __init__(self, args: argparse.Namespace, task: str, shots: int, data_seed: int):
        folder = os.path.join(args.data, FOLDERS[task])
        self.data_args = DataArguments(task_name=task, dataset_name=folder, num_k=shots, few_shot_type=PROMPT)
        self.data_args.max_predict_samples = args.test_rows
        self.data = load_data(self.data_args, data_seed=data_seed)
        self.model_args = ModelArguments(model_name_or_path=args.model, dtype="float32")
        tokenizer, model = self._load()
        rows = tokenize_prompts(self.data, tokenizer, self.data_args, model.config, data_seed=data_seed)
        self.collate = DataCollatorWithPadding(tokenizer)
        self.train = list(rows.train)
        self.dev = list(next(iter(rows.validation.values())))
        self.test = list(next(iter((rows.test or rows.validation).values())))[: args.test_rows]

    def _load(self):
        return load_tokenizer_and_model(self.model_args, self.data, seed=0, data_args=self.data_args)

    def model(self) -> torch.nn.Module:
        return self._load()[1].eval()

    def batch(self, rows: list) -> dict[str, torch.Tensor]:
        kept = [{k: v for k, v in row.items() if k in ("input_ids", "attention_mask", "labels")} for row in rows]
        return dict(self.collate(kept))

    @torch.no_grad()
    def accuracy(self, model: torch.nn.Module, rows: list) -> float:
        right = 0
        for start in range(0, len(rows), 64):
            batch = self.batch(rows[start : start + 64])
            labels = batch.pop("labels")
            right += int((model(**batch).logits.argmax(-1) == labels).sum())
        return right / len(rows)


def run(task: Task, method: str, rate: float, seed: int, passes: int, points: int, batch_size: int) -> list[dict]:
    """Points of forward passes, dev and test accuracy, seconds."""
    settings = METHODS[method][1]
    model = task.model()
    if settings is None:
        optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    else:
        model.requires_grad_(False)
        optimizer = SPSA(model.parameters(), model, lr=rate, seed=seed, **settings)
    objective = make_objective("loss", None, model.config.num_labels)
    generator, order, used, seconds, found = torch.Generator().manual_seed(seed), [], 0, 0.0, []
    while True:
        if used >= passes * len(found) / points:
            scores = {"dev": task.accuracy(model, task.dev), "test": task.accuracy(model, task.test)}
            found.append({"passes": used, **scores, "seconds": round(seconds, 1)})
            if len(found) > points:
                return found
        start = time.process_time()
        if len(order) < batch_size:
            order = torch.randperm(len(task.train), generator=generator).tolist()
        rows, order = order[:batch_size], order[batch_size:]
        full = objective_of_logits(model, objective, [task.batch([task.train[i] for i in rows])])
        if settings is None:
            optimizer.zero_grad()
            full.value().backward()
            optimizer.step()
            used += 2
        else:
            before = optimizer.evaluations
            try:
                optimizer.step(full.value, full)
            except ValueError:  # the loss is not finite: the rate is too large
                chance = [{**found[0], "passes": passes, "diverged": True}] * (points + 1 - len(found))
                return found + chance
            used += optimizer.evaluations - before
        seconds += time.process_time() - start


def study(args: argparse.Namespace) -> None:
    path = Path(args.output)
    results = json.loads(path.read_text()) if path.exists() else {"about": {}, "runs": {}}
    results["about"] = {
        "passes": args.passes, "tuning": args.tuning, "batch": args.batch, "test_rows": args.test_rows,
        "torch": torch.__version__, "command": " ".join(sys.argv),
    }  # fmt: skip

    def finished(key: str, make) -> list[dict]:
        if key not in results["runs"]:
            results["runs"][key] = make()
            temporary = path.with_suffix(".tmp")
            temporary.write_text(json.dumps(results))
            os.replace(temporary, path)
            print(key, results["runs"][key][-1], flush=True)
        return results["runs"][key]

    for shots in args.shots:
        for name in args.tasks:
            tasks: dict[int, Task] = {}

            def task_of(seed: int, name=name, shots=shots, tasks=tasks) -> Task:
                if seed not in tasks:
                    tasks[seed] = Task(args, name, shots, seed)
                return tasks[seed]

            for method in args.methods:
                base, scores = METHODS[method][0], {}
                for factor in GRID:
                    passes = int(args.tuning * args.passes)
                    points = finished(
                        f"{name} {shots} {method} tuning {factor}",
                        lambda f=factor, m=method, b=base, p=passes: run(task_of(13), m, b * f, 13, p, 2, args.batch),
                    )
                    scores[factor] = points[-1]["dev"]
                best = max(scores, key=scores.__getitem__)
                for seed in args.seeds:
                    finished(
                        f"{name} {shots} {method} seed {seed}",
                        lambda s=seed, m=method, r=base * best: run(
                            task_of(s), m, r, s, args.passes, args.points, args.batch
                        ),
                    )


def table(results: dict) -> str:
    """What there is so far."""
    runs: dict[tuple[str, str, str], list[list[dict]]] = {}
    for key, points in results["runs"].items():
        task, shots, method, kind, _ = key.split()
        if kind == "seed":
            runs.setdefault((task, shots, method), []).append(points)
    lines = [
        "| task | shots | method | seeds | accuracy | passes to MeZO's accuracy |",
        "| --- | ---: | --- | ---: | ---: | ---: |",
    ]
    for (task, shots, method), found in runs.items():
        ends = [points[-1]["test"] for points in found]
        spread = f" ± {100 * statistics.stdev(ends):.1f}" if len(ends) > 1 else ""
        mezo = runs.get((task, shots, "mezo"))
        share = ""
        if mezo:
            goal = statistics.mean(points[-1]["test"] for points in mezo)
            for at in zip(*found, strict=False):
                if statistics.mean(point["test"] for point in at) >= goal:
                    share = f"{100 * at[0]['passes'] / results['about']['passes']:.0f} %"
                    break
            else:
                share = "not reached"
        mean = f"{100 * statistics.mean(ends):.1f}{spread}"
        lines.append(f"| {task} | {shots} | {method} | {len(ends)} | {mean} | {share} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder or Hub id of a masked language model")
    parser.add_argument("--data", help="folder with glue and fewshot")
    parser.add_argument("--output", required=True, help="JSON file; a study that is there continues")
    parser.add_argument("--tasks", nargs="+", default=list(FOLDERS), choices=FOLDERS)
    parser.add_argument("--shots", type=int, nargs="+", default=[16, 512])
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[13, 21, 42])
    parser.add_argument("--passes", type=int, default=20_000, help="forward passes of a batch in each run")
    parser.add_argument("--tuning", type=float, default=0.2, help="share of the passes in a run that chooses the rate")
    parser.add_argument("--points", type=int, default=20, help="evaluations per run")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--test_rows", type=int, default=500)
    parser.add_argument("--table", action="store_true", help="print the table of what there is, and stop")
    args = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    if not args.table:
        if args.model is None or args.data is None:
            parser.error("pass --model and --data")
        study(args)
    print(table(json.loads(Path(args.output).read_text())))


if __name__ == "__main__":
    main()
