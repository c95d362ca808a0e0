"""Losses and weights that are no numbers: the run stops with a clear error and saves none of them."""

import shutil
from pathlib import Path
from random import Random

import torch
from outcomes import Fault, Unbroken, finished, new_folder, shown
from processes import launch
from quick import SOLVER_METHODS
from safetensors.torch import load_file, save_file

KINDS = ("NaN",)


def run_with_nan(unbroken: Unbroken, kind: str, seed: int) -> Fault:
    """A weight of the model that is NaN or infinite, or a learning rate that makes the weights so."""
    workload, random = unbroken.workload, Random(f"{unbroken.workload.method} {kind} {seed}")
    folder = new_folder(unbroken, "nan", seed)
    if seed % 2 and workload.method not in SOLVER_METHODS:
        rate = 10.0 ** random.randint(12, 30)
        argv, what = [*workload.argv, "--learning_rate", f"{rate:g}"], f"learning rate {rate:g}"
    else:
        shutil.copytree(workload.root / "model", folder / "model")
        what = spoil(folder / "model", random)
        argv = [*workload.argv, "--model_name_or_path", str(folder / "model")]
    ended = launch(argv, folder)
    saved = [path for path in (folder / "out").rglob("*.safetensors") if not all_finite(path)]
    found = ""
    if saved:
        found = f"{saved[0].relative_to(folder)} holds NaN"
    elif ended.status == 0 and workload.method != "gradientless":  # a search rejects what is no number and stays
        found = f"went on, {shown(ended)}"
    elif ended.status not in (0, 2) or not ended.clean:
        found = f"no clear error, {shown(ended)}"
    return finished(Fault(workload.method, kind, what, True, not found, ended.hung, found), folder)


def spoil(model: Path, random: Random) -> str:
    """Put a NaN or an infinity somewhere into the weights in the folder `model`; says where."""
    path, value = model / "model.safetensors", random.choice([float("nan"), float("inf")])
    weights = load_file(path)
    name = random.choice(sorted(weights))
    weights[name].view(-1)[random.randrange(weights[name].numel())] = value
    save_file(weights, path, {"format": "pt"})
    return f"{value} in {name}"


def all_finite(path: Path) -> bool:
    """Whether a file of tensors holds numbers only."""
    return all(bool(torch.isfinite(tensor).all()) for tensor in load_file(path).values() if tensor.is_floating_point())
