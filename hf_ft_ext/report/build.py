"""Write the report: `report.html` (self-contained), `report.md`, and the pictures as PNG."""

import datetime
import functools
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2

from hf_ft_ext.files import write_text
from hf_ft_ext.report import charts, curves
from hf_ft_ext.report.read import Found, Missing, find_runs
from hf_ft_ext.report.rows import Number, Row, Section, pareto_front, sections
from hf_ft_ext.training.sharing.text import bytes_text, code_span, prompt_text, share_text

HTML, MARKDOWN = "report.html", "report.md"
_MANY_ROWS = 60  # more rows are not legible in a picture


@dataclass(frozen=True)
class Report:
    """A written report."""

    output_dir: Path
    sections: list[Section]
    missing: list[Missing]

    def summary(self) -> str:
        """A few lines for the terminal: the rows, the missing runs, and the path of the page."""
        lines = []
        for section in self.sections:
            lines += ["", f"{section.heading}: {section.quality}"]
            width = max(len(row.name) for row in section.rows)
            for row in section.rows:
                seconds = "" if row.seconds is None else f"  {row.seconds.mean:8.1f} s"
                memory = "" if row.memory is None else f"  {row.memory.mean:8.1f} MiB"
                lines.append(f"  {row.name:<{width}}  {quality_text(row.quality):>15}{seconds}{memory}")
            lines += [f"  {row.name}: {remark}" for row in section.rows for remark in row.remarks]
        lines += [f"  {item.name}{seed_text(item.seed)}: {item.state}: {item.reason}" for item in self.missing]
        return "\n".join([*lines, f"report: {self.output_dir / HTML}"])


def write_report(
    paths: Iterable[str | os.PathLike], output_dir: str | os.PathLike, title: str | None = None
) -> Report:
    """Read the runs in `paths` and write the report into `output_dir`.

    Raises:
        InputError: see `find_runs`.
    """
    found = find_runs(list(paths))
    output_dir = Path(output_dir)
    all_sections = sections(found.runs)
    several = len(all_sections) > 1
    shown = [_shown(section, output_dir, several * number) for number, section in enumerate(all_sections, 1)]
    values = {
        "title": title or _title(all_sections),
        "sections": shown,
        "missing": found.missing,
        "left_out": {name: reasons for name, reasons in found.left_out.items() if reasons},
        "facts": _facts(found),
        "versions": _versions(found),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }
    write_text(output_dir / HTML, _environment(escape=True).get_template("report.html.jinja").render(values))
    write_text(output_dir / MARKDOWN, _environment(escape=False).get_template("report.md.jinja").render(values))
    return Report(output_dir, all_sections, found.missing)


# --- values for the templates -----------------------------------------------------------------------


def _shown(section: Section, output_dir: Path, number: int) -> dict[str, Any]:
    """Write the pictures of a section, and return its values for the templates."""
    rows = section.rows
    numbers = {row.name: number for number, row in enumerate(rows, 1)}
    fronts = {cost.attribute: pareto_front(rows, cost.attribute) for cost in charts.COSTS}
    several_seeds = any(len(row.runs) > 1 for row in rows)
    front = "dashed: the Pareto front: rows that no other row beats in both"
    front += "; bars: one standard deviation over seeds" if several_seeds else ""
    pictures = []
    for cost in charts.COSTS if len(rows) <= _MANY_ROWS else ():
        figure = charts.draw(rows, numbers, cost, section.quality)
        if figure is None:
            continue
        file = f"quality-{cost.file}{f'-{number}' if number else ''}.png"
        about = f"{section.quality} against {cost.label}, {section.task}"
        pictures.append(_picture(figure, output_dir / file, cost.title, about, front))
    losses = {row.name: curves.row_losses(row) for row in rows}
    figure = curves.draw(losses, numbers) if len(rows) <= _MANY_ROWS else None
    if figure is not None:
        path = output_dir / f"loss-curve{f'-{number}' if number else ''}.png"
        under = "lines: the mean over seeds, at steps that all seeds logged; faint: each seed"
        about = f"training and evaluation loss by step, {section.task}"
        pictures.append(_picture(figure, path, "Loss", about, under if several_seeds else ""))
    values = [
        {
            "row": row,
            "number": numbers[row.name],
            "color": charts.style(numbers[row.name])[0],
            "fronts": [cost.file for cost in charts.COSTS if row in fronts[cost.attribute]],
            "share": share_text(row.first["trainable_parameters"], row.first["total_parameters"]),
            "command": row.runs[0].command,
        }
        for row in rows
    ]
    return {
        "section": section,
        "rows": values,
        "pictures": pictures,
        "best": rows[0] if rows[0].quality is not None else None,
        "seeds": sorted({seed for row in rows for seed in row.seeds}),
        "highlights": _highlights(rows),
        "generations": [(row.name, row.first["generations"]) for row in rows if row.first.get("generations")],
    }


