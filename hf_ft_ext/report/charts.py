"""Draw quality against a cost: SVG for the page, and PNG files."""

import io
import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter
from matplotlib.transforms import Bbox

from hf_ft_ext.files import atomic_write
from hf_ft_ext.report.rows import Number, Row, pareto_front

# Distinguishable with any kind of colour vision, and also by marker.
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#7a5195", "#6b6b6b")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "h")
INK, _FAINT = "#1f2933", "#9aa5b1"
_LOG_FROM = 8.0  # costs that differ by more than this factor are drawn on a logarithmic axis
LONGEST_NAME, _MOST_NAMES = 24, 12
STYLE = {
    "svg.fonttype": "none",  # text stays text: small, sharp, searchable
    "svg.hashsalt": "hf_ft_ext",  # makes the file reproducible
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans", "Helvetica", "Arial"],
    "axes.edgecolor": _FAINT,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "font.size": 10,
}


@dataclass(frozen=True)
class Cost:
    """The x axis of a picture: attribute of `Row`, label of the axis, title, and end of the file name."""

    attribute: str
    label: str
    title: str
    file: str


COSTS = (
    Cost("memory", "peak memory in training, above the loaded model (MiB)", "Quality and memory", "memory"),
    Cost("seconds", "training time, preparation included (s)", "Quality and training time", "time"),
)


def style(number: int) -> tuple[str, str]:
    """Colour and marker of the row with this number; different for 64 rows."""
    return COLORS[number % len(COLORS)], _MARKERS[(number + number // len(COLORS)) % len(_MARKERS)]


def draw(rows: list[Row], numbers: dict[str, int], cost: Cost, quality_label: str) -> Figure | None:
    """Points with error bars (one standard deviation over seeds) and the Pareto front as a line.

    Args:
        numbers: number of each row, by name; shown instead of the names if these are many or long.

    Returns:
        The figure, or `None` if no row has both numbers.
    """
    measured: dict[int, tuple[Number, Number]] = {}  # cost and quality by the row's `id`
    for row in rows:
        spent = getattr(row, cost.attribute)
        if row.quality is not None and spent is not None:
            measured[id(row)] = spent, row.quality
    rows = [row for row in rows if id(row) in measured]
    if not rows:
        return None
    by_name = len(rows) <= _MOST_NAMES and all(len(row.name) <= LONGEST_NAME for row in rows)
    with rc_context(STYLE):
        figure = Figure(figsize=(6.4, 4.4), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        front = pareto_front(rows, cost.attribute)
        _scale(axes, [spent.mean for spent, _ in measured.values()])
        corners = [tuple(number.mean for number in measured[id(row)]) for row in front]
        axes.step(*zip(*corners, strict=True), where="post", color=INK, linewidth=1.1, linestyle=(0, (4, 3)), zorder=1)
        points = []
        for row in rows:
            (x, y), best = measured[id(row)], row in front
            color, marker = style(numbers[row.name])
            axes.errorbar(
                x.mean, y.mean, xerr=x.deviation, yerr=y.deviation, fmt="none", ecolor=color, elinewidth=1.2,
                capsize=3, alpha=0.75, zorder=2,
            )  # fmt: skip
            axes.plot(
                x.mean, y.mean, marker=marker, color=color, markersize=9, markeredgecolor=INK if best else "white",
                markeredgewidth=1.6 if best else 0.8, zorder=3,
            )  # fmt: skip
            points.append((x.mean, y.mean, row.name if by_name else str(numbers[row.name]), best))
        axes.set_xlabel(cost.label)
        axes.set_ylabel(quality_label)
        axes.grid(True, color="#e4e7eb", linewidth=0.8)
        axes.set_axisbelow(True)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
        axes.margins(x=0.16, y=0.16)
        figure.draw_without_rendering()
        _label(axes, points, _lines(axes, measured.values(), corners))
    return figure


def svg(figure: Figure, description: str) -> str:
    """The figure as an `<svg>` element for a page of HTML."""
    buffer = io.StringIO()
    with rc_context(STYLE):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Title": description})
    text = buffer.getvalue()
    return text[text.index("<svg") :].replace("<svg", '<svg role="img"', 1)


def write_png(figure: Figure, path: Path) -> None:
    with rc_context(STYLE), atomic_write(path) as temporary:
        figure.savefig(temporary, format="png", dpi=150, facecolor="white")


def _scale(axes: Axes, costs: list[float]) -> None:
    if min(costs) > 0 and max(costs) / min(costs) > _LOG_FROM:
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0), numticks=12))
        axes.xaxis.set_minor_formatter(NullFormatter())
    else:
        axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.4g}"))


