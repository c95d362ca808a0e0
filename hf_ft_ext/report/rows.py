"""Group runs into the rows of a report: runs that differ only in their seed are one row."""

import json
import math
import re
import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from hf_ft_ext.data.tasks import TASKS
from hf_ft_ext.metrics import METRICS, MULTI_LABEL_METRICS, SCORES, primary_key
from hf_ft_ext.metrics.generation import OF_TRL
from hf_ft_ext.report.identity import (
    DATA_ARGUMENTS,
    NOT_RECORDED,
    comparison_key,
    evaluated_content,
    model_of,
    rows_of,
    settings_of,
    source_of,
)
from hf_ft_ext.report.read import Run

_NO_QUALITY = re.compile(r"eval_(.*loss|(.*_)?runtime|.*_per_second|.*_time)")
_COMPARED_LIBRARIES = ("hf_ft_ext", "torch", "transformers")


@dataclass(frozen=True)
class Number:
    """Mean over seeds, and the sample standard deviation if there are several."""

    mean: float
    deviation: float | None = None

    @classmethod
    def of(cls, values: Iterable[Any]) -> "Number | None":
        """Mean and deviation of `values`; `None` if one is missing, not a number or not finite."""
        values = list(values)
        if not values or not all(isinstance(value, int | float) and math.isfinite(value) for value in values):
            return None
        return cls(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None)


@dataclass(frozen=True)
class Row:
    """A method with its settings, over its seeds.

    Attributes:
        name: the variant's name in a comparison; otherwise the method's, with the settings that distinguish it.
        runs: one for each seed.
        metric: key of the quality in the records, such as `eval_accuracy`.
        notes: differences between its data and that of the other rows.
        remarks: further warnings: seeds that ran twice, different devices or versions.
        lower: whether a run of the section says that low values of its own metric are the good ones.
    """

    name: str
    runs: list[Run]
    metric: str
    notes: tuple[str, ...] = ()
    remarks: tuple[str, ...] = ()
    lower: bool = False

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
        return self.score(self.metric)

    def score(self, key: str) -> Number | None:
        """Mean and deviation of a metric."""
        return Number.of(run.record["metrics"].get(key) for run in self.runs)

    @property
    def rank(self) -> float:
        """The mean quality, negated if lower is better (perplexity), for sorting; minus infinity without a number."""
        if self.quality is None:
            return -math.inf
        return -self.quality.mean if self.lower or lower_is_better(self.metric) else self.quality.mean

    @cached_property
    def memory(self) -> Number | None:
        """Peak memory in MiB."""
        number = self.number("peak_memory_bytes")
        scale = 2**20
        if number is None:
            return None
        return Number(number.mean / scale, None if number.deviation is None else number.deviation / scale)

    @cached_property
    def memory_holds_model(self) -> bool:
        """Whether the peak memory includes the model: earlier versions did not subtract it on a GPU."""
        return any(
            "peak_memory_kind" not in run.record and not str(run.record.get("device", "cpu")).startswith("cpu")
            for run in self.runs
        )

    @cached_property
    def seconds(self) -> Number | None:
        return self.number("train_seconds")

    @cached_property
    def evaluation_seconds(self) -> Number | None:
        return Number.of(run.record["metrics"].get("eval_runtime") for run in self.runs)


@dataclass(frozen=True)
class Section:
    """Rows that can be compared: one task, one data set, one model, one metric.

    Attributes:
        rows: best quality first; rows without one last.
        data: the data set; empty if the task determines it.
        heading: task and model, and further facts that distinguish this section from the others.
    """

    task: str
    model: str
    metric: str
    rows: list[Row]
    data: str = ""
    heading: str = ""

    @property
    def quality(self) -> str:
        """The metric's name for the page: `matthews correlation` for `eval_matthews_correlation`."""
        return self.metric.removeprefix("eval_").replace("_", " ")

    @property
    def further(self) -> dict[str, str]:
        """Names of the further metrics of the rows, such as perplexity beside f1, by their keys."""
        keys = dict.fromkeys(key for row in self.rows for run in row.runs for key in run.record["metrics"])
        return {
            key: key.removeprefix("eval_").replace("_", " ")
            for key in keys
            if key.startswith("eval_") and key != self.metric and not _NO_QUALITY.fullmatch(key)
            and not OF_TRL.fullmatch(key.removeprefix("eval_"))
            and any(row.score(key) is not None for row in self.rows)
        }  # fmt: skip

    @property
    def devices(self) -> list[str]:
        return sorted({str(run.record.get("device")) for row in self.rows for run in row.runs})


