"""The source's LLaMA-2 run: SparseGrad on the up and down projections of every third MLP, OpenAssistant dialogues.

    accelerate launch recipes/sparse/llama2_openassistant.py
    accelerate launch recipes/sparse/llama2_openassistant.py --sparse_support dynamic --sparse_density 0.005
    accelerate launch recipes/sparse/llama2_openassistant.py --model_name_or_path path/to/llama --max_steps 100

It needs the gated Llama-2 weights (or any other model with Llama's layer names) and, for 7 B, a GPU of 40 GB. All
arguments of `SparseTrainingArguments` work; the defaults below are the source's (arXiv 2410.07383 and its repository's
llama_ft): learning rate 9e-5, cosine schedule, 50 warm-up steps, batch 2 with 32-fold accumulation, one epoch, bf16,
512 tokens, all else frozen. Which layers "every third" are and how many entries train is not published: here layers 0,
3, 6 ... and 1.2 % of each weight. Structured support is ours; it is what keeps memory at LoRA's. A PEFT adapter goes
to `--output_dir` (with dynamic support the whole model); `AutoModelForCausalLM.from_pretrained` loads it after
`import hf_ft_ext`.
"""

import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from datasets import Dataset, load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForLanguageModeling, HfArgumentParser

from hf_ft_ext import InputError, SparseTrainer, SparseTrainingArguments
from hf_ft_ext.training.plan import training_plan

SETTINGS = {
    "output_dir": "runs/llama2-openassistant",
    "sparse_support": "structured",
    "sparse_train_rest": "none",
    "learning_rate": 9e-5,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 50,
    "per_device_train_batch_size": 2,
    "per_device_eval_batch_size": 2,
    "gradient_accumulation_steps": 32,
    "num_train_epochs": 1,
    "bf16": True,
    "eval_strategy": "steps",
    "eval_steps": 75,
    "save_steps": 300,
    "logging_steps": 5,
    "seed": 42,
}


@dataclass
class DialogueArguments:
    """Model and data."""

    model_name_or_path: str = field(default="meta-llama/Llama-2-7b-hf", metadata={"help": "Hub id or local folder."})
    dataset_name: str = field(
        default="OpenAssistant/oasst1",
        metadata={
            "help": "Hub id or local folder with message_id, parent_id, role and text, in train and validation."
        },
    )
    max_length: int = field(default=512, metadata={"help": "Tokens of a dialogue; the rest is cut off."})


def dialogues(messages: Dataset) -> Iterator[str]:
    """One text for each reply of the assistant: all turns from the first prompt to it."""
    known = {row["message_id"]: row for row in messages}
    for row in known.values():
        if row["role"] != "assistant":
            continue
        turns = [row]
        while (parent := known.get(turns[0]["parent_id"])) is not None:
            turns.insert(0, parent)
        yield "\n".join(f"{'Assistant' if turn['role'] == 'assistant' else 'User'}: {turn['text']}" for turn in turns)


def tokenized(messages: Dataset, tokenizer, max_length: int) -> Dataset:
    """Token ids of the dialogues, each with its end token where it fits."""
    texts = Dataset.from_dict({"text": [text + tokenizer.eos_token for text in dialogues(messages)]})
    return texts.map(lambda row: tokenizer(row["text"], truncation=True, max_length=max_length), remove_columns="text")


def every_third(model: torch.nn.Module) -> str:
    """Regular expression for the up and down projections of layers 0, 3, 6 ...

    Raises:
        InputError: the model has no such layers.
    """
    found = [re.search(r"\.layers\.(\d+)\.mlp\.up_proj$", name) for name, _ in model.named_modules()]
    numbers = [match[1] for match in found if match and int(match[1]) % 3 == 0]
    if not numbers:
        raise InputError("this model has no layers.0.mlp.up_proj; pass sparse_target_modules for its layers")
    return rf"\.layers\.({'|'.join(numbers)})\.mlp\.(up|down)_proj$"


def main(argv: list[str] | None = None) -> None:
    parser = HfArgumentParser((DialogueArguments, SparseTrainingArguments))
    parser.set_defaults(**SETTINGS)
    own, args = parser.parse_args_into_dataclasses(sys.argv[1:] if argv is None else argv)
    tokenizer = AutoTokenizer.from_pretrained(own.model_name_or_path)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    data = load_dataset(own.dataset_name)
    train, validation = (tokenized(data[split], tokenizer, own.max_length) for split in ("train", "validation"))
    model = AutoModelForCausalLM.from_pretrained(own.model_name_or_path, dtype=torch.bfloat16 if args.bf16 else None)
    model.config.use_cache = False
    args.sparse_target_modules = args.sparse_target_modules or every_third(model)
    trainer = SparseTrainer(
        model,
        args,
        train_dataset=train,
        eval_dataset=validation,
        processing_class=tokenizer,
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
    )
    print(training_plan(trainer, measure_activations=False).table())
    trainer.train()
    trainer.save_model()
    print(trainer.evaluate())


if __name__ == "__main__":
    main()
