"""The results of a run: metrics, predictions, the record, and the final table."""

import contextlib
import csv
import io
import json
import logging
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from peft import PeftModel
from transformers import Trainer, TrainingArguments
from transformers.utils import CONFIG_NAME

from hf_ft_ext.adapters import AdapterType
from hf_ft_ext.arguments import DataArguments, ModelArguments, RunArguments
from hf_ft_ext.data.language import LanguageData
from hf_ft_ext.data.multi_label import SEPARATOR
from hf_ft_ext.data.origins import data_source
from hf_ft_ext.data.task_data import TaskData
from hf_ft_ext.errors import InputError
from hf_ft_ext.files import write_json, write_text
from hf_ft_ext.launch.defaults import task_label
from hf_ft_ext.launch.language import LanguageRun, loading_class, write_predictions
from hf_ft_ext.metrics import MetricFunction, best_thresholds, probabilities
from hf_ft_ext.models import model_label, model_source
from hf_ft_ext.problem_types import MULTI_LABEL, REGRESSION
from hf_ft_ext.prompts.model import is_prompt_model
from hf_ft_ext.training.runs.plan import align, total_parameters, trained_weights
from hf_ft_ext.training.runs.record import RUN_RECORD, write_run_record
from hf_ft_ext.training.runs.resources import find_monitor
from hf_ft_ext.training.sharing import own_code_argument
from hf_ft_ext.training.sharing.privacy import hide_tokens, is_secret, without_secrets

logger = logging.getLogger(__name__)

THRESHOLDS = "multi_label_thresholds"  # in a model's configuration
_MIB = 2**20


def split_suffix(position: int, name: str) -> str:
    """The suffix of a split's metrics and files: none for the first split, `mm` for MNLI's second, else its name."""
    if position == 0:
        return ""
    return "mm" if name.endswith("mismatched") else name


def evaluate_all(trainer: Trainer, splits: dict[str, Any]) -> dict[str, float]:
    """Metrics on every split: `eval_accuracy` on the first, `eval_mm_accuracy` on MNLI's second one."""
    metrics = {}
    for position, (name, data) in enumerate(splits.items()):
        suffix = split_suffix(position, name)
        prefix = "_".join(filter(None, ("eval", suffix)))
        language = language_of(trainer)
        rows = data if language is None else language.rows_of_loss(name, data)
        # transformers drops rows here too, and takes the loader of the first split for the others if workers persist.
        with _with_values(trainer.args, dataloader_drop_last=False, dataloader_persistent_workers=False):
            metrics |= trainer.evaluate(eval_dataset=rows, metric_key_prefix=prefix)
        if language is not None and language.data_args.predict_with_generate:
            metrics |= language.scored_texts(trainer, data, prefix)[1]
    return metrics


def language_of(trainer: Trainer) -> LanguageRun | None:
    """The evaluation and output of a language-model run; `None` for classifiers."""
    return getattr(trainer, "language", None)


def store_thresholds(config: Any, thresholds: np.ndarray | float | None) -> None:
    """Store the thresholds of the labels in a model's configuration, in the order of the logits; `None` = remove."""
    values = None if thresholds is None else np.broadcast_to(thresholds, (config.num_labels,)).tolist()
    if values is not None or getattr(config, THRESHOLDS, None) is not None:
        setattr(config, THRESHOLDS, values)


