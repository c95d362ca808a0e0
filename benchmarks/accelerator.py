"""Check and time every method on an accelerator: at most ten minutes on any CUDA card.

    python benchmarks/accelerator.py                             # make bench-gpu
    python benchmarks/accelerator.py --device cpu --small        # to try it: seconds, numbers that mean nothing

Parts (`--only`), in this order:

- `correctness`: one step of every method (`method_steps.py`) on the device against the CPU, weights in float32 and in
  bfloat16. The error is relative to the CPU's float32 step from the same weights; allowed is three times the error
  that the CPU itself makes in that format, and a little more. The exit status is 1 if a method is beyond that.
- `steps`: seconds and peak memory of a training step: full fine-tuning, LoRA, the SparseGrad adapter and dynamic
  SparseGrad, at the shapes of RoBERTa-base (125 M) and -large (355 M) and of a 1 B Llama; bfloat16, random weights.
- `search`: a step of SPSA and of low-rank search against MeZO as published, all weights.
- `kernel`: 32 x 1,000 rows, and which share of the seconds its matrix products alone would take, at the speed of a
  large matrix product in the same format.
- `projected`: projected gradients per second. `fisher`: FishPAL's pre-pass over 64 rows.

Times are those of CUDA events, peaks those of the allocator above the loaded model (CPU: wall time, resident set).
What does not fit into memory or into `--budget_minutes` is left out, and the output says so. The rows go to
`results/accelerator.json` after every part.
"""

import argparse
import gc
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import method_steps
import results
import torch
from method_steps import STEPS, Place
from published_zeroth_order import LOZO, MeZO
from sparse import SIZES, optimizers_of
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForSequenceClassification

from hf_ft_ext import SPSA, empirical_ntk, projected_gradients
from hf_ft_ext.fisher.candidates import default_candidates, layers_of, modules_of, probing
from hf_ft_ext.fisher.information import gradient_sums
from hf_ft_ext.training.runs.resources import PeakMemory

Row = dict[str, Any]
CPU = torch.device("cpu")
SHAPES = {"125 M": ("roberta-base", 16, 128), "355 M": ("roberta-large", 16, 128), "1 B": ("llama-1b", 4, 512)}
SMALL = {"small": ("small", 2, 8)}
STEP_VARIANTS = {"full": "full", "LoRA": "lora", "SparseGrad adapter": "adapter", "SparseGrad dynamic": "dynamic"}
SEARCHES: dict[str, Callable[[nn.Module], Any]] = {
    "MeZO, published": MeZO,
    "LOZO, published": LOZO,
    "SPSA": lambda model: SPSA(model.parameters(), model),
    "SPSA lozo": lambda model: SPSA(model.parameters(), model, direction="lozo"),
}
# What other orders of summation alone may do: between float32 and float64 steps it is up to 6e-5.
_FLOORS = {torch.float32: 5e-4, torch.bfloat16: 1e-2}


class Budget:
    """Time that is left; a measurement that would begin too late is left out."""

    def __init__(self, minutes: float):
        self.end = time.monotonic() + 60 * minutes

    def allows(self, what: str) -> bool:
        if time.monotonic() < self.end:
            return True
        print(f"left out, no time: {what}")
        return False


def seconds_of(run: Callable[[], object], device: torch.device, repeats: int, warm: int = 1) -> list[float]:
    """Seconds of each of `repeats` runs, after `warm` others: by CUDA events, on the CPU by the wall clock."""
    for _ in range(warm):
        run()
    found = []
    for _ in range(repeats):
        if device.type == "cuda":
            first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            first.record()
            run()
            last.record()
            last.synchronize()
            found.append(first.elapsed_time(last) / 1e3)
        else:
            start = time.perf_counter()
            run()
            found.append(time.perf_counter() - start)
    return found


def build(size: str, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """A sequence classifier with random weights, the same in every call."""
    kind, options, _ = SIZES[size]
    torch.manual_seed(0)
    return AutoModelForSequenceClassification.from_config(AutoConfig.for_model(kind, **options), dtype=dtype).to(
        device
    )


def rows_like(count: int, length: int, device: torch.device) -> dict[str, torch.Tensor]:
    ids = torch.randint(5, 1000, (count, length), generator=torch.Generator().manual_seed(count)).to(device)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.arange(count, device=device) % 2}


