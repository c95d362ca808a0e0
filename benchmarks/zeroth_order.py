"""Steps of zeroth-order search of whole models: as published, and as here; time, memory, and rules on toy problems.

    python benchmarks/zeroth_order.py --threads 1 --repeats 3 --output zeroth-order-time.json
    python benchmarks/zeroth_order.py --memory --threads 1 --repeats 3 --output zeroth-order-memory.json
    python benchmarks/zeroth_order.py --toy --output zeroth-order-toy.json

RoBERTa-base's shape (125 M parameters, random weights), 16 rows of 64 tokens, all weights searched. Every variant runs
in a process of its own; the variants take turns, `--repeats` times over. Ratios are taken within a round: median and
range. `per evaluation`: a step's time by the losses that it takes. `--memory`: the most above the loaded model.

`--toy`: a quadratic (200 dimensions, condition 1,000) and a logistic regression (100 dimensions, 400 rows): the
objective above its least value after equal evaluations, for each rule at the best of its rates, mean of 5 seeds.
"""

import argparse
import json
import math
import platform
import statistics
import subprocess
import sys
import time
from datetime import UTC, datetime

import torch
import transformers
from published_zeroth_order import FZOO, LOZO, MeZO
from torch import nn
from torch.nn import functional
from transformers import AutoConfig, AutoModelForSequenceClassification

from hf_ft_ext import SPSA
from hf_ft_ext.gradientless.scoring.full_models import objective_of_logits
from hf_ft_ext.gradientless.scoring.objectives import make_objective
from hf_ft_ext.training.resources import PeakMemory

ROBERTA = {"vocab_size": 50_265, "max_position_embeddings": 514, "num_labels": 2}
PUBLISHED = {"mezo-published": MeZO, "lozo-published": LOZO, "fzoo-published": FZOO}
OURS = {
    "spsa": {},
    "lozo": {"direction": "lozo"},
    "lozo-both-at-once": {"direction": "lozo", "candidates_per_forward": 2},
    "lozo-m": {"direction": "lozo", "update": "momentum"},
    "subzero": {"direction": "subzero"},
    "fzoo": {"direction": "rademacher-outer", "estimate": "one-sided", "num_directions": 8},
    "fzoo-batched": {
        "direction": "rademacher-outer", "estimate": "one-sided", "num_directions": 8, "candidates_per_forward": 8,
    },
    "spsa-carry": {"carry": True},
}  # fmt: skip
VARIANTS = ["evaluation", *PUBLISHED, *OURS]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
LOSSES = {"evaluation": 1, "mezo-published": 2, "lozo-published": 2, "fzoo-published": 9}


def about(args: argparse.Namespace) -> dict:
    """What a result file says about how it came about."""
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    return {
        "command": " ".join(["python", "benchmarks/zeroth_order.py", *sys.argv[1:]]),
        "commit": commit,
        "date": datetime.now(UTC).date().isoformat(),
        "machine": f"{platform.machine()}, {platform.system()}, {args.threads} thread(s)",
        "versions": {"python": platform.python_version(), "torch": torch.__version__,
                     "transformers": transformers.__version__},
        "repeats": args.repeats,
    }  # fmt: skip


def step_of(variant: str, args: argparse.Namespace):
    """A step of the variant, and the losses that it takes."""
    torch.manual_seed(0)
    shape = {**ROBERTA, "num_hidden_layers": args.layers, "hidden_size": args.hidden,
             "intermediate_size": 4 * args.hidden, "num_attention_heads": max(1, args.hidden // 64)}  # fmt: skip
    model = AutoModelForSequenceClassification.from_config(AutoConfig.for_model("roberta", **shape)).eval()
    model = model.to(DTYPES[args.dtype]).requires_grad_(False)
    ids = torch.randint(5, 1000, (args.batch, args.length))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.arange(args.batch) % 2}
    full = objective_of_logits(model, make_objective("loss", None, 2), [batch])

    @torch.no_grad()
    def loss() -> float:
        return float(full.value())

    if variant == "evaluation":
        return loss, 1
    if variant in PUBLISHED:
        search = PUBLISHED[variant](model)
        return lambda: search.step(loss), LOSSES[variant]
    optimizer = SPSA(model.parameters(), model, **OURS[variant])
    return lambda: optimizer.step(loss, full), optimizer.evaluations_per_step()


def measure(variant: str, args: argparse.Namespace) -> dict:
    step, losses = step_of(variant, args)
    if args.memory:
        memory = PeakMemory()
        before = memory.level()
        memory.reset()
        for _ in range(2):
            step()
        return {"peak": memory.bytes() - before, "losses": losses}
    step()  # the first one checks whether candidates can run at once
    seconds = []
    for _ in range(args.steps):
        start = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - start)
    return {"seconds": statistics.median(seconds), "losses": losses}


def table(rounds: dict[str, list[dict]], memory: bool) -> str:
    key, unit = ("peak", "MiB above the model") if memory else ("seconds", "seconds a step")
    base = rounds["mezo-published"]
    lines = [f"| variant | {unit} | of MeZO's | per evaluation, of MeZO's |", "| --- | ---: | ---: | ---: |"]
    for variant, found in rounds.items():
        value = statistics.median(r[key] for r in found) / (2**20 if memory else 1)
        ratios = [r[key] / b[key] for r, b in zip(found, base, strict=False)]
        each = [(r[key] / r["losses"]) / (b[key] / b["losses"]) for r, b in zip(found, base, strict=False)]
        last = "" if memory else f"{statistics.median(each):.2f} ({min(each):.2f}-{max(each):.2f})"
        share = f"{statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})"
        lines.append(f"| {variant} | {value:.3g} | {share} | {last} |")
    return "\n".join(lines)


