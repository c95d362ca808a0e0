"""From runs to the rows of a report: runs that differ in their seed alone are one row."""

import json
import math
import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from hf_ft_ext.data.tasks import TASKS
from hf_ft_ext.metrics import METRICS, MULTI_LABEL_METRICS, SCORES, primary_key
from hf_ft_ext.report.read import Run

# What does not change the result (where it goes, what is shown), or what the seeds of a row differ in.
_BESIDES = {
    "method", "seed", "output_dir", "overwrite_output_dir", "disable_tqdm", "run_name", "report_to", "logging_steps",
    "logging_strategy", "save_strategy", "save_steps", "save_total_limit", "resume_from_checkpoint", "push_to_hub",
    "hub_model_id", "hub_strategy", "hub_private_repo", "feature_cache_dir", "kernel_dir", "cache_dir", "do_train",
    "do_eval", "do_predict", "prediction_probabilities", "task_name", "dataset_name", "model_name_or_path",
}  # fmt: skip
_OF_THE_DATA = (
    "max_train_samples", "max_eval_samples", "num_k", "few_shot_split", "few_shot_type", "max_seq_length", "data_seed",
    "train_file", "validation_file",
)  # fmt: skip


@dataclass(frozen=True)
class Number:
    """Mean over seeds, and the sample's standard deviation where there are several."""

    mean: float
    deviation: float | None = None

    @classmethod
    def of(cls, values: Iterable[float | None]) -> "Number | None":
        """`None` if one of the values is missing or not finite."""
        values = list(values)
        if not values or any(value is None or not math.isfinite(value) for value in values):
            return None
        return cls(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None)


@dataclass(frozen=True)
class Row:
    """A method with its settings, over its seeds.

    Attributes:
        name: the variant's name; the method's, with what distinguishes it, where no comparison gave one.
        metric: key of the quality in the records, such as `eval_accuracy`.
        notes: where its data is not that of the other rows.
    """

    name: str
    runs: list[Run]
    metric: str
    notes: tuple[str, ...] = ()

    @property
    def method(self) -> str:
        return self.runs[0].record["method"]

    @property
    def seeds(self) -> list[int]:
        return [run.record["seed"] for run in self.runs]

    @property
    def first(self) -> dict[str, Any]:
        return self.runs[0].record

    def number(self, key: str) -> Number | None:
        """Mean and deviation of a field of `run.json`."""
        return Number.of(run.record.get(key) for run in self.runs)

    @cached_property
    def quality(self) -> Number | None:
        return Number.of(run.record["metrics"].get(self.metric) for run in self.runs)

    @cached_property
    def memory(self) -> Number | None:
        """MiB."""
        number = self.number("peak_memory_bytes")
        scale = 2**20
        if number is None:
            return None
        return Number(number.mean / scale, None if number.deviation is None else number.deviation / scale)

    @cached_property
    def seconds(self) -> Number | None:
        return self.number("train_seconds")

    @cached_property
    def evaluation_seconds(self) -> Number | None:
        return Number.of(run.record["metrics"].get("eval_runtime") for run in self.runs)


@dataclass(frozen=True)
class Section:
    """Rows that can be compared: one task, one model.

    Attributes:
        rows: best quality first; rows without one last.
    """

    task: str
    model: str
    metric: str
    rows: list[Row]

    @property
    def quality(self) -> str:
        """The metric's name for people: `matthews correlation` for `eval_matthews_correlation`."""
        return self.metric.removeprefix("eval_").replace("_", " ")

    @property
    def devices(self) -> list[str]:
        return sorted({str(run.record.get("device")) for row in self.rows for run in row.runs})


def sections(runs: Iterable[Run]) -> list[Section]:
    """Group runs by task and model, then by variant."""
    groups: dict[tuple[str, str], list[Run]] = {}
    for run in runs:
        groups.setdefault((str(run.record["task"]), str(run.record["model"])), []).append(run)
    return [_section(task, model, members) for (task, model), members in groups.items()]


