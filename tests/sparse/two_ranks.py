"""Run by `test_trainer.py` on two processes: trains, and fails where the processes hold different weights."""

import os
import sys
import time
from unittest import mock

import torch
from accelerate.utils import gather
from peft import get_peft_model
from spans import principal_angle
from tiny import tiny_dataset, tiny_model, tiny_tokenizer
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader

from hf_ft_ext import SparseGradConfig, SparseTrainer, SparseTrainingArguments, compute_bases, sparse_layers
from hf_ft_ext.adapters.sparse_grad.model import sparse_grad_layers
from hf_ft_ext.adapters.sparse_grad.sketches import Sketches
from hf_ft_ext.sparse.prepass import for_each_gradient


class OwnLoader(SparseTrainer):
    """Each process reads rows of its own, in batches of its own size."""

    def get_train_dataloader(self):
        rank = self.args.process_index
        rows = [tiny_dataset(32)[i] for i in range(rank, 32, 2)]
        return DataLoader(rows, batch_size=4 - rank, collate_fn=self.data_collator)


def check_own_loader(trainer):
    """The pre-pass sees the mean loss over both processes' batches, and each process takes its steps."""
    layers, found = sparse_layers(trainer.model), []
    for_each_gradient(trainer, layers, 2, lambda name, gradient: found.append((name, gradient)), "test")
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


def ragged(rank, seed):
    """A batch of so many rows and tokens that either process takes another way to the sums of the pre-pass."""
    shape = ((2, 6), (8, 16))[rank]
    ids = torch.randint(5, 30, shape, generator=torch.Generator().manual_seed(10 * seed + rank))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.arange(shape[0]) % 2}


def mean_loss(model, seed):
    return sum(model(**ragged(rank, seed)).loss for rank in range(2)) / 2


def without_dropout():
    return tiny_model(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0).double()


def layers_of(adapted):
    """The layers with adapters by their names in the plain model."""
    return {name.removeprefix("base_model.model."): layer for name, layer in sparse_grad_layers(adapted)}


def check_ragged_bases():
    """The columns are the leading directions of the mean gradients, by one plain backward pass for each batch."""
    rank, plain = int(os.environ["RANK"]), without_dropout()
    adapted = get_peft_model(without_dropout(), SparseGradConfig(task_type="SEQ_CLS", n_params=4))
    rows_are_cheaper = Sketches.rows_are_cheaper
    with mock.patch.object(Sketches, "rows_are_cheaper", autospec=True, side_effect=rows_are_cheaper) as choice:
        compute_bases(adapted, [ragged(rank, seed) for seed in range(3)])
    # Four layers, three batches; in the last two layers one token of each row has a gradient, which is few anyway.
    chosen = [rows_are_cheaper(*call.args) for call in choice.call_args_list]
    assert (len(chosen), sum(chosen)) == (12, (12, 6)[rank])
    check_columns(adapted, plain, [mean_loss(plain, seed) for seed in range(3)], 1e-2)


def check_columns(adapted, plain, losses, angle):
    """Compare columns with the leading directions of the gradients of `losses` of the plain model."""
    sums = dict.fromkeys(layers_of(adapted), (0, 0))
    for loss in losses:
        plain.zero_grad()
        loss.backward()
        for name, (out, inp) in sums.items():
            g = plain.get_submodule(name).weight.grad
            sums[name] = (out + g @ g.T, inp + g.T @ g)
    for name, layer in layers_of(adapted).items():
        for gram, found in zip(sums[name], layer.sparse_grad_columns["default"].buffers(), strict=True):
            assert principal_angle(found, torch.linalg.eigh(gram).eigenvectors.flip(1)[:, : found.shape[1]]) < angle


class Routed(torch.nn.Module):
    """Two experts, of which a batch reaches one."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.experts = torch.nn.ModuleList(torch.nn.Linear(6, 5) for _ in range(2)).double()

    def forward(self, x, expert):
        return self.experts[expert](x).square().mean()


def check_experts():
    """Processes whose batches reach different experts get the directions of the mean gradients."""
    rank, plain = int(os.environ["RANK"]), Routed()
    batches = [
        [(torch.randn(4, 6, generator=torch.Generator().manual_seed(10 * seed + r)).double(), (seed + r) % 2)
         for seed in range(3)] for r in range(2)
    ]  # fmt: skip
    adapted = get_peft_model(Routed(), SparseGradConfig(target_modules=["experts.0", "experts.1"], n_params=4))
    compute_bases(adapted, batches[rank], lambda model, batch: model(*batch))
    losses = [(plain(*one) + plain(*other)) / 2 for one, other in zip(*batches, strict=True)]
    check_columns(adapted, plain, losses, 1e-6)


def check_fully_sharded():
    """FSDP2: columns are those of whole weights, and values those of a process that takes the mean loss."""
    rank, config = int(os.environ["RANK"]), {"task_type": "SEQ_CLS", "n_params": 4}
    alone, sharded = (get_peft_model(without_dropout(), SparseGradConfig(**config)) for _ in range(2))
    mesh = init_device_mesh("cpu", (2,))
    for block in (*sharded.base_model.model.bert.encoder.layer, sharded):
        fully_shard(block, mesh=mesh)
    for model in (alone, sharded):
        compute_bases(model, [ragged(rank, seed) for seed in range(3)])
    for name, layer in layers_of(alone).items():
        ours, theirs = (found.sparse_grad_columns["default"] for found in (layer, layers_of(sharded)[name]))
        for one, two in zip(ours.buffers(), theirs.buffers(), strict=True):
            assert principal_angle(one, two) < 1e-6
        ours.fill(theirs.out_columns, theirs.in_columns)  # signs may differ
    for model, loss in ((alone, mean_loss), (sharded, lambda model, seed: model(**ragged(rank, seed)).loss)):
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
        for seed in range(3):
            optimizer.zero_grad()
            loss(model, seed).backward()
            optimizer.step()
    for name, layer in layers_of(alone).items():
        values = layer.sparse_grad_values["default"]
        assert values.abs().max() > 1e-6
        torch.testing.assert_close(layers_of(sharded)[name].sparse_grad_values["default"].full_tensor(), values)


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
    check_ragged_bases()
    check_experts()
    check_fully_sharded()
    check_own_loader(OwnLoader(tiny_model(), args, processing_class=tiny_tokenizer()))
    # gloo's threads abort a process that exits while they still hold a collective's tensors
    trainer.accelerator.wait_for_everyone()
    time.sleep(0.5)
    trainer.accelerator.end_training()
