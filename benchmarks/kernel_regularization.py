"""Kernel regression under several regularizations, and under the one that leaving rows out chooses, on real kernels.

Kernels come from runs with `--export_kernels FOLDER --do_predict` (`train_kernels_*.pt`, `test_kernels_*.pt`), one
folder for each task, seed and kind of kernel:

    python benchmarks/kernel_regularization.py runs/exported/* --results benchmarks/kernel_regularization.json

Prints one line for each folder: test accuracy and mean squared error for every value, and which one was chosen; with
more than two classes also the accuracy of every `kernel_classes`.
"""

import argparse
import platform
import sys
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np

from hf_ft_ext.errors import InputError
from hf_ft_ext.kernel.solution import Coupling
from hf_ft_ext.kernel.solvers import KernelSystem, Solver, SolverOptions
from hf_ft_ext.kernel.source import find_task
from hf_ft_ext.kernel.store import read_kernel
from hf_ft_ext.kernel.trainer import LEFT_OUT
from hf_ft_ext.training.files import write_json

VALUES = (0.0, *LEFT_OUT)


def measured(folder: Path) -> dict:
    """Test accuracy and mean squared error by regularization, and which one leaving a row out chooses."""
    task = find_task(folder, "train")
    kernel, labels = (tensor.numpy() for tensor in read_kernel(folder, "train", task))
    other, truth = (tensor.numpy() for tensor in read_kernel(folder, "test", task))
    start = time.perf_counter()
    system = KernelSystem(SolverOptions(Solver.LSTSQ), kernel, labels)
    found = {}
    for value in VALUES:
        model = system.solve(value, quiet=True)
        scores = model.predict(other)
        predicted = (scores[:, 0] > 0) if scores.shape[1] == 1 else scores.argmax(1)
        found[value] = {"accuracy": float(np.mean(predicted == truth)), "loss": model.loss(scores, truth)}
    chosen = system.best_left_out(LEFT_OUT)
    couplings = {}
    for coupling in (Coupling.FULL, Coupling.BY_CLASS, Coupling.SHARED) if kernel.shape[2] > 1 else ():
        other_system = KernelSystem(SolverOptions(Solver.LSTSQ, coupling=coupling), kernel, labels)
        best = other_system.best_left_out(LEFT_OUT)
        scores = other_system.solve(best, quiet=True).predict(other)
        couplings[coupling.value] = {"chosen": best, "accuracy": float(np.mean(scores.argmax(1) == truth))}
    return {
        "unknowns": int(np.prod(kernel.shape[1:3])),
        "values": {f"{value:g}": result for value, result in found.items()},
        "chosen": chosen,
        "of the chosen": found[chosen],
        "couplings": couplings,
        "seconds": round(time.perf_counter() - start, 3),
    }


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--results", type=Path, help="JSON file for all numbers.")
    options = parser.parse_args(argv)
    try:
        results = {folder.name: measured(folder) for folder in options.folders}
    except InputError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    for name, result in results.items():
        columns = [f"{value}: {r['accuracy']:.3f} {r['loss']:.3g}" for value, r in result["values"].items()]
        print(f"{name} ({result['unknowns']} unknowns): {'; '.join(columns)}; loo {result['chosen']:g}")
        for coupling, found in result["couplings"].items():
            print(f"    kernel_classes={coupling}: loo {found['chosen']:g}, accuracy {found['accuracy']:.3f}")
    for key in ("accuracy", "loss"):
        names = results[next(iter(results))]["values"]
        means = {value: np.mean([r["values"][value][key] for r in results.values()]) for value in names}
        chosen = np.mean([r["of the chosen"][key] for r in results.values()])
        print(f"mean {key}:", "; ".join(f"{v}: {mean:.4g}" for v, mean in means.items()), f"; loo: {chosen:.4g}")
    if options.results:
        about = {
            "command": "python benchmarks/kernel_regularization.py FOLDERS --results FILE",
            "date": time.strftime("%Y-%m-%d"),
            "versions": {name: version(name) for name in ("numpy", "scipy", "torch", "transformers")},
            "processor": platform.machine(),
        }
        write_json(options.results, {**about, "kernels": results})
    return 0


if __name__ == "__main__":
    sys.exit(main())
