"""Cost of FishPAL's pre-pass and of the model that it leaves, at RoBERTa-base's size, random weights.

    python benchmarks/fisher.py --threads 1                       # time: pre-pass and forward
    python benchmarks/fisher.py --threads 1 --only memory
    python benchmarks/fisher.py --only counts
    python benchmarks/fisher.py --threads 1 --result fisher       # results/fisher.json, for docs/fisher.md; all parts

Pre-pass: 64 examples of 128 tokens, prefix with its network, bottleneck and LoRA in all 12 layers. `published` is one
backward pass per example with dense gradients of all that the candidates train; ours gives the same sums. Variants
take turns and process time is compared, so that other load on the machine changes both. Memory is the peak of a
process of its own, above the model. The forward pass is that of the published plans against the plain model.
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
from peft import get_peft_model
from transformers import AutoConfig, AutoModelForSequenceClassification

from hf_ft_ext.fisher.candidates import default_candidates, layers_of, modules_of, probing
from hf_ft_ext.fisher.information import gradient_sums
from hf_ft_ext.fisher.plan import AdapterPlan
from hf_ft_ext.training.runs.resources import PeakMemory

P, B, L = "prefix", "bottleneck", "lora"
TABLES = {"sst2": [P] * 5 + [B] * 5 + [L] * 2, "mrpc, mnli": [P, B, L, L, *[B] * 6, L, L]}
TABLES |= {f"{name} everywhere": [name] * 12 for name in (P, B, L)}


def roberta(layers: int = 12):
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "roberta", vocab_size=50265, max_position_embeddings=514, type_vocab_size=1, num_hidden_layers=layers
    )
    return AutoModelForSequenceClassification.from_config(config).eval()


def examples(count: int, length: int) -> list[dict]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(5, 50_000, (count, length), generator=generator)
    return [
        {"input_ids": row[None], "attention_mask": torch.ones_like(row[None]), "labels": torch.tensor([i % 2])}
        for i, row in enumerate(ids)
    ]


def batches(rows: list[dict], size: int) -> list[dict]:
    parts = (rows[i : i + size] for i in range(0, len(rows), size))
    return [{key: torch.cat([row[key] for row in part]) for key in part[0]} for part in parts]


def published(probe, rows: list[dict], names: list[str]) -> dict[str, torch.Tensor]:
    """One backward pass per example; every gradient dense, squared and added."""
    own = dict(probe.named_parameters())
    sums = {name: torch.zeros_like(own[name]) for name in names}
    for row in rows:
        probe.zero_grad()
        probe(**row).loss.backward()
        for name in names:
            sums[name] += own[name].grad ** 2
    probe.zero_grad()
    return sums


def prepared(args, use: Callable):
    """`use(probe, names, rows)` with all candidates in all layers."""
    model, candidates = roberta(args.layers), default_candidates()
    with probing(model, candidates, layers_of(model), 1) as probe:
        probe.eval()
        names = list(dict.fromkeys(n for m in modules_of(probe, candidates) for n in (*m.parameters, *m.shared)))
        return use(probe, names, examples(args.examples, args.length))


def prepass(args) -> list[dict]:
    def use(probe, names, rows):
        ways = {
            "published": lambda: published(probe, rows, names),
            "ours": lambda: gradient_sums(probe, batches(rows, args.batch), names, progress=False).powers,
        }
        seconds, sums = {name: [] for name in ways}, {}
        for _ in range(args.repeats):
            for name, way in ways.items():
                start = time.process_time()
                sums[name] = way()
                seconds[name].append(time.process_time() - start)
        worst = max(
            ((sums["ours"][n] - v).abs().max() / v.abs().max().clamp_min(1e-30)).item()
            for n, v in sums["published"].items()
        )
        ratios = [a / b for a, b in zip(seconds["ours"], seconds["published"], strict=True)]
        print(f"pre-pass, {args.examples} examples of {args.length} tokens, {args.layers} layers:")
        for name, values in seconds.items():
            print(f"  {name}: {statistics.median(values):.2f} s")
        print(f"  ratio: {statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f}); "
              f"largest relative difference of the sums (float32): {worst:.1e}")  # fmt: skip
        about = {"what": "pre-pass", "examples": args.examples, **shape(args)}
        rows = [
            {**about, "variant": name, "quantity": "s", **results.summary(values)} for name, values in seconds.items()
        ]
        rows.append({**about, "variant": "ours", "quantity": "time / published", **results.summary(ratios)})
        rows.append({**about, "variant": "ours", "quantity": "largest difference of the sums", "value": worst})
        return rows

    return prepared(args, use)


def shape(args) -> dict:
    """What rows of the result file have in common."""
    return {"layers": args.layers, "length": args.length, "batch": args.batch}


def forward(args) -> list[dict]:
    batch = {k: v for k, v in batches(examples(args.batch, args.length), args.batch)[0].items() if k != "labels"}
    models = {"plain": roberta(args.layers)}
    for name, kinds in TABLES.items():
        models[name] = adapted(kinds[: args.layers], args.layers)
    seconds = {name: [] for name in models}
    with torch.no_grad():
        for i in range(args.forwards + 1):
            for name, model in models.items():
                start = time.process_time()
                model.eval()(**batch)
                if i:
                    seconds[name].append(time.process_time() - start)
    print(f"forward pass, {args.batch} x {args.length} tokens: median of pairwise ratios to the plain model")
    rows = []
    for name in models:
        ratios = [a / b for a, b in zip(seconds[name], seconds["plain"], strict=True)]
        print(f"  {name}: {statistics.median(ratios):.3f}")
        if name != "plain":
            about = {"what": "forward", "plan": name, **shape(args), "quantity": "time / plain"}
            rows.append({**about, **results.summary(ratios)})
    return rows


def adapted(kinds: list[str], layers: int = 12, folded: bool = True):
    """A model with these candidates, prefixes as they are after saving, or with the network that makes them."""
    from hf_ft_ext.adapters.mixture.config import settings_of

    settings = {name: settings_of(config) for name, config in default_candidates().items()}
    if folded:
        settings[P].pop("projection_size")
    plan = AdapterPlan(dict(enumerate(kinds)), settings)
    return get_peft_model(roberta(layers), plan.config(modules_to_save=["classifier"]))


def counts(args) -> list[dict]:
    print("plan: trained (of it the classifier), share of the model; added at inference, share")
    rows = []
    for name, kinds in TABLES.items():
        with torch.device("meta"):
            base = sum(p.numel() for p in roberta().parameters())
            model = adapted(kinds, folded=False)
            head = sum(p.numel() for n, p in model.named_parameters() if "modules_to_save" in n and p.requires_grad)
            trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
            inference = adapted(kinds)
            added = sum(p.numel() for p in inference.parameters() if p.requires_grad) - head
        print(f"  {name}: {trained:,} ({head:,}), {100 * trained / base:.2f} %; {added:,}, {100 * added / base:.3f} %")
        found = {"trained": trained, "of the model, %": 100 * trained / base}
        found |= {"added at inference": added, "added, of the model, %": 100 * added / base}
        about = {"what": "counts", "plan": name}
        rows += [{**about, "quantity": quantity, "value": round(value, 3)} for quantity, value in found.items()]
    return rows


def memory(args) -> list[dict]:
    """Peak memory of each way, in a process of its own: pre-pass published and ours, and a training step."""
    count, rows = 16, []  # the peak does not depend on how many there are
    for way in ("published", "ours", "training step"):
        words = [sys.executable, __file__, "--measure", way, "--examples", str(count)]
        for name in ("batch", "threads", "length", "layers"):
            words += [f"--{name}", str(getattr(args, name))]
        done = subprocess.run(words, capture_output=True, text=True, check=True)
        peak = json.loads(done.stdout.splitlines()[-1])
        print(f"  {way}: {peak / 2**20:,.0f} MiB above the model")
        about = {"what": "pre-pass", "examples": count, **shape(args)}
        rows.append({**about, "variant": way, "quantity": "peak GiB", "value": peak / 2**30})
    return rows


def measure(args) -> None:
    """Print the peak, in bytes, of `args.measure`."""

    def use(probe, names, rows):
        peak = PeakMemory()
        for p in probe.parameters():
            p.detach().sum()
        before = peak.level()
        peak.reset()
        if args.measure == "published":
            published(probe, rows, names)
        elif args.measure == "ours":
            gradient_sums(probe, batches(rows, args.batch), names, progress=False)
        else:  # every candidate trains, as the published code has it
            optimizer = torch.optim.AdamW([p for p in probe.parameters() if p.requires_grad])
            probe.train()
            for batch in batches(rows, args.batch):
                optimizer.zero_grad()
                probe(**batch).loss.backward()
                optimizer.step()
        print(peak.bytes() - before)

    prepared(args, use)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--examples", type=int, default=64)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--batch", type=int, default=8, help="examples at a time, ours")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--forwards", type=int, default=7)
    parser.add_argument("--only", choices=("prepass", "forward", "counts", "memory"))
    parser.add_argument("--result", metavar="NAME", help="result file to write to, results/NAME.json; memory too")
    parser.add_argument("--measure", choices=("published", "ours", "training step"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.measure:
        measure(args)
        return
    for name, part in (("prepass", prepass), ("forward", forward), ("counts", counts), ("memory", memory)):
        if args.only in (None, name) and (name != "memory" or args.only == name or args.result):
            rows = part(args)
            if args.result:
                results.save(args.result, rows)


if __name__ == "__main__":
    main()
