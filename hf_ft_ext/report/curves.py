"""Draw training and evaluation loss by step, from the trainer state of each run."""

import json
import math
import re
import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from hf_ft_ext.report.charts import INK, LONGEST_NAME, STYLE, style
from hf_ft_ext.report.rows import Row

_STATE = "trainer_state.json"
_LOG_FROM = 8.0  # steps or losses that differ by more than this factor are drawn on a logarithmic axis
_MARKED = 25  # lines with fewer points than this have markers

Line = dict[int, float]  # loss by step


@dataclass(frozen=True)
class Losses:
    """The losses of a row: one line for each seed with logged losses."""

    train: list[Line] = field(default_factory=list)
    evaluation: list[Line] = field(default_factory=list)


def row_losses(row: Row) -> Losses:
    """The logged losses of a row's runs; lines of a single point are kept (the evaluation at the end)."""
    found = [read_losses(run.folder) for run in row.runs]
    return Losses([train for train, _ in found if train], [evaluation for _, evaluation in found if evaluation])


def read_losses(folder: Path) -> tuple[Line, Line]:
    """Training and evaluation loss by step from a run's trainer state, or that of its last checkpoint.

    Both are empty if there is none, or it cannot be read. Losses that are not finite are left out. If a step was
    logged twice (after resuming), the last value is used.
    """
    train: Line = {}
    evaluation: Line = {}
    for entry in _log_of(folder):
        step = entry.get("step") if isinstance(entry, dict) else None
        for line, key in ((train, "loss"), (evaluation, "eval_loss")):
            value = entry.get(key) if isinstance(entry, dict) else None
            if isinstance(step, int) and isinstance(value, int | float) and math.isfinite(value):
                line[step] = float(value)
    return train, evaluation


def mean_line(lines: list[Line]) -> Line:
    """The mean over the lines, at the steps that all of them have."""
    if not lines:
        return {}
    shared = set(lines[0]).intersection(*lines[1:])
    return {step: statistics.fmean(line[step] for line in lines) for step in sorted(shared)}


def draw(losses: dict[str, Losses], numbers: dict[str, int]) -> Figure | None:
    """The curves of all rows, training loss and evaluation loss side by side.

    Args:
        losses: by row name.
        numbers: number of each row, by name; it selects the colour and is shown instead of long names.

    Returns:
        The figure, or `None` if no line has two points.
    """
    panels = [
        (title, {name: lines for name, lines in shown.items() if lines})
        for title, shown in (
            ("training loss", {name: row.train for name, row in losses.items()}),
            ("evaluation loss", {name: row.evaluation for name, row in losses.items()}),
        )
    ]
    if not any(len(line) > 1 for _, shown in panels for lines in shown.values() for line in lines):
        return None
    panels = [(title, shown) for title, shown in panels if shown]
    with rc_context(STYLE):
        figure = Figure(figsize=(6.4 * len(panels), 4.4 if len(panels) == 1 else 3.9), layout="constrained")
        FigureCanvasAgg(figure)
        handles: dict[str, Any] = {}
        for axes, (title, shown) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
            for name, lines in shown.items():
                handles[name] = _draw_row(axes, lines, numbers[name])
            _finish(axes, title, [line for lines in shown.values() for line in lines])
        names = {name: _label(name, numbers[name]) for name in sorted(handles, key=lambda name: numbers[name])}
        columns = max(1, min(len(names), 84 * len(panels) // (6 + max(map(len, names.values())))))
        figure.legend(
            [handles[name] for name in names], names.values(), loc="outside lower center", ncols=columns, fontsize=8,
            frameon=False,
        )  # fmt: skip
    return figure


def _draw_row(axes: Axes, lines: list[Line], number: int) -> Any:
    color, marker = style(number)
    mean = mean_line(lines)
    if len(lines) > 1:
        for line in lines:
            axes.plot(line.keys(), line.values(), color=color, linewidth=0.8, alpha=0.3, zorder=1)
    points = mean or lines[0]
    every = marker if len(points) < _MARKED else "None"
    (handle,) = axes.plot(
        points.keys(), points.values(), color=color, linewidth=1.6, marker=every, markersize=5,
        markeredgecolor="white", markeredgewidth=0.5, zorder=2,
    )  # fmt: skip
    return handle


def _finish(axes: Axes, title: str, lines: list[Line]) -> None:
    ends = [max(line) for line in lines]
    steps = [step for line in lines for step in line if step > 0]
    values = [value for line in lines for value in line.values()]
    if steps and max(ends) / max(min(ends), 1) > _LOG_FROM and all(step > 0 for line in lines for step in line):
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1.0,) if max(steps) / min(steps) > 20 else (1.0, 2.0, 5.0)))
        axes.xaxis.set_minor_formatter(NullFormatter())
    else:
        axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    if min(values) > 0 and max(values) / min(values) > _LOG_FROM:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0), numticks=10))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.3g}"))
    else:
        axes.ticklabel_format(axis="y", useOffset=False)
    if len(set(steps)) == 1:  # a single evaluation
        axes.set_xticks(steps[:1])
    axes.set_title(title, fontsize=10, color=INK)
    axes.set_xlabel("optimizer step")
    axes.grid(True, color="#e4e7eb", linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _label(name: str, number: int) -> str:
    return name if len(name) <= LONGEST_NAME else str(number)


def _log_of(folder: Path) -> list[Any]:
    steps = {}
    for path in folder.glob("checkpoint-*"):
        if step := re.fullmatch(r"checkpoint-(\d+)", path.name):
            steps[path] = int(step[1])
    checkpoints = sorted(steps, key=lambda path: -steps[path])
    for path in (folder, *checkpoints):
        try:
            log = json.loads((path / _STATE).read_text(encoding="utf-8"))["log_history"]
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            continue
        if isinstance(log, list):
            return log
    return []
