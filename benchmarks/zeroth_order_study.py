"""Zeroth-order methods on prompts with a masked language model: accuracy and loss against forward passes.

    python benchmarks/zeroth_order_study.py --model path/to/masked-lm --data path/to/data --runs study.json

`--data` holds `glue` (sst2) and `fewshot` (subj, trec). The label words have output rows of their own. Everything is
searched but the embeddings and the first `--frozen_layers` layers of the encoder, whose outputs are computed once.
Batches hold rows of about the same length. For each task, number of shots and method, the rate is chosen by the dev
loss after a run (data seed 13) with the share `--tuning` of the forward passes. It tries the method's base rate, and
that divided and multiplied by the root of ten; while the best is at an end of these, it goes on there. Then each seed
runs with this rate. All methods get the same number of forward passes of a batch; Adam's forward and backward count as
one each. `activity` searches the linear layers only.

First every method has one seed of one task, then the next number of shots, then the next task, and so on. Each
finished run is in `--runs` at once: the study continues where it was left, and its rows in
`results/zeroth-order-study.json` are those of the runs so far (see `results.py`). "passes to MeZO's": the first
measured point at which a method's mean is at least as good as MeZO's at the end, as a share of the budget.
"""

import argparse
import copy
import json
import math
import os
import statistics
import time
from pathlib import Path
from typing import Any

import results
import torch
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence
from transformers import DataCollatorWithPadding

from hf_ft_ext import SPSA, ActivityPerturbation
from hf_ft_ext.arguments import PROMPT, DataArguments, ModelArguments
from hf_ft_ext.data.loading import load_data
from hf_ft_ext.models import load_tokenizer_and_model
from hf_ft_ext.prompts.preprocess import tokenize_prompts

FOLDERS = {"sst2": "glue", "subj": "fewshot", "trec": "fewshot"}
# measure -> (entry of a point, scale, whether more is better)
MEASURES = {"accuracy": ("test", 100, 1), "loss": ("test loss", 1, -1), "train loss": ("train loss", 1, -1)}
SETTINGS = ("passes", "tuning", "points", "batch", "test_rows", "dev_rows", "frozen_layers")
GRID_STEP, GRID_ENDS = 10**0.5, 3  # factor between rates; at most so many rates on either side of the base rate
# name -> (base rate, settings of SPSA; `None` = Adam by gradients; ACTIVITY = activity perturbation of linear layers)
ACTIVITY: dict[str, Any] = {"activity": True}
METHODS = {
    "mezo": (1e-4, {}),
    "lozo": (1e-4, {"direction": "lozo"}),
    "fzoo": (1e-3, {"direction": "rademacher", "estimate": "one-sided", "num_directions": 8}),
    "lozo-m": (1e-5, {"direction": "lozo", "update": "momentum"}),
    "adam": (1e-4, None),
    "activity": (1e-4, ACTIVITY),
    "subzero": (1e-4, {"direction": "subzero"}),
    "population": (1e-3, {"estimate": "population", "num_directions": 16}),
    "sparse-mezo": (3e-4, {"small": 0.25}),
    "fzoo-outer": (1e-3, {"direction": "rademacher-outer", "estimate": "one-sided", "num_directions": 8}),
    "forward": (1e-4, {"estimate": "forward"}),
}


class Embedded(torch.nn.Module):
    """Stands in for the embeddings: returns the outputs of the frozen part, which were computed before."""

    hidden: torch.Tensor

    def forward(self, *_: Any, **__: Any) -> torch.Tensor:
        return self.hidden


