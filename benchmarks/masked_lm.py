"""Train a masked-LM head on an encoder that has none, so that prompts can be tried with it.

    python benchmarks/masked_lm.py --model path/to/all-mpnet-base-v2 --output runs/mpnet-mlm --steps 600 \
        --texts path/to/glue/{sst2,cola,mrpc,rte,stsb} path/to/fewshot/{mr,subj,trec}

`--texts` are folders with a train split; all its text columns are used, each text once. The head (transformers' own,
its decoder tied to the embeddings) and the last `--trained_layers` layers are trained; what is below stays as it is,
which saves most of the backward pass. 15 % of the tokens are masked as in BERT (of these 80 % replaced by the mask
token, 10 % by another one). Batches hold texts of about the same length. AdamW, a warmup of 5 %, linear decay.

Prints the loss and accuracy on masked tokens of `--held_out` texts that are not trained on, and writes them to the
result file (see `results.py`). The model is saved as `from_pretrained` and the launcher's prompt mode read it.
"""

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

import results
import torch
from datasets import load_dataset
from torch.nn import functional
from transformers import AutoModelForMaskedLM, AutoTokenizer

_IGNORED = -100


def read_texts(folders: Sequence[str], least: int) -> list[str]:
    """Every text of at least so many words, once, in the order of the folders."""
    found: dict[str, None] = {}
    for folder in folders:
        rows = load_dataset(folder, split="train")
        for name, feature in rows.features.items():
            if getattr(feature, "dtype", None) in ("string", "large_string"):
                found.update((text.strip(), None) for text in rows[name] if text and len(text.split()) >= least)
    if not found:
        raise SystemExit(f"no text of {least} words or more in the train splits of {', '.join(folders)}")
    return list(found)


def token_batches(rows: list[list[int]], tokens: int, generator: torch.Generator) -> list[list[list[int]]]:
    """Batches of rows of about the same length with at most so many tokens (padding included), in random order."""
    lengths = torch.tensor([float(len(row)) for row in rows])
    order = (lengths * (1 + 0.2 * torch.rand(len(rows), generator=generator))).argsort().tolist()
    batches: list[list[list[int]]] = [[]]
    for i in order:
        width = max(len(rows[i]), max(map(len, batches[-1]), default=0))
        if batches[-1] and width * (len(batches[-1]) + 1) > tokens:
            batches.append([])
        batches[-1].append(rows[i])
    return [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]


