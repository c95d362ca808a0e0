"""One cell of the matrix of methods, families and tasks as a trainer in this process, in float64."""

from pathlib import Path

import torch
import trl
from datasets import Dataset
from decoders import TOKENIZER_OF, decoder, subword_tokenizer
from transformers import DataCollatorForSeq2Seq, DataCollatorWithPadding, Seq2SeqTrainer

from hf_ft_ext import PromptEncoder, PromptForSequenceClassification
from hf_ft_ext.launch.language import encoder_decoder_rows, token_loss
from hf_ft_ext.methods import METHODS

TEMPLATE = "*cls**sent_0*_it_was*mask*"
PAIRS = [
    ("a film", " great"), ("we hated the dull scene and the cast", " bad"), ("it was", " a great plot and a cast"),
    ("the plot", " dull"), ("a", " not the ending!"), ("the ending, but", " bad"), ("in paris", " we liked it"),
    ("on monday we saw the film", " awful"),
]  # fmt: skip
ROWS = {
    "language": Dataset.from_dict({"prompt": [p for p, _ in PAIRS], "completion": [c for _, c in PAIRS]}),
    "text": Dataset.from_dict({"text": [p + c for p, c in PAIRS]}),
}
# SGD, or AdamW with a large epsilon: a small one turns gradients that are rounding noise into steps of full size.
SGD = {"optim": "sgd", "learning_rate": 1.0, "max_grad_norm": 0.0}
SPARSE = {"adam_epsilon": 1e-2, "learning_rate": 0.1}
# Wide steps: transformers computes a language model's loss in float32, and that rounding is divided by the step.
SPSA = {"search_method": "spsa", "search_target": "all", "search_eps": 0.1, "learning_rate": 1e-2}
# name -> method, arguments
VARIANTS = {
    "full": ("full", SGD),
    "lora": ("lora", {"lora_r": 2, **SGD}),
    "sparse": ("sparse", {"sparse_density": 0.05, "sparse_basis_steps": 2, **SPARSE}),
    "sparse-kind": (
        "sparse",
        {"sparse_density": 0.05, "sparse_basis_steps": 2, "sparse_basis_scope": "kind", **SPARSE},
    ),
    "sparse-random": ("sparse", {"sparse_density": 0.05, "sparse_basis": "random", **SPARSE}),
    "sparse-dynamic": (
        "sparse",
        {"sparse_support": "dynamic", "sparse_density": 1.0, "sparse_basis_steps": 2, **SPARSE},
    ),
    "fisher": ("fisher", {"fisher_examples": 4, "fisher_candidates": ["lora", "bottleneck"], **SGD}),
    "spsa": ("gradientless", SPSA),
    "kernel": ("kernel", {"kernel_regularization": "1e-2"}),
}


def make(folder: Path, name: str, family: str, task: str, batch: int = 4, accumulation: int = 2, steps: int = 1):
    """A trainer of the variant `name` for a prompt's class (`prompt`), `language`, or `text`."""
    method, options = VARIANTS[name]
    tokenizer = subword_tokenizer(TOKENIZER_OF[family])
    model = decoder(family, len(tokenizer)).double()
    if method != "kernel":  # it takes no steps
        options = {
            "max_steps": steps, "per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation,
            "lr_scheduler_type": "constant", "train_sampling_strategy": "sequential", **options,
        }  # fmt: skip
    args = METHODS[method].arguments_class()(
        str(folder), use_cpu=True, report_to="none", activation_checkpointing=False, disable_tqdm=True,
        save_strategy="no", dataloader_pin_memory=False, **options,
    )  # fmt: skip
    kind = METHODS[method].trainer_class()
    if task == "prompt":
        model = PromptForSequenceClassification.from_language_model(
            model, tokenizer, TEMPLATE, ["bad", "great"], ["no", "yes"]
        )
        rows = PromptEncoder(tokenizer, TEMPLATE, 1, 48, reading=model.config.reading)([[p + c for p, c in PAIRS]])
        data = Dataset.from_dict({**rows, "labels": [i % 2 for i in range(len(PAIRS))]})
        collator = DataCollatorWithPadding(tokenizer)
        return kind(model, args, train_dataset=data, processing_class=tokenizer, data_collator=collator)
    if family == "t5":
        rows = encoder_decoder_rows("train", ROWS[task], tokenizer, 64)
        return type("Both", (kind, Seq2SeqTrainer), {})(
            model, args, train_dataset=rows, processing_class=tokenizer, compute_loss_func=token_loss,
            data_collator=DataCollatorForSeq2Seq(tokenizer, model),
        )  # fmt: skip
    return type("Both", (kind, trl.SFTTrainer), {})(model, args, train_dataset=ROWS[task], processing_class=tokenizer)


def result(trainer) -> dict[str, torch.Tensor]:
    """What the run ended with: the weights, or the kernel's predictions."""
    if hasattr(trainer, "solved"):
        return {"predictions": torch.from_numpy(trainer.predict(trainer.train_dataset).predictions)}
    return {name: p.detach().clone().contiguous() for name, p in trainer.model.named_parameters()}
