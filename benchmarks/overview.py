"""README's picture and table of methods, from the result file of a study of `quality.py`.

The picture (docs/quality-memory.svg) has a point for each variant of the study: its score against the peak of memory.
The table has a line for each method: what it is for (`overview.yaml`), and what its first measured variant reached and
cost. Both are of one file and one task, so that all they show was trained on the same rows; a column of the table has
the scores of one more file. `tables.py` writes them.
"""

from dataclasses import dataclass, field
from functools import cache
from html import escape
from pathlib import Path
from typing import Any

import results
import yaml

PICTURE = Path(__file__).resolve().parent.parent / "docs" / "quality-memory.svg"
COLUMNS = {
    "score, %": ("score", 100, ".1f"),
    "seconds": ("seconds", 1, ",.0f"),
    "peak MiB": ("peak MiB", 1, ",.0f"),
    "saved MB": ("saved MB", 1, ",.1f"),
}
ENOUGH = 4  # variants: a file with fewer gives way to one with more

# Of the picture. Text is large against the width, so that it can be read on a phone.
WIDTH, HEIGHT = 480, 360
SHOWN = 560  # pixels, where a page is wide enough
LEFT, RIGHT, TOP, BOTTOM = 50, 14, 34, 46
SIZE = 13
COLOURS = {
    "full": "#4e79a7", "lora": "#d37295", "sparse": "#e15759", "fisher": "#b07aa1", "kernel": "#9c755f",
    "linearhead": "#59a14f", "gradientless": "#f28e2b", None: "#888888",
}  # fmt: skip


@dataclass
class Variant:
    """One row of a study: the values by quantity, with their deviations over seeds.

    Attributes:
        method: the method of `overview.yaml` that it belongs to, if any.
    """

    name: str
    method: str | None
    values: dict[str, dict[str, Any]] = field(default_factory=dict)

    def value(self, quantity: str) -> float | None:
        return self.values[quantity]["value"] if quantity in self.values else None

    @property
    def is_drawn(self) -> bool:
        return self.value("score") is not None and self.value("peak MiB") is not None


@cache
def description() -> dict[str, Any]:
    """What `overview.yaml` says."""
    return yaml.safe_load((Path(__file__).parent / "overview.yaml").read_text(encoding="utf-8"))


def method_of(name: str) -> str | None:
    """The method that a study's variant belongs to."""
    methods = description()["methods"]
    listed = [method for method, about in methods.items() if name in about["variants"]]
    started = [method for method, about in methods.items() if name.startswith((method, *about["variants"]))]
    return next(iter(listed + started), None)


def study(folder: Path = results.FOLDER) -> tuple[str, list[Variant], list[dict[str, Any]]]:
    """The file that is shown, its variants and its rows of the task.

    That is the first one of `overview.yaml` with enough variants that have a score and a peak, else the one with most.
    """
    best: tuple[str, list[Variant], list[dict[str, Any]]] = ("", [], [])
    for name in description()["files"]:
        found, rows = _scored(name, folder)
        drawn = sum(variant.is_drawn for variant in found)
        if drawn >= ENOUGH:
            return name, found, rows
        if drawn > sum(variant.is_drawn for variant in best[1]):
            best = (name, found, rows)
    return best


def _scored(name: str, folder: Path) -> tuple[list[Variant], list[dict[str, Any]]]:
    """The variants of a file that have a score on the task, and the file's rows of the task."""
    rows = [row for row in results.read(name, folder) if row.get("task") == description()["task"]]
    variants: dict[str, Variant] = {}
    for row in rows:
        variant = variants.setdefault(row["variant"], Variant(row["variant"], method_of(row["variant"])))
        variant.values[row["quantity"]] = row
    return [variant for variant in variants.values() if variant.value("score") is not None], rows


