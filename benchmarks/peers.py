"""Kernels of gradients beside other packages: time, memory and agreement, in one process and in turns.

An environment for it (the pinned versions are those that the results on docs/peers.md are of; `--no-deps`, because
two of them would bring another torch along, and parts that are not used here):

    python -m venv .venv-peers && . .venv-peers/bin/activate
    pip install -e .
    pip install --no-deps -r benchmarks/peers.txt
    python benchmarks/peers.py --repeats 5                         # MiniLM's shape, random weights, one thread
    python benchmarks/peers.py --config path/to/config.json --train 8 --test 16
    python benchmarks/peers.py --small                             # a few seconds: does everything run?
    python benchmarks/peers.py --families                          # whose kernels are right on which models
    python benchmarks/peers.py --repeats 5 --result peers          # writes results/peers.json, for docs/peers.md
    python benchmarks/peers.py --families --result peers_families

What is computed: `K[i, j] = <d s(x_i), d s(x_j)>` between `--train` and `--test` rows, the scalar being
`s = f_1 - f_0` of a BERT classifier with two labels, over the parameters that the package at hand covers. Beside each
package runs `empirical_ntk` over the same parameters, and everything is compared with one backward pass per row.
Seconds are those of the process's CPU, memory the peak of the resident set above the level before; ratios are medians
over the rounds with their quartiles. A package that is missing or fails says why, and the others go on; it has no rows
in the result file.
"""

import argparse
import contextlib
import ctypes
import gc
import io
import json
import re
import sys
import time
import warnings
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import results
import torch
from published_kernel import prepared
from torch import nn
from transformers import BertConfig, BertForSequenceClassification

from hf_ft_ext import empirical_ntk
from hf_ft_ext.training.runs.resources import PeakMemory

MINILM = {"hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 6, "num_attention_heads": 12}
SMALL = {**MINILM, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "vocab_size": 500}
ENCODER_WEIGHTS = r"bert\.encoder\..*dense\.weight|self\.(query|key|value)\.weight"
ALL = r"."
OURS = "this package"

Rows = dict[str, torch.Tensor]


def scalars(model: nn.Module, rows: Rows) -> torch.Tensor:
    logits = model(**rows).logits
    return logits[:, 1] - logits[:, 0]


def chosen(model: nn.Module, pattern: str) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if re.search(pattern, name)}


def batches(rows: Rows, size: int) -> list[Rows]:
    n = len(rows["input_ids"])
    return [{key: value[i : i + size] for key, value in rows.items()} for i in range(0, n, size)]


def with_ids(model: nn.Module, rows: Rows) -> Rows:
    """With position and type ids of each row of a BERT: packages that go by hooks have no gradients of single rows
    of an embedding that runs once for the whole batch."""
    if not isinstance(model, BertForSequenceClassification):
        return rows
    places = torch.arange(rows["input_ids"].shape[1]).expand_as(rows["input_ids"])
    return {**rows, "position_ids": places, "token_type_ids": torch.zeros_like(places)}


# --- ways to the kernel: (model, train rows, test rows, rows of a batch) -> [train, test] -----------------------


def autograd(pattern: str) -> Callable:
    """One backward pass per row, gradients in full, products in float64."""

    def kernel(model: nn.Module, left: Rows, right: Rows, size: int) -> torch.Tensor:
        parameters = list(chosen(model, pattern).values())

        def gradients(row: Rows) -> tuple[torch.Tensor, ...]:
            return torch.autograd.grad(scalars(model, row)[0], parameters, allow_unused=True, materialize_grads=True)

        def vector(row: Rows) -> torch.Tensor:
            return torch.cat([g.flatten().double() for g in gradients(row)])  # sums of 10^7 products need float64

        mine = torch.empty(len(left["input_ids"]), sum(p.numel() for p in parameters), dtype=torch.float64)
        for i, row in enumerate(batches(left, 1)):
            mine[i] = vector(row)
        return torch.stack([mine @ vector(row) for row in batches(right, 1)], 1)

    return kernel


