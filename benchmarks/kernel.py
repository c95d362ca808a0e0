"""Time and memory of a kernel: as published, by full Jacobians, and as it is here, on the same rows.

    python benchmarks/kernel.py --data path/to/glue --repeats 3
    python benchmarks/kernel.py --data path/to/glue --train 128 --test 1000 --published_rows 1 --published_test 64
    python benchmarks/kernel.py --size roberta-base --variants structured --memory_gb 8
    python benchmarks/kernel.py --size roberta-base --train 32 --test 1000 --device cuda --variants structured

SST-2 rows padded to `--length` tokens, the demo encoder with a fresh head, one scalar f_1 - f_0 (`--size
roberta-base`: random weights of that shape, random rows). Every variant runs in a process of its own, on as many
threads, in turns, `--repeats` times over; seconds are those of the process's CPU (CUDA: of the wall), ratios medians
within a round with their range, memory the peak above the loaded model (RSS; CUDA: allocated). The published algorithm
takes as long for each training row as for another, and for each batch of test rows too: it is run on
`--published_rows` x `--published_test` rows and the time multiplied up, which the table says. `--result NAME` writes
the rows of `results/NAME.json` after every round, for the tables of docs/kernel.md (there NAME is `kernel`).
"""

import argparse
import json
import statistics
import subprocess
import sys
import time

import results
import torch
from published_kernel import full_jacobians, published
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from hf_ft_ext import demo_encoder, empirical_ntk
from hf_ft_ext.training.runs.resources import PeakMemory

FORMULAS = ["sgd", "signgd", "asymmetric_signgd"]
VARIANTS = ["published", "jacobians", "structured"]
_PASSED = (
    "size", "data", "train", "test", "length", "threads", "memory_gb", "batch", "published_rows", "published_test",
    "device", "dtype",
)  # fmt: skip


def build(args: argparse.Namespace) -> tuple[torch.nn.Module, dict, dict]:
    """Model, training rows, test rows."""
    torch.manual_seed(0)
    if args.size == "minilm":
        name = demo_encoder()
        model = AutoModelForSequenceClassification.from_pretrained(name, num_labels=2)
        tokenizer = AutoTokenizer.from_pretrained(name)

        def encoded(split: str, n: int) -> dict:
            from datasets import load_dataset

            texts = load_dataset(args.data, "sst2", split=split)[:n]["sentence"]
            padding = {"padding": "max_length", "truncation": True, "max_length": args.length}
            return dict(tokenizer(texts, return_tensors="pt", **padding))

        left, right = encoded("train", args.train), encoded("validation", args.test)
    else:
        config = AutoConfig.for_model("roberta", vocab_size=50_265, max_position_embeddings=514)
        model = AutoModelForSequenceClassification.from_config(config)

        def random(n: int) -> dict:
            ids = torch.randint(5, 50_000, (n, args.length))
            return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

        left, right = random(args.train), random(args.test)
    model = model.eval().to(args.device)
    return model, *({key: value.to(args.device) for key, value in side.items()} for side in (left, right))


def measure(args: argparse.Namespace) -> dict:
    """Seconds and peak memory of one variant; a check value of its kernel."""
    variant, formula = args.worker
    model, left, right = build(args)
    factor = 1.0
    if variant == "published":
        n, m = min(args.published_rows, args.train), min(args.published_test, args.test)
        factor = args.train * args.test / (n * m)
        left, right = ({k: v[:size] for k, v in side.items()} for side, size in ((left, n), (right, m)))
    for parameter in model.parameters():
        parameter.sum()  # weights are mapped from the file: let them be resident
    memory = PeakMemory()
    before = memory.level()
    memory.reset()
    clock = time.process_time if args.device == "cpu" else time.perf_counter
    start = clock()
    if variant == "published":
        kernel = published(model, left, right, formula)
    elif variant == "jacobians":
        kernel = full_jacobians(model, left, right, formula)
    else:
        options = {"binary_classification": True, "memory_gb": args.memory_gb, "batch_size": args.batch}
        kernel = empirical_ntk(model, left, right, formula, **options).squeeze(-1).squeeze(-2)
    seconds = clock() - start
    first = kernel.reshape(-1, *kernel.shape[-2:])[0]
    return {
        "seconds": factor * seconds,
        "peak": memory.bytes() - before,
        "factor": factor,
        "check": float(first[0, 0]),
    }


