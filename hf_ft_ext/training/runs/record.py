"""`run.json`: the settings, metrics and costs of a run. Reports are built from this file alone."""

import functools
import importlib.metadata
import json
import os
import platform
import re
from pathlib import Path
from typing import Any

import torch

from hf_ft_ext.adapters.folder import local_files
from hf_ft_ext.files import write_json
from hf_ft_ext.training.runs.resources import ResourceMonitor
from hf_ft_ext.training.weights.devices import device_name

RUN_RECORD = "run.json"
MEMORY_KIND = "above the level before training, largest of all processes"
TRAINER_STATE = "trainer_state.json"  # transformers' name for it
_LIBRARIES = ("hf_ft_ext", "torch", "transformers", "accelerate", "peft", "datasets", "evaluate")
_ARTEFACTS = ("*.safetensors", "*.safetensors.index.json", "config.json", "adapter_config.json")


def artefact_bytes(folder: str | os.PathLike) -> int:
    """Bytes of the saved model or adapter in `folder`: weights and configuration, no tokenizer, no checkpoints."""
    paths = {path for pattern in _ARTEFACTS for path in Path(folder).glob(pattern)} - set(local_files(folder))
    return sum(path.stat().st_size for path in paths)


def library_versions() -> dict[str, str]:
    """Versions of Python and of the libraries that a result depends on."""
    found = {name: _version(name) for name in _LIBRARIES}
    return {"python": platform.python_version()} | {name: version for name, version in found.items() if version}


def recorded_method(folder: str | os.PathLike) -> str | None:
    """The method of the run recorded in `folder`, a run's folder or a checkpoint in it; `None` without a record."""
    folder = Path(folder)
    if re.fullmatch(r"checkpoint-\d+", folder.name) and not (folder / RUN_RECORD).is_file():
        folder = folder.parent
    try:
        record = json.loads((folder / RUN_RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    method = record.get("method") if isinstance(record, dict) else None
    return method if isinstance(method, str) else None


def write_run_record(
    output_dir: str | os.PathLike,
    *,
    method: str,
    task: str,
    model: str,
    seed: int,
    metrics: dict[str, float],
    command: list[str],
    monitor: ResourceMonitor | None = None,
    trainable_parameters: int | None = None,
    counted_parameters: int | None = None,
    total_parameters: int | None = None,
    arguments: dict[str, Any] | None = None,
    labels: list[str] | None = None,
    load: str | None = None,
    device: torch.device | None = None,
    data: dict[str, Any] | None = None,
    model_source: dict[str, Any] | None = None,
    quality: str | None = None,
    primary_metric: str | None = None,
    positive_label: str | None = None,
    thresholds: dict[str, float] | None = None,
    task_type: str = "sequence_classification",
    generations: list[dict[str, Any]] | None = None,
) -> dict[str, Any]:
    """Write `run.json` into `output_dir` and return its content.

    Args:
        metrics: all of the run's metrics, evaluation and training.
        command: the command line that started the run, as a list of words.
        monitor: the callback that measured training; without one (evaluation only) its fields are null.
        trainable_parameters: parameters that training changes (for sparse training: the trained entries); 0 for a
            kernel, and for a run without training.
        counted_parameters: of a method that changes none, those that it uses (of a kernel: those of its gradients).
        arguments: the arguments that differ from the defaults.
        labels: names of the classes in the order of the logits; `None` for regression.
        load: a line of Python that loads the model saved in `output_dir`; `None` if none was saved.
        device: the device of the run; `None` = the machine's accelerator, or else the CPU.
        data: the data set and, under `splits`, the rows behind each set of metrics (`SplitOrigin.record`).
        model_source: the Hub id and revision, or the folder, of the model that training started from.
        quality: key in `metrics` of the metric by which runs are compared.
        primary_metric: key, without prefix, of the metric that chooses the best model.
        positive_label: name of the class for which F1, precision and recall are computed.
        thresholds: with several labels per row, the lowest probability at which each label is predicted.
        task_type: "sequence_classification", "causal_lm" or "seq2seq_lm".
        generations: a few generated texts: `prompt`, `prediction`, `references`.

    Seconds are wall-clock, memory and artefact sizes are bytes.
    """
    trained = monitor if monitor is not None and monitor.train_seconds > 0 else None
    if device is None:
        device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    record = {
        "method": method,
        "task": task,
        "model": model,
        "seed": seed,
        "metrics": metrics,
        "train_seconds": round(trained.train_seconds, 3) if trained else None,
        "preparation_seconds": round(trained.preparation_seconds, 3) if trained else None,
        "samples_per_second": round(trained.samples_per_second, 3) if trained else None,
        "peak_memory_bytes": trained.peak_memory_bytes if trained else None,
        "peak_memory_kind": f"{trained.memory.what}, {MEMORY_KIND}"
        if trained and trained.memory is not None
        else None,
        "trainable_parameters": trainable_parameters,
        "counted_parameters": counted_parameters,
        "total_parameters": total_parameters,
        "artefact_bytes": artefact_bytes(output_dir),
        "device": device_name(device),
        "world_size": int(os.environ.get("WORLD_SIZE", 1)),
        "versions": library_versions(),
        "command": command,
        "arguments": arguments or {},
        "labels": labels,
        "primary_metric": primary_metric,
        "positive_label": positive_label,
        "thresholds": thresholds,
        "output_dir": os.fspath(output_dir),
        "load": load,
        "data": data,
        "model_source": model_source,
        "quality": quality,
        "task_type": task_type,
        "generations": generations,
    }
    write_json(Path(output_dir) / RUN_RECORD, record)
    return record


@functools.cache  # reading it parses the metadata of the package
def _version(name: str) -> str | None:
    """The installed version of a package; `None` if it runs from a checkout that was never installed."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
