"""Plots of adapter plans."""

import importlib.util
import logging
import math
import os
from pathlib import Path

from hf_ft_ext.errors import InputError
from hf_ft_ext.fisher.plan import AdapterPlan

logger = logging.getLogger(__name__)

PICTURE_FILE = "adapter_plan.png"


def draw_plan(plan: AdapterPlan, path: str | os.PathLike) -> Path:
    """Plot the scores by layer and candidate as a PNG, with the choice marked.

    Colours are scaled per layer from its lowest to its highest score, because candidates are compared within a layer.

    Args:
        path: the file, or a folder, in which it is called `adapter_plan.png`.

    Raises:
        InputError: the plan holds no scores, or matplotlib is not installed.
    """
    if not plan.scores:
        raise InputError("the plan holds no scores to draw; only a pre-pass computes them (fisher_mode=select)")
    if importlib.util.find_spec("matplotlib") is None:
        raise InputError("matplotlib is not installed; run pip install 'hf_ft_ext[pictures]'")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    path = Path(path)
    path = path / PICTURE_FILE if path.is_dir() else path
    layers, names = sorted(plan.scores), list(plan.candidates)
    figure = Figure(figsize=(1.5 + 0.62 * len(layers), 1.3 + 0.5 * len(names)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    shares = [[math.nan] * len(layers) for _ in names]
    for column, layer in enumerate(layers):
        own = plan.scores[layer]
        low, high = min(own.values()), max(own.values())
        for row, name in enumerate(names):
            if name in own:
                shares[row][column] = (own[name] - low) / (high - low) if high > low else 1.0
    axes.imshow(shares, cmap="Blues", aspect="auto", vmin=0, vmax=1.4)
    for column, layer in enumerate(layers):
        for row, name in enumerate(names):
            if name not in plan.scores[layer]:
                continue
            chosen = plan.choice.get(layer) == name
            axes.text(column, row, f"{plan.scores[layer][name]:.1e}", ha="center", va="center", fontsize=6,
                      fontweight="bold" if chosen else "normal")  # fmt: skip
            if chosen:
                from matplotlib.patches import Rectangle

                box = Rectangle((column - 0.47, row - 0.47), 0.94, 0.94, fill=False, edgecolor="black", linewidth=2)
                axes.add_patch(box)
    axes.set_xticks(range(len(layers)), labels=[str(layer) for layer in layers])
    axes.set_yticks(range(len(names)), labels=names)
    axes.set_xlabel("layer")
    axes.set_title(f"criterion: {plan.criterion}; framed: chosen", fontsize=9)
    figure.savefig(path, dpi=150)
    return path


def draw_if_possible(plan: AdapterPlan, folder: str | os.PathLike) -> None:
    """Call `draw_plan` for `folder` if matplotlib is installed."""
    if importlib.util.find_spec("matplotlib") is None:
        logger.info("No picture of the plan: matplotlib is not installed (pip install 'hf_ft_ext[pictures]').")
        return
    draw_plan(plan, folder)
