"""SparseGrad as a PEFT adapter in trl's SFTTrainer: `peft_config=SparseGradConfig(...)`.

Offline, with the `trl` extra; a tiny Llama is made here, so it takes seconds. `--model` names another one:

    python examples/sparse_in_trl.py --output_dir runs/sparse-in-trl
"""

import argparse
from pathlib import Path

import torch
from datasets import Dataset
from peft import PeftModel
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

from hf_ft_ext import SparseGradConfig, compute_bases

ROWS = [
    {"prompt": f"how was the {thing} ?", "completion": f" the {thing} was {word}"}
    for thing in ("film", "plot", "cast", "ending", "music", "scene")
    for word in ("good", "great")
] * 4


def write_tiny_model(folder: Path) -> str:
    """A Llama of two small layers and a tokenizer of whole words."""
    words = sorted({word for row in ROWS for text in row.values() for word in text.split()})
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<s>", "</s>", "<unk>", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)
    torch.manual_seed(0)
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(vocabulary),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )
    ).save_pretrained(folder)
    return str(folder)


def main(argv: list[str] | None = None) -> tuple[float, float]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("runs/sparse-in-trl"))
    parser.add_argument("--model", help="a causal language model: a Hub id or a folder; none = a tiny one, made here")
    args = parser.parse_args(argv)
    name = args.model or write_tiny_model(args.output_dir / "tiny-llama")

    # `init="gradient"`: which block trains is chosen below, by compute_bases.
    config = SparseGradConfig(density=0.05, init="gradient", task_type="CAUSAL_LM")
    trainer = SFTTrainer(
        name,
        SFTConfig(
            str(args.output_dir),
            max_steps=30,
            per_device_train_batch_size=8,
            learning_rate=1e-2,
            max_length=32,
            logging_steps=10,
            save_strategy="no",
            report_to="none",
            bf16=False,
            use_cpu=True,
            seed=42,
        ),
        train_dataset=Dataset.from_list(ROWS),
        eval_dataset=Dataset.from_list(ROWS[:12]),
        peft_config=config,
    )
    # The gradient pre-pass, at the weights of the start, on batches as the trainer makes them.
    compute_bases(trainer.model, trainer.get_train_dataloader(), gradients=8)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    after = trainer.evaluate()["eval_loss"]
    trainer.save_model()
    trained = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    print(f"{trained:,} trained parameters, loss {before:.3f} -> {after:.3f}")

    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(name), str(args.output_dir))
    tokenizer = AutoTokenizer.from_pretrained(str(args.output_dir))
    prompt = tokenizer(ROWS[0]["prompt"], return_tensors="pt").to(loaded.device)
    written = loaded.generate(
        input_ids=prompt["input_ids"], attention_mask=prompt["attention_mask"], max_new_tokens=6, do_sample=False
    )
    print(tokenizer.decode(written[0], skip_special_tokens=True))
    return before, after


if __name__ == "__main__":
    main()
