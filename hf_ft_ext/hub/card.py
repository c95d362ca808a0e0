"""The model card of a run, made from `run.json` and the files beside it."""

import json
import os
import re
import shlex
from pathlib import Path
from typing import Any

import jinja2
import yaml
from huggingface_hub import EvalResult, ModelCardData

from hf_ft_ext.data.tasks import TASKS
from hf_ft_ext.methods import METHODS
from hf_ft_ext.metrics import SCORES
from hf_ft_ext.models import DEMO_NAME

DEMO_HUB_ID = "sentence-transformers/all-MiniLM-L6-v2"
ADAPTER_CONFIG = "adapter_config.json"
_DELTAS = {"sparse_delta.safetensors": "load_delta", "entries_delta.safetensors": "load_entries"}  # file -> its reader
KERNELS = "kernels"
KERNEL_SOLUTION = "kernel_solution.json"
_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
_METRIC_TYPES = {  # our key -> the Hub's name
    "accuracy": "accuracy",
    "f1": "f1",
    "matthews_correlation": "matthews_correlation",
    "pearson": "pearsonr",
    "spearmanr": "spearmanr",
    "roc_auc": "roc_auc",
    "balanced_accuracy": "accuracy",
    "subset_accuracy": "accuracy",
    **{name: name.partition("_")[0] for name in SCORES if name.startswith(("f1", "precision", "recall"))},
}
_SPLITS = {"eval": "validation", "eval_mm": "validation_mismatched", "test": "test", "test_mm": "test_mismatched"}
# Of this machine and of no use on another one.
_OF_THE_MACHINE = {
    "output_dir", "overwrite_output_dir", "push_to_hub", "hub_token", "token", "hub_model_id", "hub_strategy",
    "hub_private_repo", "hub_always_push", "cache_dir", "feature_cache_dir", "kernel_dir", "resume_from_checkpoint",
    "disable_tqdm", "report_to", "use_cpu",
}  # fmt: skip
# Settled by the model that was pushed.
_OF_THE_MODEL = {"model_name_or_path", "model_revision", "tokenizer_name", "from_linearhead"}
_LIBRARY_OF = {  # where the names in a line of code that loads a model come from
    "AutoModelForSequenceClassification": "transformers",
    "PeftModel": "peft",
    "PromptForSequenceClassification": "hf_ft_ext",
}


def model_card(folder: str | os.PathLike, record: dict[str, Any], repo_id: str) -> str:
    """The README.md of a Hub repository for the run in `folder`.

    Args:
        record: the content of its `run.json`.
        repo_id: the repository that the snippets load from.
    """
    folder = Path(folder)
    base = base_model(record)
    local_base = None if base else os.path.basename(os.path.normpath(record["model"]))
    task = TASKS.get(record["task"])
    is_adapter = (folder / ADAPTER_CONFIG).is_file()
    results = _results(record)
    data = ModelCardData(
        model_name=repo_id.rpartition("/")[2],
        base_model=base,
        base_model_relation=("adapter" if is_adapter else "finetune") if base else None,
        datasets=[dataset_id(record)] if dataset_id(record) else None,
        library_name="peft" if is_adapter else "transformers",
        pipeline_tag="text-classification",
        tags=["hf_ft_ext", record["method"], record["task"]],
        metrics=sorted({result.metric_type for result in results}) or None,
        eval_results=results or None,
    )
    values = {
        "metadata": data.to_yaml(),
        "name": repo_id.rpartition("/")[2],
        "repo_id": repo_id,
        "record": record,
        "base": base,
        "local_base": local_base,
        "dataset": dataset_id(record),
        "config": task.hub_config if task else None,
        "help": METHODS[record["method"]].help if record["method"] in METHODS else record["method"],
        "results": [(result.dataset_split, result.metric_name, result.metric_value) for result in results],
        "labels": record.get("labels"),
        "snippet": loading_snippet(folder, record, repo_id),
        "delta": delta_snippet(folder, record, repo_id),
        "command": shlex.join(["python", *_command(record)]),
        "share": _share(record),
        "size": f"{record['artefact_bytes'] / 1e6:.1f} MB" if record.get("artefact_bytes") else None,
        "papers": yaml.safe_load((Path(__file__).parent / "papers.yaml").read_text(encoding="utf-8")).get(
            record["method"], []
        ),
    }
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    return environment.get_template("model_card.md.jinja").render(values)


def base_model(record: dict[str, Any]) -> str | None:
    """Hub id of the model that training started from; `None` for a local folder."""
    name = record["model"]
    if name == DEMO_NAME:
        return DEMO_HUB_ID
    return name if _HUB_ID.fullmatch(name) and not os.path.isdir(name) else None


def dataset_id(record: dict[str, Any]) -> str | None:
    """Hub id of the data set; `None` for local data and the demo's."""
    arguments = record.get("arguments") or {}
    given = arguments.get("dataset_name")
    if given:
        return given if _HUB_ID.fullmatch(given) and not os.path.isdir(given) else None
    task = TASKS.get(record["task"])
    return task.hub_id if task and not arguments.get("train_file") else None


