"""Data loaders of cached features, and of batches that every process reads as a whole."""

import torch
from accelerate.data_loader import prepare_data_loader
from torch.utils.data import DataLoader, Dataset
from transformers import Trainer

from hf_ft_ext.errors import InputError
from hf_ft_ext.features.rows import LABELS, data_and_collator


class FeatureRows(Dataset):
    """Data set of cached features and labels; a batch is fetched at once, without a collator.

    Args:
        features: `[rows, hidden]`, in memory or memory-mapped.
        labels: `[rows]`.
    """

    def __init__(self, features: torch.Tensor, labels: torch.Tensor):
        self.features, self.labels = features, labels

    def __len__(self) -> int:
        return len(self.features)

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        return {"features": self.features[i], LABELS: self.labels[i]}

    def __getitems__(self, indices: list[int]) -> dict[str, torch.Tensor]:
        rows = torch.as_tensor(indices)
        return {"features": self.features[rows], LABELS: self.labels[rows]}


def train_dataloader(trainer: Trainer, features: FeatureRows | None, whole_batches: bool) -> DataLoader:
    """The training dataloader, in the order of `Trainer`'s sampler.

    Args:
        features: rows to load; `None` = the training data themselves.
        whole_batches: every process gets the rows of all processes, in the order of a single-process run.

    Raises:
        InputError: the batches are to be balanced by the lengths of their rows, for each process.
    """
    args = trainer.args
    if args.train_sampling_strategy == "batch_rebalance":
        why = "cached features have none" if features is not None else "all processes read the same rows"
        raise InputError(
            f"train_sampling_strategy=batch_rebalance divides rows among processes by their lengths, and {why}; leave "
            "it out"
        )
    order = trainer._get_train_sampler(trainer.train_dataset)
    if features is None:
        dataset, collate = data_and_collator(trainer, trainer.train_dataset)
    else:
        dataset, collate = features, _as_fetched
    loader = DataLoader(
        dataset,
        batch_size=trainer._train_batch_size * (args.world_size if whole_batches else 1),
        sampler=order,
        collate_fn=collate,
        drop_last=args.dataloader_drop_last,
        num_workers=0 if features is not None else args.dataloader_num_workers,
        pin_memory=args.dataloader_pin_memory,
    )
    accelerator = trainer.accelerator
    if not whole_batches:
        return accelerator.prepare(loader)
    return prepare_data_loader(
        loader,
        accelerator.device,
        num_processes=1,
        process_index=0,
        put_on_device=True,
        rng_types=list(accelerator.rng_types or ()),
        use_seedable_sampler=accelerator.use_seedable_sampler,
        data_seed=accelerator.dataloader_config.data_seed,
    )


def _as_fetched(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return batch
