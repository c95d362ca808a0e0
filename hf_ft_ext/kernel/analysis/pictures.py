"""Plots of kernels and of comparisons with fine-tuning (the `pictures` extra)."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure


def heat_map(kernel: np.ndarray, labels: np.ndarray, path: Path) -> None:
    """Plot a kernel `[N, N]` with a diagonal of 1 and rows sorted by class, with lines between the classes."""
    figure, axes = _figure(5.4, 4.6)
    image = axes.imshow(kernel, cmap="viridis", vmin=float(kernel.min()), vmax=1, interpolation="nearest")
    figure.colorbar(image, ax=axes, label="kernel, diagonal scaled to 1")
    starts = np.flatnonzero(np.diff(labels)) + 0.5
    for position in starts:
        axes.axhline(position, color="white", linewidth=1)
        axes.axvline(position, color="white", linewidth=1)
    edges = np.concatenate([[-0.5], starts, [len(labels) - 0.5]])
    middles = (edges[:-1] + edges[1:]) / 2
    names = [str(int(label)) for label in labels[np.ceil(edges[:-1]).astype(int)]]
    axes.set_xticks(middles, names)
    axes.set_yticks(middles, names)
    axes.set_xlabel("examples, ordered by class")
    axes.set_ylabel("examples, ordered by class")
    figure.savefig(path, dpi=130)


def scatter(predicted: np.ndarray, actual: np.ndarray, error: float, path: Path) -> None:
    """Plot the actual change of each logit against the change by the expansion, `[n, c]` each."""
    figure, axes = _figure(4.8, 4.4)
    ends = [float(min(predicted.min(), actual.min())), float(max(predicted.max(), actual.max()))]
    axes.plot(ends, ends, color="#7f7f7f", linewidth=1, label="linear")
    for scalar in range(actual.shape[1]):
        axes.scatter(predicted[:, scalar], actual[:, scalar], s=10, alpha=0.7, label=f"logit {scalar}")
    axes.set_xlabel("change by the first-order expansion at the start")
    axes.set_ylabel("change in fine-tuning")
    axes.set_title(f"relative squared error {error:.2g}")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=130)


def bars(scores: Mapping[str, Sequence[float]], path: Path) -> None:
    """Plot the mean and standard deviation of each variant's scores, and the scores of the single seeds."""
    figure, axes = _figure(1.2 + 1.0 * len(scores), 4.2)
    for position, values in enumerate(scores.values()):
        spread = float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
        axes.bar(position, np.mean(values), yerr=spread, capsize=4, color="#9ecae1", edgecolor="#3182bd")
        axes.scatter([position] * len(values), values, s=14, color="#08519c", zorder=3)
    axes.set_xticks(range(len(scores)), list(scores), rotation=30, ha="right")
    lowest = min(min(values) for values in scores.values())
    axes.set_ylim(max(0.0, lowest - 0.1), 1.0)
    axes.set_ylabel("test score (bar: mean, line: deviation, dots: seeds)")
    axes.grid(alpha=0.3, axis="y")
    figure.savefig(path, dpi=130)


def matrix(values: np.ndarray, names: Sequence[str], path: Path) -> None:
    """Plot a matrix of shares in [0, 1] between variants, with the values in its cells."""
    figure, axes = _figure(2.4 + 0.8 * len(names), 1.8 + 0.8 * len(names))
    axes.imshow(values, cmap="Blues", vmin=0.5, vmax=1.2)
    for i, row in enumerate(values):
        for j, value in enumerate(row):
            axes.text(j, i, f"{value:.2f}", ha="center", va="center")
    axes.set_xticks(range(len(names)), names, rotation=30, ha="right")
    axes.set_yticks(range(len(names)), names)
    axes.set_title("share of test rows with the same prediction")
    figure.savefig(path, dpi=130)


def _figure(width: float, height: float) -> tuple[Figure, matplotlib.axes.Axes]:
    with matplotlib.rc_context({"font.size": 9}):
        figure = Figure(figsize=(width, height), layout="constrained")
        return figure, figure.subplots()
