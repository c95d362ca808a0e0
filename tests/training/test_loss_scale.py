"""Micro-batches must not change the loss that is logged nor the gradient that is clipped."""

import numpy as np
import pytest
import torch
from other_models import other_model
from peft import LoraConfig, get_peft_model
from tiny import CONFIGS, tiny_dataset, tiny_model, tiny_tokenizer
from torch import nn
from transformers import BertConfig, BertForTokenClassification, Trainer, TrainingArguments

from hf_ft_ext import (
    FisherTrainer,
    FisherTrainingArguments,
    FullTrainer,
    FullTrainingArguments,
    LoraTrainer,
    LoraTrainingArguments,
    SparseTrainer,
    SparseTrainingArguments,
)
from hf_ft_ext.label_tokens import label_count
from hf_ft_ext.training.loss_scale import declare_mean_loss

NO_DROPOUT = dict.fromkeys(
    ("hidden_dropout_prob", "attention_probs_dropout_prob", "dropout", "attention_dropout", "seq_classif_dropout"), 0.0
)


@pytest.mark.parametrize("model_type", CONFIGS)
def test_accumulated_loss_and_gradient_norm_equal_those_of_one_batch(tmp_path, model_type):
    logged = []
    for size, accumulation in ((8, 1), (2, 4)):
        model = tiny_model(model_type, **NO_DROPOUT)
        declare_mean_loss(model)
        args = TrainingArguments(
            str(tmp_path),
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulation,
            logging_steps=1,
            max_steps=3,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            dataloader_pin_memory=False,
        )
        trainer = Trainer(model, args, train_dataset=tiny_dataset(32), processing_class=tiny_tokenizer())
        trainer.train()
        logged.append([(log["loss"], log["grad_norm"]) for log in trainer.state.log_history if "loss" in log])
    assert len(logged[0]) == 3
    for (loss, norm), (other_loss, other_norm) in zip(*logged, strict=True):
        assert loss == pytest.approx(other_loss, rel=1e-4)
        assert norm == pytest.approx(other_norm, rel=1e-3)


class OwnModel(nn.Module):
    """A user's model: its forward takes anything, and its loss is the mean over the rows that it gets."""

    def __init__(self):
        super().__init__()
        self.table, self.head = nn.Embedding(60, 8), nn.Linear(8, 2)

    def forward(self, input_ids, labels=None, **kwargs):
        logits = self.head(self.table(input_ids).mean(1))
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def tagger():
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    return BertForTokenClassification(BertConfig(vocab_size=60, **sizes, **NO_DROPOUT))


def adapted():
    config = LoraConfig(task_type="SEQ_CLS", target_modules=["query"], lora_dropout=0.0, init_lora_weights=False)
    return get_peft_model(tiny_model(**NO_DROPOUT), config)


def trained(found):
    return {name: p.detach().clone() for name, p in found.named_parameters() if p.requires_grad}


OWN = {
    "image": (lambda: other_model("clip").float(), "pixel_values", (3, 16, 16), ()),
    "image with LoRA": (lambda: other_model("clip").float(), "pixel_values", (3, 16, 16), ()),
    "a user's": (OwnModel, "input_ids", (6,), ()),
    "tokens": (tagger, "input_ids", (6,), (6,)),
    "a user's adapter": (adapted, "input_ids", (6,), ()),
}


@pytest.mark.parametrize("kind", OWN)
def test_micro_batches_of_any_model_equal_one_batch(tmp_path, kind):
    """The models of transformers and of users that take any argument and ignore the count of labels."""
    make, key, shape, labels = OWN[kind]
    draw = torch.Generator().manual_seed(0)
    values = torch.randn(8, *shape, generator=draw) if key == "pixel_values" else torch.randint(5, 40, (8, *shape))
    rows = [{key: v, "labels": torch.randint(0, 2, labels, generator=draw)} for v in values]
    own, of_adapters = (FullTrainer, FullTrainingArguments), (LoraTrainer, LoraTrainingArguments)
    trainer_class, arguments = of_adapters if kind == "image with LoRA" else own
    more = {"lora_dropout": 0.0} if kind == "image with LoRA" else {}
    found = []
    for size, accumulation in ((8, 1), (2, 4)):
        args = arguments(
            str(tmp_path), per_device_train_batch_size=size, gradient_accumulation_steps=accumulation, optim="sgd",
            learning_rate=0.1, max_grad_norm=0, lr_scheduler_type="constant", max_steps=1, save_strategy="no",
            report_to="none", disable_tqdm=True, use_cpu=True, dataloader_pin_memory=False, weight_decay=0.0, **more,
        )  # fmt: skip
        with torch.random.fork_rng():
            torch.manual_seed(0)
            trainer = trainer_class(make(), args, train_dataset=rows)
        before = trained(trainer.model)
        trainer.train()
        found.append({name: value - before[name] for name, value in trained(trainer.model).items()})
    assert any(change.abs().max() > 1e-3 for change in found[0].values())
    for name, change in found[0].items():
        torch.testing.assert_close(change, found[1][name], rtol=1e-3, atol=1e-6, msg=name)


WEIGHT = torch.tensor([0.3, 1.7])


def weighted(logits, labels, count):
    """A loss with class weights, as users write it: divided by the count, which Trainer passes in each step."""
    return nn.functional.cross_entropy(logits, labels, weight=WEIGHT, reduction="sum") / count


