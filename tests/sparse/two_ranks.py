"""Run by `test_trainer.py` on two processes: trains, and fails where the processes hold different weights."""

import sys
import time

import torch
from accelerate.utils import gather
from tiny import tiny_dataset, tiny_model, tiny_tokenizer

from hf_ft_ext import SparseTrainer, SparseTrainingArguments, sparse_layers

if __name__ == "__main__":
    torch.set_num_threads(1)
    args = SparseTrainingArguments(
        sys.argv[1],
        max_steps=6,
        per_device_train_batch_size=4,
        learning_rate=5e-3,
        sparse_density=0.05,
        sparse_basis_steps=3,
        sparse_basis_refresh_steps=4,
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
    for tensor in [*states, *bases, *(p.detach() for p in trainer.model.parameters())]:
        both = gather(tensor.reshape(1, -1).contiguous())
        assert both.shape[0] == 2 and torch.equal(both[0], both[1]), tensor.shape
    # gloo's threads abort a process that exits while they still hold a collective's tensors
    del tensor, both
    trainer.accelerator.wait_for_everyone()
    time.sleep(0.5)
    trainer.accelerator.end_training()
