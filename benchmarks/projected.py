"""The engine `projected` on many rows: time, memory, error and accuracy.

    python benchmarks/projected.py time --data path/to/glue                       # 4,000 x 872 rows of sst2, k = 4,096
    python benchmarks/projected.py time --size roberta-base --train 1024 --test 2000 --length 128 --memory_gb 4
    python benchmarks/projected.py error --data path/to/glue                      # k = 256 to 16,384 beside the exact
    python benchmarks/projected.py accuracy --data path/to/glue --train 512       # and linear head and fine-tuning

sst2 with the demo encoder and a fresh head, one scalar f_1 - f_0 (`--size roberta-base`: random weights of that shape,
random rows of `--length` tokens). `time`: projected gradients of all rows and their product, beside the gradients of
single rows by autograd (one forward and backward pass each, without padding, all parameters), which are measured on
every `--every`-th row and multiplied up; seconds of the process's CPU, memory the peak above the loaded model (RSS;
CUDA: seconds of the wall, allocated). `error`: the Frobenius norm of the kernel's error relative to the kernel's, root
mean square over `--seeds` projections, beside what `hf_ft_ext.kernel.engines.projection` predicts for it.
`accuracy`: kernel regression (`lstsq`) with the regularization chosen on 200 rows that are neither trained nor
tested on; the linear head and fine-tuning see the same rows. `--result NAME` writes the rows of `results/NAME.json`,
for the tables of docs/kernel.md (there NAME is `projected`).
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import results
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer, Trainer

from hf_ft_ext import (
    FullTrainer,
    FullTrainingArguments,
    KernelTrainer,
    KernelTrainingArguments,
    LinearHeadTrainer,
    LinearHeadTrainingArguments,
    demo_encoder,
    empirical_ntk,
    projected_gradients,
)
from hf_ft_ext.kernel.rows import ExampleRows
from hf_ft_ext.training.runs.resources import PeakMemory

DEV_ROWS = 200


def build(size: str) -> nn.Module:
    torch.manual_seed(0)
    if size == "minilm":
        return AutoModelForSequenceClassification.from_pretrained(demo_encoder(), num_labels=2).eval()
    config = AutoConfig.for_model("roberta", vocab_size=50_265, max_position_embeddings=514)
    return AutoModelForSequenceClassification.from_config(config).eval()


def sst2(data: str, split: str, first: int, last: int) -> dict[str, torch.Tensor]:
    """Rows `first` to `last` of a fixed random order, with labels."""
    from datasets import load_dataset

    chosen = load_dataset(data, "sst2", split=split).shuffle(seed=0)
    chosen = chosen.select(range(first, min(last, len(chosen))))
    tokenizer = AutoTokenizer.from_pretrained(demo_encoder())
    batch = dict(tokenizer(list(chosen["sentence"]), return_tensors="pt", padding=True, truncation=True))
    return {**batch, "labels": torch.tensor(chosen["label"])}


def random_rows(count: int, length: int) -> dict[str, torch.Tensor]:
    ids = torch.randint(5, 50_000, (count, length), generator=torch.Generator().manual_seed(count))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def sides(args: argparse.Namespace) -> tuple[dict, dict]:
    if args.size == "minilm":
        return sst2(args.data, "train", 0, args.train), sst2(args.data, "validation", 0, args.test)
    return random_rows(args.train, args.length), random_rows(args.test, args.length)


def single_rows(model: nn.Module, rows: ExampleRows, indices: range) -> None:
    """The gradients of single rows."""
    parameters = list(model.parameters())
    device = parameters[0].device
    for i in indices:
        logits = model(**rows.batch([i], device)).logits
        torch.autograd.grad(logits[0, 1] - logits[0, 0], parameters, allow_unused=True)


def quantities(about: dict[str, Any], values: dict[str, Any]) -> list[dict]:
    """Rows of a result file, one for each quantity: numbers, or what `results.summary` and the like give."""
    return [
        {**about, "quantity": name, **(value if isinstance(value, dict) else {"value": value})}
        for name, value in values.items()
    ]


def measure_time(args: argparse.Namespace) -> list[dict]:
    model = build(args.size).to(args.device)
    for parameter in model.parameters():
        parameter.sum()  # weights are mapped from the file: let them be resident
    clock = time.process_time if args.device == "cpu" else time.perf_counter

    def seconds(run: Callable[[], object]) -> float:
        start = clock()
        run()
        return clock() - start

    left, right = sides(args)
    options = {"engine": "projected", "dimension": args.dimension, "binary_classification": True}
    options |= {"memory_gb": args.memory_gb, "batch_size": args.batch}
    memory = PeakMemory()
    before = memory.level()
    memory.reset()
    projected = seconds(lambda: empirical_ntk(model, left, right, disable_tqdm=False, **options))
    peak = memory.bytes() - before
    single = 0.0
    for side in (left, right):
        rows = ExampleRows(side)
        indices = range(0, len(rows), args.every)
        single_rows(model, rows, indices[:2])
        single += (
            seconds(lambda rows=rows, indices=indices: single_rows(model, rows, indices)) / len(indices) * len(rows)
        )
    tokens = 0 if args.size == "minilm" else args.length  # real rows have a length each
    about = {"what": "time", "size": args.size, "rows": f"{args.train} x {args.test}", "tokens": tokens}
    about |= {"dimension": args.dimension, "memory_gb": args.memory_gb, "batch": args.batch, "device": args.device}
    found = {"s": projected, "s, single rows": single, "time / single rows": projected / single}
    return quantities(about, {**found, "peak GB": peak / 1e9})


def measure_error(args: argparse.Namespace) -> list[dict]:
    model = build(args.size)
    left, right = sides(args)
    exact = empirical_ntk(model, left, right, binary_classification=True)[:, 0, :, 0]
    found = []
    for k in args.dimensions:
        errors = []
        for seed in range(args.seeds):
            a, b = (
                projected_gradients(model, side, k, seed, binary_classification=True)[:, 0].double()
                for side in (left, right)
            )
            errors.append(float((a @ b.T - exact).norm() / exact.norm()))
        sizes = a.square().sum(1)[:, None] * b.square().sum(1)  # |g|^2 |g'|^2, estimated
        bound = float(((sizes + exact.square()) / k).sum().sqrt() / exact.norm())
        about = {"what": "error", "rows": f"{args.train} x {args.test}", "dimension": k}
        error = {"value": 100 * float(np.sqrt(np.mean(np.square(errors)))), "values": [100 * e for e in errors]}
        found += quantities(about, {"error, %": error, "predicted, %": 100 * bound})
    return found


class Rows(torch.utils.data.Dataset):
    """The rows of a batch, without their padding."""

    def __init__(self, batch: dict[str, torch.Tensor]):
        self.batch, self.lengths = batch, batch["attention_mask"].sum(1).tolist()

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, i: int) -> dict:
        row = {key: value[i] if value.ndim == 1 else value[i, : self.lengths[i]] for key, value in self.batch.items()}
        return {key: value.tolist() for key, value in row.items()}


def measure_accuracy(args: argparse.Namespace) -> list[dict]:
    train = Rows(sst2(args.data, "train", 0, args.train))
    dev = Rows(sst2(args.data, "train", args.train, args.train + DEV_ROWS))
    test = Rows(sst2(args.data, "validation", 0, args.test))
    tokenizer = AutoTokenizer.from_pretrained(demo_encoder())
    found = []

    def add(name: str, kind: type[Trainer], arguments: type, **settings) -> None:
        with tempfile.TemporaryDirectory() as folder:
            settings = {"use_cpu": args.device == "cpu", "report_to": "none", "save_strategy": "no", **settings}
            trainer = kind(
                build("minilm"),
                arguments(folder, **settings),
                train_dataset=train,
                eval_dataset=dev,
                processing_class=tokenizer,
                compute_metrics=lambda p: {"accuracy": float(np.mean(p.predictions.argmax(-1) == p.label_ids))},
            )
            start = time.process_time()
            trainer.train()
            accuracy = trainer.predict(test).metrics["test_accuracy"]
        about = {"what": "accuracy", "method": name, "rows": f"{args.train} x {len(test)}"}
        rows = quantities(about, {"accuracy, %": 100 * accuracy, "s": time.process_time() - start})
        found.extend(rows)
        print(json.dumps(rows), flush=True)

    solved = {"kernel_solver": "lstsq", "kernel_regularization": "auto", "per_device_eval_batch_size": args.batch}
    solved |= {"kernel_memory_gb": args.memory_gb}
    if args.train <= args.exact_up_to:
        add("exact kernel", KernelTrainer, KernelTrainingArguments, **solved)
    for k in args.dimensions:
        some = {"kernel_engine": "projected", "kernel_dimension": k}
        add(f"projected, k = {k}", KernelTrainer, KernelTrainingArguments, **solved, **some)
    add("linear head", LinearHeadTrainer, LinearHeadTrainingArguments)
    tuned = {"num_train_epochs": 3, "learning_rate": 5e-5, "per_device_train_batch_size": 16, "warmup_steps": 0.06}
    add("fine-tuning", FullTrainer, FullTrainingArguments, **tuned)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["time", "error", "accuracy"])
    parser.add_argument("--data", help="folder with GLUE (minilm)")
    parser.add_argument("--size", choices=["minilm", "roberta-base"], default="minilm")
    parser.add_argument("--train", type=int, help="default: 4,000 rows; error: 128; accuracy: 512")
    parser.add_argument("--test", type=int, help="default: 872 rows; error: 128")
    parser.add_argument("--length", type=int, default=128, help="tokens of random rows (roberta-base)")
    parser.add_argument("--dimension", type=int, default=4096, help="of time")
    parser.add_argument("--dimensions", type=int, nargs="+", default=[256, 1024, 4096, 16384], help="of the others")
    parser.add_argument("--seeds", type=int, default=5, help="of error")
    parser.add_argument("--every", type=int, default=20, help="time: every which row is measured by itself")
    parser.add_argument("--exact_up_to", type=int, default=512, help="accuracy: training rows with an exact kernel")
    parser.add_argument("--batch", type=int, default=16, help="rows of a forward pass")
    parser.add_argument("--memory_gb", type=float, default=4.0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--result", metavar="NAME", help="result file to write to, results/NAME.json")
    args = parser.parse_args()
    if args.data is None and (args.size == "minilm" or args.what != "time"):
        raise SystemExit("pass --data with a folder that holds sst2 (time: or --size roberta-base)")
    torch.set_num_threads(args.threads)
    args.train = args.train or {"time": 4000, "error": 128, "accuracy": 512}[args.what]
    args.test = args.test or {"time": 872, "error": 128, "accuracy": 872}[args.what]
    found = {"time": measure_time, "error": measure_error, "accuracy": measure_accuracy}[args.what](args)
    for row in found:
        print(json.dumps(row))
    if args.result:
        results.save(args.result, found)


if __name__ == "__main__":
    main()
