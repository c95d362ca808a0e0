"""Write the model card of a run from `run.json` and the files beside it."""

import importlib.resources
import math
import os
import re
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from hf_ft_ext.arguments import CAUSAL_LM, SEQ2SEQ_LM
from hf_ft_ext.data.origins import ALL, DRAWN
from hf_ft_ext.data.tasks import TASKS
from hf_ft_ext.demo.encoder import DEMO_HUB_ID, DEMO_NAME
from hf_ft_ext.hub.code import loading_snippet
from hf_ft_ext.hub.files import ADAPTER_CONFIG, public_record
from hf_ft_ext.methods import METHODS, hooks_of
from hf_ft_ext.metrics import SCORES
from hf_ft_ext.metrics.generation import OF_TRL
from hf_ft_ext.training.sharing import FinishedRun, is_machine_specific
from hf_ft_ext.training.sharing.privacy import is_foreign_path, last_part, without_secrets
from hf_ft_ext.training.sharing.text import bytes_text, code_span, prompt_text, share_text, shell_command

_HERE = Path(__file__).parent
_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
_METRIC_TYPES = {  # our key -> the Hub's name, if different
    "pearson": "pearsonr",
    "balanced_accuracy": "accuracy",
    "subset_accuracy": "accuracy",
    **{name: name.partition("_")[0] for name in SCORES if name.startswith(("f1_", "precision_", "recall_"))},
}
_NO_QUALITY = re.compile(r"loss|runtime|.*_per_second|.*_time|epoch")
# For records of earlier versions, which do not have the splits: the split of each metric prefix, and the arguments
# that reduce its rows.
_SPLIT_OF_PREFIX = {
    "eval": "validation",
    "eval_mm": "validation_mismatched",
    "test": "test",
    "test_mm": "test_mismatched",
}
_FEWER_ROWS = {"eval": ("num_k", "max_eval_samples"), "test": ("num_k", "max_predict_samples")}


def model_card(folder: str | os.PathLike, record: dict[str, Any], repo_id: str) -> str:
    """Return the README.md of a Hub repository for the run in `folder`.

    Results on all rows of a split are also metadata (the model index); results on some rows are in the text only.

    Args:
        record: the content of its `run.json`.
        repo_id: the repository that the code snippets load from.
    """
    folder = Path(folder)
    base, dataset, config = base_model(record), dataset_id(record), dataset_config(record)
    public = public_record(record)
    run = FinishedRun(folder, public, repo_id, base)
    trainer = hooks_of(record["method"])
    name = repo_id.rpartition("/")[2]
    evaluations = _evaluations(record)
    results = [
        EvalResult(
            task_type=hub_task(record),
            dataset_type=dataset or public["task"],
            dataset_name=public["task"],
            dataset_config=config,
            dataset_split=found["split"],
            dataset_revision=(record.get("data") or {}).get("revision") if dataset else None,
            metric_type=_METRIC_TYPES.get(metric, metric),
            metric_name=metric,
            metric_value=round(float(value), 6),
        )
        for found in evaluations
        if found["whole"]
        for metric, value in found["metrics"].items()
    ]
    is_adapter = run.has(ADAPTER_CONFIG)
    data = ModelCardData(
        model_name=name,
        base_model=base,
        base_model_relation=("adapter" if is_adapter else "finetune") if base else None,
        datasets=[dataset] if dataset else None,
        library_name="peft" if is_adapter else "transformers",
        pipeline_tag=hub_task(record),
        tags=["hf_ft_ext", public["method"], public["task"]],
        metrics=sorted({result.metric_type for result in results}) or None,
        eval_results=results or None,
    )
    delta_code = getattr(trainer, "delta_code", None)
    parameters = record.get("counted_parameters") or record.get("trainable_parameters")
    card = ModelCard.from_template(
        data,
        template_path=str(_HERE / "templates" / "model_card.md.jinja"),
        code=code_span,
        name=name,
        record=public,
        base=base,
        local_base=None if base else last_part(record["model"]),
        dataset=dataset,
        config=config,
        about=METHODS[record["method"]].help if record["method"] in METHODS else None,
        evaluations=evaluations,
        training_rows=_training_rows(record),
        labels=record.get("labels"),
        generations=[{**text, "prompt": prompt_text(text["prompt"])} for text in record.get("generations") or ()],
        thresholds=_tuned_thresholds(record),
        chosen_thresholds=_chose_thresholds(record),
        snippet=loading_snippet(run, trainer, record),
        delta=delta_code(run) if delta_code else None,
        command=shell_command(_command(public)),
        parameters_text=getattr(trainer, "parameters_text", "trained parameters"),
        parameters=parameters,
        share=share_text(parameters, record.get("total_parameters")),
        size=bytes_text(record["artefact_bytes"]) if record.get("artefact_bytes") else None,
        papers=_papers(trainer),
    )
    return str(card).rstrip() + "\n"


def hub_task(record: dict[str, Any]) -> str:
    """The Hub's name of the task of a run's model."""
    names = {CAUSAL_LM: "text-generation", SEQ2SEQ_LM: "text2text-generation"}
    return names.get(str(record.get("task_type")), "text-classification")


