"""Time and memory of one training step: full fine-tuning, LoRA, MeProp, SparseGrad as published and as it is here.

    python benchmarks/sparse.py --size minilm --repeats 5
    python benchmarks/sparse.py --size roberta-base --repeats 3 --batch 16 --length 128
    python benchmarks/sparse.py --size llama-1b --device cuda --dtype bfloat16 --batch 4 --length 512

Every variant runs in a process of its own; the variants take turns, `--repeats` times over, so that a slow
minute of the machine meets all of them. Reported: the median step, its ratio to `full` and to `lora` (median of the
ratios within a round, with their quartiles), peak memory above the loaded model (RSS; CUDA: allocated), and the bytes
of optimizer state, of gradients and of what autograd saves for the backward pass. Models have random weights, bases
are random: neither changes the cost. The table goes to standard output. With `--save`, ratios to LoRA go to
`results/sparse_step.json` and that of pre-passes to `results/sparse_prepass.json`, for the tables of docs/sparse.md.

`adapter`: the PEFT adapter of `--method sparse`, a basis per layer. It adds the change of a weight either to the
product or to the weight, whichever costs less; `adapter-product` and `adapter-weight` always take one of the two ways.
`structured-head`: the same block in a converted layer, folded into the weight.
`prepass-layer`, `prepass-kind`: the gradient pre-pass of the adapter; its "step" is one of `--gradients` gradients,
with its share of the decomposition at the end, and its "state" the columns that are kept.

Models that are too large to be measured: `--layers 1 2 3` measures depths of one, two and three layers, and the peak
at the model's own depth is that of the line through them.
"""

import argparse
import json
import math
import statistics
import subprocess
import sys
import time

import results as result_files
import torch
from peft import LoraConfig, get_peft_model
from published_sparse import PublishedLinear
from torch import nn
from transformers import AutoConfig, AutoModelForSequenceClassification

from hf_ft_ext import SparseAdamW, SparseGradConfig, compute_bases, convert_to_sparse
from hf_ft_ext.adapters.sparse_grad import functions
from hf_ft_ext.adapters.sparse_grad.model import layers_by_columns
from hf_ft_ext.sparse.basis import Basis, by_columns, cheaper_rotation
from hf_ft_ext.sparse.convert import freeze_rest
from hf_ft_ext.sparse.fixed import FixedSupport
from hf_ft_ext.sparse.targets import find_targets
from hf_ft_ext.training.runs.resources import PeakMemory