def pareto_front(rows: Iterable[Row], cost: str) -> list[Row]:
    """The rows that no other one beats in quality and in `cost` (`memory`, `seconds`), cheapest first.

    A row is beaten by one that is at least as good in both and better in one, by the means over seeds.
    """
    points = [(getattr(row, cost), row) for row in rows if getattr(row, cost) is not None and row.quality is not None]
    front = []
    for price, row in points:
        beaten = any(
            other.quality.mean >= row.quality.mean
            and its.mean <= price.mean
            and (other.quality.mean > row.quality.mean or its.mean < price.mean)
            for its, other in points
        )
        if not beaten:
            front.append((price.mean, row))
    return [row for _, row in sorted(front, key=lambda pair: pair[0])]


def quality_key(runs: list[Run]) -> str:
    """Key of the quality in the records' metrics: as recorded, that of the metric which was passed, or the task's own.

    Where none is known (own data), the first primary metric that the records have.
    """
    record = runs[0].record
    if record.get("primary_metric"):
        return f"eval_{record['primary_metric']}"
    task = TASKS.get(record["task"])
    named = (record.get("arguments") or {}).get("metric") or (task.metric if task else None)
    first = named[0] if isinstance(named, list) else named  # of several the first chooses
    if first in SCORES:
        return f"eval_{first}"
    candidates = [first] if first in METRICS else list(METRICS)
    keys = [f"eval_{primary_key(name)}" for name in candidates] + [f"eval_{MULTI_LABEL_METRICS[0]}"]
    return next((key for key in keys if key in record["metrics"]), keys[0])


def _section(task: str, model: str, runs: list[Run]) -> Section:
    metric = quality_key(runs)
    groups: dict[tuple, list[Run]] = {}
    for run in runs:
        groups.setdefault((run.variant, run.record["method"], _settings_text(run)), []).append(run)
    rows = []
    kinds = {key: _data_of(members[0]) for key, members in groups.items()}
    names = _names(groups)
    for key, members in groups.items():
        members = sorted(members, key=lambda run: run.record["seed"])
        notes = _notes(kinds[key], list(kinds.values()))
        rows.append(Row(names[key], members, metric, notes))
    rows.sort(key=lambda row: (row.quality is None, -row.quality.mean if row.quality else 0.0, row.name))
    return Section(task, model, metric, rows)


def _settings(run: Run) -> dict[str, Any]:
    return {k: v for k, v in (run.record.get("arguments") or {}).items() if k not in _BESIDES}


def _settings_text(run: Run) -> str:
    return json.dumps(_settings(run), sort_keys=True, default=str)


def _data_of(run: Run) -> dict[str, Any]:
    return {key: value for key, value in _settings(run).items() if key in _OF_THE_DATA}


def _notes(own: dict[str, Any], everyone: list[dict[str, Any]]) -> tuple[str, ...]:
    """What a row's data has that most rows have not."""
    notes = []
    for key in _OF_THE_DATA:
        values = [json.dumps(other.get(key)) for other in everyone]
        usual = statistics.mode(values)
        if json.dumps(own.get(key)) != usual:
            notes.append(f"{key}={own.get(key, 'default')} (others: {'default' if usual == 'null' else usual})")
    return tuple(notes)


def _names(groups: dict[tuple, list[Run]]) -> dict[tuple, str]:
    """A variant's own name, or the method's with the settings in which its rows differ."""
    names = {}
    for key, members in groups.items():
        variant, method, _ = key
        base = variant or method
        rivals = [other for other in groups if (other[0] or other[1]) == base]
        if len(rivals) > 1:
            all_settings = [_settings(groups[other][0]) for other in rivals]
            own = _settings(members[0])
            keys = sorted({key for settings in all_settings for key in settings})
            differing = [k for k in keys if len({str(settings.get(k)) for settings in all_settings}) > 1]
            base += " (" + ", ".join(f"{k}={_short(own.get(k, 'default'))}" for k in differing) + ")"
        names[key] = base
    return names


def _short(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