def masked(rows: list[list[int]], tokenizer, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """A padded batch with masked tokens and their labels, as BERT's recipe says."""
    batch = dict(tokenizer.pad({"input_ids": rows}, return_tensors="pt"))
    ids = batch["input_ids"]
    special = torch.isin(ids, torch.tensor(tokenizer.all_special_ids))
    chosen = (torch.rand(ids.shape, generator=generator) < 0.15) & ~special
    kind = torch.rand(ids.shape, generator=generator)
    labels = torch.where(chosen, ids, _IGNORED)
    ids = ids.masked_fill(chosen & (kind < 0.8), tokenizer.mask_token_id)
    other = torch.randint(len(tokenizer), ids.shape, generator=generator)
    return {**batch, "input_ids": torch.where(chosen & (kind >= 0.9), other, ids), "labels": labels}


def masked_logits(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits and labels of the masked tokens only: the decoder is the largest product."""
    labels = batch["labels"]
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    hidden = model.base_model(**inputs).last_hidden_state
    at = labels != _IGNORED
    return model.lm_head(hidden[at]).float(), labels[at]


@torch.no_grad()
def held_out_scores(model: torch.nn.Module, batches: list[dict[str, torch.Tensor]]) -> tuple[float, float]:
    """Mean loss and accuracy, in %, over all masked tokens."""
    loss, right, count = 0.0, 0, 0
    for batch in batches:
        logits, labels = masked_logits(model, batch)
        loss += float(functional.cross_entropy(logits, labels, reduction="sum"))
        right += int((logits.argmax(-1) == labels).sum())
        count += len(labels)
    return loss / count, 100 * right / count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder or Hub id of an encoder whose masked LM has an lm_head")
    parser.add_argument("--texts", nargs="+", required=True, help="folders with a train split")
    parser.add_argument("--output", required=True)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--tokens", type=int, default=2048, help="per batch")
    parser.add_argument("--trained_layers", type=int, default=4)
    parser.add_argument("--least_words", type=int, default=6, help="shorter texts are left out")
    parser.add_argument("--held_out", type=int, default=500, help="texts")
    parser.add_argument("--head_rate", type=float, default=1e-3)
    parser.add_argument("--layer_rate", type=float, default=1e-4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--result", help="name of the result file")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    generator = torch.Generator().manual_seed(args.seed)

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForMaskedLM.from_pretrained(args.model, dtype=torch.float32)
    if not hasattr(model, "lm_head"):
        raise SystemExit(f"{type(model).__name__} has no lm_head; this script is for models such as MPNet and RoBERTa")
    model.eval().requires_grad_(False)  # no dropout: each text is seen about once
    layers = list(model.base_model.encoder.layer)[-args.trained_layers :] if args.trained_layers else []
    tied = {id(parameter) for parameter in model.base_model.parameters()}
    head = [parameter for parameter in model.lm_head.parameters() if id(parameter) not in tied]
    groups = [{"params": head, "lr": args.head_rate}]
    groups += [{"params": list(layer.parameters()), "lr": args.layer_rate} for layer in layers]
    for group in groups:
        for parameter in group["params"]:
            parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(groups, weight_decay=0.01)
    warmup = max(1, args.steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, (args.steps - step) / max(1, args.steps - warmup))
    )

    texts = read_texts(args.texts, args.least_words)
    rows = tokenizer(texts, truncation=True, max_length=128)["input_ids"]
    rows = [rows[i] for i in torch.randperm(len(rows), generator=generator).tolist()]
    held_out = [masked(part, tokenizer, generator) for part in token_batches(rows[: args.held_out], 2048, generator)]
    rows = rows[args.held_out :]
    if not args.held_out or not rows:
        raise SystemExit(f"--held_out {args.held_out} of {len(texts)} texts; 1 or more have to be on either side")
    print(f"{len(rows)} texts, {sum(map(len, rows)):,} tokens", flush=True)

    autocast = torch.autocast("cpu", torch.bfloat16)
    batches: list[list[list[int]]] = []
    start, seen, losses = time.monotonic(), 0, []
    with autocast:
        print("before:", held_out_scores(model, held_out), flush=True)
    for step in range(args.steps):
        batches = batches or token_batches(rows, args.tokens, generator)
        batch = masked(batches.pop(), tokenizer, generator)
        if not (batch["labels"] != _IGNORED).any():  # a small batch: the mean loss of no token is not a number
            continue
        with autocast:
            loss = functional.cross_entropy(*masked_logits(model, batch))
        loss.backward()
        torch.nn.utils.clip_grad_norm_([p for group in groups for p in group["params"]], 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        seen += int(batch["attention_mask"].sum())
        losses.append(loss.item())
        if (step + 1) % 50 == 0 or step + 1 == args.steps:
            mean = sum(losses[-50:]) / len(losses[-50:])
            print(f"step {step + 1}: loss {mean:.3f}, {time.monotonic() - start:.0f} s", flush=True)
    with autocast:
        loss, accuracy = held_out_scores(model, held_out)
    print(f"after {seen:,} tokens: held-out loss {loss:.3f}, accuracy {accuracy:.1f} %", flush=True)
    model.save_pretrained(args.output)
    tokenizer.save_pretrained(args.output)
    if args.result:
        about = {"what": Path(args.model).name, "layers": args.trained_layers, "tokens": seen}
        measured = {"held-out loss": loss, "held-out accuracy, %": accuracy, "million tokens": seen / 1e6}
        results.save(args.result, [{**about, "measure": name, "value": value} for name, value in measured.items()])


if __name__ == "__main__":
    main()