def choice(folder: Path = results.FOLDER) -> tuple[list[str], list[dict[str, Any]]]:
    """The lines of the table "which method" with a sentence above, and the rows that it shows."""
    name, variants, rows = study(folder)
    shown = {method: _first(method, variants) for method in description()["methods"]}
    measured = [variant for variant in shown.values() if variant is not None]
    beside = description()["beside"]
    others, other_rows = _scored(beside["file"], folder) if rows and name != beside["file"] else ([], [])
    columns = {head: column for head, column in COLUMNS.items() if any(_cell(v, *column) for v in measured)}
    lines = []
    if rows:
        empty = " Empty: not measured there." if len(measured) < len(shown) else ""
        lines = [
            f"{description()['files'][name]} on {description()['task']}. Peak: above the loaded model, over the whole "
            f"run. {description()['spread']}{empty}" + (f" {beside['about']}" if others else ""),
            "",
        ]
    heads = ["you want", "`--method`", *columns, *([beside["head"]] if others else []), "what it is"]
    lines += [f"| {' | '.join(heads)} |", "| --- | --- |" + " ---: |" * (len(heads) - 3) + " --- |"]
    for method, about in description()["methods"].items():
        cells = [_cell(shown[method], *column) for column in columns.values()]
        cells += [_cell(_first(method, others), *COLUMNS["score, %"])] if others else []
        lines.append(f"| {' | '.join([about['wanted'], f'`{method}`', *cells, about['about'].strip()])} |")
    shown_files = ((name, rows), (beside["file"], other_rows))
    return lines, [{**row, "file": file} for file, part in shown_files for row in part]


def _first(method: str, variants: list[Variant]) -> Variant | None:
    """The variant that stands for a method: the first one in its list, else the first of the study."""
    order = {name: place for place, name in enumerate(description()["methods"][method]["variants"])}
    mine = [variant for variant in variants if variant.method == method]
    return min(mine, key=lambda variant: order.get(variant.name, len(order)), default=None)


def _cell(variant: Variant | None, quantity: str, scale: float, form: str) -> str:
    row = variant.values.get(quantity) if variant else None
    if row is None:
        return ""
    spread = row.get("deviation")
    around = f" ± {format(scale * spread, form)}" if spread is not None and quantity == "score" else ""
    return format(scale * row["value"], form) + around


# --- the picture ------------------------------------------------------------------------------------------


def write(folder: Path = results.FOLDER) -> None:
    """Write the picture, if there is anything to draw."""
    text = picture(folder)
    if text:
        PICTURE.write_text(text, encoding="utf-8")


def picture(folder: Path = results.FOLDER) -> str:
    """The picture as SVG; an empty text if nothing is measured.

    It is drawn here, without a library, so that the same numbers give the same file everywhere, and it has a ground of
    its own, so that it can be read on light and dark pages.
    """
    name, variants, _ = study(folder)
    points = [variant for variant in variants if variant.is_drawn]
    if not points:
        return ""
    highest = max(variant.value("peak MiB") for variant in points)
    ends = [end for variant in points for end in _range(variant)]
    across = _ticks(0, highest)
    up = _ticks(min(ends), max(ends))

    def place(variant: Variant, score: float | None = None) -> tuple[float, float]:
        x = LEFT + (WIDTH - LEFT - RIGHT) * variant.value("peak MiB") / across[-1]
        score = 100 * variant.value("score") if score is None else score
        return x, HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (score - up[0]) / (up[-1] - up[0])

    title = f"{description()['files'][name]}, {description()['task']}: score, %"
    parts = [_text(LEFT - 38, 20, title, weight="bold")]
    for tick in across:
        x = LEFT + (WIDTH - LEFT - RIGHT) * tick / across[-1]
        anchor, shift = ("end", RIGHT - 4) if tick == across[-1] else ("middle", 0)
        parts += [_line(x, TOP, x, HEIGHT - BOTTOM)]
        parts += [_text(x + shift, HEIGHT - BOTTOM + 17, f"{tick:,.0f}", anchor)]
    for tick in up:
        y = HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (tick - up[0]) / (up[-1] - up[0])
        parts += [_line(LEFT, y, WIDTH - RIGHT, y), _text(LEFT - 6, y + 4, f"{tick:g}", "end")]
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(_text(middle, HEIGHT - 9, "peak memory above the loaded model, MiB", "middle"))
    for variant in points:
        colour, (x, y) = COLOURS[variant.method], place(variant)
        low, high = (place(variant, end)[1] for end in _range(variant))
        if low != high:
            parts.append(f'<path d="M{x:.1f} {low:.1f}V{high:.1f}" stroke="{colour}" stroke-width="2"/>')
        parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5.5" fill="{colour}" stroke="#fff"/>')
    for variant, (x, y, anchor) in zip(points, place_labels(points, [place(v) for v in points]), strict=True):
        parts.append(_text(x, y, variant.name, anchor, COLOURS[variant.method], "bold"))
    font = f"font-family=\"system-ui, -apple-system, 'Segoe UI', 'DejaVu Sans', sans-serif\" font-size=\"{SIZE}\""
    size = f'width="{SHOWN}" height="{SHOWN * HEIGHT // WIDTH}"'
    return "\n".join([
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" {size} {font} role="img">',
        f"<title>{escape(title)} against peak memory</title>",
        f'<rect width="{WIDTH}" height="{HEIGHT}" rx="8" fill="#fff"/>', *parts, "</svg>\n",
    ])  # fmt: skip


