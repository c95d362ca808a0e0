"""Kernel regression under several regularizations, and under the one that leaving rows out chooses, on real kernels.

Kernels come from runs with `--export_kernels FOLDER --do_predict` (`train_kernels_*.pt`, `test_kernels_*.pt`), one
folder for each task, seed and kind of kernel:

    python benchmarks/kernel_regularization.py runs/exported/* --result kernel_regularization

Prints one line for each folder: test accuracy and mean squared error for every value, and which one was chosen; with
more than two classes also the accuracy of every `kernel_classes`. `--result NAME` writes these rows, and their means
over all kernels, to `results/NAME.json`, for the tables of docs/kernel.md.
"""

import argparse
import statistics
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import results

from hf_ft_ext.errors import InputError
from hf_ft_ext.kernel.solvers import LEAVE_ONE_OUT_GRID, Coupling, KernelSystem, Solver, SolverOptions
from hf_ft_ext.kernel.store import find_task, read_kernel

VALUES = (0.0, *LEAVE_ONE_OUT_GRID)
LEFT_ONE_OUT = "loo"  # in the place of a value: the one that leaving a row out chooses
ACCURACY, LOSS = "test accuracy, %", "mean squared error"
MEAN = "mean over kernels"

Row = dict[str, Any]


def measured(folder: Path) -> list[Row]:
    """Rows of one kernel: test accuracy and mean squared error by regularization, and by the one that is chosen."""
    task = find_task(folder, "train")
    kernel, labels = (tensor.numpy() for tensor in read_kernel(folder, "train", task))
    other, truth = (tensor.numpy() for tensor in read_kernel(folder, "test", task))
    about = {"what": "regularization", "kernel": folder.name, "unknowns": int(np.prod(kernel.shape[1:3]))}
    system = KernelSystem(SolverOptions(Solver.LSTSQ), kernel, labels)

    def rows_of(regularization: float, name: str) -> list[Row]:
        model = system.solve(regularization, quiet=True)
        scores = model.predict(other)
        predicted = (scores[:, 0] > 0) if scores.shape[1] == 1 else scores.argmax(1)
        found = {ACCURACY: 100 * float(np.mean(predicted == truth)), LOSS: model.loss(scores, truth)}
        return [{**about, "regularization": name, "quantity": key, "value": value} for key, value in found.items()]

    rows = [row for value in VALUES for row in rows_of(value, f"{value:g}")]
    chosen = system.best_by_leave_one_out(LEAVE_ONE_OUT_GRID)
    rows += rows_of(chosen, LEFT_ONE_OUT)
    rows.append({**about, "regularization": LEFT_ONE_OUT, "quantity": "chosen", "value": chosen})
    for coupling in (Coupling.FULL, Coupling.BY_CLASS, Coupling.SHARED) if kernel.shape[2] > 1 else ():
        other_system = KernelSystem(SolverOptions(Solver.LSTSQ, coupling=coupling), kernel, labels)
        best = other_system.best_by_leave_one_out(LEAVE_ONE_OUT_GRID)
        scores = other_system.solve(best, quiet=True).predict(other)
        found = {ACCURACY: 100 * float(np.mean(scores.argmax(1) == truth)), "chosen": best}
        of_classes = {**about, "what": "classes", "kernel_classes": coupling.value}
        rows += [{**of_classes, "quantity": key, "value": value} for key, value in found.items()]
    return rows


def means(rows: Iterable[Row]) -> list[Row]:
    """Rows of the means over kernels, for each regularization and each measure."""
    values: dict[tuple[str, str], list[float]] = {}
    for row in rows:
        if row["what"] == "regularization" and row["kernel"] != MEAN and row["quantity"] in (ACCURACY, LOSS):
            values.setdefault((row["regularization"], row["quantity"]), []).append(row["value"])
    about = {"what": "regularization", "kernel": MEAN}
    return [
        {**about, "regularization": regularization, "quantity": quantity, "value": statistics.mean(found)}
        for (regularization, quantity), found in values.items()
    ]


def shown(rows: list[Row]) -> str:
    """One line for a kernel, or for the means."""
    lines = [row for row in rows if row["quantity"] == ACCURACY and row["what"] == "regularization"]
    losses = {row["regularization"]: row["value"] for row in rows if row["quantity"] == LOSS}
    columns = [f"{r['regularization']}: {r['value']:.1f} {losses[r['regularization']]:.3g}" for r in lines]
    columns += [
        f"kernel_classes={row['kernel_classes']}: {row['value']:.1f}"
        for row in rows
        if row["what"] == "classes" and row["quantity"] == ACCURACY
    ]
    return f"{rows[0]['kernel']}: {'; '.join(columns)}"


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit status."""
    words = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--result", metavar="NAME", help="result file to write to, results/NAME.json")
    options = parser.parse_args(words)
    found: list[Row] = []
    try:
        for folder in options.folders:
            rows = measured(folder)
            print(shown(rows), flush=True)
            found += rows
    except InputError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    if options.result:
        command = ["python", "benchmarks/kernel_regularization.py", *words]
        results.save(options.result, found, command)
        found = results.read(options.result)  # those measured before too
        results.save(options.result, means(found), command)
    print(shown(means(found)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
