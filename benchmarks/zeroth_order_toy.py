"""Rules of zeroth-order search on two problems whose least value is known, at equal evaluations.

    python benchmarks/zeroth_order_toy.py

A quadratic (200 dimensions, condition 1,000) and a logistic regression (100 dimensions, 400 rows). For each rule the
objective above its least value after `--evaluations` losses, mean of `--seeds`, at the best of the rates and of two
schedules: constant, and falling to 0. The rates are powers of ten, then halfway between around the best one,
twice. Rows go to `results/zeroth-order-toy.json` as each rule ends (see `results.py`).
"""

import argparse
import math
import statistics
import sys

import results
import torch
from torch import nn
from torch.nn import functional

from hf_ft_ext import SPSA


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


PROBLEMS = {"quadratic": Quadratic, "logistic": Logistic}
RULES = {
    "sgd": {}, "sign": {"update": "sign"}, "sign-rademacher": {"update": "sign", "direction": "rademacher"},
    "sign-8": {"update": "sign", "num_directions": 8},
    "sign-16-one-sided": {"update": "sign", "num_directions": 16, "estimate": "one-sided"},
    "conservative-8": {"update": "conservative", "num_directions": 8},
    "conservative-8-one-sided": {"update": "conservative", "num_directions": 8, "estimate": "one-sided"},
    "momentum": {"update": "momentum", "moments": "buffer"},
    "adam": {"update": "adam", "betas": (0.9, 0.99)}, "rms": {"update": "rms"},
    "conservative": {"update": "conservative"}, "rademacher": {"direction": "rademacher"},
    "one-sided": {"estimate": "one-sided", "num_directions": 8},
    "population": {"estimate": "population", "num_directions": 8}, "forward": {"estimate": "forward"},
}  # fmt: skip
SCHEDULES = {"constant": lambda done: 1.0, "linear": lambda done: 1 - done}


def end_of_run(problem: nn.Module, settings: dict, lr: float, schedule: str, seed: int, evaluations: int) -> float:
    """The objective above its least value; infinite where the rate is too large."""
    start = {name: value.clone() for name, value in problem.state_dict().items()}
    optimizer = SPSA(problem.parameters(), problem, lr=lr, eps=1e-4, seed=seed, **settings)
    try:
        while optimizer.evaluations < evaluations:
            optimizer.param_groups[0]["lr"] = lr * SCHEDULES[schedule](optimizer.evaluations / evaluations)
            optimizer.step(problem)
        value = float(problem().detach()) - problem.least
        return value if math.isfinite(value) else math.inf
    except ValueError:  # the loss is not finite
        return math.inf
    finally:
        problem.load_state_dict(start)


def best_rate(
    problem: nn.Module, settings: dict, schedule: str, tried: list[float], args: argparse.Namespace
) -> tuple[float, list[float]]:
    """Exponent of the best rate and the ends of its runs, by seed: from `tried`, by halving steps around the best."""
    ends: dict[float, list[float]] = {}

    def best_of(exponents: list[float]) -> float:
        for e in exponents:
            if e not in ends:
                runs = range(args.seeds)
                ends[e] = [end_of_run(problem, settings, 10**e, schedule, seed, args.evaluations) for seed in runs]
        return min(ends, key=lambda e: statistics.mean(ends[e]))

    best = best_of(tried)
    for step in (0.5, 0.25):
        best = best_of([best - step, best + step])
    return best, ends[best]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problems", nargs="+", default=list(PROBLEMS), choices=PROBLEMS)
    parser.add_argument("--rules", nargs="+", default=list(RULES), choices=RULES)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--evaluations", type=int, default=2000, help="of each run")
    parser.add_argument("--result", default="zeroth-order-toy", help="name of the result file")
    args = parser.parse_args()
    torch.set_num_threads(1)
    for name in args.problems:
        problem, sgd = PROBLEMS[name](), None
        for rule in ["sgd", *(rule for rule in args.rules if rule != "sgd")]:
            found = {"constant": best_rate(problem, RULES[rule], "constant", [1.0, 0.0, -1.0, -2.0, -3.0, -4.0], args)}
            found["linear"] = best_rate(problem, RULES[rule], "linear", [found["constant"][0]], args)
            schedule = min(found, key=lambda one: statistics.mean(found[one][1]))
            ends = found[schedule][1]
            end = statistics.mean(ends)
            sgd = end if rule == "sgd" else sgd
            row = {"what": rule, "problem": name, "evaluations": args.evaluations}
            rows = [
                {**row, "measure": "above the least", **results.over_seeds(dict(enumerate(ends)))},
                {**row, "measure": "of sgd's", "value": end / sgd},
            ]
            results.save(args.result, rows)
            means = {schedule: f"{statistics.mean(e):.3g} at {10**lr:.2g}" for schedule, (lr, e) in found.items()}
            share = f"{end / sgd:.2f} of sgd's"
            print(name, rule, share, schedule, means, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
