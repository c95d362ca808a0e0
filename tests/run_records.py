"""Made-up run folders for tests of what reads them."""

import json
from pathlib import Path

MIB = 2**20


def run_record(method: str, seed: int, accuracy: float | None, **fields) -> dict:
    """A `run.json` as the launcher writes it; `fields` win."""
    arguments = {"method": method, "seed": seed, **fields.pop("arguments", {})}
    metrics = {"train_loss": 0.5, "eval_loss": 0.4, "eval_runtime": 0.25}
    return {
        "method": method,
        "task": "sst2",
        "model": "tiny",
        "seed": seed,
        "metrics": metrics if accuracy is None else {**metrics, "eval_accuracy": accuracy},
        "train_seconds": 10.0,
        "preparation_seconds": 0.0,
        "samples_per_second": 100.0,
        "peak_memory_bytes": 100 * MIB,
        "trainable_parameters": 1000,
        "total_parameters": 100_000,
        "artefact_bytes": 400_000,
        "device": "cpu, 2 threads",
        "world_size": 1,
        "versions": {"python": "3.11", "torch": "2.13"},
        "command": ["run_glue.py", "--method", method, "--seed", str(seed)],
        "arguments": arguments,
        **fields,
    }


def write_run(folder: Path, record: dict) -> Path:
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps(record))
    return folder


def model_run(name: str, source: str, **fields) -> Path:
    """A run folder with the files of the model in `source`, as far as a push looks at it."""
    folder = write_run(Path(name), run_record(fields.pop("method", "full"), 1, 0.5, **fields))
    for path in Path(source).iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


def write_runs(root: Path) -> Path:
    """Three methods with three seeds each: `cheap` and `good` on the front, `bad` beaten by both."""
    for method, accuracy, memory, seconds in (("good", 0.9, 300, 90), ("cheap", 0.8, 50, 4), ("bad", 0.7, 400, 95)):
        for seed in (1, 2, 3):
            record = run_record(
                method, seed, accuracy + 0.01 * (seed - 2), train_seconds=float(seconds + seed),
                peak_memory_bytes=(memory + seed) * MIB,
            )  # fmt: skip
            write_run(root / f"{method}-{seed}", record)
    return root
