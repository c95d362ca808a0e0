"""Time and memory of the basis: Gram sums and `eigh` against the SVD of the stacked gradients, as published.

    python benchmarks/basis.py --repeats 3

Both give the HOSVD factors of the same stack of `--gradients` matrices of `--shape` (out, in): the published way keeps
the stack, unfolds it along both sides and takes the left singular vectors; ours adds each gradient to two Gram sums as
it comes and takes their eigenvectors. One process per way, in turn. Reported: seconds (median, with the range of the
ratios within a round), the peak of memory above the imports, and the largest principal angle between the leading
subspaces of the two, `--leading` directions on either side, in float64 on a smaller stack. The gradients are random
ones with a falling spectrum, drawn one by one. At the default size the stacked SVD needs about 13 GB.

    python benchmarks/basis.py --real

The energy of real gradients that the structured block's directions keep: the leading eigenvectors of the full Gram
sums against those of the sketches that a SparseGrad adapter takes (`compute_bases`). Demo encoder and task, 30 batches
of 16 rows; mean over the layers of a kind. And the largest angle, in radians, between the leading quarter of the full
directions and the span of the sketched ones. "bfloat16": with autocast, so that gradients and their products with test
matrices are rounded to it; their energy is that of the float32 gradients. Written to `results/sparse_basis.json`.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time

import results as result_files
import torch

from hf_ft_ext.sparse.basis import GramSums
from hf_ft_ext.training.runs.resources import PeakMemory

WAYS = ("stacked-svd", "gram-eigh")


def gradients(count: int, n_out: int, n_in: int, dtype: torch.dtype = torch.float32):
    """Products of few shared directions and noise, as gradients of one kind of layer are."""
    generator = torch.Generator().manual_seed(0)
    rank = min(n_out, n_in) // 2
    left = torch.randn(n_out, rank, generator=generator, dtype=dtype)
    right = torch.randn(rank, n_in, generator=generator, dtype=dtype)
    fall = torch.logspace(0, -3, rank, dtype=dtype)
    for _ in range(count):
        mix = torch.randn(rank, generator=generator, dtype=dtype) * fall
        yield (left * mix) @ right / rank + 1e-4 * torch.randn(n_out, n_in, generator=generator, dtype=dtype)


def stacked_svd(stream, count: int, n_out: int, n_in: int, dtype: torch.dtype = torch.float32):
    """Left singular vectors of both unfoldings of the whole stack."""
    stack = torch.empty(count, n_out, n_in, dtype=dtype)
    for i, gradient in enumerate(stream):
        stack[i] = gradient
    out = torch.linalg.svd(stack.permute(1, 0, 2).reshape(n_out, -1), full_matrices=False).U
    return out, torch.linalg.svd(stack.permute(2, 0, 1).reshape(n_in, -1), full_matrices=False).U


def gram_eigh(stream, count: int, n_out: int, n_in: int, dtype: torch.dtype = torch.float32):
    """The package's way."""
    sums = GramSums(n_out, n_in, dtype, torch.device("cpu"))
    for gradient in stream:
        sums.add(gradient)
    return sums.factors()


def largest_angle(a: torch.Tensor, b: torch.Tensor) -> float:
    """Largest principal angle in radians between the columns' spans, by its sine (accurate for small angles)."""
    return torch.linalg.matrix_norm(b - a @ (a.T @ b), 2).clamp(max=1).asin().item()


def angles(leading: int) -> tuple[float, float]:
    """Angles on both sides between the two ways' leading subspaces, float64, 192 x 96, 40 gradients."""
    shape = (40, 192, 96)
    ours = gram_eigh(gradients(*shape, torch.float64), *shape, torch.float64)
    theirs = stacked_svd(gradients(*shape, torch.float64), *shape, torch.float64)
    return tuple(largest_angle(a[:, :leading], b[:, :leading]) for a, b in zip(ours, theirs, strict=True))


