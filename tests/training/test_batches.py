"""An epoch without a batch is refused, before a step and in every trainer with steps."""

import pytest
from tiny import tiny_dataset, tiny_model
from transformers import TrainingArguments

import hf_ft_ext
from hf_ft_ext.errors import InputError
from hf_ft_ext.training.checks import check_full_batch


@pytest.mark.parametrize("name", ["Full", "Lora", "Sparse", "Fisher", "Gradientless"])
def test_dropping_every_batch_is_refused(tmp_path, tokenizer, name):
    arguments = getattr(hf_ft_ext, f"{name}TrainingArguments")
    args = arguments(
        str(tmp_path / "out"), dataloader_drop_last=True, per_device_train_batch_size=9, report_to="none", use_cpu=True
    )
    trainer_class, data = getattr(hf_ft_ext, f"{name}Trainer"), tiny_dataset(8)
    trainer = trainer_class(tiny_model(), args, train_dataset=data, processing_class=tokenizer)
    with pytest.raises(InputError, match=r"training data has 8 rows, fewer than a batch of 9; pass a .* of 8 or less"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_settings_that_leave_a_batch_pass():
    args = TrainingArguments(dataloader_drop_last=True, per_device_train_batch_size=9, report_to="none", use_cpu=True)
    check_full_batch(args, tiny_dataset(9))
    check_full_batch(args, iter(()))  # of unknown length
    args.dataloader_drop_last = False
    check_full_batch(args, tiny_dataset(8))
