"""Run by `test_trainer.py` on two processes: trains, and fails where the processes hold different weights."""

import os
import sys
import time

import torch
from accelerate.utils import gather
from tiny import tiny_dataset, tiny_model, tiny_tokenizer
from torch.utils.data import DataLoader

from hf_ft_ext import SparseTrainer, SparseTrainingArguments, sparse_layers
from hf_ft_ext.sparse.prepass import visit_gradients


class OwnLoader(SparseTrainer):
    """Each process reads rows of its own, in batches of its own size."""

    def get_train_dataloader(self):
        rank = self.args.process_index
        rows = [tiny_dataset(32)[i] for i in range(rank, 32, 2)]
        return DataLoader(rows, batch_size=4 - rank, collate_fn=self.data_collator)


def check_own_loader(trainer):
    """The pre-pass sees the mean loss over both processes' batches, and each process takes its steps."""
    layers, found = sparse_layers(trainer.model), []
    visit_gradients(trainer, layers, 2, lambda name, gradient: found.append((name, gradient)), "test")
    rank, model = trainer.args.process_index, tiny_model().eval()
    rows = [tiny_dataset(32)[i] for i in (*range(8 * rank, 8 * rank + 8, 2), *range(6 * rank + 1, 6 * rank + 7, 2))]
    model(**trainer.data_collator(rows)).loss.backward()
    assert [name for name, _ in found] == list(layers)
    for name, gradient in found:
        torch.testing.assert_close(gradient, model.get_submodule(name).weight.grad, rtol=1e-4, atol=1e-7)


def check_equal(tensors):
    for tensor in tensors:
        both = gather(tensor.detach().reshape(1, -1).contiguous())
        assert both.shape[0] == 2 and torch.equal(both[0], both[1]), tensor.shape


def check_adapter(folder, reference):
    """Processes with seeds of their own choose equal columns and train equal values, and the base has none of it."""
    rank = int(os.environ["RANK"])
    args = SparseTrainingArguments(
        folder, max_steps=4, per_device_train_batch_size=4, sparse_density=0.2, sparse_basis_steps=3, seed=42 + rank,
        save_strategy="no", report_to="none", use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    trainer = SparseTrainer(reference(), args, train_dataset=tiny_dataset(32), processing_class=tiny_tokenizer())
    trainer.train()
    columns = [b for name, b in trainer.model.named_buffers() if "sparse_grad_columns" in name]
    assert columns and all(b.any() for b in columns)
    check_equal([*columns, *trainer.model.parameters()])


if __name__ == "__main__":
    torch.set_num_threads(1)
    args = SparseTrainingArguments(
        sys.argv[1],
        max_steps=6,
        per_device_train_batch_size=4,
        learning_rate=5e-3,
        sparse_density=0.05,
        sparse_support="dynamic",
        sparse_basis_steps=3,
        sparse_basis_refresh_steps=4,
        seed=42 + int(os.environ["RANK"]),  # seeds of their own
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = SparseTrainer(tiny_model(), args, train_dataset=tiny_dataset(32), processing_class=tiny_tokenizer())
    assert args.world_size == 2
    trainer.train()
    layers = sparse_layers(trainer.model).values()
    states = [trainer.optimizer.optimizer.state[layer.weight]["indices"] for layer in layers]
    bases = [layer.basis.out_factor.contiguous() for layer in layers]
    check_equal([*states, *bases, *trainer.model.parameters()])
    check_adapter(sys.argv[1], tiny_model)
    check_own_loader(OwnLoader(tiny_model(), args, processing_class=tiny_tokenizer()))
    # gloo's threads abort a process that exits while they still hold a collective's tensors
    trainer.accelerator.wait_for_everyone()
    time.sleep(0.5)
    trainer.accelerator.end_training()
