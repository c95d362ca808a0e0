"""Zeroth-order steps of models that accelerate offloads: memory, time, and how often a step loads the weights.

    python benchmarks/offload.py --threads 1
    python benchmarks/offload.py --threads 1 --shape llama-1b --layers 8 --dtype bfloat16 \
        --variants evaluation lora-both

A checkpoint of the shape (random weights, see `zeroth_order.py`) is loaded in three ways: as usual (`loaded`), behind
`cpu_offload`, and by a `device_map` that reads each layer from the checkpoint on disk when it runs. Each
measurement has a process of its own, forked before a model is loaded. Memory: the most of this process during the
steps, above its level without a model. Time: processor time of the second step with one thread; the files are in the
page cache then. Loaded, written: the weights that this step reads and writes, in units of the model's bytes. On an
accelerator they are what a step transfers.

The rows go to `results/offload.json` (see `results.py`).
"""

import argparse
import multiprocessing
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import results
import torch
from accelerate import cpu_offload
from accelerate.utils import PrefixedDataset
from transformers import AutoConfig, AutoModelForCausalLM
from zeroth_order import DTYPES, SHAPES

from hf_ft_ext import SPSA
from hf_ft_ext.gradientless.scoring.full_models import language_losses, model_loss, objective_of_logits
from hf_ft_ext.gradientless.scoring.objectives import make_objective
from hf_ft_ext.models.peft import wrap_with_peft
from hf_ft_ext.offload import StoredTensor
from hf_ft_ext.training.runs.resources import PeakMemory

_MIB = 2**20
FORMS = ("loaded", "cpu_offload", "disk")
BOTH = {"candidates_per_forward": 2}  # both signs in one pass through the layers
# settings of the search, and whether it searches an adapter of the frozen model
VARIANTS = {
    "evaluation": (None, False),
    "mezo": ({}, False),
    "mezo-both": (BOTH, False),
    "lozo-both": ({"direction": "lozo", **BOTH}, False),
    "lora-both": (BOTH, True),
}


def save_checkpoint(args: argparse.Namespace, folder: Path) -> None:
    torch.manual_seed(0)
    auto, kind, layers, options = SHAPES[args.shape]
    config = AutoConfig.for_model(kind, num_hidden_layers=args.layers or layers, **options)
    auto.from_config(config, dtype=DTYPES[args.dtype]).save_pretrained(folder / "checkpoint")


def load(form: str, args: argparse.Namespace, folder: Path) -> torch.nn.Module:
    options: dict[str, Any] = {"dtype": DTYPES[args.dtype]}
    if form == "disk":
        options |= {"device_map": {"": "disk"}, "offload_folder": str(folder / "changed")}
    model = SHAPES[args.shape][0].from_pretrained(folder / "checkpoint", **options)
    model.eval().requires_grad_(False)
    return cpu_offload(model, torch.device("cpu")) if form == "cpu_offload" else model


def counted(moved: Counter[str]) -> None:
    """Count the bytes that are loaded and written, from now on."""
    get, read, write = PrefixedDataset.__getitem__, StoredTensor.read, StoredTensor.write

    def counting_get(self: PrefixedDataset, key: str) -> torch.Tensor:
        value = get(self, key)
        moved["loaded"] += value.nbytes
        return value

    def counting_read(self: StoredTensor) -> torch.Tensor:
        value = read(self)
        moved["loaded"] += value.nbytes
        return value

    def counting_write(self: StoredTensor, value: torch.Tensor) -> None:
        moved["written"] += value.nbytes
        write(self, value)

    PrefixedDataset.__getitem__, StoredTensor.read, StoredTensor.write = counting_get, counting_read, counting_write


