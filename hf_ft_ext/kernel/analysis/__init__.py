"""Checks of the kernel view of fine-tuning: contrast of classes, linearity of training, agreement of predictions."""

import csv
import json
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import nn

from hf_ft_ext.errors import InputError
from hf_ft_ext.per_example.capture import Function
from hf_ft_ext.per_example.outputs import logits
from hf_ft_ext.per_example.state import Batch, batch_in, computing_in, evaluating

_STEP = 1e-4
_SCORES = ("accuracy", "f1", "matthews_correlation", "pearson")


def by_class(kernel: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sum a kernel `[N, C, N, C]` over equal scalars, scale its diagonal to 1, and sort its rows by class.

    An example without gradients, whose diagonal entry is 0, gives a row and a column of NaN.

    Returns:
        `[N, N]` in the order of the labels, and the sorted labels.
    """
    order = np.argsort(labels, kind="stable")
    # S[i, j] = sum_c K[i, c, j, c], divided by sqrt(S[i, i] S[j, j])
    matrix = np.einsum("icjc->ij", kernel)[np.ix_(order, order)]
    size = np.sqrt(np.abs(matrix.diagonal()))
    return matrix / size[:, None] / size, np.asarray(labels)[order]


def class_contrast(matrix: np.ndarray, labels: np.ndarray) -> tuple[float, float]:
    """Mean off-diagonal entry of a kernel within classes, and between classes; NaN where no two examples are so."""
    same = labels[:, None] == labels
    off = ~np.eye(len(labels), dtype=bool)
    return float(matrix[same & off].mean()), float(matrix[~same].mean())


@torch.no_grad()
def linearization(
    start: nn.Module, trained: nn.Module, batch: Batch, function: Function | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """The change of the scalars of `batch` in training, and its first-order expansion at the start.

    Args:
        start, trained: the model before and after training; the same class, with the same parameter names.
        batch: examples.
        function: maps model and batch to scalars; default: the logits.

    Returns:
        `f(trained) - f(start)` and `<grad f(start), trained - start>`, both `[n, c]`; the latter is a central
        difference along the change, in float64.

    Raises:
        InputError: the models have different parameters.
    """
    function = function or logits
    after = {name: p.detach() for name, p in trained.named_parameters()}
    if after.keys() != dict(start.named_parameters()).keys() or any(
        after[name].shape != p.shape for name, p in start.named_parameters()
    ):
        raise InputError("the two models have different parameters; pass the model that training started from")
    batch = batch_in({key: value for key, value in batch.items() if key != "labels"}, torch.float64)
    with evaluating(start), computing_in(start, torch.float64):
        before = {name: p.data for name, p in start.named_parameters()}

        def at(share: float) -> torch.Tensor:
            for name, p in start.named_parameters():
                p.data = before[name] + share * (after[name].double() - before[name])
            found = function(start, batch)
            return found[:, None] if found.ndim == 1 else found

        try:
            # <grad f, d> = (f(theta + h d) - f(theta - h d)) / (2 h) + O(h^2), with d = trained - start
            slope = (at(_STEP) - at(-_STEP)) / (2 * _STEP)
            change = at(1.0) - at(0.0)
        finally:
            for name, p in start.named_parameters():
                p.data = before[name]
    return change.cpu().numpy(), slope.cpu().numpy()


def linearization_error(change: np.ndarray, slope: np.ndarray) -> float:
    """Mean squared difference relative to the mean squared change: 0 if training was linear, NaN without a change."""
    return float(np.mean((change - slope) ** 2) / np.mean(change**2))


def between_classes(values: np.ndarray) -> np.ndarray:
    """Logits `[n, c]` minus their mean over classes, which does not affect predictions; one scalar is unchanged."""
    return values - values.mean(1, keepdims=True) if values.shape[1] > 1 else values


def scores_by_seed(folder: Path, names: Sequence[str]) -> dict[str, list[float]]:
    """The test scores of each variant, one per seed (the run that is best on the dev split, if a seed has several).

    Raises:
        InputError: a variant has no runs in `folder`.
    """
    return {name: [run["score"] for run in _runs(folder, name).values()] for name in names}


def agreements(folder: Path, names: Sequence[str]) -> np.ndarray:
    """Share of test rows for which two variants predict the same, averaged over common seeds: `[names, names]`.

    Raises:
        InputError: a variant has no runs, or two have no seed in common.
    """
    runs = {name: _runs(folder, name) for name in names}
    found = np.eye(len(names))
    for i, a in enumerate(names):
        for j, b in enumerate(names[:i]):
            seeds = runs[a].keys() & runs[b].keys()
            if not seeds:
                raise InputError(f"{folder}: {a} and {b} have no seed in common; finish the study")
            shares = [np.mean(np.array(_predictions(runs[a][s])) == _predictions(runs[b][s])) for s in seeds]
            found[i, j] = found[j, i] = float(np.mean(shares))
    return found


def _runs(folder: Path, name: str) -> dict[int, dict]:
    best: dict[int, dict] = {}
    for path in sorted(folder.glob(f"{name}-*/run.json")):
        matched = re.fullmatch(rf"{re.escape(name)}-(\d+)(-[\d.e+-]+)?", path.parent.name)
        if matched is None:
            continue
        metrics = json.loads(path.read_text(encoding="utf-8"))["metrics"]
        dev = next((metrics[f"eval_{key}"], metrics[f"test_{key}"]) for key in _SCORES if f"test_{key}" in metrics)
        run = {"dev": (dev[0], -metrics["eval_loss"]), "score": dev[1], "folder": path.parent}
        seed = int(matched[1])
        if seed not in best or run["dev"] > best[seed]["dev"]:
            best[seed] = run
    if not best:
        raise InputError(f"{folder} holds no finished run of {name}; pass the study's folder and its variants")
    return best


def _predictions(run: dict) -> list[str]:
    with open(run["folder"] / "predictions.tsv", newline="", encoding="utf-8") as file:
        return [row["prediction"] for row in csv.DictReader(file, delimiter="\t")]