def ratio(rounds: list[dict], to: list[dict], key: str) -> str:
    values = [a[key] / b[key] for a, b in zip(rounds, to, strict=True)]
    return f"{statistics.median(values):.3g} ({min(values):.3g}-{max(values):.3g})"


def rows_of(measured: dict[tuple[str, str], list[dict]], args: argparse.Namespace) -> list[dict]:
    """Rows of the result file: each variant's time and memory, and their ratios to ours in the same round."""
    setting = {"size": args.size, "rows": f"{args.train} x {args.test}", "length": args.length}
    setting |= {"batch": args.batch, "memory_gb": args.memory_gb, "device": args.device}
    rows = []
    for (formula, variant), rounds in measured.items():
        quantities = {"s": [r["seconds"] for r in rounds], "peak GB": [r["peak"] / 1e9 for r in rounds]}
        ours = measured.get((formula, "structured"))
        if ours is not None and variant != "structured":
            pairs = list(zip(rounds, ours, strict=True))
            quantities["time / ours"] = [theirs["seconds"] / mine["seconds"] for theirs, mine in pairs]
            quantities["memory / ours"] = [theirs["peak"] / mine["peak"] for theirs, mine in pairs]
        about = {"what": f"{formula}, {variant}", "formula": formula, "variant": variant, **setting}
        rows += [{**about, "quantity": name, **results.summary(values)} for name, values in quantities.items()]
    return rows


def table(measured: dict[tuple[str, str], list[dict]]) -> str:
    lines = ["| formula | variant | s | peak MB | time / structured | memory / structured |", "|" + " --- |" * 6]
    for (formula, variant), rounds in measured.items():
        ours = measured.get((formula, "structured"), rounds)
        seconds = statistics.median(r["seconds"] for r in rounds)
        scaled = f" (measured x {rounds[0]['factor']:.4g})" if rounds[0]["factor"] > 1 else ""
        peak = statistics.median(r["peak"] for r in rounds) / 1e6
        ratios = ratio(rounds, ours, "seconds"), ratio(rounds, ours, "peak")
        lines.append(f"| {formula} | {variant} | {seconds:.3g}{scaled} | {peak:,.0f} | {' | '.join(ratios)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=["minilm", "roberta-base"], default="minilm")
    parser.add_argument("--data", help="folder with GLUE (minilm)")
    parser.add_argument("--formulas", nargs="+", default=FORMULAS, choices=FORMULAS)
    parser.add_argument("--variants", nargs="+", default=VARIANTS, choices=VARIANTS)
    parser.add_argument("--train", type=int, default=32)
    parser.add_argument("--test", type=int, default=64)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--batch", type=int, default=16, help="rows of a forward pass (structured)")
    parser.add_argument("--memory_gb", type=float, default=4.0)
    parser.add_argument(
        "--published_rows", type=int, default=2, help="training rows the published algorithm is run on"
    )
    parser.add_argument("--published_test", type=int, default=64)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--result", metavar="NAME", help="result file to write to, results/NAME.json")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.worker:
        print(json.dumps(measure(args)))
        return
    if args.size == "minilm" and args.data is None:
        raise SystemExit("pass --data with a folder that holds sst2, or --size roberta-base")
    measured: dict[tuple[str, str], list[dict]] = {(f, v): [] for f in args.formulas for v in args.variants}
    for number in range(args.repeats):
        for (formula, variant), rounds in measured.items():
            words = [sys.executable, __file__, "--worker", variant, formula]
            passed = [(key, getattr(args, key, None)) for key in _PASSED]
            words += [f"--{key}={value}" for key, value in passed if value is not None]
            done = subprocess.run(words, capture_output=True, text=True, check=False)
            if done.returncode:
                raise SystemExit(f"{variant} {formula} failed:\n{done.stderr[-2000:]}")
            rounds.append(json.loads(done.stdout.splitlines()[-1]))
            print(f"round {number + 1}, {formula}, {variant}: {rounds[-1]}", file=sys.stderr)
        if args.result:
            results.save(args.result, rows_of(measured, args))
    print(f"{args.train} x {args.test} rows, {args.threads} threads, {args.repeats} rounds\n\n{table(measured)}\n")


if __name__ == "__main__":
    main()