def base_model(record: dict[str, Any]) -> str | None:
    """Hub id of the model that training started from; `None` for a local folder."""
    if record.get("model_source"):
        return record["model_source"]["hub_id"]
    return DEMO_HUB_ID if record["model"] == DEMO_NAME else _hub_id(record["model"])


def dataset_id(record: dict[str, Any]) -> str | None:
    """Hub id of the data set; `None` for local data and the demo data."""
    if record.get("data"):
        return record["data"]["hub_id"]
    arguments = record.get("arguments") or {}
    if arguments.get("dataset_name"):
        return _hub_id(arguments["dataset_name"])
    task = TASKS.get(record["task"])
    return task.hub_id if task and not arguments.get("train_file") else None


def dataset_config(record: dict[str, Any]) -> str | None:
    """Configuration of the data set on the Hub; `None` for other data, or if it has none."""
    if dataset_id(record) is None:
        return None
    if record.get("data"):
        return record["data"]["config"]
    given = (record.get("arguments") or {}).get("dataset_config_name")
    task = TASKS.get(record["task"])
    return given or (task.hub_config if task else None)


def rows_text(split: dict[str, Any]) -> str:
    """A text about the number of rows used of a split, and their choice; `split` as in `run.json`."""
    rows, of = split.get("rows"), split.get("source_rows")
    if rows is None:
        return f"some rows ({split['fewer']})" if split.get("fewer") else "all"
    if split["selection"] == ALL:
        return f"all {rows:,}"
    chosen = f"drawn ({split['drawn']})" if split["selection"] == DRAWN else "the first ones"
    return f"{rows:,} of {of:,}, {chosen}"


def _chose_thresholds(record: dict[str, Any]) -> bool:
    """Whether multi-label thresholds were chosen on the first evaluation split."""
    return (record.get("arguments") or {}).get("multi_label_threshold") == "auto"


def _tuned_thresholds(record: dict[str, Any]) -> dict[str, float] | None:
    """The thresholds by label; `None` if all are 0.5."""
    thresholds = record.get("thresholds") or {}
    return thresholds if any(value != 0.5 for value in thresholds.values()) else None


def _papers(trainer: type | None) -> list[dict[str, str]]:
    """The papers in the method's `papers.yaml`, in the package of its trainer: `title`, `url` and maybe `bibtex`."""
    package = "" if trainer is None else trainer.__module__.rpartition(".")[0]
    if not package:
        return []
    file = importlib.resources.files(package) / "papers.yaml"
    return yaml.safe_load(file.read_text(encoding="utf-8")) or [] if file.is_file() else []


def _hub_id(name: str) -> str | None:
    return name if _HUB_ID.fullmatch(name) and not is_foreign_path(name) and not os.path.isdir(name) else None


def _evaluations(record: dict[str, Any]) -> list[dict[str, Any]]:
    """The evaluations of a run, in the order of the metrics.

    Each has `split`, `rows` (a text), `whole` (whether these are all rows of the split), and `metrics`.
    """
    splits = (record.get("data") or {}).get("splits") or _earlier_splits(record)
    prefixes = sorted((key for key in splits if key != "train"), key=len, reverse=True)
    found: dict[str, dict[str, float]] = {}
    for key, value in record["metrics"].items():
        prefix = next((p for p in prefixes if key.startswith(f"{p}_")), None)
        name = key.removeprefix(f"{prefix}_")
        if _NO_QUALITY.fullmatch(name) or OF_TRL.fullmatch(name):
            continue
        if prefix and isinstance(value, int | float) and math.isfinite(value):
            found.setdefault(prefix, {})[name] = value
    return [
        {
            "split": splits[prefix]["split"],
            "rows": rows_text(splits[prefix]),
            "whole": splits[prefix]["selection"] == ALL and not (prefix == "eval" and _chose_thresholds(record)),
            "metrics": metrics,
        }
        for prefix, metrics in found.items()
    ]


def _earlier_splits(record: dict[str, Any]) -> dict[str, dict[str, Any]]:
    arguments = record.get("arguments") or {}
    splits = {}
    for prefix, split in _SPLIT_OF_PREFIX.items():
        fewer = [name for name in _FEWER_ROWS[prefix.partition("_")[0]] if arguments.get(name) is not None]
        splits[prefix] = {"split": split, "selection": "unknown" if fewer else ALL, "fewer": ", ".join(
            f"{name}={arguments[name]}" for name in fewer)}  # fmt: skip
    return splits


def _training_rows(record: dict[str, Any]) -> str | None:
    split = ((record.get("data") or {}).get("splits") or {}).get("train")
    if not split:
        return None
    return "a stream" if split["rows"] is None else rows_text(split)


def _command(record: dict[str, Any]) -> list[str]:
    """The run's command without arguments that are specific to this machine."""
    words, skip = [], False
    for word in without_secrets(record["command"]):
        if word.startswith("--"):
            skip = is_machine_specific(word[2:].partition("=")[0].replace("-", "_"))
        if not skip:
            words.append(word)
    return words