def ours(pattern: str) -> Callable:
    def kernel(model: nn.Module, left: Rows, right: Rows, size: int) -> torch.Tensor:
        return empirical_ntk(model, left, right, function=scalars, batch_size=size, parameters=pattern)[:, 0, :, 0]

    return kernel


def dattri(model: nn.Module, left: Rows, right: Rows, size: int) -> torch.Tensor:
    """Grad-Dot: `TracInAttributor` with one checkpoint of weight 1, its default projection to 512 numbers taken out.

    All training rows are one batch, because the gradients of the test rows are computed anew for each.
    """
    from dattri.algorithm.tracin import TracInAttributor
    from dattri.task import AttributionTask
    from torch.utils.data import DataLoader, TensorDataset

    def target(parameters: dict, row: tuple) -> torch.Tensor:
        ids, mask = row
        logits = torch.func.functional_call(model, parameters, (ids[None], mask[None])).logits
        return logits[0, 1] - logits[0, 0]

    def loader(rows: Rows, count: int) -> DataLoader:
        rows = prepared(rows)  # vmap takes no mask that is made with a branch on data
        return DataLoader(TensorDataset(rows["input_ids"], rows["attention_mask"]), batch_size=count)

    task = AttributionTask(loss_func=target, model=model, checkpoints=model.state_dict())
    attributor = TracInAttributor(task, weight_list=torch.ones(1), normalized_grad=False)
    attributor.projector_kwargs = None  # `projector_kwargs=None` in the constructor means the default
    return attributor.attribute(loader(left, len(left["input_ids"])), loader(right, size))


def products(gradients: Callable[[Rows], dict[str, torch.Tensor]], left: Rows, right: Rows, size: int) -> torch.Tensor:
    """The kernel from full gradients, `gradients(rows)` -> `[n, entries]` by name: all of the left side are kept."""
    parts = [gradients(rows) for rows in batches(left, size)]
    mine = {name: torch.cat([part.pop(name) for part in parts]) for name in list(parts[0])}
    columns = []
    for rows in batches(right, size):
        columns.append(sum(mine[name] @ theirs.T for name, theirs in gradients(rows).items()))
    return torch.cat(columns, 1)


def bergson(model: nn.Module, left: Rows, right: Rows, size: int) -> torch.Tensor:
    """Its collector of gradients by hooks, without projection, and one product per layer.

    Its own loop computes the loss of a causal language model, without a mask; so the scalars are summed and
    differentiated here. Its hooks refuse inputs that are not [rows, tokens, features]: the pooler's and the head's.
    """
    from bergson.collector.gradient_collectors import StreamingGradientCollector

    names = {name.removesuffix(".weight") for name in chosen(model, ENCODER_WEIGHTS)}
    collector = StreamingGradientCollector(model=model, target_modules=names, dtype=torch.float32)

    def gradients(rows: Rows) -> dict[str, torch.Tensor]:
        with collector.with_batch(rows["attention_mask"].bool()):
            scalars(model, rows).sum().backward()
        model.zero_grad()
        found, collector.mod_grads = collector.mod_grads, {}
        return found

    return products(gradients, left, right, size)


def dattri_llm(model: nn.Module, left: Rows, right: Rows, size: int) -> torch.Tensor:
    """Gradients by hooks, kept as activations and output gradients, and its dot products (`Gradient.similarity`)."""
    from dattri_llm import REGISTER_ALL, HookManager, HookManagerConfig

    with HookManager(model, HookManagerConfig(linear_io=REGISTER_ALL)).collect(deregister_on_exit=True) as hooks:

        def gradients(rows: Rows) -> object:
            scalars(model, with_ids(model, rows)).sum().backward()
            model.zero_grad()
            return hooks.get_gradient()

        mine = [gradients(rows) for rows in batches(left, size)]
        columns = []
        for rows in batches(right, size):
            theirs = gradients(rows)
            columns.append(torch.cat([part.similarity(theirs, reduce="all") for part in mine]))
    return torch.cat(columns, 1)


