"""What the kernel view of fine-tuning rests on, as one command and picture each.

    python benchmarks/kernel_analysis.py heatmap files/train_kernels_sst-2.pt
    python benchmarks/kernel_analysis.py linearization --start runs/kernel --trained runs/fine-tuned \
        -- --dataset_name path/to/glue --task_name sst2
    python benchmarks/kernel_analysis.py compare runs/few-sst2 --names prompt-sgd prompt-kernel-sgd
    python benchmarks/kernel_analysis.py agreement runs/few-sst2 --names prompt-sgd prompt-adam prompt-kernel-sgd

`heatmap` takes a kernel file of the authors' form, written by `--export_kernels` or by their code. `linearization`
asks whether the first-order expansion at the start explains a fine-tuned model; the start is what a kernel run saves,
and what follows `--` names the data as for `run_glue.py`. `compare` and `agreement` read the
run folders `<name>-<seed>` of a study (`benchmarks/quality.py --few_shot`): test scores, and how often two variants
predict the same class. Needs the `pictures` extra. Numbers go to standard output, the picture to `--output`, and the
numbers of `linearization` and `agreement` also to a result file (`--result`, see `results.py`), as those of `--what`.
"""

import argparse
import re
import statistics
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import results

from hf_ft_ext.errors import InputError
from hf_ft_ext.features.rows import batches_in_order, data_and_collator
from hf_ft_ext.kernel.analysis import (
    agreements,
    between_classes,
    by_class,
    class_contrast,
    linearization,
    linearization_error,
    pictures,
    scores_by_seed,
)
from hf_ft_ext.kernel.store import read_kernel
from hf_ft_ext.launch.building import load
from hf_ft_ext.launch.parsing import parse_arguments


def heatmap(args: argparse.Namespace) -> None:
    """Kernel entries, examples ordered by class."""
    path = Path(args.file)
    matched = re.fullmatch(r"(\w+?)_kernels_(.+)\.pt", path.name)
    if matched is None:
        raise InputError(f"{path.name!r} is no name of the form {{split}}_kernels_{{task}}.pt; rename the file")
    kernel, labels = read_kernel(path.parent, matched[1], matched[2])
    if kernel.shape[1] != kernel.shape[3]:
        raise InputError(f"{path}: a heat map needs the train kernel, of examples with themselves; pass train_kernels")
    matrix, ordered = by_class(kernel[0].numpy(), labels.numpy())
    within, between = class_contrast(matrix, ordered)
    print(f"mean entry within classes {within:.4f}, between classes {between:.4f} (diagonal: 1)")
    pictures.heat_map(matrix, ordered, args.output or path.with_suffix(".png"))


def compare_linearization(args: argparse.Namespace) -> None:
    """Change of each logit against what the expansion says."""
    (start, trainer, data), (trained, _, _) = (loaded(folder, args.passed_on) for folder in (args.start, args.trained))
    rows = next(iter((data.test or data.validation).values()))
    split = rows.select(range(min(args.rows, len(rows))))
    pairs = [
        linearization(start, trained, batch) for batch in batches_in_order(*data_and_collator(trainer, split), 16)
    ]
    change, slope = (np.concatenate(parts) for parts in zip(*pairs, strict=True))
    error = linearization_error(change, slope)
    differences = linearization_error(between_classes(change), between_classes(slope))
    print(f"{change.size} logits: relative squared error of the expansion {error:.4f}")
    print(f"less the mean over classes, on which no prediction depends: {differences:.4f}")
    pictures.scatter(slope, change, error, args.output or Path(args.trained) / "linearization.png")
    measures = {"squared error of the logits": error, "less their mean over classes": differences}
    _record(args, [{"measure": measure, "rows": len(change), "value": value} for measure, value in measures.items()])


def loaded(folder: str, passed_on: list[str]) -> tuple:
    """Model, trainer and data as the launcher loads them."""
    words = ["--method", "full", "--model_name_or_path", folder, "--do_eval", "--output_dir", f"{folder}/unused"]
    run_args, model_args, data_args, args = parse_arguments([*words, *passed_on])
    build, data = load(run_args, model_args, data_args, args)
    trainer = build(args)
    return trainer.model, trainer, data


def compare(args: argparse.Namespace) -> None:
    """Test scores, mean and deviation over seeds."""
    scores = scores_by_seed(Path(args.folder), args.names)
    for name, values in scores.items():
        deviation = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
        print(f"{name}: {statistics.mean(values):.4f}{deviation} ({len(values)} seeds)")
    pictures.bars(scores, args.output or Path(args.folder) / "compare.png")


def agreement(args: argparse.Namespace) -> None:
    """How often variants predict alike."""
    matrix = agreements(Path(args.folder), args.names)
    for name, row in zip(args.names, matrix, strict=True):
        print(f"{name}: " + " ".join(f"{value:.3f}" for value in row))
    pictures.matrix(matrix, args.names, args.output or Path(args.folder) / "agreement.png")
    pairs = [(i, j) for i in range(len(args.names)) for j in range(i + 1, len(args.names))]
    _record(args, [{"variant": args.names[i], "other": args.names[j], "value": float(matrix[i, j])} for i, j in pairs])


def _record(args: argparse.Namespace, rows: list[dict]) -> None:
    if args.result:
        results.save(args.result, [{"what": args.what, **row} for row in rows])


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; 0 = done, 2 = input that cannot work."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, run, help_ in _commands():
        command = commands.add_parser(name, help=help_)
        command.set_defaults(run=run)
        command.add_argument("--output", type=Path, help="picture (png); default: beside what is read")
        if name in ("linearization", "agreement"):
            command.add_argument("--result", metavar="NAME", help="result file to write to, results/NAME.json")
            command.add_argument("--what", help="with --result: what the numbers are of, such as the task")
        if name == "heatmap":
            command.add_argument("file", help="kernel file, {split}_kernels_{task}.pt")
        elif name == "linearization":
            command.add_argument("--start", required=True, help="the model that training started from: its folder")
            command.add_argument("--trained", required=True, help="the fine-tuned model's folder")
            command.add_argument("--rows", type=int, default=64, help="the first n rows of test or validation data")
        else:
            command.add_argument("folder", help="a study's folder")
            command.add_argument("--names", nargs="+", required=True, metavar="VARIANT")
    words = list(sys.argv[1:] if argv is None else argv)
    cut = words.index("--") if "--" in words else len(words)
    args = parser.parse_args(words[:cut])
    args.passed_on = words[cut + 1 :]
    if getattr(args, "result", None) and not args.what:
        parser.error("--result needs --what, such as the task, to tell these rows from others in the file")
    try:
        args.run(args)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _commands() -> Iterator[tuple]:
    for name, run in (
        ("heatmap", heatmap), ("linearization", compare_linearization), ("compare", compare), ("agreement", agreement),
    ):  # fmt: skip
        yield name, run, run.__doc__


if __name__ == "__main__":
    sys.exit(main())