def attempt(what: str, measure: Callable[[], list[Row]], device: torch.device, budget: Budget) -> list[Row]:
    """The rows of a measurement; an empty list if time or memory runs out."""
    if not budget.allows(what):
        return []
    try:
        rows = measure()
    except torch.OutOfMemoryError:
        print(f"left out, no memory: {what}")
        rows = []
    gc.collect()  # searches and their models are in cycles; left to later, they would be in the next one's level
    if device.type == "cuda":
        torch.cuda.empty_cache()
    for row in rows:
        print(f"{what}, {row['quantity']}: {row['value']:.4g}", flush=True)
    return rows


def time_and_peak(about: Row, run: Callable[[], object], device: torch.device, repeats: int, before: int) -> list[Row]:
    """Rows with seconds and with the peak above `before`, the level of the loaded model."""
    memory = PeakMemory(device)
    run()
    memory.reset()
    found = seconds_of(run, device, repeats, warm=0)
    peak = {"value": max(0, memory.bytes() - before) / 2**30}
    return [{**about, "quantity": "s", **results.summary(found)}, {**about, "quantity": "peak GiB", **peak}]


# --- parts ----------------------------------------------------------------------------------------------


def correctness(args: argparse.Namespace, budget: Budget) -> Iterator[list[Row]]:
    for dtype, name in ((torch.float32, "float32"), (torch.bfloat16, "bfloat16")):
        for method in args.methods:
            step = STEPS[method]

            def measure(method=method, step=step, dtype=dtype, name=name) -> list[Row]:
                reference = step(Place(CPU, torch.float32, dtype))
                own = 0.0
                if dtype != torch.float32:
                    own = method_steps.error_of(step(Place(CPU, dtype, dtype)), reference)
                error = method_steps.error_of(step(Place(args.device, dtype, dtype)), reference)
                if error > 3 * own + _FLOORS[dtype]:
                    args.failed.append(f"{method}, {name}: error {error:.2g}, that of the CPU is {own:.2g}")
                about = {"what": "correctness", "method": method, "dtype": name}
                return [{**about, "quantity": "error", "value": error}, {**about, "quantity": "CPU's", "value": own}]

            yield attempt(f"{method}, {name}", measure, args.device, budget)


def steps(args: argparse.Namespace, budget: Budget) -> Iterator[list[Row]]:
    for shape, (size, count, length) in args.shapes.items():
        for method, variant in STEP_VARIANTS.items():

            def measure(shape=shape, size=size, count=count, length=length, method=method, variant=variant):
                model = build(size, args.device, torch.bfloat16).train()
                before = PeakMemory(args.device).level()
                model, optimizers = optimizers_of(variant, model, SIZES[size][2], count * length)
                batch = rows_like(count, length, args.device)

                def step() -> None:
                    model(**batch).loss.backward()
                    for optimizer in optimizers:
                        optimizer.step()
                        optimizer.zero_grad()

                about = {"what": "step", "shape": shape, "method": method, "tokens": f"{count} x {length}"}
                return time_and_peak(about, step, args.device, args.repeats, before)

            yield attempt(f"step, {shape}, {method}", measure, args.device, budget)


def search(args: argparse.Namespace, budget: Budget) -> Iterator[list[Row]]:
    for shape, (size, count, length) in args.shapes.items():
        base: list[float] = []
        for method, make in SEARCHES.items():

            def measure(shape=shape, size=size, count=count, length=length, method=method, make=make, base=base):
                model = build(size, args.device, torch.bfloat16).eval().requires_grad_(False)
                before, batch = PeakMemory(args.device).level(), rows_like(count, length, args.device)
                optimizer = make(model)

                @torch.no_grad()
                def loss() -> float:
                    return float(model(**batch).loss)

                about = {"what": "search", "shape": shape, "method": method, "tokens": f"{count} x {length}"}
                rows = time_and_peak(about, lambda: optimizer.step(loss), args.device, args.repeats, before)
                if not base:
                    base.append(rows[0]["value"])
                return [*rows, {**about, "quantity": "time / MeZO", "value": rows[0]["value"] / base[0]}]

            yield attempt(f"search, {shape}, {method}", measure, args.device, budget)