def loading_snippet(folder: Path, record: dict[str, Any], repo_id: str) -> str:
    """Python that loads the result from the Hub; the last line may be a comment where code alone cannot do it."""
    if (folder / KERNEL_SOLUTION).is_file():
        return kernel_snippet(folder, record, repo_id)
    line = record.get("load") or f"AutoModelForSequenceClassification.from_pretrained({str(folder)!r})"
    written = record.get("output_dir", str(folder))
    names = [name for name in _LIBRARY_OF if re.search(rf"\b{name}\b", line)]
    base = base_model(record)
    local = re.search(r"AutoModelForSequenceClassification\.from_pretrained\(('[^']*')", line)
    if "PeftModel" in names and local and base:
        line = line.replace(local.group(1), repr(base))
    imports = [f"from {_LIBRARY_OF[name]} import {name}" for name in names]
    if set(names) <= {"AutoModelForSequenceClassification", "PeftModel"} and names:
        if "PeftModel" in names and not _is_of_peft(folder):
            imports.append("import hf_ft_ext  # makes this kind of adapter known to peft")
        code = [f"model = {line.replace(repr(written), repr(repo_id))}"]
        imports[:0] = ["from transformers import AutoTokenizer"]
        code.append(f"tokenizer = AutoTokenizer.from_pretrained({repo_id!r})")
    else:  # a class that knows folders only, or a result that is more than a model
        imports.append("from huggingface_hub import snapshot_download")
        code = [f"folder = snapshot_download({repo_id!r})"]
        if names:
            code.append(f"model = {line.replace(repr(written), 'folder')}")
        else:
            code.append(f"# {line.replace(written, '{folder}')}")
    return "\n".join([*_merged(imports), "", *code])


def delta_snippet(folder: Path, record: dict[str, Any], repo_id: str) -> str | None:
    """Python that applies the small file of changes to the base model; `None` if there is none, or no base to name."""
    base = base_model(record)
    file = next((name for name in _DELTAS if (folder / name).is_file()), None)
    if base is None or file is None:
        return None
    labels = len(record.get("labels") or "??")
    return "\n".join(
        (
            "from huggingface_hub import snapshot_download",
            "from transformers import AutoModelForSequenceClassification",
            f"from hf_ft_ext import {_DELTAS[file]}",
            "",
            f"base = AutoModelForSequenceClassification.from_pretrained({base!r}, num_labels={labels})",
            f"model = {_DELTAS[file]}(base, snapshot_download({repo_id!r}, allow_patterns={file!r}))",
        )
    )


def kernel_snippet(folder: Path, record: dict[str, Any], repo_id: str) -> str:
    """Python that predicts again with a pushed kernel: the launcher with the run's settings, model and kernels."""
    local = repo_id.rpartition("/")[2]
    settings = dict(record.get("arguments") or {})
    if (folder / ADAPTER_CONFIG).is_file():  # it is drawn again from the seed, on the model that it was drawn for
        settings["model_name_or_path"] = base_model(record) or record["model"]
        lines = []
    else:
        settings = {key: value for key, value in settings.items() if key not in _OF_THE_MODEL}
        lines = ["'--model_name_or_path', folder,"]
    settings = {key: value for key, value in settings.items() if key not in {*_OF_THE_MACHINE, "method", "do_train"}}
    if not settings.keys() & {"do_eval", "do_predict"}:
        settings["do_eval"] = True
    if (folder / KERNELS).is_dir():
        lines.append(f"'--kernel_dir', folder + '/{KERNELS}',")
    return "\n".join(
        (
            "import run_glue  # the launcher of hf_ft_ext",
            "from huggingface_hub import snapshot_download",
            "",
            f"folder = snapshot_download({repo_id!r}, local_dir={local!r})",
            "# A kernel predicts from its training data, which has to be at hand; the store saves computing it.",
            "run_glue.main([",
            f"    '--method', {record['method']!r}, '--do_train', '--output_dir', {local + '-again'!r},",
            *(f"    {', '.join(map(repr, _words(key, value)))}," for key, value in sorted(settings.items())),
            *(f"    {line}" for line in lines),
            "])",
        )
    )


def _words(key: str, value: Any) -> list[str]:
    """An argument as words of a command line."""
    if isinstance(value, list):
        return [f"--{key}", *map(str, value)]
    return [f"--{key}", json.dumps(value) if isinstance(value, dict) else str(value)]


def _is_of_peft(folder: Path) -> bool:
    from peft import PeftType

    config = yaml.safe_load((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))  # JSON is YAML
    return config.get("peft_type") in {kind.value for kind in PeftType}


def _merged(imports: list[str]) -> list[str]:
    """`from x import a` and `from x import b` in one line."""
    by_module: dict[str, list[str]] = {}
    others = []
    for line in imports:
        found = re.fullmatch(r"from (\S+) import (\S+)", line)
        if found:
            by_module.setdefault(found.group(1), []).append(found.group(2))
        else:
            others.append(line)
    return [
        *others,
        *(f"from {module} import {', '.join(sorted(names))}" for module, names in sorted(by_module.items())),
    ]


def _results(record: dict[str, Any]) -> list[EvalResult]:
    task = TASKS.get(record["task"])
    results = []
    for key, value in record["metrics"].items():
        prefix, name = next(
            ((p, n) for p in sorted(_SPLITS, key=len, reverse=True) for n in _METRIC_TYPES if key == f"{p}_{n}"),
            (None, None),
        )
        if prefix is None or value is None:
            continue
        results.append(
            EvalResult(
                task_type="text-classification",
                dataset_type=dataset_id(record) or record["task"],
                dataset_name=record["task"],
                dataset_config=task.hub_config if task and dataset_id(record) else None,
                dataset_split=_SPLITS[prefix],
                metric_type=_METRIC_TYPES[name],
                metric_name=name,
                metric_value=round(float(value), 6),
            )
        )
    return results


def _command(record: dict[str, Any]) -> list[str]:
    """The run's command without what only this machine knows."""
    words, skip = [], False
    for word in record["command"]:
        if word.startswith("--"):
            skip = word[2:].partition("=")[0].replace("-", "_") in _OF_THE_MACHINE
        if not skip:
            words.append(word)
    return words


def _share(record: dict[str, Any]) -> str:
    trained, total = record.get("trainable_parameters"), record.get("total_parameters")
    return f"{100 * trained / total:.2g} %" if trained and total else ""
