"""The training examples of a pre-pass, in batches of similar length."""

from typing import Any

import torch
from datasets import Dataset
from transformers import Trainer

from hf_ft_ext.errors import InputError
from hf_ft_ext.training.generators import generators_kept
from hf_ft_ext.training.loader_batches import draws_own_batches, loader_rows
from hf_ft_ext.training.method_trainer import overridden


def prepass_batches(trainer: Trainer, examples: int, batch_size: int) -> list[dict[str, Any]]:
    """Batch `examples` random training rows, drawn from the trainer's seed, or all rows if there are fewer.

    Every process gets its share, which may be empty. Rows of similar length share a batch, which keeps padding low.
    If the trainer's data loader is overridden, the examples are the first ones that it gives.

    Raises:
        InputError: there is no training data.
    """
    data, args = trainer.train_dataset, trainer.args
    if data is None and not overridden(trainer, "get_train_dataloader"):
        raise InputError("the pre-pass needs training data; pass train_dataset (--do_train), or an adapter_plan")
    if draws_own_batches(trainer):
        return loader_rows(trainer, len(range(args.process_index, examples, args.world_size)), batch_size)
    collate = trainer.data_collator
    if isinstance(data, Dataset):
        data = trainer._remove_unused_columns(data, description="pre-pass")
    else:
        collate = trainer._get_collator_with_removed_columns(collate, description="pre-pass")
    with generators_kept():  # a data set or collator may draw at random
        if hasattr(data, "__len__"):
            order = torch.randperm(len(data), generator=torch.Generator().manual_seed(args.seed))[:examples].tolist()
            rows = [data[i] for i in order[args.process_index :: args.world_size]]
        else:
            first = [row for row, _ in zip(data, range(examples), strict=False)]
            rows = first[args.process_index :: args.world_size]
        rows.sort(key=_length, reverse=True)  # the longest first, so that running out of memory shows at once
        return [dict(collate(rows[i : i + batch_size])) for i in range(0, len(rows), batch_size)]


def _length(row: dict) -> int:
    return len(row["input_ids"]) if isinstance(row, dict) and "input_ids" in row else 0
