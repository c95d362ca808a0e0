"""Micro-batches must not change the loss that is logged nor the gradient that is clipped."""

import pytest
import torch
from tiny import CONFIGS, tiny_dataset, tiny_model, tiny_tokenizer
from transformers import Trainer, TrainingArguments

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


def test_a_batch_weighs_by_its_label_tokens_or_its_rows():
    labels = torch.tensor([[5, 6, 7, -100], [8, -100, -100, -100]])
    batch = {"input_ids": labels, "labels": labels}
    assert label_count(batch, shifted=True) == 2 and label_count(batch, shifted=False) == 4
    assert label_count({**batch, "shift_labels": labels}, shifted=True) == 4
    assert label_count({"input_ids": labels, "labels": torch.tensor([0, 1])}, True) == 2
    assert label_count({"input_ids": labels, "labels": torch.rand(2, 5)}, False) == 2