def _lines(axes: Axes, measured: Iterable[tuple[Number, Number]], corners: list[tuple[float, ...]]) -> list[Bbox]:
    """Bounding boxes of the front's and the error bars' lines, in pixels."""
    ends = []
    for (x, y), (x2, y2) in itertools.pairwise(corners):
        ends += [((x, y), (x2, y)), ((x2, y), (x2, y2))]
    for spent, reached in measured:
        dx, dy = spent.deviation or 0.0, reached.deviation or 0.0
        x, y = spent.mean, reached.mean
        ends += [((x, y - dy), (x, y + dy)), ((x - dx, y), (x + dx, y))]
    low, high = axes.get_xlim()
    boxes = []
    for pair in ends:
        (x, y), (x2, y2) = axes.transData.transform([(min(max(a, low), high), b) for a, b in pair])
        boxes.append(Bbox.from_extents(min(x, x2) - 1, min(y, y2) - 1, max(x, x2) + 1, max(y, y2) + 1))
    return boxes


def _label(axes: Axes, points: list[tuple[float, float, str, bool]], lines: list[Bbox]) -> None:
    """Write each name beside its point, where it overlaps least with points, other names and lines."""
    canvas: Any = axes.figure.canvas  # of a raster backend, which has a renderer
    renderer = canvas.get_renderer()
    frame = axes.get_window_extent(renderer)
    places = [axes.transData.transform(point[:2]) for point in points]
    taken = [Bbox.from_bounds(x - 7, y - 7, 14, 14) for x, y in places]
    for x, y, name, best in points:
        text = axes.annotate(
            name, (x, y), xytext=(0, 0), textcoords="offset points", fontsize=9, color=INK,
            fontweight="bold" if best else "normal", zorder=4,
        )  # fmt: skip
        choices = []
        for rank, (dx, dy, ha, va) in enumerate(_AROUND):
            text.set(position=(dx, dy), horizontalalignment=ha, verticalalignment=va)
            box = text.get_window_extent(renderer)
            covered = sum(_overlap(box, other) for other in (*taken, *lines))
            outside = box.width * box.height - _overlap(box, frame)
            distance = abs(dx) + abs(dy)
            choices.append((covered + 3 * outside, distance, rank, (dx, dy, ha, va), box))
        *_, (dx, dy, ha, va), box = min(choices, key=lambda choice: choice[:3])
        text.set(position=(dx, dy), horizontalalignment=ha, verticalalignment=va)
        if abs(dx) + abs(dy) > 25:  # far from its point: connect them by a line
            axes.annotate(
                "", (x, y), xytext=(dx, dy), textcoords="offset points",
                arrowprops={"arrowstyle": "-", "color": _FAINT, "linewidth": 0.8}, zorder=1,
            )  # fmt: skip
        taken.append(box)


_AROUND = tuple(
    (dx, dy, ha, va)
    for far in (1, 2, 3, 4)
    for dx, dy, ha, va in (
        (9 * far, 0, "left", "center"),
        (0, 9 * far, "center", "bottom"),
        (0, -9 * far, "center", "top"),
        (-9 * far, 0, "right", "center"),
        (7 * far, 7 * far, "left", "bottom"),
        (7 * far, -7 * far, "left", "top"),
        (-7 * far, 7 * far, "right", "bottom"),
        (-7 * far, -7 * far, "right", "top"),
    )
)


def _overlap(a: Bbox, b: Bbox) -> float:
    both = Bbox.intersection(a, b)
    return 0.0 if both is None else max(both.width, 0) * max(both.height, 0)
