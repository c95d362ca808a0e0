"""Steps of zeroth-order search of whole models: as published, and as here; time and memory.

    python benchmarks/zeroth_order.py --threads 1 --repeats 3
    python benchmarks/zeroth_order.py --memory --threads 1 --repeats 3
    python benchmarks/zeroth_order.py --memory --shape llama-1b --layers 2 --of_layers 22 --dtype bfloat16 \
        --variants evaluation spsa lozo

RoBERTa-base's shape (125 M parameters, random weights, a classifier) or TinyLlama's (1.1 B with all 22 layers, a
language model), 16 rows of 64 tokens, all weights searched. Every variant runs in a process of its own; the variants
take turns, `--repeats` times over. Ratios are taken within a round; with one thread, seconds are processor time. `per
loss`: a step's time by the losses that it takes. `--memory`: the most above the loaded model. `--of_layers n`: memory
measured with `--layers` and with twice as many, and from both for a model of `n` layers.

The rows go to `results/zeroth-order.json` after each round (see `results.py`), a variant's earlier ones are replaced.
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
from published_zeroth_order import FZOO, LOZO, MeZO
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from hf_ft_ext import SPSA
from hf_ft_ext.gradientless.scoring.full_models import FullObjective, model_loss, objective_of_logits
from hf_ft_ext.gradientless.scoring.objectives import make_objective
from hf_ft_ext.training.runs.resources import PeakMemory

_MIB = 2**20
# auto class, model type, layers, configuration
SHAPES = {
    "roberta-base": (AutoModelForSequenceClassification, "roberta", 12, {
        "vocab_size": 50_265, "max_position_embeddings": 514, "num_labels": 2,
    }),
    "llama-1b": (AutoModelForCausalLM, "llama", 22, {
        "hidden_size": 2048, "intermediate_size": 5632, "num_attention_heads": 32, "num_key_value_heads": 4,
        "vocab_size": 32_000,
    }),
}  # fmt: skip
BASELINE = "mezo-published"
PUBLISHED = {BASELINE: (MeZO, 2), "lozo-published": (LOZO, 2), "fzoo-published": (FZOO, 9)}  # and losses of a step
OURS = {
    "spsa": {},
    "spsa-carry": {"carry": True},
    "lozo": {"direction": "lozo"},
    "lozo-both-at-once": {"direction": "lozo", "candidates_per_forward": 2},
    "lozo-m": {"direction": "lozo", "update": "momentum"},
    "subzero": {"direction": "subzero"},
    "fzoo": {"direction": "rademacher", "estimate": "one-sided", "num_directions": 8},
    "fzoo-outer": {"direction": "rademacher-outer", "estimate": "one-sided", "num_directions": 8},
    "fzoo-outer-batched": {
        "direction": "rademacher-outer", "estimate": "one-sided", "num_directions": 8, "candidates_per_forward": 8,
    },
}  # fmt: skip
VARIANTS = ["evaluation", *PUBLISHED, *OURS]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
SHARED = ("shape", "layers", "dtype", "batch", "length", "steps", "threads")


def build(args: argparse.Namespace) -> tuple[torch.nn.Module, FullObjective]:
    """The model, and the loss of a batch."""
    torch.manual_seed(0)
    auto, kind, layers, options = SHAPES[args.shape]
    config = AutoConfig.for_model(kind, num_hidden_layers=args.layers or layers, **options)
    model = auto.from_config(config, dtype=DTYPES[args.dtype]).eval().requires_grad_(False)
    ids = torch.randint(5, config.vocab_size, (args.batch, args.length))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if auto is AutoModelForCausalLM:
        return model, model_loss(lambda inputs: model(**inputs).loss, [{**batch, "labels": ids}], shifted=True)
    batch["labels"] = torch.arange(args.batch) % 2
    return model, objective_of_logits(model, make_objective("loss", None, 2), [batch])


def step_of(variant: str, args: argparse.Namespace) -> tuple[Callable[[], float], int]:
    """A step of the variant, and the losses that it takes."""
    model, full = build(args)

    @torch.no_grad()
    def loss() -> float:
        return float(full.value())

    if variant == "evaluation":
        return loss, 1
    if variant in PUBLISHED:
        peer, losses = PUBLISHED[variant]
        search = peer(model)
        return lambda: search.step(loss), losses
    optimizer = SPSA(model.parameters(), model, **OURS[variant])
    return lambda: optimizer.step(loss, full), optimizer.evaluations_per_step()


def measure(variant: str, args: argparse.Namespace) -> dict:
    step, losses = step_of(variant, args)
    if args.memory:
        memory = PeakMemory()
        before = memory.level()
        memory.reset()
        for _ in range(args.steps):
            step()
        return {"peak": memory.bytes() - before, "losses": losses}
    step()  # the first one checks whether candidates can run at once
    # other work on a shared machine changes the processor time of one thread little
    clock = time.process_time if args.threads == 1 else time.perf_counter
    seconds = []
    for _ in range(args.steps):
        start = clock()
        step()
        seconds.append(clock() - start)
    return {"seconds": statistics.median(seconds), "losses": losses}


def in_a_process_of_its_own(variant: str, args: argparse.Namespace, **changed: int) -> dict:
    words = [sys.executable, __file__, "--worker", variant, *(["--memory"] if args.memory else [])]
    settings = {key: changed.get(key, getattr(args, key)) for key in SHARED}
    words += [f"--{key}={value}" for key, value in settings.items() if value is not None]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{variant} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def at_all_layers(variant: str, args: argparse.Namespace) -> dict:
    """One measurement; with `--of_layers` the line through those of a few layers and of twice as many."""
    few = in_a_process_of_its_own(variant, args)
    if args.of_layers is None:
        return few
    more = in_a_process_of_its_own(variant, args, layers=2 * args.layers)
    each = (more["peak"] - few["peak"]) / args.layers
    return {**few, "peak": few["peak"] + each * (args.of_layers - args.layers)}


def rows_of(rounds: dict[str, list[dict]], args: argparse.Namespace) -> list[dict]:
    """Rows of the result file."""
    quantity = "memory" if args.memory else "time"
    about = {"quantity": quantity, "shape": args.shape, "dtype": args.dtype, "batch": args.batch,
             "length": args.length, "layers": args.of_layers or args.layers or SHAPES[args.shape][2]}  # fmt: skip
    key, unit = ("peak", "MiB above the model") if args.memory else ("seconds", "seconds a step")
    rows = []
    for variant, found in rounds.items():
        measured = {unit: [one[key] / (_MIB if args.memory else 1) for one in found]}
        pairs = list(zip(found, rounds.get(BASELINE, ()), strict=False))
        if pairs:
            measured["of MeZO's"] = [one[key] / base[key] for one, base in pairs]
            if not args.memory:
                measured["per loss, of MeZO's"] = [
                    (one[key] / one["losses"]) / (base[key] / base["losses"]) for one, base in pairs
                ]
        if args.memory and "evaluation" in rounds:
            pairs = zip(found, rounds["evaluation"], strict=False)
            measured["of evaluation's"] = [one[key] / base[key] for one, base in pairs]
        rows += [{"what": variant, "measure": name, **about, **results.summary(v)} for name, v in measured.items()]
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--shape", choices=SHAPES, default="roberta-base")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--variants", nargs="+", default=VARIANTS, choices=VARIANTS)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--layers", type=int, help="none = those of the shape")
    parser.add_argument("--of_layers", type=int, help="--memory: extrapolated to this number, from --layers")
    parser.add_argument("--steps", type=int, default=3, help="steps per process, with --memory all of them")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--result", default="zeroth-order", help="name of the result file")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.worker:
        print(json.dumps(measure(args.worker, args)))
        return
    if args.of_layers is not None and not (args.memory and args.layers):
        parser.error("--of_layers is about --memory, and needs --layers")
    rounds: dict[str, list[dict]] = {name: [] for name in args.variants}
    for number in range(args.repeats):
        for variant in rounds:
            rounds[variant].append(at_all_layers(variant, args))
            print(f"round {number + 1}, {variant}: {rounds[variant][-1]}", file=sys.stderr, flush=True)
        results.save(args.result, rows_of(rounds, args))
    for row in rows_of(rounds, args):
        print(f"{row['what']}, {row['measure']}: {row['value']:.3g} ({row['low']:.3g}-{row['high']:.3g})")


if __name__ == "__main__":
    main()
