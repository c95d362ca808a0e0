"""What was pushed to the stand-in of the Hub: cards, their code, and a process that has nothing else."""

import os
import re
import subprocess
import sys
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[2]
# Settings with which these methods run quickly.
QUICK = {
    "sparse": ["--sparse_basis_steps", "2", "--sparse_density", "0.2"],
    "gradientless": ["--feature_cache_dir", "features"],
}


def card_of(hub, name: str) -> tuple[dict, str]:
    text = hub.repositories[f"me/{name}"].files["README.md"].decode()
    _, metadata, rest = text.split("---\n", 2)
    return yaml.safe_load(metadata), rest


def snippets(text: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)


def fresh_process(program: str, hub, folder: Path) -> subprocess.CompletedProcess:
    """Run Python in an empty folder, with nothing at hand but the Hub."""
    folder.mkdir(exist_ok=True)
    environment = {
        **os.environ, "PYTHONPATH": str(ROOT), "HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "OMP_NUM_THREADS": "1",
        "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(folder / "home"),
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=folder, env=environment, capture_output=True, text=True, timeout=120,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done
