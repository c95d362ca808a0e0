"""Accumulated micro-batches of unequal lengths equal one batch: the loss counts tokens, not micro-batches."""

import pytest
import torch
from datasets import Dataset
from decoders import TOKENIZER_OF, decoder, subword_tokenizer
from transformers import DataCollatorForSeq2Seq, Seq2SeqTrainer

from hf_ft_ext import FullTrainer, LoraTrainer
from hf_ft_ext.launch.language import encoder_decoder_rows, token_loss

trl = pytest.importorskip("trl")
PAIRS = [
    ("a film", " great"), ("we hated the dull scene and the cast", " bad"), ("it was", " a great plot and a cast"),
    ("the plot", " dull"), ("a", " not the ending!"), ("the ending, but", " bad"), ("in paris", " we liked it"),
    ("on monday we saw the film", " awful"),
]  # fmt: skip
ROWS = Dataset.from_dict({"prompt": [prompt for prompt, _ in PAIRS], "completion": [answer for _, answer in PAIRS]})
METHODS = {
    FullTrainer: {},
    LoraTrainer: {"lora_r": 2},
}
SHARED = {
    "max_steps": 1, "use_cpu": True, "bf16": False, "report_to": "none", "activation_checkpointing": False,
    "disable_tqdm": True, "save_strategy": "no", "optim": "sgd", "learning_rate": 1.0, "max_grad_norm": 0.0,
    "lr_scheduler_type": "constant", "train_sampling_strategy": "sequential",
}  # fmt: skip


def trained(kind, values, folder, family, batch, accumulation):
    """Parameters after one step of eight rows, in float64."""
    tokenizer = subword_tokenizer(TOKENIZER_OF[family])
    model = decoder(family, len(tokenizer)).double()
    sizes = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation}
    args = kind.arguments_class(str(folder), **SHARED, **sizes, **values)
    if family == "t5":
        rows = encoder_decoder_rows("train", ROWS, tokenizer, 64)
        trainer = type("Both", (kind, Seq2SeqTrainer), {})(
            model, args, train_dataset=rows, processing_class=tokenizer, compute_loss_func=token_loss,
            data_collator=DataCollatorForSeq2Seq(tokenizer, model),
        )  # fmt: skip
    else:
        trainer = type("Both", (kind, trl.SFTTrainer), {})(model, args, train_dataset=ROWS, processing_class=tokenizer)
    trainer.train()
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


@pytest.mark.parametrize("family", ["llama", "t5"])
@pytest.mark.parametrize("kind", [FullTrainer, LoraTrainer], ids=lambda kind: kind.__name__)
def test_eight_times_one_row_equals_two_times_four(tmp_path, kind, family):
    one = trained(kind, METHODS[kind], tmp_path, family, 1, 8)
    four = trained(kind, METHODS[kind], tmp_path, family, 4, 2)
    start = dict(decoder(family, len(subword_tokenizer(TOKENIZER_OF[family]))).double().named_parameters())
    assert one.keys() == four.keys()
    assert any(name not in start or not torch.equal(start[name], p) for name, p in one.items())
    for name, parameter in one.items():
        assert torch.allclose(parameter, four[name], rtol=0, atol=1e-6), name