_MIB = 2**20
# model type, configuration, entries per weight (the source's 28,000 of 768 x 3072, and the same share)
SIZES = {
    "small": (  # to try the script
        "roberta",
        {"vocab_size": 1000, "max_position_embeddings": 130, "hidden_size": 32, "intermediate_size": 48}
        | {"num_hidden_layers": 2, "num_attention_heads": 2},
        60,
    ),
    "minilm": ("bert", {"hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 6}, 7_000),
    "roberta-base": ("roberta", {"vocab_size": 50_265, "max_position_embeddings": 514}, 28_000),
    "roberta-large": (
        "roberta",
        {"vocab_size": 50_265, "max_position_embeddings": 514, "hidden_size": 1024, "intermediate_size": 4096}
        | {"num_hidden_layers": 24, "num_attention_heads": 16},
        50_000,
    ),
    "llama-1b": (
        "llama",
        {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "num_attention_heads": 32}
        | {"num_key_value_heads": 4, "pad_token_id": 0},
        140_000,
    ),
}
CLOCKS = {"wall": time.perf_counter, "processor": time.process_time}


def build(args: argparse.Namespace) -> nn.Module:
    model_type, options, _ = SIZES[args.size]
    if args.attention_dropout is not None:
        options = options | {"attention_probs_dropout_prob": args.attention_dropout}
    if args.layers is not None:
        options = options | {"num_hidden_layers": args.layers[0]}
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **options)
    dtype = getattr(torch, args.dtype)
    return AutoModelForSequenceClassification.from_config(config, dtype=dtype).to(args.device).train()


def random_bases(layers: list[nn.Linear]) -> dict[tuple[int, int], Basis]:
    bases = {}
    for layer in layers:
        shape = (layer.out_features, layer.in_features)
        if shape not in bases:
            factors = (torch.linalg.qr(torch.randn(n, n, device=layer.weight.device)).Q for n in shape)
            bases[shape] = Basis(*map(by_columns, factors))
    return bases


def optimizers_of(variant: str, model: nn.Module, k: int, tokens: int) -> tuple[nn.Module, list]:
    """Prepare `model` for `variant`; return it and its optimizers."""
    if variant in ("lora", "lora-rest"):
        targets = list(find_targets(model))
        model = get_peft_model(model, LoraConfig(task_type="SEQ_CLS", r=7, lora_alpha=14, target_modules=targets))
        if variant == "lora-rest":  # as in the authors' baseline: all that is not an MLP weight trains too
            for name, parameter in model.named_parameters():
                parameter.requires_grad_("base_layer.weight" not in name)
    elif variant.startswith(("adapter", "prepass")):
        kind, _, way = variant.partition("-")
        if kind == "adapter" and way:
            functions.by_weight_is_cheaper = lambda *_, **__: way == "weight"
        init, scope = ("gradient", way) if kind == "prepass" else ("random", "layer")
        model = get_peft_model(model, SparseGradConfig(task_type="SEQ_CLS", n_params=k, init=init, scope=scope))
    elif variant == "published":
        targets = find_targets(model)
        bases = random_bases(list(targets.values()))
        for name, linear in targets.items():
            basis = bases[linear.out_features, linear.in_features]
            model.set_submodule(name, PublishedLinear(linear, basis.out_factor, basis.in_factor, k))
        rotated = [p for n, p in model.named_parameters() if n.endswith(".rotated")]
        rest = [p for n, p in model.named_parameters() if not n.endswith(".rotated")]
        return model, [torch.optim.SparseAdam(rotated, lr=1e-5), torch.optim.AdamW(rest, lr=1e-5)]
    elif variant != "full":
        support, _, rest = variant.partition("-")
        basis = "none" if support == "meprop" else "random"
        support = "dynamic" if support == "meprop" else support
        square = support == "square"  # a structured block with as many rows as columns
        support = "structured" if square else support
        layers = convert_to_sparse(model, k, support=support, basis=basis)
        bases = random_bases(list(layers.values())) if basis == "random" else {}
        for layer in layers.values():
            shape = (layer.out_features, layer.in_features)
            if bases:
                layer.basis.out_factor, layer.basis.in_factor = bases[shape].out_factor, bases[shape].in_factor
                layer.basis.rotates = cheaper_rotation(*shape, tokens)
            device = layer.weight.device
            if square:
                layer.block = (math.ceil(math.sqrt(k)),) * 2
                layer.n_params = math.prod(layer.block)
                layer.values = nn.Parameter(layer.values.new_zeros(layer.n_params))
            if support == "structured":
                sides = (torch.arange(n, device=device) for n in layer.block)
                layer.set_support(FixedSupport.of_block(layer.basis, *sides))
            elif support == "static":
                indices = torch.randperm(layer.weight.numel(), device=device)[:k].sort().values
                layer.set_support(FixedSupport.of_entries(layer.basis, indices, layer.in_features))
        if support == "structured":
            for layer in layers.values():
                layer.basis.out_factor = layer.basis.in_factor = None
        freeze_rest(model, "head" if rest == "head" else "all")
        trained = [p for p in model.parameters() if p.requires_grad]
        return model, [SparseAdamW(trained, layers.values(), lr=1e-5)]
    return model, [torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5)]


def tensor_bytes(value) -> int:
    if isinstance(value, torch.Tensor):
        return (
            value._values().numel() * value.element_size() if value.is_sparse else value.numel() * value.element_size()
        )
    if isinstance(value, dict):
        return sum(tensor_bytes(item) for item in value.values())
    return 0


def factors_of(module: nn.Module) -> list[torch.Tensor]:
    holders = [module, getattr(module, "basis", None), getattr(module, "support", None)]
    names = ("out_factor", "in_factor", "out_columns", "in_columns")
    found = [getattr(holder, name, None) for holder in holders for name in names]
    return [tensor for tensor in found if isinstance(tensor, torch.Tensor)]


