"""Do scores before training tell what a module achieves? Each layer's module of each kind is trained alone.

    python benchmarks/fisher_ranks.py --dataset_name path/to/glue --task_name sst2 --output_dir runs/ranks-sst2

For every layer and candidate a model with that one module and the classifier is trained on `--train_rows` rows and
evaluated; the plain classifier on the frozen encoder too. Then the rank correlation (Spearman) of each criterion's
scores with the validation loss, negated: over all modules, and within kinds. Runs that are there already are not
repeated. `ranks.json` in the output folder has the numbers.
"""

import argparse
import copy
import json
import tempfile
from pathlib import Path

import torch
from scipy.stats import spearmanr
from transformers import set_seed
from transformers.utils import logging as transformers_logging

from hf_ft_ext import FisherTrainer, FisherTrainingArguments
from hf_ft_ext.arguments import DataArguments, ModelArguments
from hf_ft_ext.data.loading import load_data
from hf_ft_ext.data.preprocess import tokenize
from hf_ft_ext.files import write_json
from hf_ft_ext.fisher.candidates import layers_of, make_candidates
from hf_ft_ext.fisher.criteria import CRITERIA
from hf_ft_ext.fisher.plan import AdapterPlan
from hf_ft_ext.fisher.prepass import prepass_batches
from hf_ft_ext.fisher.selection import select_adapters, settings_of
from hf_ft_ext.metrics import primary_key
from hf_ft_ext.models import load_tokenizer_and_model, model_max_length


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--task_name", required=True)
    parser.add_argument("--dataset_name")
    parser.add_argument("--model_name_or_path")
    parser.add_argument("--train_rows", type=int, default=2000)
    parser.add_argument("--epochs", type=float, default=1)
    parser.add_argument(
        "--rates",
        type=json.loads,
        default={"prefix": 3e-4, "bottleneck": 1e-3, "lora": 3e-3},
        help="learning rate of each kind (default: %(default)s, those of benchmarks/studies/fisher.yaml)",
    )
    parser.add_argument("--bf16", action="store_true", help="train in bfloat16: half the time where there is AMX")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--examples", type=int, nargs="+", default=[64, 512], help="of the pre-pass")
    parser.add_argument("--max_seq_length", type=int, default=64)
    args = parser.parse_args()
    transformers_logging.set_verbosity_error()
    args.output_dir.mkdir(parents=True, exist_ok=True)
    path = args.output_dir / "ranks.json"
    found = json.loads(path.read_text()) if path.exists() else {"trained": {}, "scores": {}}

    data_args = DataArguments(
        task_name=args.task_name, dataset_name=args.dataset_name, max_train_samples=args.train_rows,
        max_seq_length=args.max_seq_length,
    )  # fmt: skip
    data = load_data(data_args)
    tokenizer, model = load_tokenizer_and_model(ModelArguments(args.model_name_or_path), data, seed=1)
    data = tokenize(data, tokenizer, data_args, label2id=model.config.label2id,
                    model_max_length=model_max_length(model, tokenizer))  # fmt: skip
    validation = next(iter(data.validation.values()))
    candidates = make_candidates(None)
    key = primary_key(data.metric)

    def trainer(plan: str | None, seed: int, folder: str, rates: dict | None = None) -> FisherTrainer:
        settings = FisherTrainingArguments(
            folder, adapter_plan=plan, learning_rate=3e-3, fisher_learning_rates=rates, num_train_epochs=args.epochs,
            bf16=args.bf16, use_cpu=not torch.cuda.is_available(), seed=seed,
            per_device_train_batch_size=16, per_device_eval_batch_size=64, save_strategy="no", report_to="none",
            disable_tqdm=True, warmup_steps=0.06, lr_scheduler_type="polynomial", logging_strategy="no",
            train_sampling_strategy="group_by_length", dataloader_pin_memory=False,
        )  # fmt: skip
        set_seed(seed)
        return FisherTrainer(
            copy.deepcopy(model), settings, train_dataset=data.train, eval_dataset=validation,
            processing_class=tokenizer, compute_metrics=data.metric_function(),
        )  # fmt: skip

    with tempfile.TemporaryDirectory() as folder:
        for seed in args.seeds:
            for examples in args.examples:
                batches = prepass_batches(trainer(None, seed, folder), examples, 8)
                for criterion in CRITERIA:
                    name = f"{criterion}, {examples} examples, seed {seed}"
                    if name not in found["scores"]:
                        plan = select_adapters(model, batches, candidates, criterion, seed=seed, progress=False)
                        found["scores"][name] = {
                            f"{layer} {kind}": value
                            for layer, own in plan.scores.items()
                            for kind, value in own.items()
                        }
            for layer in layers_of(model):
                for kind, config in candidates.items():
                    name = f"{layer} {kind}, seed {seed}"
                    if name in found["trained"]:
                        continue
                    plan = Path(folder, "plan.json")
                    AdapterPlan({layer: kind}, {kind: settings_of(config)}).save(plan)
                    run = trainer(str(plan), seed, folder, {kind: args.rates[kind]} if kind in args.rates else None)
                    run.train()
                    metrics = run.evaluate()
                    found["trained"][name] = {"loss": metrics["eval_loss"], key: metrics[f"eval_{key}"]}
                    print(name, found["trained"][name], flush=True)
                    write_json(path, found)
    found["correlations"] = correlations(found, args.seeds, list(candidates))
    write_json(path, found)
    for name, values in found["correlations"].items():
        print(name, {group: round(value, 2) for group, value in values.items()})


def correlations(found: dict, seeds: list[int], kinds: list[str]) -> dict[str, dict[str, float]]:
    """Spearman's rho of scores and negated losses, by criterion: all modules, and those of each kind."""
    result = {}
    for name, scores in found["scores"].items():
        seed = name.rpartition(" ")[2]
        losses = {key: found["trained"][f"{key}, seed {seed}"]["loss"] for key in scores}
        groups = {"all": list(scores), **{kind: [key for key in scores if key.endswith(kind)] for kind in kinds}}
        result[name] = {
            group: float(spearmanr([scores[k] for k in keys], [-losses[k] for k in keys]).statistic)
            for group, keys in groups.items()
        }
    return result


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