class Task:
    """A few-shot split of a task as tokenised rows, and a fresh model for each run."""

    def __init__(self, args: argparse.Namespace, task: str, shots: int, data_seed: int):
        folder = os.path.join(args.data, FOLDERS[task])
        self.data_args = DataArguments(task_name=task, dataset_name=folder, num_k=shots, few_shot_type=PROMPT)
        self.data_args.max_predict_samples, self.data_args.untie_words = args.test_rows, True
        self.data = load_data(self.data_args, data_seed=data_seed)
        self.model_args = ModelArguments(model_name_or_path=args.model, dtype="float32")
        tokenizer, model = load_tokenizer_and_model(self.model_args, self.data, seed=0, data_args=self.data_args)
        rows = tokenize_prompts(self.data, tokenizer, self.data_args, model.config, data_seed=data_seed)
        model.eval()
        self.collate = DataCollatorWithPadding(tokenizer)
        last = last_frozen(model, args.frozen_layers)
        dev, test = (next(iter(part.values())) for part in (rows.validation, rows.test or rows.validation))
        self.train = _embedded(model, last, list(rows.train))
        self.dev = _embedded(model, last, _some(list(dev), args.dev_rows))
        self.test = _embedded(model, last, _some(list(test), args.test_rows))
        drop_frozen(model, args.frozen_layers)
        self.pretrained = model

    def model(self) -> torch.nn.Module:
        """The pretrained model above its frozen part."""
        return copy.deepcopy(self.pretrained).requires_grad_(True)

    def batch(self, rows: list) -> dict[str, torch.Tensor]:
        batch = dict(self.collate([{k: v for k, v in row.items() if k != "hidden"} for row in rows]))
        batch["hidden"] = pad_sequence([row["hidden"] for row in rows], batch_first=True)
        return batch

    @torch.no_grad()
    def scores(self, model: torch.nn.Module, rows: list) -> tuple[float, float]:
        """Accuracy and mean loss."""
        right, loss, rows = 0, 0.0, sorted(rows, key=lambda row: len(row["input_ids"]))
        for start in range(0, len(rows), 64):
            batch = self.batch(rows[start : start + 64])
            labels = batch.pop("labels")
            logits = logits_of(model, batch)
            right += int((logits.argmax(-1) == labels).sum())
            loss += float(functional.cross_entropy(logits, labels, reduction="sum"))
        return right / len(rows), loss / len(rows)


def last_frozen(model: torch.nn.Module, layers: int) -> torch.nn.Module:
    """The last module of the part that is the embeddings and the first `layers` layers."""
    body = model.masked_lm.base_model
    return body.encoder.layer[layers - 1] if layers else body.embeddings


def drop_frozen(model: torch.nn.Module, layers: int) -> None:
    """Replace that part by its stored outputs."""
    body = model.masked_lm.base_model
    body.embeddings, body.encoder.layer = Embedded(), body.encoder.layer[layers:]


@torch.no_grad()
def _embedded(model: torch.nn.Module, last: torch.nn.Module, rows: list) -> list[dict]:
    """The rows with the outputs of the frozen part of the model, whose last module is `last`."""
    found: list[torch.Tensor] = []

    def keep(module: torch.nn.Module, inputs: tuple, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output  # MPNet's layers return tuples
        found.append(hidden[0].clone())  # of the only row

    handle = last.register_forward_hook(keep)
    kept = [{key: row[key] for key in ("input_ids", "attention_mask", "labels")} for row in rows]
    for row in kept:
        model(input_ids=torch.tensor([row["input_ids"]]), attention_mask=torch.tensor([row["attention_mask"]]))
    handle.remove()
    return [{**row, "hidden": hidden} for row, hidden in zip(kept, found, strict=True)]


def logits_of(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    inputs = dict(batch)
    model.masked_lm.base_model.embeddings.hidden = inputs.pop("hidden")
    return model(**inputs).logits


def epoch_of_batches(rows: list[dict], size: int, generator: torch.Generator) -> list[list[dict]]:
    """Batches of rows of about the same length (up to random factors of 1 to 2), in random order."""
    lengths = torch.tensor([float(len(row["input_ids"])) for row in rows])
    order = (lengths * (1 + torch.rand(len(rows), generator=generator))).argsort().tolist()
    batches = [[rows[i] for i in order[start : start + size]] for start in range(0, len(rows) - size + 1, size)]
    return [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]


def run(task: Task, method: str, rate: float, seed: int, passes: int, points: int, batch_size: int) -> list[dict]:
    """Accuracy and loss after some numbers of passes, of test and some train rows; without `points`, of dev rows."""
    settings = METHODS[method][1]
    model = task.model()
    if settings is None:
        optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    elif settings is ACTIVITY:
        model.requires_grad_(False)
        layers = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
        parameters = {id(p): p for layer in layers for p in layer.parameters()}
        optimizer = ActivityPerturbation(parameters.values(), model, lr=rate, seed=seed)
    else:
        model.requires_grad_(False)
        optimizer = SPSA(model.parameters(), model, lr=rate, seed=seed, **settings)
    generator, batches, used, seconds, found = torch.Generator().manual_seed(seed), [], 0, 0.0, []
    parts = {"test": task.test, "train": _some(task.train, 64)} if points else {"dev": task.dev}
    while True:
        if used >= passes * len(found) / max(1, points) and (points or used >= passes):
            found.append({"passes": used, "seconds": round(seconds, 1)})
            for name, rows in parts.items():
                found[-1][name], found[-1][f"{name} loss"] = task.scores(model, rows)
            if len(found) > points:
                return found
        start = time.process_time()
        batches = batches or epoch_of_batches(task.train, batch_size, generator)
        batch = task.batch(batches.pop())
        labels = batch.pop("labels")

        def loss(batch=batch, labels=labels) -> torch.Tensor:
            reduction = "none" if settings is ACTIVITY else "mean"
            return functional.cross_entropy(logits_of(model, batch), labels, reduction=reduction)

        if settings is None:
            optimizer.zero_grad()
            loss().backward()
            optimizer.step()
            used += 2
        else:
            before = optimizer.evaluations
            try:
                optimizer.step(loss)
            except ValueError:  # the loss is not finite: the rate is too large
                bad = {"passes": passes, "diverged": True}
                for name in parts:
                    bad |= {name: 0.0, f"{name} loss": math.inf}
                return found + [bad] * (points + 1 - len(found))
            used += optimizer.evaluations - before
        seconds += time.process_time() - start


def study(args: argparse.Namespace) -> None:
    path = Path(args.runs)
    content = json.loads(path.read_text()) if path.exists() else {"settings": {}, "runs": {}}
    settings = {name: getattr(args, name) for name in SETTINGS}
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

    def best_rate(name: str, shots: int, method: str) -> float:
        """The rate with the lowest dev loss: from the base rate outwards, until the best is not at an end."""
        base, losses = METHODS[method][0], {}
        new = [-1, 0, 1]
        while new:
            for i in new:
                key = f"{name} {shots} {method} tuning {i}"
                rate = base * GRID_STEP**i
                end = finished(key, (name, shots, 13), method, rate, 13, int(args.tuning * args.passes), 0)[-1]
                losses[i] = end["dev loss"]
            best = min(losses, key=losses.__getitem__)
            new = [i for i in (best - 1, best + 1) if i not in losses and abs(i) <= GRID_ENDS]
        return base * GRID_STEP**best

    for seed in args.seeds:
        for name in args.tasks:
            for shots in args.shots:
                for method in args.methods:
                    rate = best_rate(name, shots, method)
                    key = f"{name} {shots} {method} seed {seed}"
                    points = finished(key, (name, shots, seed), method, rate, seed, args.passes, args.points)
                    points[-1]["rate"] = rate
                    results.save(args.result, rows_of(content))


def _some(rows: list, most: int) -> list:
    """At most so many rows, the same ones in every run, in an order of their own (the classes may be sorted)."""
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0)).tolist()
    return [rows[i] for i in order[:most]]