def opacus(model: nn.Module, left: Rows, right: Rows, size: int) -> torch.Tensor:
    """`GradSampleModule` and one product per parameter.

    It keeps nothing in evaluation mode, so the model is in training mode (without dropout).
    """
    from opacus import GradSampleModule

    sampled = GradSampleModule(model.train(), loss_reduction="sum")

    def gradients(rows: Rows) -> dict[str, torch.Tensor]:
        scalars(sampled, with_ids(model, rows)).sum().backward()
        found = {name: p.grad_sample.flatten(1) for name, p in sampled.named_parameters() if p.grad_sample is not None}
        sampled.zero_grad()  # drops the gradients of single rows, too
        return found

    try:
        return products(gradients, left, right, size)
    finally:
        sampled.to_standard_module()
        model.eval().zero_grad()


PEERS = {
    "dattri": (dattri, ALL),
    "dattri-llm": (dattri_llm, ALL),
    "bergson": (bergson, ENCODER_WEIGHTS),
    "opacus": (opacus, ALL),
}


# --- measuring ------------------------------------------------------------------------------------------------


def build(args: argparse.Namespace) -> tuple[nn.Module, Rows, Rows]:
    """The classifier with random weights, train rows, test rows."""
    torch.manual_seed(0)
    settings = SMALL if args.small else MINILM
    if args.config:
        settings = json.loads(Path(args.config).read_text())
    no_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config = BertConfig(**{**settings, **no_dropout, "num_labels": 2})
    model = BertForSequenceClassification._from_config(config, attn_implementation="eager").eval()

    def rows(n: int) -> Rows:
        ids = torch.randint(5, config.vocab_size, (n, args.length))
        lengths = torch.randint(args.length // 2, args.length + 1, (n,)) if args.ragged else args.length
        mask = (torch.arange(args.length) < torch.as_tensor(lengths).expand(n)[:, None]).long()
        return {"input_ids": ids * mask, "attention_mask": mask}

    return model, rows(args.train), rows(args.test)


def measure(kernel: Callable, model: nn.Module, left: Rows, right: Rows, size: int) -> tuple[torch.Tensor, dict]:
    """The kernel; seconds of the CPU and peak memory above the level before, in bytes."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # what the one before gave back
    memory = PeakMemory()
    before = memory.level()
    memory.reset()
    start = time.process_time()
    with contextlib.redirect_stderr(io.StringIO()):  # bars
        found = kernel(model, left, right, size)
    return found.detach().double(), {"seconds": time.process_time() - start, "bytes": memory.bytes() - before}


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


def installed(name: str) -> str:
    try:
        return f"{name} {version(name)}"
    except PackageNotFoundError:
        return f"{name} (not installed)"


def compare(name: str, args: argparse.Namespace, model: nn.Module, left: Rows, right: Rows) -> list[dict]:
    """Rounds of one package and ours in turn.

    Raises:
        Exception: whatever the package raises.
    """
    peer, pattern = PEERS[name]
    ways = {"ours": ours(pattern), name: peer, "autograd": autograd(pattern)}
    rounds: list[dict] = []
    for kernel in ways.values():  # imports, and what is only made once
        measure(kernel, model, *({key: value[:2] for key, value in rows.items()} for rows in (left, right)), 1)
    for _ in range(args.repeats):
        found, taken = {}, {}
        for way, kernel in ways.items():
            found[way], taken[way] = measure(kernel, model, left, right, args.batch)
        taken["errors"] = {way: relative_error(found[way], found["autograd"]) for way in ("ours", name)}
        rounds.append(taken)
        print(f"{name}, round {len(rounds)}: {taken}", file=sys.stderr)
    return rounds


def rows_of(name: str, rounds: list[dict], covered: int, args: argparse.Namespace) -> list[dict]:
    """Rows of the result file: one package and ours over the same `covered` parameters."""
    about = {"what": "time", "package": installed(name), "model": args.config or ("small" if args.small else "MiniLM")}
    about |= {"rows": f"{args.train} x {args.test}", "length": args.length, "ragged": args.ragged, "batch": args.batch}
    found: dict[str, dict] = {"parameters, M": {"value": covered / 1e6}}
    for way, said in (("ours", "ours, "), (name, "")):
        found[f"{said}s"] = results.summary([r[way]["seconds"] for r in rounds])
        found[f"{said}GB"] = results.summary([r[way]["bytes"] / 1e9 for r in rounds])
    for key, said in (("seconds", "time / ours"), ("bytes", "memory / ours")):
        found[said] = results.summary([r[name][key] / r["ours"][key] for r in rounds])
    found["one by one, time / ours"] = results.summary(
        [r["autograd"]["seconds"] / r["ours"]["seconds"] for r in rounds]
    )
    for way, said in (("ours", "our error"), (name, "its error")):
        found[said] = {"value": max(r["errors"][way] for r in rounds)}
    return [{**about, "quantity": quantity, **values} for quantity, values in found.items()]


def families(save: Callable[[list[dict]], None]) -> None:
    """Print, for tiny classifiers of many families, the error of each package's kernel, or what it raised.

    In float64, or float32 where the model itself takes no other: mixtures of experts. Rows are ragged and come as a
    tokenizer gives them: ids and mask.
    """
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
    from classifiers import DIFFERENT, perturb, ragged_rows, tiny_classifier

    ways = {OURS: ours(ALL), installed("dattri-llm"): dattri_llm, installed("opacus"): opacus}
    for kind in DIFFERENT:
        rows = {key: value for key, value in ragged_rows().items() if key != "labels"}
        dtype = torch.float64
        model = without_dropout(perturb(tiny_classifier(kind)).to(dtype))
        try:
            expected = autograd(ALL)(model, rows, rows, 1)
        except RuntimeError:
            dtype = torch.float32
            expected = autograd(ALL)(model.to(dtype), rows, rows, 1)
        if not expected.isfinite().all():
            print(f"{kind}: the model itself gives NaN for these rows", flush=True)
            continue
        found: dict[str, float | str] = {}
        for package, kernel in ways.items():
            model = without_dropout(perturb(tiny_classifier(kind)).to(dtype))
            try:
                with contextlib.redirect_stderr(io.StringIO()):
                    kernel_found = kernel(model, rows, rows, 3)
                finite = bool(kernel_found.isfinite().all())
                found[package] = relative_error(kernel_found, expected) if finite else "not finite"
            except Exception as error:  # is the answer
                found[package] = f"{type(error).__name__}: {str(error)[:300]}"
        family = kind if dtype == torch.float64 else f"{kind} (float32)"
        print(f"{family}: {found}", flush=True)
        about = {"what": "families", "family": family, "quantity": "error"}
        save([{**about, "package": name, "value": error} for name, error in found.items() if isinstance(error, float)])


def without_dropout(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", nargs="+", default=list(PEERS), choices=list(PEERS))
    parser.add_argument("--config", help="JSON file with the fields of a BertConfig")
    parser.add_argument("--small", action="store_true", help="a model of 32 features, to see that everything runs")
    parser.add_argument("--families", action="store_true", help="errors on tiny models of many families, not timed")
    parser.add_argument("--train", type=int, default=16)
    parser.add_argument("--test", type=int, default=32)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--ragged", action="store_true", help="rows of half the length up to all of it")
    parser.add_argument("--batch", type=int, default=8, help="rows of a pass, where the package lets one choose")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--result", metavar="NAME", help="result file to write to, results/NAME.json")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    warnings.filterwarnings("ignore")

    def save(rows: list[dict]) -> None:
        if args.result:
            results.save(args.result, rows)

    if args.families:
        families(save)
        return
    model, left, right = build(args)
    for name in args.peers:
        try:
            rounds = compare(name, args, model, left, right)
        except Exception as error:  # the others go on
            print(f"{installed(name)} cannot run here: {type(error).__name__}: {str(error)[:500]}")
            continue
        rows = rows_of(name, rounds, sum(p.numel() for p in chosen(model, PEERS[name][1]).values()), args)
        for row in rows:
            spread = f" ({row['low']:.3g}-{row['high']:.3g})" if "low" in row else ""
            print(f"{row['package']}: {row['quantity']}: {row['value']:.3g}{spread}", flush=True)
        save(rows)


if __name__ == "__main__":
    main()