def choose_thresholds(trainer: Trainer, splits: dict[str, Any]) -> None:
    """Choose the thresholds of a multi-label task on the first split, if none are set, for all later metrics."""
    metrics = trainer.compute_metrics
    if not isinstance(metrics, MetricFunction) or metrics.problem_type != MULTI_LABEL:
        return
    if metrics.thresholds is not None or not splits or trainer.args.prediction_loss_only:
        return
    name, data = next(iter(splits.items()))
    with _with_values(trainer.args, dataloader_drop_last=False):
        output = trainer.predict(data, metric_key_prefix="eval")
    thresholds = best_thresholds(logits_of(output.predictions), np.asarray(output.label_ids))
    metrics.thresholds = thresholds
    names = trainer.model.config.id2label
    shown = ", ".join(f"{names[i]} {value:.3g}" for i, value in enumerate(thresholds[:10]))
    logger.info("Thresholds by F1 on split '%s', whose metrics are thus slightly optimistic: %s.", name, shown)
    store_thresholds(trainer.model.config, thresholds)
    path = Path(trainer.args.output_dir) / CONFIG_NAME
    if trainer.args.do_train and trainer.is_world_process_zero() and path.is_file():  # the model is saved already
        saved = json.loads(path.read_text(encoding="utf-8"))
        write_json(path, {**saved, THRESHOLDS: getattr(trainer.model.config, THRESHOLDS)})


def predict_all(
    trainer: Trainer,
    splits: dict[str, Any],
    with_probabilities: bool = False,
    numbers: Mapping[tuple[str, str], Sequence[int]] | None = None,
) -> dict[str, float]:
    """Write `predictions.tsv` (`predictions_mm.tsv`, ...) for every split; metrics where there are labels.

    A language model writes `predictions.jsonl` instead, with the texts it generates.

    Columns: `index` (row of the split's source, from 0), `prediction` (label name; several labels: names with `|`
    between them; regression: number) and, if wanted, `probability_<label>` for each label.

    Args:
        numbers: by role and split, where rows are left out: the number of each row in its source; others are counted.
    """
    metrics = {}
    for position, (name, data) in enumerate(splits.items()):
        suffix = split_suffix(position, name)
        prefix = "_".join(filter(None, ("test", suffix)))
        if (language := language_of(trainer)) is not None:
            texts, scores = language.scored_texts(trainer, data, prefix)
            metrics |= scores
            if trainer.is_world_process_zero():
                write_predictions(trainer.args.output_dir, suffix, texts)
            continue
        # Settings that shorten training would shuffle or drop these rows.
        in_order = {
            "train_sampling_strategy": "sequential",
            "dataloader_drop_last": False,
            "dataloader_in_order": True,
        }
        with _with_values(trainer.args, **in_order):
            output = trainer.predict(data, metric_key_prefix=prefix)
        metrics |= output.metrics
        if output.predictions is None:
            raise InputError("--prediction_loss_only leaves no predictions to write; drop it or --do_predict")
        if trainer.is_world_process_zero():
            file = "_".join(filter(None, ("predictions", suffix))) + ".tsv"
            header, rows = prediction_table(
                trainer, output.predictions, with_probabilities, (numbers or {}).get(("test", name))
            )
            write_text(os.path.join(trainer.args.output_dir, file), _tsv(header, rows))
    return metrics


def recorded_arguments(given: dict[str, Any]) -> dict[str, Any]:
    """The options that the user set, as JSON values, without access tokens."""
    plain = (str, int, float, bool, list, dict, type(None))
    kept = {k: v if isinstance(v, plain) else str(v) for k, v in given.items() if not is_secret(k)}
    return json.loads(hide_tokens(json.dumps(kept, default=str)))


def loading_line(trainer: Trainer) -> str:
    """The line of Python that loads what the run saved."""
    if hasattr(trainer, "loading_line"):  # a method whose result is more than a model file
        return trainer.loading_line()
    folder = trainer.args.output_dir
    is_adapter = isinstance(trainer.model, PeftModel)
    inner = trainer.model.get_base_model() if is_adapter else trainer.model
    own_code = own_code_argument(trainer.model)
    if language_of(trainer) is not None:
        kind = loading_class(inner)
        kind = kind.replace("Auto", "AutoPeft", 1) if is_adapter else kind
        return f"{kind}.from_pretrained({folder!r}{own_code})"
    prompt = is_prompt_model(trainer.model)
    if not is_adapter:
        name = "PromptForSequenceClassification" if prompt else "AutoModelForSequenceClassification"
        return f"{name}.from_pretrained({folder!r}{own_code})"
    if prompt:
        return f"PeftModel.from_pretrained(PromptForSequenceClassification.from_adapter({folder!r}), {folder!r})"
    adapter = trainer.model.peft_config["default"]
    chosen = "" if adapter.revision is None else f", revision={adapter.revision!r}"
    # The configuration has the trained labels; if the base has a head of another size, the adapter replaces it.
    return (
        f"PeftModel.from_pretrained(AutoModelForSequenceClassification.from_pretrained("
        f"{adapter.base_model_name_or_path!r}{chosen}{own_code}, "
        f"config=AutoConfig.from_pretrained({folder!r}{own_code}), ignore_mismatched_sizes=True), {folder!r})"
    )


