"""Find the features that the head reads, and compute them once for all training data (the encoder is frozen)."""

import logging
from typing import Any

import numpy as np
import torch
from transformers import Trainer

from hf_ft_ext.features import HeadReader
from hf_ft_ext.features.cache import cached_features, feature_bytes
from hf_ft_ext.features.rows import (
    LABELS,
    data_and_collator,
    inputs_of,
    labels_of,
    on_device,
    only_pads,
    read_in_order,
    sample_rows,
    stacked_labels,
)
from hf_ft_ext.gradientless.scoring.objectives import check_labels
from hf_ft_ext.gradientless.scoring.rows import FeatureRows
from hf_ft_ext.training.generators import generators_kept
from hf_ft_ext.training.runs.resources import preparation
from hf_ft_ext.training.weights.precision import autocast_of

logger = logging.getLogger(__name__)


def first_batch(trainer: Trainer) -> dict[str, torch.Tensor] | None:
    """A collated batch of the first training rows with their labels, on the model's device; `None` for a stream."""
    if not hasattr(trainer.train_dataset, "__len__"):
        return None
    dataset, collate = data_and_collator(trainer, trainer.train_dataset)
    with generators_kept():
        return on_device(collate(sample_rows(dataset)), trainer.args.device)


def find_reader(trainer: Trainer, batch: dict[str, torch.Tensor] | None, as_in_model: bool) -> HeadReader | None:
    """Return the reader of the head's inputs; `None` (and a log line) if candidates have to run the whole model.

    Args:
        as_in_model: the attribute of the reader, for a search that also runs the whole model.
    """
    if batch is None:
        logger.info("streamed training data: every candidate runs the whole model")
        return None
    inputs = inputs_of(batch, trainer.args.device)
    reader = HeadReader.find(trainer.model, inputs, autocast_of(trainer.args))
    if reader is None:
        name = type(trainer.model).__name__
        logger.info("the head of %s reads more than one vector per row: candidates run the whole model", name)
    else:
        reader.as_in_model = as_in_model
    return reader


def returns_rows_unchanged(trainer: Trainer) -> bool:
    """Whether data set and collator return each row unchanged: the same inputs each time, and the row's own label.

    This holds for transformers' padding collators and ours. Another one may mask tokens at random or create the
    labels, and a data set may change its rows at random (images), so the encoder runs on each batch in every step
    (with a log line).
    """
    if not only_pads(trainer.data_collator):
        name = getattr(trainer.data_collator, "__name__", type(trainer.data_collator).__name__)
        logger.info("data_collator %s may change rows from batch to batch: the encoder runs in every step", name)
        return False
    dataset, collate = data_and_collator(trainer, trainer.train_dataset)
    with generators_kept():
        rows = sample_rows(dataset)
        twice, batch = zip(rows, sample_rows(dataset), strict=True), collate(rows)
    own = [row.get(LABELS, row.get("label")) for row in rows]
    if LABELS in batch and None not in own and not torch.equal(batch[LABELS].double(), stacked_labels(own).double()):
        logger.info("the collator takes other labels than the column %s: the encoder runs in every step", LABELS)
        return False
    if not all(_equal(row, again) for row, again in twice):
        logger.info("the training data gives other rows each time: the encoder runs in every step")
        return False
    return True


def feature_rows(trainer: Trainer, reader: HeadReader) -> FeatureRows | None:
    """Features and labels of the training data; `None` (and a log line) if they exceed `feature_cache_gb`.

    The first process of a machine computes them; the others wait and read its file.

    Raises:
        InputError: the cache cannot be read or written, or a row has no label.
    """
    args, dataset = trainer.args, trainer.train_dataset
    rows, collate = data_and_collator(trainer, dataset)
    size = feature_bytes(reader, len(dataset)) / 1e9
    if size > args.feature_cache_gb:
        logger.info(
            "features would take %.3g GB, more than feature_cache_gb=%g: the encoder runs in every step",
            size,
            args.feature_cache_gb,
        )
        return None
    labels = labels_of(rows)
    if trainer.objective is None:
        check_labels(trainer.model.config, labels)
    with preparation(trainer), args.main_process_first(desc="features"):
        features = cached_features(
            reader,
            rows,
            lambda start: read_in_order(
                reader.features,
                rows,
                collate,
                args.per_device_eval_batch_size,
                args.device,
                start=start,
            ),
            args.feature_cache_dir,
            args.disable_tqdm or not args.should_log,
            collate,
            args.per_device_eval_batch_size,
        )
    return FeatureRows(features, labels)


def _equal(row: dict[str, Any], again: dict[str, Any]) -> bool:
    def same(value: Any, other: Any) -> bool:
        return torch.equal(value, other) if isinstance(value, torch.Tensor) else bool(np.all(value == other))

    return all(same(value, again[key]) for key, value in row.items())