def sections(runs: Iterable[Run]) -> list[Section]:
    """Group runs by task, data set, model and metric, then by variant.

    Data sets are the same if they have the same source, or if the runs were evaluated on the same rows.
    """
    groups: dict[tuple[str, str, str], list[Run]] = {}
    key_of: dict[tuple, tuple[str, str, str]] = {}  # by the content of the evaluated rows
    for run in runs:
        key = (run.record["task"], model_of(run), source_of(run))
        content = evaluated_content(run)
        if content is not None:
            key = key_of.setdefault((*key[:2], content), key)
        groups.setdefault(key, []).append(run)
    parts = [(key, metric, part) for key, group in groups.items() for metric, part in _by_metric(group).items()]
    facts = [(key[0], part[0].record["model"], key[1], key[2], metric) for key, metric, part in parts]
    return [_section(about, _heading(about, facts), part) for about, (_, _, part) in zip(facts, parts, strict=True)]


def pareto_front(rows: Iterable[Row], cost: str) -> list[Row]:
    """The Pareto front of quality and `cost` (`memory` or `seconds`), cheapest row first.

    A row is on the front if no other row is at least as good in both and better in one, by the means over seeds. For
    memory, rows whose value includes the model are left out if there are rows whose value does not.
    """
    rows = list(rows)
    if cost == "memory":
        rows = [row for row in rows if not row.memory_holds_model] or rows
    points = [(getattr(row, cost), row) for row in rows if getattr(row, cost) is not None and row.quality is not None]
    front = []
    for price, row in points:
        beaten = any(
            other.rank >= row.rank and its.mean <= price.mean and (other.rank > row.rank or its.mean < price.mean)
            for its, other in points
        )
        if not beaten:
            front.append((price.mean, row))
    return [row for _, row in sorted(front, key=lambda pair: pair[0])]


def lower_is_better(metric: str) -> bool:
    """Whether lower values of `metric` (`eval_perplexity`) are better."""
    return metric.rpartition("_")[2] in ("perplexity", "loss")


def quality_key(run: Run) -> str | None:
    """Key of the quality in a record's metrics; `None` if it has none.

    The first of these that is among the metrics: the key in the record, the primary key of the metric that was passed,
    that of the task, any other primary key, any other metric.
    """
    record, metrics = run.record, run.record["metrics"]
    task = TASKS.get(record["task"])
    passed = (record["arguments"] or {}).get("metric")
    passed = passed[0] if isinstance(passed, list) and passed else passed  # the first one selects the best model
    keys = [record["quality"]]
    for name in (passed, task.metric if task else None, *METRICS, *MULTI_LABEL_METRICS):
        if name in METRICS:
            keys.append(f"eval_{primary_key(name)}")
        elif name in SCORES:
            keys.append(f"eval_{name}")
    others = (key for key in metrics if key.startswith("eval_") and not _NO_QUALITY.fullmatch(key))
    return next((key for key in (*keys, *others) if key in metrics), None)


def _heading(about: tuple[str, ...], everyone: Sequence[tuple[str, ...]]) -> str:
    """Task and model; also the model's folder, data set and metric if they differ between sections of these two."""
    alike = [other for other in everyone if other[:2] == about[:2]]
    further = [fact for fact, values in zip(about, zip(*alike, strict=True), strict=True) if len(set(values)) > 1]
    return ", ".join(filter(None, dict.fromkeys([*about[:2], *further])))


def _by_metric(runs: list[Run]) -> dict[str, list[Run]]:
    """Group runs by the metric to compare them by: the most frequent one, or their own if they lack it."""
    own = [quality_key(run) for run in runs]
    counts = Counter(key for key in own if key is not None)
    task = TASKS.get(runs[0].record["task"])
    unknown = f"eval_{primary_key(task.metric if task else next(iter(METRICS)))}"
    usual = max(counts, key=lambda key: counts[key]) if counts else unknown
    groups: dict[str, list[Run]] = {}
    for run, key in zip(runs, own, strict=True):
        groups.setdefault(usual if key is None or usual in run.record["metrics"] else key, []).append(run)
    return groups


def _section(about: tuple[str, str, str, str, str], heading: str, runs: list[Run]) -> Section:
    task, model, _, data, metric = about
    groups: dict[tuple, list[Run]] = {}
    for run in runs:
        method = run.record["method"]
        groups.setdefault((run.variant or method, method, comparison_key(run)), []).append(run)
    firsts = [members[0] for members in groups.values()]
    names = _names(groups)
    lower = any(_says_lower(run, metric) for run in runs)
    rows = []
    for key, members in groups.items():
        counted, remarks = _one_for_each_seed(members)
        remarks += _environment_remarks(counted)
        rows.append(Row(names[key], counted, metric, _notes(members[0], firsts), tuple(remarks), lower))
    rows.sort(key=lambda row: (row.quality is None, -row.rank if row.quality else 0.0, row.name))
    return Section(task, model, metric, rows, data, heading)