def record_run(
    trainer: Trainer,
    metrics: dict[str, float],
    command: list[str],
    run_args: RunArguments,
    model_args: ModelArguments,
    data_args: DataArguments,
    data: TaskData | LanguageData,
) -> str:
    """Write `run.json` and return the run's final table; for the first process."""
    scoring, language = scoring_of(trainer), language_of(trainer)
    chooses = scoring.get("primary_metric")
    if language is not None:
        chooses = "f1" if language.data_args.predict_with_generate else "perplexity"
        scoring["generations"] = language.sample or None
    parameters = sum(weight.trained for weight in trained_weights(trainer))
    changes_none = hasattr(trainer, "parameters_text")
    record = write_run_record(
        trainer.args.output_dir,
        method=run_args.method,
        task=task_label(data_args),
        model=model_label(model_args),
        seed=trainer.args.seed,
        metrics=metrics,
        command=without_secrets(command),
        monitor=find_monitor(trainer),
        trainable_parameters=0 if changes_none or not trainer.args.do_train else parameters,
        counted_parameters=parameters if changes_none else None,
        total_parameters=total_parameters(trainer),
        arguments=recorded_arguments(run_args.given),
        labels=None if language is not None else _label_names(trainer.model.config),
        task_type=run_args.task_type,
        **scoring,
        load=loading_line(trainer) if trainer.args.do_train else None,
        device=trainer.args.device,
        data={**data_source(data_args, data.task), "splits": _splits(trainer.args, data)},
        model_source=model_source(model_args),
        quality=f"eval_{chooses}" if chooses else None,
    )
    return final_table(record, trainer)


def final_table(record: dict[str, Any], trainer: Trainer) -> str:
    """A short table of the run: metrics, training time, memory, size, the model folder and how to load it."""
    rows = [(f"{record['method']} on {record['task']}", "")]
    for key, value in record["metrics"].items():
        if re.match(r"(eval|test)_", key) and not re.search(r"_(runtime|per_second|preparation_time)$", key):
            rows.append((key, f"{value:.4f}" if isinstance(value, float) else str(value)))
    if record["train_seconds"] is not None:
        rows.append(("training seconds", f"{record['train_seconds']:.1f}"))
        rows.append(("peak memory (MiB)", f"{record['peak_memory_bytes'] / _MIB:,.1f}"))
        text = getattr(trainer, "parameters_text", "trainable parameters")
        rows.append((text, f"{record['counted_parameters'] or record['trainable_parameters']:,}"))
    folder = Path(trainer.args.output_dir)
    lines = ["", *(line.rstrip() for line in align(rows)), f"record: {folder / RUN_RECORD}"]
    if trainer.args.do_train:
        lines += [f"model: {folder}", f"load it: {loading_line(trainer)}"]
        if isinstance(trainer.model, PeftModel) and trainer.model.peft_type in tuple(AdapterType):
            lines.append("before that: import hf_ft_ext")
    return "\n".join(lines)


