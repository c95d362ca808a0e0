"""Find the features that the head reads, and compute them once for all training data (the encoder is frozen)."""

import logging

import torch
from transformers import DataCollatorWithPadding, DefaultDataCollator, Trainer, default_data_collator

from hf_ft_ext.features import HeadReader
from hf_ft_ext.features.cache import cached_features, feature_bytes
from hf_ft_ext.features.rows import SAMPLE, data_and_collator, inputs_of, labels_of, read_in_order
from hf_ft_ext.gradientless.scoring.rows import FeatureRows, in_order
from hf_ft_ext.prompts.collator import ContextCollator
from hf_ft_ext.training.runs.resources import preparation

logger = logging.getLogger(__name__)

_PADDING = (DataCollatorWithPadding, DefaultDataCollator, ContextCollator)


def find_reader(trainer: Trainer) -> HeadReader | None:
    """Return the reader of the head's inputs; `None` (and a log line) if candidates have to run the whole model."""
    if not hasattr(trainer.train_dataset, "__len__"):
        logger.info("streamed training data: every candidate runs the whole model")
        return None
    rows = min(SAMPLE, len(trainer.train_dataset))
    return reader_of_batch(trainer, next(in_order(trainer, trainer.train_dataset, rows)))


def reader_of_batch(trainer: Trainer, batch: dict[str, torch.Tensor]) -> HeadReader | None:
    """As `find_reader`, from a training batch."""
    reader = HeadReader.find(trainer.model, inputs_of(batch, trainer.args.device))
    if reader is None:
        name = type(trainer.model).__name__
        logger.info("the head of %s reads more than one vector per row: candidates run the whole model", name)
    return reader


def returns_rows_unchanged(trainer: Trainer) -> bool:
    """Whether the collator returns each row unchanged: the same inputs each time, and the label of the data set.

    This holds for transformers' padding collators and ours. Another one may mask tokens at random or create the
    labels, so the encoder runs on each batch in every step (with a log line).
    """
    if type(trainer.data_collator) in _PADDING or trainer.data_collator is default_data_collator:
        return True
    name = getattr(trainer.data_collator, "__name__", type(trainer.data_collator).__name__)
    logger.info("data_collator %s may change rows from batch to batch: the encoder runs in every step", name)
    return False


def feature_rows(trainer: Trainer, reader: HeadReader) -> FeatureRows | None:
    """Features and labels of the training data; `None` (and a log line) if they exceed `feature_cache_gb`.

    The first process of a machine computes them; the others wait and read its file.

    Raises:
        InputError: the cache cannot be read or written, or a row has no label.
    """
    args, dataset = trainer.args, trainer.train_dataset
    size = feature_bytes(reader, len(dataset)) / 1e9
    if size > args.feature_cache_gb:
        logger.info(
            "features would take %.3g GB, more than feature_cache_gb=%g: the encoder runs in every step",
            size,
            args.feature_cache_gb,
        )
        return None
    labels = labels_of(dataset)
    with preparation(trainer), args.main_process_first(desc="features"):
        features = cached_features(
            reader,
            dataset,
            lambda start: read_in_order(
                reader.features,
                *data_and_collator(trainer, dataset),
                args.per_device_eval_batch_size,
                args.device,
                start=start,
            ),
            args.feature_cache_dir,
            args.disable_tqdm or not args.should_log,
        )
    return FeatureRows(features, labels)