def _range(variant: Variant) -> tuple[float, float]:
    """Score less and plus its deviation, in percent."""
    row = variant.values["score"]
    spread = row.get("deviation") or 0.0
    return 100 * (row["value"] - spread), 100 * (row["value"] + spread)


def _ticks(low: float, high: float) -> list[float]:
    """Return five to nine round numbers for the ticks of an axis that covers `low` to `high` with a margin."""
    low, high = (low, 1.02 * high) if low == 0 else (low - 0.1 * (high - low) - 0.1, high + 0.1 * (high - low) + 0.1)
    raw = (high - low) / 5
    power = 10.0 ** (len(f"{int(raw)}") - 1 if raw >= 1 else -1)
    step = next(power * factor for factor in (1, 2, 5, 10, 20, 50, 100) if power * factor >= raw)
    first = step * (low // step)
    found = [first]
    while found[-1] < high:
        found.append(round(found[-1] + step, 10))
    return found


def place_labels(variants: list[Variant], places: list[tuple[float, float]]) -> list[tuple[float, float, str]]:
    """Where each name stands: beside, above or below its point, where it covers no point and no other name."""
    taken = [(x - 6, y - 6, x + 6, y + 6) for x, y in places]
    found = []
    for variant, (x, y) in zip(variants, places, strict=True):
        wide = 0.6 * SIZE * len(variant.name)
        options = [
            (x + 9, y + 4, "start"), (x - 9, y + 4, "end"), (x, y - 10, "middle"), (x, y + 19, "middle"),
            (x + 7, y - 8, "start"), (x + 7, y + 17, "start"), (x - 7, y - 8, "end"), (x - 7, y + 17, "end"),
            (x + 9, y + 27, "start"), (x + 9, y - 21, "start"), (x - 9, y + 27, "end"), (x - 9, y - 21, "end"),
        ]  # fmt: skip
        boxes = [box_of(option, wide) for option in options]
        free = [place for place, box in enumerate(boxes) if _inside(box) and not any(overlap(box, b) for b in taken)]
        inside = [place for place, box in enumerate(boxes) if _inside(box)]
        best = (free or inside or [0])[0]
        taken.append(boxes[best])
        found.append(options[best])
    return found


def box_of(option: tuple[float, float, str], wide: float) -> tuple[float, float, float, float]:
    x, y, anchor = option
    left = x - {"start": 0, "middle": wide / 2, "end": wide}[anchor]
    return left, y - SIZE + 2, left + wide, y + 3


def _inside(box: tuple[float, float, float, float]) -> bool:
    return box[0] >= LEFT and box[2] <= WIDTH and box[1] >= TOP - 10 and box[3] <= HEIGHT - BOTTOM + 2


def overlap(one: tuple[float, float, float, float], other: tuple[float, float, float, float]) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def _line(x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<path d="M{x1:.1f} {y1:.1f}L{x2:.1f} {y2:.1f}" stroke="#d8d8d8"/>'


def _text(
    x: float, y: float, text: str, anchor: str = "start", colour: str = "#333333", weight: str = "normal"
) -> str:
    # a white edge, so that no line of the grid runs through the letters
    edge = 'stroke="#fff" stroke-width="3" paint-order="stroke"'
    about = f'text-anchor="{anchor}" fill="{colour}" font-weight="{weight}" {edge}'
    return f'<text x="{x:.1f}" y="{y:.1f}" {about}>{escape(text)}</text>'
