"""A small run of each method, and what it leaves, for comparisons with a run that met a fault."""

import json
import re
from dataclasses import dataclass
from pathlib import Path

from quick import QUICK, SOLVER_METHODS
from safetensors.torch import load_file
from tiny import tiny_model, tiny_tokenizer, write_texts

# Many blocks, not one; one fit, without a search for its C.
MORE = {"kernel": ("--kernel_memory_gb", "0.0025"), "linearhead": ("--linearhead_c", "1")}


def prepare(root: Path) -> Path:
    """Model and data in `root`, shared by all runs; returns it."""
    root.mkdir(parents=True, exist_ok=True)
    tiny_model("bert").save_pretrained(root / "model")
    tiny_tokenizer().save_pretrained(root / "model")
    for name, rows in (("train", 48), ("dev", 16), ("test", 8)):
        write_texts(root / f"{name}.csv", rows, seed=rows)
    return root


@dataclass(frozen=True)
class Workload:
    """The command of one method's run: output in `out` of the folder it runs in.

    Attributes:
        method: name of the method.
        root: where `prepare` put model and data.
        more: further words.
    """

    method: str
    root: Path
    more: tuple[str, ...] = ()

    @property
    def argv(self) -> list[str]:
        files = [word for split, name in (("train", "train"), ("validation", "dev"), ("test", "test"))
                 for word in (f"--{split}_file", str(self.root / f"{name}.csv"))]  # fmt: skip
        steps = () if self.method in SOLVER_METHODS else (
            "--max_steps", "6", "--save_steps", "2", "--logging_steps", "1", "--learning_rate", "1e-2",
        )  # fmt: skip
        return [
            "--method", self.method, "--model_name_or_path", str(self.root / "model"), *files, "--output_dir", "out",
            "--do_train", "--do_eval", "--do_predict", "--max_seq_length", "16", "--use_cpu", "--disable_tqdm",
            "true", *QUICK.get(self.method, ()), *MORE.get(self.method, ()), *steps, *self.more,
        ]  # fmt: skip

    @property
    def resumed(self) -> list[str]:
        """What a user runs after an interruption."""
        if self.method in SOLVER_METHODS:
            return self.anew
        return [*self.argv, "--resume_from_checkpoint", "true"]

    @property
    def anew(self) -> list[str]:
        """What a user runs if nothing was saved yet."""
        return [*self.argv, "--overwrite_output_dir"]


_NOT_COMPARED = re.compile("runtime|per_second|preparation|train_loss|total_flos")


def differences(folder: Path, other: Path) -> list[str]:
    """What the runs in two folders left that is not equal, bit for bit."""
    found = []
    names = [{path.relative_to(at).as_posix() for path in results(at)} for at in (folder / "out", other / "out")]
    if names[0] != names[1]:
        return [f"other files: {sorted(names[0] ^ names[1])}"]
    for name in sorted(names[0]):
        ours, theirs = (load_file(at / "out" / name) for at in (folder, other))
        if ours.keys() != theirs.keys():
            found.append(f"{name}: other tensors")
        found += [f"{name}: {key}" for key in ours.keys() & theirs.keys() if not _equal(ours[key], theirs[key])]
    records = [json.loads((at / "out" / "run.json").read_text()) for at in (folder, other)]
    metrics = [
        {key: value for key, value in record["metrics"].items() if not _NOT_COMPARED.search(key)} for record in records
    ]
    if metrics[0] != metrics[1]:
        found.append(f"metrics: {metrics[0]} and {metrics[1]}")
    if (folder / "out/predictions.tsv").read_text() != (other / "out/predictions.tsv").read_text():
        found.append("predictions.tsv")
    return found


def results(out: Path) -> list[Path]:
    """The tensors that a finished run has in `out`: weights, deltas, kernels."""
    return [*out.glob("*.safetensors"), *out.glob("kernels/*/*.safetensors")]


def _equal(ours, theirs) -> bool:
    return ours.dtype == theirs.dtype and ours.shape == theirs.shape and bool((ours == theirs).all())
