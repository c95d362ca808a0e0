"""Decide whether two runs differ only in their seed: compare data, model, method and settings."""

import json
from typing import Any

from hf_ft_ext.data.tasks import TASKS
from hf_ft_ext.report.read import Run
from hf_ft_ext.training.sharing import is_machine_specific

# Arguments that do not affect the result (logging, saving, further evaluation), or that differ between the seeds of a
# row. Model and data are compared by their identity (`model_of`, `source_of`), not by the arguments.
_IGNORED = {
    "method", "seed", "logging_steps", "logging_strategy", "logging_first_step", "save_strategy", "save_steps",
    "save_total_limit", "do_train", "do_eval", "do_predict", "task_name", "dataset_name", "dataset_config_name",
    "dataset_revision", "train_file", "validation_file", "test_file", "model_name_or_path", "max_predict_samples",
    "prediction_probabilities", "task_type", "predict_with_generate",
}  # fmt: skip
DATA_ARGUMENTS = (
    "max_train_samples", "max_eval_samples", "num_k", "few_shot_split", "few_shot_type", "max_seq_length", "data_seed",
    "sample", "train_split", "validation_split", "problem_type", "quoting",
)  # fmt: skip
NOT_RECORDED = "not recorded"


def settings_of(run: Run) -> dict[str, Any]:
    """The arguments that may affect a run's result."""
    arguments = run.record["arguments"] or {}
    return {key: value for key, value in arguments.items() if key not in _IGNORED and not is_machine_specific(key)}


def rows_of(run: Run) -> dict[str, Any]:
    """Number and content hash of the rows that a run was trained and evaluated on, by names for the report."""
    facts: dict[str, Any] = {
        "evaluation only": run.record["train_seconds"] is None,
        "processes": run.record["world_size"] or 1,
    }
    splits = (run.record["data"] or {}).get("splits")
    for prefix, split in sorted(splits.items()) if isinstance(splits, dict) else ():
        if prefix.partition("_")[0] in ("train", "eval") and isinstance(split, dict):
            facts[f"{prefix} rows"] = split.get("rows")
            facts[f"{prefix} content"] = split.get("content")
    return facts


def comparison_key(run: Run) -> str:
    """Settings and rows of a run as a text to compare; equal for the runs of one row (task, model and data aside)."""
    return json.dumps([settings_of(run), rows_of(run)], sort_keys=True, default=str)


def model_of(run: Run) -> str:
    """The model that a run started from: its folder, or its name."""
    return (run.record["model_source"] or {}).get("folder") or run.record["model"]


def source_of(run: Run) -> str:
    """The data set of a run: Hub id, configuration and revision, folder, or files; empty for the demo data."""
    arguments, task = run.record["arguments"] or {}, TASKS.get(run.record["task"])
    options = ("train_file", "validation_file", "test_file")
    data = run.record["data"]
    if data is None:  # a record of an earlier version: use the arguments, or the task's own data set
        files = {option: arguments[option] for option in options if arguments.get(option)}
        name, config = arguments.get("dataset_name"), arguments.get("dataset_config_name")
        if not name and not files and task:
            name, config = task.hub_id, config or task.hub_config
        data = {"hub_id": name, "config": config, "files": files}
    files = data.get("files")
    if isinstance(files, dict) and files:
        return ", ".join(str(files[option]) for option in options if option in files)
    parts = [data.get("folder") or data.get("hub_id"), data.get("config"), data.get("revision")]
    return ", ".join(str(part) for part in parts if part)


def evaluated_content(run: Run) -> str | None:
    """Hash of the rows of the first evaluation, if it is recorded."""
    splits = (run.record["data"] or {}).get("splits")
    split = splits.get("eval") if isinstance(splits, dict) else None
    return split.get("content") if isinstance(split, dict) else None
