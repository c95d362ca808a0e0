"""Select some of a split's rows: the first ones, a random sample, or a stratified sample."""

import logging

import numpy as np
from datasets import ClassLabel, Dataset

from hf_ft_ext.arguments import FIRST, RANDOM, SAMPLES, STRATIFIED, DataArguments
from hf_ft_ext.data.few_shot import DEFAULT_SEED, draw_order
from hf_ft_ext.data.task_data import LABEL
from hf_ft_ext.errors import InputError

_LIMITS = ("max_train_samples", "max_eval_samples", "max_predict_samples")

logger = logging.getLogger(__name__)


def check_sampling(data_args: DataArguments) -> None:
    """Raise `InputError` if `max_*_samples` or `sample` is invalid or would have no effect."""
    for option in _LIMITS:
        limit = getattr(data_args, option)
        if limit is not None and limit < 1:
            raise InputError(f"--{option} {limit} must be 1 or more; leave it out to use all rows")
    if data_args.sample not in SAMPLES:
        raise InputError(f"--sample {data_args.sample!r} is unknown; choose from: {', '.join(SAMPLES)}")
    if data_args.sample == FIRST:
        return
    if data_args.max_train_samples is None and data_args.max_eval_samples is None:
        raise InputError(
            f"--sample {data_args.sample} draws the rows of --max_train_samples and --max_eval_samples; pass one of "
            "them with it, or leave it out"
        )
    if data_args.streaming and data_args.max_train_samples is not None:
        raise InputError(
            f"--sample {data_args.sample} draws from all training rows, which a stream does not hold; leave "
            "--streaming out"
        )


def draw_text(data_args: DataArguments, seed: int | None) -> str:
    """Return a description of how `sampled` draws; empty if it takes the first rows."""
    if data_args.sample == FIRST:
        return ""
    return f"{data_args.sample}, data_seed {DEFAULT_SEED if seed is None else seed}"


def sampled(split: str, data: Dataset, data_args: DataArguments, seed: int | None) -> Dataset:
    """Return the rows of `split` that `data_args` select, in their original order.

    Args:
        split: `train`, or any other name for validation data.
        data: all rows; if there is a label column, classes without a selected row are logged.
        data_args: `sample` and the limit are read.
        seed: seed of the draw; `None` = 13, as for few-shot splits.
    """
    option = "max_train_samples" if split == "train" else "max_eval_samples"
    limit = getattr(data_args, option)
    if limit is None or limit >= len(data):
        return data
    labels = np.asarray(data[LABEL][:]) if LABEL in data.column_names else None
    if data_args.sample == FIRST:
        rows = np.arange(limit)
    else:
        order = draw_order(range(len(data)), DEFAULT_SEED if seed is None else seed)
        if data_args.sample == RANDOM or labels is None:
            rows = order[:limit]
        elif labels.ndim > 1:
            raise InputError(
                f"--sample {STRATIFIED} needs one label per row, but this data has several; pass {RANDOM}"
            )
        elif isinstance(data.features[LABEL], ClassLabel):
            rows = _stratified_by_class(order, labels, limit)
        else:
            rows = _stratified_by_score(order, labels, limit)
    if labels is not None and isinstance(data.features[LABEL], ClassLabel):
        _warn_of_lost_classes(split, f"--{option} {limit}", data, labels, rows, data_args.sample)
    elif labels is not None and labels.ndim == 1 and 2 * np.ptp(labels[rows]) < np.ptp(labels):
        logger.warning(
            "--%s %d: the rows of split '%s' have scores from %g to %g, all rows from %g to %g; --sample %s draws "
            "from the whole scale",
            option,
            limit,
            split,
            labels[rows].min(),
            labels[rows].max(),
            labels.min(),
            labels.max(),
            STRATIFIED,
        )
    return data.select(np.sort(rows))


def _stratified_by_class(order: np.ndarray, labels: np.ndarray, n: int) -> np.ndarray:
    """Return `n` rows with the shares of the classes (largest remainders), at least one of each if `n` allows it."""
    classes, counts = np.unique(labels, return_counts=True)
    exact = counts * (n / counts.sum())
    taken = np.floor(exact).astype(np.int64)
    for i in np.argsort(-(exact - taken), kind="stable")[: n - taken.sum()]:
        taken[i] += 1
    while n >= len(classes) and (taken == 0).any():
        taken[np.argmax(taken)] -= 1
        taken[np.argmin(taken)] += 1
    parts = [order[labels[order] == name][:k] for name, k in zip(classes, taken, strict=True)]
    return np.concatenate(parts)


def _stratified_by_score(order: np.ndarray, scores: np.ndarray, n: int) -> np.ndarray:
    """Return `n` rows evenly spaced in the order of the scores; rows of equal score are in the order of the draw."""
    by_score = order[np.argsort(scores[order], kind="stable")]
    middles = (np.arange(n) + 0.5) * (len(order) / n)
    return by_score[middles.astype(np.int64)]


def _warn_of_lost_classes(
    split: str, option: str, data: Dataset, labels: np.ndarray, rows: np.ndarray, sample: str
) -> None:
    names = data.features[LABEL].names
    lost = [names[i] for i in np.setdiff1d(labels, labels[rows])]
    if not lost:
        return
    there = len(np.unique(labels))
    advice = f"; --sample {STRATIFIED} draws from all" if sample != STRATIFIED and there <= len(rows) else ""
    logger.warning(
        "%s: the rows of split '%s' hold %d of %d classes, none of: %s%s",
        option,
        split,
        there - len(lost),
        there,
        ", ".join(lost[:10]) + (", ..." if len(lost) > 10 else ""),
        advice,
    )
