"""Time of one step of the gradientless search: as published, as it is here, Adam on the same head, MeZO; and memory.

    python benchmarks/gradientless.py --threads 1 --repeats 5
    python benchmarks/gradientless.py --memory --threads 2 --repeats 2
    python benchmarks/gradientless.py --curve --data path/to/glue --steps 80000 --seeds 0 1 2 --output runs/curve.json

Every variant runs in a process of its own; the variants take turns, `--repeats` times over, so that a slow minute of
the machine meets all of them. Ratios are taken within a round: median and range. MiniLM's shape with random weights:
neither they nor the data change the cost. The head is BERT's pooler and classifier (384 x 384 and 384 x 2, with
biases: four tensors), 768 entries of the large matrix in each step, K = 5, batch 64.

`--result NAME` writes the rows to `results/NAME.json` (in the page: `gradientless`); `--curve` writes
`results/gradientless-curve.json`.

`--memory`: peak (RSS above the loaded model; CUDA: allocated) of some steps on a model of 125 M parameters against
evaluation of the same batch; the bound is that evaluation plus the largest searched tensor.
`--curve`: accuracy on a real task against seconds (see gradientless_curve.py).
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import results
import torch
from gradientless_curve import add_curve_arguments, curve
from published_gradientless import PublishedSearch
from torch.nn import functional
from transformers import AutoConfig, AutoModelForSequenceClassification

from hf_ft_ext import SPSA, DirectSearch
from hf_ft_ext.features import HeadReader
from hf_ft_ext.gradientless.scoring.evaluation import HeadEvaluation
from hf_ft_ext.gradientless.scoring.objectives import make_objective
from hf_ft_ext.training.runs.resources import PeakMemory

_MIB = 2**20
MINILM = ("bert", {"hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 6})
ROBERTA = ("roberta", {"vocab_size": 50_265, "max_position_embeddings": 514})
SIZES = {
    "bert.pooler.dense.weight": 768,
    "bert.pooler.dense.bias": None,
    "classifier.weight": None,
    "classifier.bias": None,
}
STEPS = ["published-1x1", "published-3x2", "1x1", "none", "3x2", "adam", "spsa-head", "spsa-all"]
MEMORY = ["evaluation", "spsa-all", "gld-encoder"]
ENCODER = [f"roberta.encoder.layer.{i}.intermediate.dense.weight" for i in (0, 5, 11)]
Step = Callable[[], None]


def build(model_type: str, options: dict) -> torch.nn.Module:
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(AutoConfig.for_model(model_type, **options)).eval()
    return model.requires_grad_(False)


def tokens(batch: int, length: int) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    ids = torch.randint(5, 1000, (batch, length))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, torch.randint(0, 2, (batch,))


def step_of(variant: str, args: argparse.Namespace) -> Step:
    """One step of `variant`, on a new batch each time."""
    model = build(*MINILM)
    inputs, labels = tokens(args.batch, args.length)
    reader = HeadReader.find(model, {key: value[:4] for key, value in inputs.items()})
    table, targets = torch.randn(20_000, reader.hidden), torch.randint(0, 2, (20_000,))
    kind, _, shape = variant.partition("-")
    head = reader.head_parameters()
    if kind == "published":
        model.train()
        per_level, levels = map(int, shape.split("x"))
        search = PublishedSearch(reader, SIZES, keep=per_level, levels=levels)
        return lambda: search.step(*tokens(args.batch, args.length))
    if kind == "adam":
        return adam_step(head, table, targets, args.batch)
    if variant == "spsa-all":
        optimizer = SPSA(model.parameters(), model)
        return lambda: optimizer.step(lambda: functional.cross_entropy(model(**inputs).logits, labels))
    scoring = HeadEvaluation(reader, {id(p): name for name, p in head.items()}, make_objective("loss", None, 2))
    if kind == "spsa":
        optimizer = SPSA(head.values(), model)
    else:
        optimizer = DirectSearch(head.values(), options=variant, sampling_size=768, lr=5e-3)

    def step() -> None:
        rows = torch.randint(len(table), (args.batch,))
        scoring.load([(table[rows], targets[rows])])
        optimizer.step(scoring.closure, scoring)

    return step


def adam_step(head: dict, table: torch.Tensor, targets: torch.Tensor, batch: int) -> Step:
    """Adam on the same tensors with nothing in between: no model around the head."""
    w1, b1, w2, b2 = (p.detach().clone().requires_grad_() for p in head.values())
    optimizer = torch.optim.Adam([w1, b1, w2, b2], lr=1e-4)

    def step() -> None:
        rows = torch.randint(len(table), (batch,))
        hidden = functional.linear(table[rows], w1, b1).tanh()
        functional.cross_entropy(functional.linear(hidden, w2, b2), targets[rows]).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def measure_time(variant: str, args: argparse.Namespace) -> dict:
    slow = variant.startswith("published") or variant == "spsa-all"
    step, n = step_of(variant, args), max(2, args.steps // 50) if slow else args.steps
    for _ in range(2 if slow else 20):
        step()
    # other work on a shared machine changes the processor time of one thread little
    clock = time.process_time if args.threads == 1 else time.perf_counter
    seconds = []
    for _ in range(n):
        start = clock()
        step()
        seconds.append(clock() - start)
    return {"seconds": statistics.median(seconds), "mean": statistics.mean(seconds)}


def measure_memory(variant: str, args: argparse.Namespace) -> dict:
    model, memory = build(*ROBERTA), PeakMemory()
    inputs, labels = tokens(args.batch, args.length)
    named = dict(model.named_parameters())
    searched = [named[name] for name in ENCODER] if variant == "gld-encoder" else list(named.values())
    for parameter in model.parameters():
        parameter.sum()

    def loss() -> float:
        with torch.no_grad():
            return float(functional.cross_entropy(model(**inputs).logits, labels))

    step: Step = loss
    if variant == "spsa-all":
        optimizer = SPSA(searched, model)
        step = lambda: optimizer.step(loss)  # noqa: E731
    elif variant == "gld-encoder":
        search = DirectSearch(searched, sampling_size=1536, options="1x1")
        step = lambda: search.step(loss)  # noqa: E731
    before = memory.level()
    memory.reset()
    for _ in range(20 if variant == "evaluation" else 1):  # as many as a step makes
        step()
    largest = 0 if variant == "evaluation" else max(p.numel() * p.element_size() for p in searched)
    return {"peak": memory.bytes() - before, "largest": largest}


def ratio(rounds: list[dict], to: list[dict], key: str) -> str:
    values = [a[key] / b[key] for a, b in zip(rounds, to, strict=True)]
    return f"{statistics.median(values):.3g} ({min(values):.3g}-{max(values):.3g})"


def time_table(found: dict[str, list[dict]]) -> str:
    compared = [name for name in ("published-1x1", "adam") if name in found]
    lines = [f"| variant | step ms | {' | '.join(f'x {name}' for name in compared)} |"]
    lines.append("| --- |" + " ---: |" * (1 + len(compared)))
    for variant, rounds in found.items():
        step = f"{1e3 * statistics.median(r['seconds'] for r in rounds):.2f}"
        lines.append(f"| {' | '.join([variant, step, *(ratio(rounds, found[to], 'seconds') for to in compared)])} |")
    return "\n".join(lines)


def result_rows(rounds_of: dict[str, list[dict]], args: argparse.Namespace) -> list[dict]:
    """Rows of the result file: times, and their ratios within a round."""
    rows = []
    for variant, rounds in rounds_of.items():
        about = {"what": variant, "quantity": "memory" if args.memory else "time"}
        if args.memory:
            rows.append({**about, "measure": "MiB", **results.summary([r["peak"] / _MIB for r in rounds])})
            continue
        rows.append({**about, "measure": "ms a step", **results.summary([1e3 * r["seconds"] for r in rounds])})
        for to in ("published-1x1", "published-3x2", "adam"):
            if to in rounds_of:
                ratios = [a["seconds"] / b["seconds"] for a, b in zip(rounds, rounds_of[to], strict=True)]
                rows.append({**about, "measure": f"of {to}", **results.summary(ratios)})
    return rows


def memory_table(found: dict[str, list[dict]]) -> str:
    lines = ["| variant | peak MiB | evaluation + largest tensor MiB |", "| --- | ---: | ---: |"]
    evaluation = statistics.median(r["peak"] for r in found["evaluation"])
    for variant, rounds in found.items():
        peak, largest = statistics.median(r["peak"] for r in rounds), rounds[0]["largest"]
        lines.append(f"| {variant} | {peak / _MIB:,.1f} | {(evaluation + largest) / _MIB:,.1f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--curve", action="store_true")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--length", type=int, default=45, help="tokens per row: longest of 64 rows of sst2")
    parser.add_argument("--steps", type=int, default=300, help="measured steps per process (--curve: of each run)")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--variants", nargs="+")
    parser.add_argument("--output")
    parser.add_argument("--result", metavar="NAME", help="result file to write to, results/NAME.json")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    add_curve_arguments(parser)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.curve:
        print(curve(args))
        return
    measure, make_table = (measure_memory, memory_table) if args.memory else (measure_time, time_table)
    if args.worker:
        print(json.dumps(measure(args.worker, args)))
        return
    found: dict[str, list[dict]] = {variant: [] for variant in args.variants or (MEMORY if args.memory else STEPS)}
    for number in range(args.repeats):
        for variant in found:
            words = [sys.executable, __file__, "--worker", variant, *(["--memory"] if args.memory else [])]
            words += [f"--{key}={getattr(args, key)}" for key in ("batch", "length", "steps", "threads")]
            done = subprocess.run(words, capture_output=True, text=True, check=False)
            if done.returncode:
                raise SystemExit(f"{variant} failed:\n{done.stderr[-2000:]}")
            found[variant].append(json.loads(done.stdout.splitlines()[-1]))
            print(f"round {number + 1}, {variant}: {found[variant][-1]}", file=sys.stderr)
        if args.result:
            results.save(args.result, result_rows(found, args))
    text = f"batch {args.batch}, {args.threads} threads, {args.repeats} rounds\n\n{make_table(found)}\n"
    print(text)
    if args.output:
        with open(args.output, "w") as file:
            file.write(text)


if __name__ == "__main__":
    main()