def measure(variant: str, args: argparse.Namespace) -> dict:
    """Steps of one variant in this process."""
    torch.set_num_threads(args.threads)
    now = CLOCKS[args.clock]
    model, memory = build(args), PeakMemory()
    before = memory.level()
    model, optimizers = optimizers_of(variant, model, SIZES[args.size][2], args.batch * args.length)
    if variant.startswith("prepass"):
        return measure_prepass(model, before, memory, args)
    # Weights and factors are there anyway; only what the forward pass makes counts as saved.
    there = [*model.parameters(), *(v for module in model.modules() for v in factors_of(module))]
    known = {tensor.untyped_storage().data_ptr() for tensor in there}
    ids = torch.randint(5, 1000, (args.batch, args.length), device=args.device)
    labels = torch.randint(0, 2, (args.batch,), device=args.device)
    saved: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    def forward() -> torch.Tensor:
        return model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels).loss

    def finish(loss: torch.Tensor) -> int:
        loss.backward()
        size = sum(tensor_bytes(p.grad) for p in model.parameters() if p.grad is not None)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        return size

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = forward()
    gradient_bytes = finish(loss)
    finish(forward())
    memory.reset()
    seconds = []
    for _ in range(args.steps):
        start = now()
        finish(forward())
        if args.device != "cpu":
            torch.cuda.synchronize()
        seconds.append(now() - start)
    states = [state for optimizer in optimizers for state in optimizer.state.values()]
    return {
        "seconds": statistics.median(seconds),
        "peak": memory.bytes() - before,
        "state": sum(tensor_bytes(state) for state in states),
        "gradients": gradient_bytes,
        "saved": sum(saved.values()),
    }


def measure_prepass(model: nn.Module, before: int, memory: PeakMemory, args: argparse.Namespace) -> dict:
    """The gradient pre-pass: seconds of one gradient, everything at the end included."""
    ids = torch.randint(5, 1000, (args.batch, args.length), device=args.device)
    labels = torch.randint(0, 2, (args.batch,), device=args.device)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    now = CLOCKS[args.clock]
    compute_bases(model, [batch])  # warm
    for columns, _ in layers_by_columns(model, "default"):
        columns.ready = False  # as before training
    memory.reset()
    start = now()
    compute_bases(model, [batch] * args.gradients, gradients=args.gradients)
    if args.device != "cpu":
        torch.cuda.synchronize()
    seconds = (now() - start) / args.gradients
    columns = {b.data_ptr(): b.numel() * b.element_size() for n, b in model.named_buffers() if "columns" in n}
    return {"seconds": seconds, "peak": memory.bytes() - before, "state": sum(columns.values()), "gradients": 0,
            "saved": 0}  # fmt: skip


def rows_beside_lora(results: dict[str, list[dict]], args: argparse.Namespace) -> dict[str, list[dict]]:
    """Rows of the result files by file name: each variant's numbers and their ratios to LoRA's of the same round."""
    setting = {"model": args.size, "dtype": args.dtype, "tokens": f"{args.batch} x {args.length}"}
    setting |= {} if args.clock == "wall" else {"clock": args.clock}
    setting |= {} if args.attention_dropout is None else {"attention_dropout": args.attention_dropout}
    setting |= {} if args.layers is None else {"layers": args.layers[0]}
    rows: dict[str, list[dict]] = {"sparse_step": [], "sparse_prepass": []}
    for variant, rounds in results.items():
        pairs = list(zip(rounds, results["lora"], strict=True))
        found = {
            "s": result_files.summary([r["seconds"] for r in rounds]),
            "time / LoRA": result_files.summary([r["seconds"] / lora["seconds"] for r, lora in pairs]),
            "peak GiB": {"value": statistics.median(r["peak"] for r in rounds) / 2**30},
        }
        if variant.startswith("prepass"):
            kept = [r["peak"] / (lora["peak"] + r["state"]) for r, lora in pairs]
            found["peak / (LoRA + columns)"] = {"value": statistics.median(kept)}
        else:
            found["peak / LoRA"] = {"value": statistics.median(r["peak"] / lora["peak"] for r, lora in pairs)}
            found["saved GiB"] = {"value": rounds[0]["saved"] / 2**30}
            found["saved / LoRA"] = {"value": rounds[0]["saved"] / results["lora"][0]["saved"]}
        file = "sparse_prepass" if variant.startswith("prepass") else "sparse_step"
        rows[file] += [{**setting, "variant": variant, "quantity": name, **values} for name, values in found.items()]
    return rows


