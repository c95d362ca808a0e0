"""Zeroth-order methods on prompts with a masked language model: accuracy and loss against forward passes.

    python benchmarks/zeroth_order_study.py --model path/to/masked-lm --data path/to/data --runs study.json

`--data` holds `glue` (sst2) and `fewshot` (subj, trec). All weights are searched. For each task, number of shots and
method, the rate is the one of `GRID` times the method's base rate with the lowest dev loss after one run (data seed
13) with the share `--tuning` of the forward passes; then each seed runs with it. All methods get the same number of
forward passes of a batch; Adam's forward and backward count as one each. First every method has one seed of one task,
then the next task, and so on. Each finished run is in `--runs` at once: the study continues where it was left, and its
rows in `results/zeroth-order-study.json` are those of the runs so far (see `results.py`). "passes to MeZO": the first
measured point at which a method's mean is at least as good as MeZO's at the end, as a share of the budget.
"""

import argparse
import json
import math
import os
import statistics
import time
from pathlib import Path

import results
import torch
from torch.nn import functional
from transformers import DataCollatorWithPadding

from hf_ft_ext import SPSA
from hf_ft_ext.arguments import PROMPT, DataArguments, ModelArguments
from hf_ft_ext.data.loading import load_data
from hf_ft_ext.gradientless.scoring.full_models import objective_of_logits
from hf_ft_ext.gradientless.scoring.objectives import make_objective
from hf_ft_ext.models import load_tokenizer_and_model
from hf_ft_ext.prompts.preprocess import tokenize_prompts

