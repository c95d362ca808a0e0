"""What runs of the launcher left: their weights, and whether they are the same."""

import os
import subprocess
import sys
from pathlib import Path

import torch
from processes import finished
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[2]
KEEPS_WEIGHTS = ("kernel",)  # what it learns is no weight: the saved model is the start


def weights(folder) -> dict[str, torch.Tensor]:
    """Of a model or an adapter; a kernel's solution lies beside."""
    files = sorted(Path(folder).glob("*.safetensors"), key=lambda path: not path.name.endswith("model.safetensors"))
    return load_file(files[0])


def same(a, b) -> bool:
    ours, theirs = weights(a), weights(b)
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def python(*argv: str, **environment: str) -> subprocess.CompletedProcess:
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "PYTHONPATH": path, **environment}
    return finished([sys.executable, *argv], timeout=240, env=environment)