def named_predictions(predictions: Any, config: Any, thresholds: float | np.ndarray = 0.5) -> list[str]:
    """Logits as label names (several per row are joined by `|`), or as numbers for a regression.

    Args:
        predictions: logits, alone or first in a tuple.
        config: configuration of the model.
        thresholds: with several labels per row, the lowest probability at which a label is predicted.
    """
    logits = logits_of(predictions)
    if config.problem_type == REGRESSION:
        return [f"{value:.6g}" for value in logits.reshape(-1)]
    if config.problem_type == MULTI_LABEL:
        names = [str(config.id2label[i]) for i in range(logits.shape[-1])]
        chosen = probabilities(logits, MULTI_LABEL) >= thresholds
        return [SEPARATOR.join(name for name, yes in zip(names, row, strict=True) if yes) for row in chosen]
    return [str(config.id2label[int(i)]) for i in logits.argmax(axis=-1)]


def prediction_table(
    trainer: Trainer, predictions: Any, with_probabilities: bool, numbers: Sequence[int] | None = None
) -> tuple[list[str], list[tuple]]:
    """Header and rows of a predictions file: `index`, `prediction` and, if wanted, a probability for each label."""
    config = trainer.model.config
    columns: list[Any] = [named_predictions(predictions, config, thresholds_of(trainer))]
    header = ["index", "prediction"]
    if with_probabilities:
        shares = probabilities(logits_of(predictions), config.problem_type)
        header += [f"probability_{config.id2label[i]}" for i in range(shares.shape[-1])]
        columns += [[f"{share:.6g}" for share in column] for column in shares.T]
    places = range(len(columns[0])) if numbers is None else numbers[: len(columns[0])]  # `max_predict_samples` cuts
    return header, list(zip(places, *columns, strict=True))


def thresholds_of(trainer: Trainer) -> float | np.ndarray:
    """The thresholds of the trainer's metrics."""
    thresholds = getattr(trainer.compute_metrics, "thresholds", None)
    return 0.5 if thresholds is None else thresholds


def scoring_of(trainer: Trainer) -> dict[str, Any]:
    """How the run was scored, for `run.json`: the primary metric, the positive class, the thresholds."""
    metrics = trainer.compute_metrics
    if not isinstance(metrics, MetricFunction):
        return {}
    positive = metrics.label_names[metrics.positive] if metrics.label_names and metrics.positive is not None else None
    return {
        "primary_metric": metrics.keys()[0],
        "positive_label": positive if metrics.reads_positive else None,
        "thresholds": _recorded_thresholds(trainer),
    }


def logits_of(predictions: Any) -> np.ndarray:
    return np.asarray(predictions[0] if isinstance(predictions, tuple) else predictions)


@contextlib.contextmanager
def _with_values(args: TrainingArguments, **values: Any) -> Iterator[None]:
    """A context in which `args` has other values."""
    before = {name: getattr(args, name) for name in values}
    try:
        for name, value in values.items():
            setattr(args, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(args, name, value)


def _tsv(header: Iterable[str], rows: Iterable[tuple]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, delimiter="\t", lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    return text.getvalue()


def _splits(args: TrainingArguments, data: TaskData | LanguageData) -> dict[str, dict[str, Any]]:
    """The rows that the run trained on (`train`), and those behind each metric prefix (`eval`, `test_mm`)."""
    used = []
    if args.do_train:
        used.append(("train", "train", "train"))
    for wanted, role, prefix in ((args.do_eval, "validation", "eval"), (args.do_predict, "test", "test")):
        for position, name in enumerate(getattr(data, role) if wanted else ()):
            used.append(("_".join(filter(None, (prefix, split_suffix(position, name)))), role, name))
    return {key: data.origins[role, name].record() for key, role, name in used if (role, name) in data.origins}


def _label_names(config: Any) -> list[str] | None:
    if config.problem_type == REGRESSION:
        return None
    return [str(config.id2label[i]) for i in range(config.num_labels)]


def _recorded_thresholds(trainer: Trainer) -> dict[str, float] | None:
    """The thresholds by label name; `None` with one label per row."""
    config = trainer.model.config
    if config.problem_type != MULTI_LABEL:
        return None
    values = np.broadcast_to(np.asarray(thresholds_of(trainer), dtype=float), (config.num_labels,))
    return {str(config.id2label[i]): float(value) for i, value in enumerate(values)}
