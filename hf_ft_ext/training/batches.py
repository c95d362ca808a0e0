"""Whether an epoch has a batch at all."""

from typing import Any

from transformers import TrainingArguments

from hf_ft_ext.errors import InputError


def check_full_batch(args: TrainingArguments, dataset: Any) -> None:
    """Raise `InputError` if `dataloader_drop_last` drops every batch: training would do nothing and look finished.

    Args:
        args: batch size, number of processes and `dataloader_drop_last` are read.
        dataset: the training data; one of unknown length passes.
    """
    if not args.dataloader_drop_last or not hasattr(dataset, "__len__"):
        return
    rows, batch = len(dataset), args.train_batch_size * args.world_size
    if 0 < rows < batch:
        size = f"a batch of {batch}" + (f" over {args.world_size} processes" if args.world_size > 1 else "")
        raise InputError(
            f"dataloader_drop_last drops every batch: the training data has {rows} rows, fewer than {size}; pass a "
            f"per_device_train_batch_size of {max(1, rows // args.world_size)} or less, or leave it out"
        )