def _says_lower(run: Run, metric: str) -> bool:
    """Whether a run was told `--greater_is_better false`, and about this metric."""
    arguments = run.record["arguments"] or {}
    chosen = arguments.get("metric_for_best_model") or metric
    return arguments.get("greater_is_better") is False and str(chosen).removeprefix("eval_") == metric[len("eval_") :]


def _one_for_each_seed(runs: list[Run]) -> tuple[list[Run], list[str]]:
    """The latest run of each seed, and remarks about repeated runs (they do not count as further seeds)."""
    by_seed: dict[int, list[Run]] = {}
    for run in sorted(runs, key=lambda run: (run.modified, str(run.folder))):
        by_seed.setdefault(run.record["seed"], []).append(run)
    remarks = [
        f"seed {seed} ran {len(same)} times; only the latest run counts: {same[-1].folder}"
        for seed, same in sorted(by_seed.items())
        if len(same) > 1
    ]
    return [same[-1] for _, same in sorted(by_seed.items())], remarks


def _environment_remarks(runs: list[Run]) -> list[str]:
    """Remarks about runs of a row on different devices or with different versions, whose mean may mislead."""
    remarks = []
    devices = sorted({str(run.record["device"]) for run in runs})
    if len(devices) > 1:
        remarks.append(f"its seeds ran on different devices: {'; '.join(devices)}")
    for name in _COMPARED_LIBRARIES:
        versions = sorted({str((run.record["versions"] or {}).get(name, NOT_RECORDED)) for run in runs})
        if len(versions) > 1:
            remarks.append(f"its seeds ran with different versions of {name}: {', '.join(versions)}")
    return remarks


def _notes(run: Run, everyone: list[Run]) -> tuple[str, ...]:
    """Notes about a row's data where it differs from that of most rows."""
    notes = []
    own, others = settings_of(run), [settings_of(other) for other in everyone]
    for key in DATA_ARGUMENTS:
        usual = statistics.mode(json.dumps(other.get(key)) for other in others)
        if json.dumps(own.get(key)) != usual:
            notes.append(f"{key}={own.get(key, 'default')} (others: {'default' if usual == 'null' else usual})")
    if notes:
        return tuple(notes)
    facts, others = rows_of(run), [rows_of(other) for other in everyone]
    for prefix in ("train", "eval"):
        own_text, *texts = [_rows_text(fact, prefix) for fact in (facts, *others)]
        usual = statistics.mode(texts)
        if own_text != usual:
            notes.append(f"{prefix}: {own_text} (others: {usual})")
    return tuple(notes)


def _rows_text(facts: dict[str, Any], prefix: str) -> str:
    rows, content = facts.get(f"{prefix} rows"), facts.get(f"{prefix} content")
    return NOT_RECORDED if rows is None else f"{rows:,} rows, content {content}"


def _names(groups: dict[tuple, list[Run]]) -> dict[tuple, str]:
    """Name of each row: the variant's or method's, with the settings (else data set, else rows) that differ."""
    names = {}
    for key in groups:
        base = key[0]
        rivals = {other: runs[0] for other, runs in groups.items() if other[0] == base}
        if len(rivals) > 1:
            traits, shown = _distinguishing(rivals)
            base += " (" + ", ".join(f"{k}={_short(traits[key].get(k, _missing_text(k)))}" for k in shown) + ")"
        names[key] = base
    return names


def _distinguishing(rivals: dict[tuple, Run]) -> tuple[dict[tuple, dict[str, Any]], list[str]]:
    """Settings and facts of rows that share a name, and the keys that distinguish them."""
    traits = {key: settings_of(run) for key, run in rivals.items()}
    shown = _differing(traits)
    for further in (lambda run: {"data": source_of(run)}, rows_of):
        if len({json.dumps([own.get(k) for k in shown], default=str) for own in traits.values()}) < len(rivals):
            traits = {key: traits[key] | further(run) for key, run in rivals.items()}
            shown = _differing(traits)
    return traits, shown


def _missing_text(key: str) -> str:
    """Text for a value that a record lacks: an argument has its default; facts of rows were not recorded.

    Names of facts contain a space.
    """
    return NOT_RECORDED if " " in key else "default"


def _differing(settings: dict[tuple, dict[str, Any]]) -> list[str]:
    keys = sorted({key for own in settings.values() for key in own})
    return [k for k in keys if len({str(own.get(k)) for own in settings.values()}) > 1]


def _short(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else NOT_RECORDED if value is None else str(value)