def step_of(variant: str, model: torch.nn.Module, args: argparse.Namespace) -> Callable[[], Any]:
    settings, adapter = VARIANTS[variant]
    if adapter:
        model = wrap_with_peft(model, "lora", None, 0).eval()
    ids = torch.randint(5, model.config.vocab_size, (args.batch, args.length))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if SHAPES[args.shape][0] is AutoModelForCausalLM:
        batch["labels"] = ids

        def losses(inputs: dict, labels: torch.Tensor, n: int) -> torch.Tensor:
            return language_losses(model, inputs, labels, n)

        full = model_loss(lambda inputs: model(**inputs).loss, [batch], True, losses)
    else:
        batch["labels"] = torch.arange(args.batch) % 2
        full = objective_of_logits(model, make_objective("loss", None, 2), [batch])

    @torch.no_grad()
    def loss() -> float:
        return float(full.value())

    if settings is None:
        return loss
    searched = [parameter for parameter in model.parameters() if not adapter or parameter.requires_grad]
    search = SPSA(searched, model, **settings)

    def step() -> None:
        search.step(loss, full)
        if "candidates_per_forward" in settings and not search.batches:
            raise RuntimeError(f"{variant}: the two signs did not run as one pass")

    return step


def measure(variant: str, form: str, args: argparse.Namespace, folder: Path) -> dict[str, float]:
    memory, moved = PeakMemory(), Counter[str]()
    before = memory.level()
    model = load(form, args, folder)
    size = sum(parameter.nbytes for parameter in model.parameters())
    step = step_of(variant, model, args)
    memory.reset()
    step()  # the first one checks whether candidates can run at once
    counted(moved)
    # other work on a shared machine changes the processor time of one thread little
    clock = time.process_time if args.threads == 1 else time.perf_counter
    start = clock()
    step()
    found = {"seconds a step": clock() - start, "MiB": (memory.bytes() - before) / _MIB}
    return found if form == "loaded" else {**found, **{f"{key}, of the model": moved[key] / size for key in
                                                       ("loaded", "written")}}  # fmt: skip


def _child(pipe: Any, *arguments: Any) -> None:
    pipe.send(measure(*arguments))


def in_a_process_of_its_own(*arguments: Any) -> dict[str, float]:
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(sender, *arguments))
    process.start()
    sender.close()
    try:
        return receiver.recv()
    except EOFError:
        raise SystemExit(f"{arguments[:2]} failed") from None
    finally:
        process.join()


def rows_of(rounds: dict[tuple[str, str], list[dict]], args: argparse.Namespace) -> list[dict]:
    about = {"shape": args.shape, "dtype": args.dtype, "batch": args.batch, "length": args.length,
             "layers": args.layers or SHAPES[args.shape][2]}  # fmt: skip
    rows = []
    for (variant, form), found in rounds.items():
        measured = {key: [one[key] for one in found] for key in (found[0] if found else ())}
        rows += [{"what": variant, "form": form, "measure": name, **about, **results.summary(values)}
                 for name, values in measured.items()]  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="roberta-base")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=VARIANTS)
    parser.add_argument("--forms", nargs="+", default=list(FORMS), choices=FORMS)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--length", type=int, default=16)
    parser.add_argument("--layers", type=int, help="none = those of the shape")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rounds: dict[tuple[str, str], list[dict]] = {(v, form): [] for v in args.variants for form in args.forms}
    with tempfile.TemporaryDirectory() as folder:
        save = multiprocessing.get_context("fork").Process(target=save_checkpoint, args=(args, Path(folder)))
        save.start()
        save.join()
        for number in range(args.repeats):
            for variant, form in rounds:
                found = in_a_process_of_its_own(variant, form, args, Path(folder))
                rounds[variant, form].append(found)
                print(f"round {number + 1}, {variant}, {form}: {found}", file=sys.stderr, flush=True)
            results.save("offload", rows_of(rounds, args))
    for row in rows_of(rounds, args):
        print(f"{row['what']}, {row['form']}, {row['measure']}: {row['value']:.3g}")


if __name__ == "__main__":
    main()