def rows_of(content: dict) -> list[dict]:
    """Rows of the result file from the runs so far; `before` in place of a method is the pretrained model."""
    runs: dict[tuple[str, str], dict[str, dict[int, list[dict]]]] = {}
    for key, points in content["runs"].items():
        task, shots, method, kind, number = key.split()
        if kind == "seed":
            runs.setdefault((task, shots), {}).setdefault(method, {})[int(number)] = points
    rows = []
    for (task, shots), methods in runs.items():
        about = {"what": task, "shots": int(shots), "passes": content["settings"]["passes"]}
        first = next(iter(methods.values()))
        methods = {"before": {seed: points[:1] for seed, points in first.items()}, **methods}
        for method, found in methods.items():
            for measure, (name, scale, _) in MEASURES.items():
                ends = {seed: scale * points[-1][name] for seed, points in found.items()}
                rows.append({**about, "method": method, "measure": measure, **results.over_seeds(ends)})
            for measure, share in shares_to_mezo(found, methods.get("mezo"), about["passes"]).items():
                rows.append({**about, "method": method, "measure": measure, "value": share})
            if "rate" in next(iter(found.values()))[-1]:
                rate = next(iter(found.values()))[-1]["rate"]
                rows.append({**about, "method": method, "measure": "rate", "value": rate})
    return rows


def shares_to_mezo(found: dict[int, list[dict]], mezo: dict[int, list[dict]] | None, passes: int) -> dict[str, float]:
    """For each measure, the share of the passes, in %, after which the mean is as good as that of MeZO at the end."""
    shares = {}
    for measure, (name, _, better) in MEASURES.items():
        if mezo is None or len(mezo) != len(found):
            continue
        goal = better * statistics.mean(points[-1][name] for points in mezo.values())
        reached = [at[0]["passes"] for at in zip(*found.values(), strict=False)
                   if better * statistics.mean(point[name] for point in at) >= goal]  # fmt: skip
        if reached:
            shares[f"passes to MeZO's {measure}, %"] = 100 * reached[0] / passes
    return shares


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
    parser.add_argument("--dev_rows", type=int, default=256)
    parser.add_argument("--frozen_layers", type=int, default=0, help="of the encoder's layers, from the first")
    parser.add_argument("--result", default="zeroth-order-study", help="name of the result file")
    args = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    study(args)


if __name__ == "__main__":
    main()