FOLDERS = {"sst2": "glue", "subj": "fewshot", "trec": "fewshot"}
GRID = (0.3, 1.0, 3.0)
# name -> (base rate, settings of SPSA; `None` = Adam by gradients)
METHODS = {
    "mezo": (3e-5, {}),
    "lozo": (3e-5, {"direction": "lozo"}),
    "fzoo": (1e-3, {"direction": "rademacher", "estimate": "one-sided", "num_directions": 8}),
    "adam": (3e-5, None),
    "subzero": (3e-5, {"direction": "subzero"}),
    "lozo-m": (3e-6, {"direction": "lozo", "update": "momentum"}),
    "sparse-mezo": (1e-4, {"small": 0.25}),
    "fzoo-outer": (1e-3, {"direction": "rademacher-outer", "estimate": "one-sided", "num_directions": 8}),
    "population": (1e-3, {"estimate": "population", "num_directions": 16}),
    "forward": (3e-5, {"estimate": "forward"}),
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
    def scores(self, model: torch.nn.Module, rows: list) -> tuple[float, float]:
        """Accuracy and mean loss."""
        right, loss = 0, 0.0
        for start in range(0, len(rows), 64):
            batch = self.batch(rows[start : start + 64])
            labels = batch.pop("labels")
            logits = model(**batch).logits
            right += int((logits.argmax(-1) == labels).sum())
            loss += float(functional.cross_entropy(logits, labels, reduction="sum"))
        return right / len(rows), loss / len(rows)


def run(task: Task, method: str, rate: float, seed: int, passes: int, points: int, batch_size: int) -> list[dict]:
    """Points of forward passes, accuracy and loss of dev and test rows; without `points`, those of dev at the end."""
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
        if used >= passes * len(found) / max(1, points) and (points or used >= passes):
            found.append({"passes": used, "seconds": round(seconds, 1)})
            for name, rows in (("dev", task.dev), ("test", task.test))[: 2 if points else 1]:
                found[-1][name], found[-1][f"{name} loss"] = task.scores(model, rows)
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
                bad = {"passes": passes, "diverged": True, "dev": 0.0, "test": 0.0}
                return found + [{**bad, "dev loss": math.inf, "test loss": math.inf}] * (points + 1 - len(found))
            used += optimizer.evaluations - before
        seconds += time.process_time() - start


def study(args: argparse.Namespace) -> None:
    path = Path(args.runs)
    content = json.loads(path.read_text()) if path.exists() else {"settings": {}, "runs": {}}
    settings = {name: getattr(args, name) for name in ("passes", "tuning", "points", "batch", "test_rows")}
    if content["settings"] not in ({}, settings):
        raise SystemExit(f"{path} is of a study with {content['settings']}; pass the same, or another --runs")
    content["settings"] = settings
    tasks: dict[tuple, Task] = {}

    def finished(key: str, task: tuple, method: str, rate: float, seed: int, passes: int, points: int) -> list[dict]:
        if key not in content["runs"]:
            if task not in tasks:
                tasks[task] = Task(args, *task)
            content["runs"][key] = run(tasks[task], method, rate, seed, passes, points, args.batch)
            temporary = path.with_suffix(".tmp")
            temporary.write_text(json.dumps(content))
            os.replace(temporary, path)
            print(key, f"rate {rate:.2g}", content["runs"][key][-1], flush=True)
        return content["runs"][key]

    for seed in args.seeds:
        for shots in args.shots:
            for name in args.tasks:
                for method in args.methods:
                    base, losses = METHODS[method][0], {}
                    passes = int(args.tuning * args.passes)
                    for factor in GRID:
                        key = f"{name} {shots} {method} tuning {factor}"
                        end = finished(key, (name, shots, 13), method, base * factor, 13, passes, 0)[-1]
                        losses[factor] = end["dev loss"]
                    rate = base * min(losses, key=losses.__getitem__)
                    key = f"{name} {shots} {method} seed {seed}"
                    finished(key, (name, shots, seed), method, rate, seed, args.passes, args.points)
                    results.save(args.result, rows_of(content))


def rows_of(content: dict) -> list[dict]:
    """Rows of the result file from the runs so far."""
    runs: dict[tuple[str, str, str], dict[int, list[dict]]] = {}
    for key, points in content["runs"].items():
        task, shots, method, kind, number = key.split()
        if kind == "seed":
            runs.setdefault((task, shots, method), {})[int(number)] = points
    rows = []
    for (task, shots, method), found in runs.items():
        about = {"task": task, "shots": int(shots), "method": method, "passes": content["settings"]["passes"]}
        for name, scale in (("test", 100), ("test loss", 1)):
            ends = {seed: scale * points[-1][name] for seed, points in found.items()}
            measure = {"test": "accuracy", "test loss": "loss"}[name]
            rows.append({**about, "measure": measure, **results.over_seeds(ends)})
            start = statistics.mean(points[0][name] for points in found.values())
            rows.append({**about, "measure": f"{measure} before", "value": scale * start})
        mezo = runs.get((task, shots, "mezo"))
        if mezo is None:
            continue
        for name, better in (("test", 1), ("test loss", -1)):
            goal = better * statistics.mean(points[-1][name] for points in mezo.values())
            for at in zip(*found.values(), strict=False):
                if better * statistics.mean(point[name] for point in at) >= goal:
                    share = 100 * at[0]["passes"] / content["settings"]["passes"]
                    measure = "accuracy" if name == "test" else "loss"
                    rows.append({**about, "measure": f"passes to MeZO's {measure}, %", "value": share})
                    break
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder or Hub id of a masked language model")
    parser.add_argument("--data", required=True, help="folder with glue and fewshot")
    parser.add_argument("--runs", required=True, help="JSON file of all runs; a study that is there continues")
    parser.add_argument("--tasks", nargs="+", default=list(FOLDERS), choices=FOLDERS)
    parser.add_argument("--shots", type=int, nargs="+", default=[16, 512])
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[13, 21, 42])
    parser.add_argument("--passes", type=int, default=20_000, help="forward passes of a batch in each run")
    parser.add_argument("--tuning", type=float, default=0.2, help="share of the passes in a run that chooses the rate")
    parser.add_argument("--points", type=int, default=20, help="evaluations per run, beside the one at the start")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--test_rows", type=int, default=500)
    parser.add_argument("--result", default="zeroth-order-study", help="name of the result file")
    args = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    study(args)


if __name__ == "__main__":
    main()