def real_energy(model_name: str | None, batches: int = 30, rows: int = 16) -> list[dict]:
    """Rows of a result file: the energy that the full HOSVD and sketches keep on both sides, and the angle between."""
    from peft import get_peft_model
    from transformers import AutoModelForSequenceClassification, AutoTokenizer, DataCollatorWithPadding

    from hf_ft_ext import SparseGradConfig, compute_bases, demo_dataset, demo_encoder
    from hf_ft_ext.adapters.layers import fold_layer_numbers, shown_name
    from hf_ft_ext.adapters.sparse_grad.model import sparse_grad_layers

    name = model_name or demo_encoder()
    tokenizer = AutoTokenizer.from_pretrained(name)
    data = demo_dataset()["train"].shuffle(seed=0).select(range(batches * rows))
    data = data.map(
        lambda row: {**tokenizer(row["sentence"]), "labels": row["label"]}, remove_columns=data.column_names
    )
    collate = DataCollatorWithPadding(tokenizer)
    batch_list = [dict(collate([data[i] for i in range(s, s + rows)])) for s in range(0, batches * rows, rows)]
    torch.manual_seed(0)
    base = AutoModelForSequenceClassification.from_pretrained(name, num_labels=2)
    found: dict[tuple[str, str, str], dict[str, list[float]]] = {}
    for scope in ("layer", "kind"):
        model = get_peft_model(base, SparseGradConfig(task_type="SEQ_CLS", scope=scope))
        layers = {shown_name(layer_name): layer for layer_name, layer in sparse_grad_layers(model)}
        columns = {layer_name: layer.sparse_grad_columns["default"] for layer_name, layer in layers.items()}
        sketches: dict[int, dict[str, list[torch.Tensor]]] = {id(chosen): {} for chosen in columns.values()}
        for dtype_name in ("bfloat16", "float32"):  # the second choice stays
            with torch.autocast("cpu", torch.bfloat16, enabled=dtype_name == "bfloat16"):
                compute_bases(model, batch_list)
            for chosen in columns.values():
                sketches[id(chosen)][dtype_name] = [side.double() for side in chosen.buffers()]
        base = model.unload()
        sums: dict[int, list[torch.Tensor]] = {}
        for batch in batch_list:
            base.eval().zero_grad()
            for layer_name in layers:
                base.get_submodule(layer_name).weight.requires_grad_(True)
            base(**batch).loss.backward()
            for layer_name in layers:
                gradient = base.get_submodule(layer_name).weight.grad
                parts = (gradient @ gradient.T, gradient.T @ gradient)
                totals = sums.setdefault(id(columns[layer_name]), [torch.zeros_like(part) for part in parts])
                for total, part in zip(totals, parts, strict=True):
                    total += part
        one_each = {id(chosen): (layer_name, chosen) for layer_name, chosen in columns.items()}
        for layer_name, chosen in one_each.values():
            both = zip(*(sketches[id(chosen)][dtype_name] for dtype_name in ("float32", "bfloat16")), strict=True)
            for side, gram, (sketched, coarse) in zip(("out", "in"), sums[id(chosen)], both, strict=True):
                values, vectors = torch.linalg.eigh(gram.double())
                k = sketched.shape[1]
                leading = vectors.flip(1)[:, : max(k // 4, 1)]
                measured = {
                    "energy, full HOSVD": values.flip(0)[:k].sum() / values.sum(),
                    "energy, sketches": (sketched.T @ gram.double() @ sketched).trace() / values.sum(),
                    "energy, sketches, bfloat16": (coarse.T @ gram.double() @ coarse).trace() / values.sum(),
                    "angle of the leading quarter": torch.tensor(largest_angle(sketched, leading)),
                }
                cells = found.setdefault((scope, fold_layer_numbers(layer_name), side), {})
                for quantity, value in measured.items():
                    cells.setdefault(quantity, []).append(float(value))
    return [
        {"scope": scope, "layers": kind, "side": side, "quantity": quantity, **over_layers(values)}
        for (scope, kind, side), cells in found.items()
        for quantity, values in cells.items()
    ]


def over_layers(values: list[float]) -> dict:
    return {"value": statistics.mean(values), "low": min(values), "high": max(values), "values": values}


def measure(way: str, args: argparse.Namespace) -> dict:
    torch.set_num_threads(args.threads)
    memory = PeakMemory()
    before = memory.level()
    memory.reset()
    started = time.perf_counter()
    for _ in gradients(args.gradients, *args.shape):  # drawing them is not what is measured
        pass
    drawing = time.perf_counter() - started
    started = time.perf_counter()
    decompose = stacked_svd if way == "stacked-svd" else gram_eigh
    decompose(gradients(args.gradients, *args.shape), args.gradients, *args.shape)
    return {"seconds": time.perf_counter() - started - drawing, "peak": memory.bytes() - before}


def rows_of(measured: dict[str, list[dict]], args: argparse.Namespace) -> list[dict]:
    """Rows of the result file: seconds and peak of each way, and their ratios to the stacked SVD's in a round."""
    about = {"shape": "{} x {}".format(*args.shape), "gradients": args.gradients}
    rows = []
    for way, rounds in measured.items():
        pairs = list(zip(rounds, measured[WAYS[0]], strict=True))
        quantities = {"s": [r["seconds"] for r in rounds], "peak MiB": [r["peak"] / 2**20 for r in rounds]}
        if way != WAYS[0]:
            quantities["time / stacked SVD"] = [a["seconds"] / b["seconds"] for a, b in pairs]
            quantities["memory / stacked SVD"] = [a["peak"] / b["peak"] for a, b in pairs if b["peak"] > 0]
        rows += [
            {"what": way, "quantity": name, **about, **result_files.summary(values)}
            for name, values in quantities.items()
            if values
        ]
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", type=int, nargs=2, default=(768, 3072), metavar=("OUT", "IN"))
    parser.add_argument("--gradients", type=int, default=360)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--leading", type=int, default=16)
    parser.add_argument("--real", action="store_true", help="the energy kept on real gradients, nothing else")
    parser.add_argument("--model", help="with --real: another model than the demo encoder")
    parser.add_argument("--result", metavar="NAME", help="result file to write to, results/NAME.json")
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.way:
        print(json.dumps(measure(args.way, args)))
        return
    if args.real:
        torch.set_num_threads(args.threads)
        rows = real_energy(args.model)
        for row in rows:
            print({key: value for key, value in row.items() if key != "values"})
        result_files.save("sparse_basis", rows)
        return
    results: dict[str, list[dict]] = {way: [] for way in WAYS}
    for number in range(args.repeats):
        for way in WAYS:
            command = [sys.executable, __file__, *sys.argv[1:], "--way", way]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            results[way].append(json.loads(done.stdout.splitlines()[-1]))
            print(f"round {number + 1}: {way} {results[way][-1]}", file=sys.stderr, flush=True)
    print("| way | seconds | x stacked SVD | peak MiB | x stacked SVD |\n| --- | ---: | ---: | ---: | ---: |")
    for way, rounds in results.items():
        cells = [way]
        for key, unit in (("seconds", 1), ("peak", 2**20)):
            ratios = [a[key] / b[key] for a, b in zip(rounds, results[WAYS[0]], strict=True)]
            cells.append(f"{statistics.median(r[key] for r in rounds) / unit:,.1f}")
            cells.append(f"{statistics.median(ratios):.3f} ({min(ratios):.3f}-{max(ratios):.3f})")
        print(f"| {' | '.join(cells)} |")
    if args.result:
        result_files.save(args.result, rows_of(results, args))
    out, inp = angles(args.leading)
    print(f"\nlargest principal angle, {args.leading} leading directions, float64: {out:.1e} (out), {inp:.1e} (in)")


if __name__ == "__main__":
    main()