# --- toy problems -------------------------------------------------------------------------------------------------


class Quadratic(nn.Module):
    """`0.5 sum of scale * weight^2`, scales from 0.001 to 1."""

    least = 0.0

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.full((200,), 0.1, dtype=torch.double))
        self.scales = torch.logspace(-3, 0, 200, dtype=torch.double)

    def forward(self) -> torch.Tensor:
        return 0.5 * (self.scales * self.weight.square()).sum()


class Logistic(nn.Module):
    """Logistic regression with an l2 term on 400 made-up rows whose features have unequal scales."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randn(400, 100, generator=generator, dtype=torch.double) * torch.logspace(-1, 0, 100)
        self.y = (self.x @ torch.randn(100, generator=generator, dtype=torch.double) > 0).double()
        self.weight = nn.Parameter(torch.zeros(100, dtype=torch.double))
        solver = torch.optim.LBFGS(self.parameters(), max_iter=500, line_search_fn="strong_wolfe")

        def closure() -> torch.Tensor:
            solver.zero_grad()
            loss = self()
            loss.backward()
            return loss

        solver.step(closure)
        self.least = float(self().detach())
        with torch.no_grad():
            self.weight.zero_()

    def forward(self) -> torch.Tensor:
        loss = functional.binary_cross_entropy_with_logits(self.x @ self.weight, self.y)
        return loss + 1e-3 * self.weight.square().sum()


RULES = {
    "sgd": {}, "sign": {"update": "sign"}, "momentum": {"update": "momentum", "moments": "buffer"},
    "adam": {"update": "adam", "betas": (0.9, 0.99)}, "rms": {"update": "rms"},
    "conservative": {"update": "conservative"}, "rademacher": {"direction": "rademacher"},
    "one-sided": {"estimate": "one-sided", "num_directions": 8},
    "population": {"estimate": "population", "num_directions": 8}, "forward": {"estimate": "forward"},
}  # fmt: skip


def toy(args: argparse.Namespace) -> dict[str, dict[str, dict]]:
    results: dict[str, dict[str, dict]] = {}
    for problem in (Quadratic, Logistic):
        results[problem.__name__.lower()] = found = {}
        for rule, settings in RULES.items():
            ends = {}
            for lr in [10**-e for e in (0, 0.5, 1, 1.5, 2, 2.5, 3, 3.5, 4, 4.5)]:
                values = []
                for seed in range(args.seeds):
                    model = problem()
                    optimizer = SPSA(model.parameters(), model, lr=lr, eps=1e-4, seed=seed, **settings)
                    try:
                        while optimizer.evaluations < args.evaluations:
                            optimizer.step(model)
                        values.append(float(model().detach()) - model.least)
                    except ValueError:  # the rate is too large
                        values.append(math.inf)
                ends[lr] = statistics.mean(values)
            best = min(ends, key=lambda lr: ends[lr] if math.isfinite(ends[lr]) else math.inf)
            found[rule] = {"rate": best, "above_least": ends[best], "of_sgd": ends[best] / found["sgd"]["above_least"]
                           if found else 1.0}  # fmt: skip
            print(problem.__name__, rule, found[rule], flush=True, file=sys.stderr)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--toy", action="store_true")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--variants", nargs="+", default=VARIANTS)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--steps", type=int, default=3, help="measured steps per process")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seeds", type=int, default=5, help="--toy")
    parser.add_argument("--evaluations", type=int, default=4000, help="--toy: of each run")
    parser.add_argument("--output", help="JSON file")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.worker:
        print(json.dumps(measure(args.worker, args)))
        return
    if args.toy:
        content = {"about": about(args), "problems": toy(args)}
        print(json.dumps(content["problems"], indent=1))
    else:
        names = dict.fromkeys(["mezo-published", *args.variants])
        rounds: dict[str, list[dict]] = {name: [] for name in names}
        for number in range(args.repeats):
            for variant in rounds:
                words = [sys.executable, __file__, "--worker", variant, *(["--memory"] if args.memory else [])]
                kept = ("dtype", "batch", "length", "layers", "hidden", "steps", "threads")
                words += [f"--{key}={getattr(args, key)}" for key in kept]
                done = subprocess.run(words, capture_output=True, text=True, check=False)
                if done.returncode:
                    raise SystemExit(f"{variant} failed:\n{done.stderr[-2000:]}")
                rounds[variant].append(json.loads(done.stdout.splitlines()[-1]))
                print(f"round {number + 1}, {variant}: {rounds[variant][-1]}", file=sys.stderr)
        content = {"about": about(args), "dtype": args.dtype, "memory": args.memory, "rounds": rounds}
        print(table(rounds, args.memory))
    if args.output:
        with open(args.output, "w", encoding="utf-8") as file:
            json.dump(content, file, indent=1)


if __name__ == "__main__":
    main()