def table(results: dict[str, list[dict]]) -> str:
    """Markdown; ratios are taken round by round."""

    def ratio(variant: str, to: str) -> str:
        if to not in results:
            return ""
        values = [a["seconds"] / b["seconds"] for a, b in zip(results[variant], results[to], strict=True)]
        if len(values) == 1:
            return f"{values[0]:.2f}"
        low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
        return f"{middle:.2f} ({low:.2f}-{high:.2f})"

    lines = [
        "| variant | step s | x full | x lora | x published | peak MiB | state MiB | gradients MiB | saved MiB |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for variant, rounds in results.items():
        sizes = [
            f"{statistics.median(r[key] for r in rounds) / _MIB:,.1f}"
            for key in ("peak", "state", "gradients", "saved")
        ]
        step = f"{statistics.median(r['seconds'] for r in rounds):.3f}"
        ratios = [ratio(variant, to) for to in ("full", "lora", "published")]
        lines.append(f"| {' | '.join([variant, step, *ratios, *sizes])} |")
    return "\n".join(lines)


VARIANTS = [
    *("full", "lora", "lora-rest", "published", "meprop", "dynamic", "dynamic-head"),
    *("static", "static-head", "structured", "structured-head", "square-head"),  # square: as many rows as columns
    *("adapter", "adapter-product", "adapter-weight", "prepass-layer", "prepass-kind"),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="minilm")
    parser.add_argument("--layers", type=int, nargs="+", help="other depths than the size's, each measured")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--steps", type=int, default=3, help="measured steps per process (after two others)")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--gradients", type=int, default=30, help="of the pre-pass")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the model")
    parser.add_argument(
        "--attention_dropout",
        type=float,
        help="with 0 the CPU's attention keeps no probabilities for the backward pass; default: the model's",
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument(
        "--clock", choices=CLOCKS, default="wall", help="processor: where other work shares the cores; CPU only"
    )
    parser.add_argument("--variants", nargs="+", default=VARIANTS, choices=VARIANTS)
    parser.add_argument("--save", action="store_true", help="write result files; the variants must include lora")
    parser.add_argument("--worker", choices=VARIANTS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        print(json.dumps(measure(args.worker, args)))
        return
    if args.save and "lora" not in args.variants:
        parser.error("--save compares with LoRA; add lora to --variants")
    torch.set_num_threads(args.threads)  # the result files say so
    depths, peaks = args.layers or [None], {}
    for depth in depths:
        args.layers = None if depth is None else [depth]
        results = measured(args)
        peaks[depth] = {name: statistics.median(r["peak"] for r in rounds) for name, rounds in results.items()}
        print(f"{heading(args)}\n\n{table(results)}\n")
        if args.save:
            save(rows_beside_lora(results, args))
    if len(depths) > 1:
        whole = peaks_of_the_whole(peaks, args)
        for row in whole:
            print(f"{row['variant']}, {row['layers']} layers by a line: {row['value']:.2f} GiB")
        if args.save:
            save({"sparse_prepass": [row for row in whole if row["variant"].startswith("prepass")]})


def measured(args: argparse.Namespace) -> dict[str, list[dict]]:
    """All rounds of all variants, each in a process of its own."""
    depth = [] if args.layers is None else ["--layers", str(args.layers[0])]
    results: dict[str, list[dict]] = {variant: [] for variant in args.variants}
    for number in range(args.repeats):
        for variant in args.variants:
            words = [sys.executable, __file__, *sys.argv[1:], *depth, "--worker", variant]
            done = subprocess.run(words, capture_output=True, text=True, check=False)
            if done.returncode:
                raise SystemExit(f"{variant} failed:\n{done.stderr[-2000:]}")
            results[variant].append(json.loads(done.stdout.splitlines()[-1]))
            print(f"round {number + 1}, {variant}: {results[variant][-1]['seconds']:.3f} s", file=sys.stderr)
    return results


def heading(args: argparse.Namespace) -> str:
    head = (
        f"{args.size}, {args.dtype}, batch {args.batch} x {args.length}, {args.threads} threads, {args.repeats} rounds"
    )
    if args.layers is not None:
        head += f", {args.layers[0]} layers"
    if args.attention_dropout is not None:
        head += f", attention dropout {args.attention_dropout:g}"
    return head


def save(rows: dict[str, list[dict]]) -> None:
    for name, found in rows.items():
        if found:
            result_files.save(name, found)


def peaks_of_the_whole(peaks: dict[int, dict[str, float]], args: argparse.Namespace) -> list[dict]:
    """Rows of a result file: each variant's peak at the model's own depth, by a line through the measured depths."""
    model_type, options, _ = SIZES[args.size]
    layers = AutoConfig.for_model(model_type, **options).num_hidden_layers
    setting = {"model": args.size, "dtype": args.dtype, "tokens": f"{args.batch} x {args.length}", "layers": layers}
    setting |= {"quantity": "peak GiB", "from": f"{', '.join(map(str, peaks))} layers"}
    rows = []
    for variant in args.variants:
        line = statistics.linear_regression(list(peaks), [found[variant] for found in peaks.values()])
        rows.append({**setting, "variant": variant, "value": (line.intercept + line.slope * layers) / 2**30})
    return rows


if __name__ == "__main__":
    main()
