"""Cost of prompt tokenisation against plain tokenisation, and of a linear head on cached features.

    python benchmarks/prompts.py --glue path/to/glue --model path/to/masked-lm --repeats 5

Both are measured on the training rows of sst2, in process CPU seconds, the tokenisations in turn; the ratio is the
median over repeats, with its range. The linear head is fitted with features that are on disk (`--linear_head`).
`--result NAME` writes the rows to `results/NAME.json` (for the page of all measurements: `prompts`).
"""

import argparse
import logging
import statistics
import time
from dataclasses import replace

import results
from transformers import AutoTokenizer, DataCollatorWithPadding

from hf_ft_ext.arguments import PROMPT, DataArguments, ModelArguments
from hf_ft_ext.data.loading import load_data
from hf_ft_ext.data.preprocess import tokenize
from hf_ft_ext.features.linear_probe import fit_linear_head
from hf_ft_ext.models import load_tokenizer_and_model
from hf_ft_ext.prompts.configuration import PromptConfig
from hf_ft_ext.prompts.preprocess import tokenize_prompts
from hf_ft_ext.prompts.templates.defaults import PROMPTS


def seconds(run) -> float:
    """Process CPU seconds of one call."""
    start = time.process_time()
    run()
    return time.process_time() - start


def tokenisation(args: argparse.Namespace, data) -> list[dict]:
    """Rows: plain, prompt, and their ratio."""
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    config = PromptConfig(template=PROMPTS["sst2"].template, label2id={"negative": 0, "positive": 1})
    plain, prompt = DataArguments(), DataArguments(few_shot_type=PROMPT)
    only = replace(data, validation={}, test={})
    runs = {
        "plain": lambda: tokenize(only, tokenizer, plain),
        "prompt": lambda: tokenize_prompts(only, tokenizer, prompt, config),
    }
    times = {name: [] for name in runs}
    for repeat in range(args.repeats + 1):
        for name, run in runs.items():
            spent = seconds(run)
            if repeat:  # the first is a warm-up
                times[name].append(spent)
    ratios = [b / a for a, b in zip(times["plain"], times["prompt"], strict=True)]
    rows = len(data.train)
    print(
        f"tokenising {rows:,} rows: plain {statistics.median(times['plain']):.2f} s, prompt "
        f"{statistics.median(times['prompt']):.2f} s, ratio {statistics.median(ratios):.2f} "
        f"({min(ratios):.2f}-{max(ratios):.2f})",
        flush=True,
    )
    about = {"what": "tokenisation", "rows": rows}
    found = [{**about, "variant": name, "quantity": "s", **results.summary(values)} for name, values in times.items()]
    return [*found, {**about, "variant": "prompt", "quantity": "time / plain", **results.summary(ratios)}]


def linear_head(args: argparse.Namespace, data) -> list[dict]:
    """Rows: the fit with features on disk."""
    data_args = DataArguments(few_shot_type=PROMPT, max_seq_length=64)
    arguments = ModelArguments(model_name_or_path=args.model)
    tokenizer, model = load_tokenizer_and_model(arguments, data, seed=0, data_args=data_args)
    only = replace(data, validation={}, test={})
    rows = tokenize_prompts(only, tokenizer, data_args, model.config).train
    collate = DataCollatorWithPadding(tokenizer)
    spent = []
    for _ in range(2):  # the first pass leaves the features on disk
        start, cpu = time.perf_counter(), time.process_time()
        head = fit_linear_head(model, rows, collate, feature_cache_gb=10, feature_cache_dir=args.features)
        spent.append((time.perf_counter() - start, time.process_time() - cpu))
    (first, _), (wall, cpu) = spent
    print(
        f"linear head on {len(rows):,} rows: {wall:.1f} s ({cpu:.1f} s of CPU) with features on disk, {first:.1f} s "
        f"with the encoder; {head.fit.summary()}",
        flush=True,
    )
    about = {"what": "linear head", "rows": len(rows)}
    measured = {"s": cpu, "s with the encoder": first}
    return [{**about, "quantity": quantity, "value": value} for quantity, value in measured.items()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--glue", required=True, help="folder or Hub id of GLUE")
    parser.add_argument("--model", required=True, help="folder or Hub id of a masked language model")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--linear_head", action="store_true", help="measure the linear head too")
    parser.add_argument("--features", help="where features are kept")
    parser.add_argument("--result", metavar="NAME", help="result file to write to, results/NAME.json")
    args = parser.parse_args()
    logging.basicConfig(format="%(message)s")
    data = load_data(DataArguments(dataset_name=args.glue, task_name="sst2"))
    for part in (tokenisation, linear_head) if args.linear_head else (tokenisation,):
        rows = part(args, data)
        if args.result:
            results.save(args.result, rows)


if __name__ == "__main__":
    main()