def kernel(args: argparse.Namespace, budget: Budget) -> Iterator[list[Row]]:
    size, first, second, length = ("small", 3, 5, 8) if args.small else ("roberta-base", 32, 1000, 64)

    def measure() -> list[Row]:
        model = build(size, args.device, torch.float32).eval()
        before = PeakMemory(args.device).level()
        sides = [
            {k: v for k, v in rows_like(n, length, args.device).items() if k != "labels"} for n in (first, second)
        ]

        def run() -> torch.Tensor:
            return empirical_ntk(model, *sides, binary_classification=True)

        with FlopCounterMode(display=False) as counter:
            run()
        n = 256 if args.small else 8192
        square = torch.randn(n, n, device=args.device)
        speed = 2 * n**3 / statistics.median(seconds_of(lambda: square @ square, args.device, 5, warm=2))
        about = {"what": "kernel", "formula": "sgd", "rows": f"{first} x {second}", "length": length}
        rows = time_and_peak(about, run, args.device, args.repeats, before)
        share = counter.get_total_flops() / speed / rows[0]["value"]
        return [*rows, {**about, "quantity": "share of the matrix-product limit", "value": share},
                {**about, "quantity": "matrix product, TFLOP/s", "value": speed / 1e12}]  # fmt: skip

    yield attempt("kernel", measure, args.device, budget)


def projected(args: argparse.Namespace, budget: Budget) -> Iterator[list[Row]]:
    size, count, length = ("small", 4, 8) if args.small else ("roberta-base", 256, 128)

    def measure() -> list[Row]:
        model = build(size, args.device, torch.float32).eval()
        batch = {key: v for key, v in rows_like(count, length, args.device).items() if key != "labels"}
        options = {"dimension": 64 if args.small else 4096, "binary_classification": True}
        found = seconds_of(lambda: projected_gradients(model, batch, **options), args.device, args.repeats)
        about = {"what": "projected", "rows": count, "length": length, "dimension": options["dimension"]}
        return [{**about, "quantity": "gradients / s", **results.summary([count / s for s in found])}]

    yield attempt("projected gradients", measure, args.device, budget)


def fisher(args: argparse.Namespace, budget: Budget) -> Iterator[list[Row]]:
    size, count, length, at_once = ("small", 4, 8, 2) if args.small else ("roberta-base", 64, 128, 8)

    def measure() -> list[Row]:
        model, candidates = build(size, args.device, torch.float32).eval(), default_candidates()
        before, rows = PeakMemory(args.device).level(), rows_like(count, length, args.device)
        batches = [{k: v[i : i + at_once] for k, v in rows.items()} for i in range(0, count, at_once)]
        with probing(model, candidates, layers_of(model), 1) as probe:
            probe.eval()
            names = list(dict.fromkeys(n for m in modules_of(probe, candidates) for n in (*m.parameters, *m.shared)))
            about = {"what": "fisher", "rows": count, "length": length, "batch": at_once}
            run = lambda: gradient_sums(probe, batches, names, progress=False)  # noqa: E731
            return time_and_peak(about, run, args.device, args.repeats, before)

    yield attempt("Fisher pre-pass", measure, args.device, budget)


PARTS = {
    "correctness": correctness, "steps": steps, "search": search, "kernel": kernel, "projected": projected,
    "fisher": fisher,
}  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", type=torch.device, default=torch.device("cuda"))
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--methods", nargs="+", choices=STEPS, default=list(STEPS), help="correctness: which of them")
    parser.add_argument("--budget_minutes", type=float, default=9.0, help="nothing begins after it")
    parser.add_argument("--repeats", type=int, default=10, help="measured runs of each, after one other")
    parser.add_argument("--small", action="store_true", help="tiny sizes, to try the script")
    parser.add_argument("--result", metavar="NAME", default="accelerator", help="name of the result file")
    parser.add_argument("--results_folder", type=Path, default=results.FOLDER)
    args = parser.parse_args()
    if args.device.type == "cuda" and not torch.cuda.is_available():
        parser.error("no CUDA device; to try the script on the CPU pass --device cpu --small")
    args.shapes, args.failed = SMALL if args.small else SHAPES, []
    budget = Budget(args.budget_minutes)
    for name in args.only:
        rows = [row for found in PARTS[name](args, budget) for row in found]
        about = {"size": "small"} if args.small else {}
        rows = [{**row, **about, "device": args.device.type} for row in rows]
        if rows:
            results.save(args.result, rows, folder=args.results_folder)
    for text in args.failed:
        print(f"wrong: {text}")
    return 1 if args.failed else 0


if __name__ == "__main__":
    sys.exit(main())
