"""Plots of the sparsity of gradients (for `watch.SparsityWatch`)."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib
import torch
from matplotlib.figure import Figure

from hf_ft_ext.sparse.sparsity.measure import FRACTIONS, FRESH, RAW, START
from hf_ft_ext.training.runs.plan import fold_layer_numbers

_COLORS = {RAW: "#7f7f7f", START: "#1f77b4", FRESH: "#d95f02"}
_BAND = "line: mean, band: range over layers"
_MARKERS = {RAW: "o", START: "s", FRESH: "^"}
_ONE_PERCENT = FRACTIONS.index(min(FRACTIONS, key=lambda fraction: abs(fraction - 0.01)))
Steps = Mapping[int, Mapping[str, Mapping[str, list[float]]]]


def draw_sparsity(steps: Steps, folder: Path) -> list[Path]:
    """Write three plots into `folder` and return their paths.

    `energy_by_fraction.png`: energy against the fraction of entries kept, for the first and last measurement, mean and
    range over the layers of a kind. `energy_by_layer.png`: energy in 1 % of the entries by layer, for the same two
    measurements. `energy_by_step.png`: the same energy by training step, mean and range over layers.

    Args:
        steps: what `measure_sparsity` returned, by optimizer step.
    """
    first = steps[min(steps)]
    kinds: dict[str, list[str]] = {}
    for name in first[RAW]:
        kinds.setdefault(fold_layer_numbers(name), []).append(name)
    drawn = {
        "energy_by_fraction.png": _by_fraction(steps, kinds),
        "energy_by_layer.png": _by_layer(steps, kinds),
        "energy_by_step.png": _by_step(steps, kinds),
    }
    paths = [folder / name for name in drawn]
    for path, figure in zip(paths, drawn.values(), strict=True):
        figure.savefig(path, dpi=130)
    return paths


def _panels(rows: list[str], columns: list[str]):
    with matplotlib.rc_context({"font.size": 9}):
        figure = Figure(figsize=(4.2 * len(columns) + 0.8, 3.1 * len(rows) + 0.5), layout="constrained")
        axes: Any = figure.subplots(len(rows), len(columns), sharex="col", sharey=True, squeeze=False)
    for i, row in enumerate(rows):
        for j, column in enumerate(columns):
            axes[i][j].grid(alpha=0.3)
            axes[i][j].set_ylim(0, 1.02)
            axes[i][j].set_title(" \N{MIDDLE DOT} ".join(word for word in (_short(row), column) if word))
    return figure, axes


def _short(kind: str) -> str:
    """Return a kind's name without layer numbers, from the part after the list of layers on."""
    return ".".join(part for part in kind.split(".") if part != "*").split("layer.")[-1]


def _rows(by_layer: Mapping[str, list[float]], names: list[str]) -> torch.Tensor:
    return torch.tensor([by_layer[name] for name in names])


def _band(axis, x, values: torch.Tensor, system: str) -> None:
    """Plot the mean over layers as a line and their range as a band; `values` of shape (layers, points)."""
    axis.fill_between(x, values.amin(0), values.amax(0), color=_COLORS[system], alpha=0.15, linewidth=0)
    axis.plot(x, values.mean(0), color=_COLORS[system], marker=_MARKERS[system], markersize=3, label=system)


def _by_fraction(steps: Steps, kinds: Mapping[str, list[str]]) -> Figure:
    shown = sorted({min(steps), max(steps)})
    figure, axes = _panels(list(kinds), [f"step {step}" for step in shown])
    for i, names in enumerate(kinds.values()):
        for axis, step in zip(axes[i], shown, strict=True):
            for system, by_layer in steps[step].items():
                if system != FRESH or step != shown[0]:  # at the start both bases are the same
                    _band(axis, FRACTIONS, _rows(by_layer, names), system)
            axis.set_xscale("log")
            axis.axvline(0.01, color="black", linewidth=0.7, linestyle=":")
    for axis in axes[-1]:
        axis.set_xlabel("fraction of entries kept (dotted: 1 %)")
    return _finish(figure, axes, f"gradient energy in the largest entries ({_BAND})")


def _by_layer(steps: Steps, kinds: Mapping[str, list[str]]) -> Figure:
    shown = sorted({min(steps), max(steps)})
    figure, axes = _panels(list(kinds), [f"step {step}" for step in shown])
    for i, names in enumerate(kinds.values()):
        numbers = [int((re.findall(r"\d+", name) or [0])[0]) for name in names]
        for axis, step in zip(axes[i], shown, strict=True):
            for system, by_layer in steps[step].items():
                if system != FRESH or step != shown[0]:
                    at_one = _rows(by_layer, names)[:, _ONE_PERCENT]
                    axis.plot(numbers, at_one, color=_COLORS[system], marker=_MARKERS[system], label=system)
            axis.set_xticks(numbers)
    for axis in axes[-1]:
        axis.set_xlabel("layer")
    return _finish(figure, axes, "gradient energy in 1 % of the entries")


def _by_step(steps: Steps, kinds: Mapping[str, list[str]]) -> Figure:
    figure, axes = _panels([""], [_short(kind) for kind in kinds])
    order = sorted(steps)
    for axis, names in zip(axes[0], kinds.values(), strict=True):
        for system in steps[order[0]]:
            values = [_rows(steps[step][system], names)[:, _ONE_PERCENT] for step in order]
            _band(axis, order, torch.stack(values, 1), system)
        axis.set_xlabel("optimizer step")
    return _finish(figure, axes, f"gradient energy in 1 % of the entries ({_BAND})")


def _finish(figure: Figure, axes, title: str) -> Figure:
    for row in axes:
        row[0].set_ylabel("energy captured")
    handles, labels = axes[0][-1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
    figure.suptitle(title)
    return figure
