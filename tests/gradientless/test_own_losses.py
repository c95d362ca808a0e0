"""A classifier's own loss is searched, however its first batch, its head and the other processes look."""

import os
import time
from pathlib import Path

import pytest
import torch
from heads import make
from processes import two_ranks
from tiny import one_layer_model, tiny_dataset, tiny_model
from torch.nn import functional

from hf_ft_ext.gradientless.scoring.full_models import has_usual_loss

WEIGHTS = torch.tensor([1.0, 20.0])
MULTI = {"problem_type": "multi_label_classification"}
LOSSES = {
    "weighted": (lambda logits, labels: functional.cross_entropy(logits, labels, WEIGHTS.to(logits.dtype)), {}),
    "smoothed": (lambda logits, labels: functional.cross_entropy(logits, labels, label_smoothing=0.3), {}),
    "positive": (
        lambda logits, labels: functional.binary_cross_entropy_with_logits(logits, labels, pos_weight=WEIGHTS),
        MULTI,
    ),
    "rounded": (lambda logits, labels: functional.smooth_l1_loss(logits[:, 0], labels), {"num_labels": 1}),
    "usual": (functional.cross_entropy, {}),
    "usual of several": (functional.binary_cross_entropy_with_logits, MULTI),
    "usual of numbers": (lambda logits, labels: functional.mse_loss(logits[:, 0], labels), {"num_labels": 1}),
}


def with_loss(loss, zero_head=False, **config):
    class OwnForSequenceClassification(type(one_layer_model())):
        def forward(self, input_ids=None, attention_mask=None, labels=None, **kwargs):
            output = super().forward(input_ids, attention_mask, **kwargs)
            if labels is not None:
                output.loss = loss(output.logits, labels)
            return output

    model = tiny_model(**config)
    model.__class__ = OwnForSequenceClassification
    if zero_head:
        torch.nn.init.zeros_(model.classifier.weight)
    return model.eval()


def batch_of(model, n=6):
    """Rows of one class, or without any label, or whose residuals are below 1."""
    ids = torch.randint(5, 30, (n, 8), generator=torch.Generator().manual_seed(0))
    config = model.config
    labels = torch.zeros(n, dtype=torch.long)
    if config.num_labels == 1:
        labels = torch.zeros(n)
    elif config.problem_type is not None:
        labels = torch.zeros(n, config.num_labels)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


@pytest.mark.parametrize("zero_head", [False, True])
@pytest.mark.parametrize("name", LOSSES)
def test_own_losses_are_told_from_the_usual_ones(name, zero_head):
    loss, config = LOSSES[name]
    model = with_loss(loss, zero_head, **config)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    batch = batch_of(model)
    logits, problem = model(**batch).logits, model.config.problem_type
    assert has_usual_loss(model, batch) is name.startswith("usual")
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert torch.equal(model(**batch).logits, logits) and model.config.problem_type == problem


@pytest.mark.parametrize("target", ["head", "all"])
def test_sorted_rows_and_a_zero_head_do_not_hide_class_weights(tmp_path, target):
    """The head moves as by the weighted loss: a step of SPSA, written out for that loss."""
    weighted = LOSSES["weighted"][0]
    model = with_loss(weighted, zero_head=True).double()
    data = tiny_dataset(32).sort("labels")
    settings = {"search_method": "spsa", "search_target": target, "max_steps": 1, "learning_rate": 0.1}
    trainer = make(tmp_path, model, data, lr_scheduler_type="constant", **settings)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    losses, compute = [], trainer.compute_loss

    def noted(model, inputs, *args, **kwargs):
        found = compute(model, inputs, *args, **kwargs)
        logits = model(**{k: v for k, v in inputs.items() if k != "labels"}).logits
        losses.append((float(found), float(weighted(logits, inputs["labels"]))))
        return found

    trainer.compute_loss = noted
    trainer.train()
    assert len(losses) == 2 and losses[0][0] != losses[1][0]
    assert all(found == pytest.approx(own, rel=1e-12) for found, own in losses)
    slope = (losses[0][1] - losses[1][1]) / (2 * trainer.args.search_eps)
    assert trainer.optimizer.optimizer.record[0][0][0] == pytest.approx(slope, rel=1e-9)
    assert any(not torch.equal(p, start[name]) for name, p in trainer.searched.items())


# --- two processes ------------------------------------------------------------------------------------------

SEEN = 7  # the token whose rows have a loss of their own


class UnusualForSequenceClassification(type(one_layer_model())):
    """Its loss is the usual one, plus the share of rows with the token `SEEN`."""

    def forward(self, input_ids=None, attention_mask=None, labels=None, **kwargs):
        output = super().forward(input_ids, attention_mask, labels=labels, **kwargs)
        if labels is not None:
            output.loss = output.loss + (input_ids == SEEN).any(1).double().mean()
        return output


def run(argv: list[str]) -> None:
    """As one of two processes: batches of the second one alone show that the loss is not the usual one."""
    rank, folder = int(os.environ["RANK"]), Path(argv[0])
    model = one_layer_model().double()
    model.__class__ = UnusualForSequenceClassification
    batch = batch_of(model)
    batch["input_ids"] = torch.where(batch["input_ids"] == SEEN, SEEN + 1, batch["input_ids"])
    if rank:
        batch["input_ids"][0, 1] = SEEN
    trainer = make(
        folder, model, max_steps=1, search_method="spsa", search_target="all", per_device_train_batch_size=6
    )
    trainer.get_train_dataloader = lambda: torch.utils.data.DataLoader([batch], batch_size=None)
    loss = trainer.train().training_loss
    assert trainer._by_model_loss(), f"process {rank} takes the usual loss"
    with torch.no_grad():
        logits = model.eval()(**{key: value for key, value in batch.items() if key != "labels"}).logits
    assert 0.05 < loss - float(functional.cross_entropy(logits, batch["labels"])) < 0.12  # one row of 12 adds 1
    trainer.accelerator.wait_for_everyone()
    time.sleep(0.5)  # gloo's threads abort a process that exits while they hold tensors
    trainer.accelerator.end_training()


@pytest.mark.slow
def test_processes_agree_on_whose_loss_is_searched(tmp_path):
    two_ranks(run, str(tmp_path))