def _picture(figure: Any, path: Path, title: str, about: str, under: str) -> dict[str, str]:
    """Write a figure as PNG, and return its values for the templates."""
    charts.write_png(figure, path)
    width = "wide" if len(figure.axes) > 1 else ""
    return {"title": title, "svg": charts.svg(figure, about), "file": path.name, "about": about, "under": under,
            "width": width}  # fmt: skip


def _highlights(rows: list[Row]) -> list[tuple[str, str, str]]:
    """(title, row, value) of the boxes at the top."""
    scored = [row for row in rows if row.quality is not None]
    if not scored:
        return []
    boxes = [("best quality", scored[0].name, quality_text(scored[0].quality))]
    for what, attribute, text in (
        ("least memory", "memory", lambda row: f"{row.memory.mean:,.0f} MiB"),
        ("fastest training", "seconds", lambda row: f"{row.seconds.mean:,.1f} s"),
    ):
        known = [row for row in scored if getattr(row, attribute) is not None]
        if known:
            row = min(known, key=lambda row: getattr(row, attribute).mean)
            boxes.append((what, row.name, f"{text(row)}, quality {quality_text(row.quality)}"))
    if saved := [row for row in scored if row.first["artefact_bytes"]]:
        row = min(saved, key=lambda row: row.first["artefact_bytes"])
        size = bytes_text(row.first["artefact_bytes"])
        boxes.append(("smallest to save", row.name, f"{size}, quality {quality_text(row.quality)}"))
    return boxes


def _title(all_sections: list[Section]) -> str:
    tasks = list(dict.fromkeys(section.task for section in all_sections))
    return f"Fine-tuning methods on {', '.join(tasks)}" if tasks else "Fine-tuning methods: no finished run"


def _facts(found: Found) -> str | None:
    if not found.run_seconds:
        return None
    return f"The last comparison took {duration(found.seconds)}, {duration(found.run_seconds)} of it in its runs."


def _versions(found: Found) -> str:
    versions: dict[str, set[str]] = {}
    for run in found.runs:
        for name, version in (run.record.get("versions") or {}).items():
            versions.setdefault(name, set()).add(str(version))
    return ", ".join(f"{name} {' / '.join(sorted(values))}" for name, values in versions.items())


@functools.cache
def _environment(escape: bool) -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=escape,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {
        "quality": quality_text, "number": number_text, "bytes": bytes_text, "count": count_text, "seed": seed_text,
        "cell": _cell, "code": code_span, "prompt": prompt_text,
    }  # fmt: skip
    return environment


def _cell(text: Any) -> str:
    """Text for a cell of a Markdown table."""
    return re.sub(r"\s+", " ", str(text)).replace("|", "\\|")


def quality_text(number: Number | None) -> str:
    if number is None:
        return "-"
    return f"{number.mean:.4f}" + ("" if number.deviation is None else f" ± {number.deviation:.4f}")


def number_text(number: Number | None, digits: int = 1) -> str:
    if number is None:
        return "-"
    return f"{number.mean:,.{digits}f}" + ("" if number.deviation is None else f" ± {number.deviation:,.{digits}f}")


def count_text(value: float | None) -> str:
    return "-" if value is None else f"{value:,}"


def seed_text(seed: int | None) -> str:
    return "" if seed is None else f", seed {seed}"


def duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.1f} min"