def with_loss(kind, how):
    """`kind` with a user's `compute_loss`, or with nothing overridden."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if how == "super":
            return super(mine, self).compute_loss(model, inputs, return_outputs, num_items_in_batch)
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        count = len(labels) if how == "mean" else num_items_in_batch
        loss = weighted(outputs.logits, labels, count)
        return (loss, outputs) if return_outputs else loss

    mine = type("Mine", (kind,), {} if how == "function" else {"compute_loss": compute_loss})
    return mine


def of_function(how):
    function = lambda outputs, labels, num_items_in_batch: weighted(outputs.logits, labels, num_items_in_batch)  # noqa: E731
    return {"compute_loss_func": function} if how == "function" else {}


SGD = {
    "optim": "sgd", "learning_rate": 0.1, "max_grad_norm": 0, "lr_scheduler_type": "constant", "max_steps": 1,
    "weight_decay": 0.0, "save_strategy": "no", "report_to": "none", "disable_tqdm": True, "use_cpu": True,
    "dataloader_pin_memory": False,
}  # fmt: skip


class Mixed(FullTrainer):
    """Mixes the losses of two labels of a row, by numpy's random numbers: a mean over a micro-batch."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels, share = inputs.pop("labels"), np.random.beta(1, 1)
        outputs = model(**inputs)
        losses = [nn.functional.cross_entropy(outputs.logits, y) for y in (labels, labels.flip(0))]
        loss = share * losses[0] + (1 - share) * losses[1]
        return (loss, outputs) if return_outputs else loss


def test_a_user_s_loss_may_draw_at_random(tmp_path):
    args = FullTrainingArguments(str(tmp_path), per_device_train_batch_size=2, gradient_accumulation_steps=4, **SGD)
    trainer = Mixed(tiny_model(), args, train_dataset=tiny_dataset(8), processing_class=tiny_tokenizer())
    np.random.seed(0)
    expected = np.random.beta(1, 1, 5)[-1]
    np.random.seed(0)
    assert trainer.train().training_loss < 1  # about log 2, not four times as much
    assert np.random.beta(1, 1) == expected  # the comparison left the generator as it was


@pytest.mark.parametrize("how", ["count", "mean", "super", "function"])
def test_micro_batches_of_a_user_s_loss_equal_one_batch(tmp_path, how):
    found = []
    for size, accumulation in ((8, 1), (2, 4)):
        sizes = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulation}
        args = FullTrainingArguments(str(tmp_path), **sizes, **SGD)
        trainer = with_loss(FullTrainer, how)(
            tiny_model(**NO_DROPOUT), args, train_dataset=tiny_dataset(8), eval_dataset=tiny_dataset(5),
            processing_class=tiny_tokenizer(), **of_function(how),
        )  # fmt: skip
        trainer.train()
        found.append((trained(trainer.model), trainer.evaluate()["eval_loss"]))
    for name, value in found[0][0].items():
        torch.testing.assert_close(value, found[1][0][name], rtol=1e-4, atol=1e-6, msg=name)
    assert found[0][1] == pytest.approx(found[1][1], rel=1e-4)
    before = dict(tiny_model(**NO_DROPOUT).named_parameters())
    assert any((value - before[name]).abs().max() > 1e-3 for name, value in found[0][0].items())


PREPASSES = {
    "structured": (SparseTrainer, SparseTrainingArguments, {"sparse_density": 0.2, "sparse_basis_steps": 1}),
    "dynamic": (
        SparseTrainer, SparseTrainingArguments,
        {"sparse_density": 0.2, "sparse_basis_steps": 1, "sparse_support": "dynamic", "optim": "adamw_torch"},
    ),
    "select": (FisherTrainer, FisherTrainingArguments, {"fisher_candidates": ["bottleneck"], "fisher_examples": 3}),
    "mask": (FisherTrainer, FisherTrainingArguments, {"fisher_mode": "mask", "fisher_examples": 3}),
}  # fmt: skip


@pytest.mark.parametrize("how", ["count", "function"])
@pytest.mark.parametrize("method", PREPASSES)
def test_a_pre_pass_gives_a_user_s_loss_the_count_of_its_labels(tmp_path, method, how):
    kind, arguments, own = PREPASSES[method]
    found = []
    for way in (how, "mean"):
        args = arguments(str(tmp_path), per_device_train_batch_size=4, **{**SGD, **own})
        trainer = with_loss(kind, way)(
            tiny_model(**NO_DROPOUT), args, train_dataset=tiny_dataset(8), processing_class=tiny_tokenizer(),
            **of_function(way),
        )  # fmt: skip
        trainer.train()
        found.append(trainer.model.state_dict())
    assert found[0].keys() == found[1].keys()
    for name, value in found[0].items():
        torch.testing.assert_close(value, found[1][name], rtol=1e-4, atol=1e-5, msg=name)


def test_a_batch_weighs_by_its_label_tokens_or_its_rows():
    labels = torch.tensor([[5, 6, 7, -100], [8, -100, -100, -100]])
    batch = {"input_ids": labels, "labels": labels}
    assert label_count(batch, shifted=True) == 2 and label_count(batch, shifted=False) == 4
    assert label_count({**batch, "shift_labels": labels}, shifted=True) == 4
    assert label_count({"input_ids": labels, "labels": torch.tensor([0, 1])}, True) == 2
    assert label_count({"input_ids": labels, "labels": torch.rand(2, 5)}, False) == 2
