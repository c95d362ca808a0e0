"""Saved adapters load with the trained labels and logits: by transformers, by peft, in a pipeline, as printed."""

import json
import os
import shutil
from types import SimpleNamespace

import pytest
import torch
from peft import AutoPeftModelForSequenceClassification, PeftModel
from tiny import SPECIAL, WORDS, tiny_dataset, tiny_masked_lm, tiny_model
from transformers import AutoConfig, AutoModelForSequenceClassification, pipeline

from hf_ft_ext import (
    FisherTrainer,
    FisherTrainingArguments,
    FullTrainer,
    FullTrainingArguments,
    GradientlessTrainer,
    GradientlessTrainingArguments,
    LoraTrainer,
    LoraTrainingArguments,
    SparseTrainer,
    SparseTrainingArguments,
)
from hf_ft_ext.arguments import ModelArguments
from hf_ft_ext.launch.results import loading_line
from hf_ft_ext.models import load_tokenizer_and_model
from hf_ft_ext.sparse.export import export_lora

NAMES = ["k0 é", 'k"1']
SMALL = {"prefix": {"projection_size": 6}, "bottleneck": {"bottleneck_size": 5}, "lora": {"r": 3}}
METHODS = {
    "lora": (LoraTrainer, LoraTrainingArguments, {}),
    "fisher": (FisherTrainer, FisherTrainingArguments, {"fisher_mode": "random", "fisher_candidate_settings": SMALL}),
    **{
        f"fisher-{kind}": (
            FisherTrainer, FisherTrainingArguments,
            {"fisher_mode": "single", "fisher_candidates": [kind], "fisher_candidate_settings": {kind: SMALL[kind]}},
        )
        for kind in SMALL
    },
    "full-ia3": (
        FullTrainer, FullTrainingArguments,
        {"peft": "ia3", "peft_config": {"target_modules": ["query"], "feedforward_modules": []}},
    ),
    "full-prefix": (FullTrainer, FullTrainingArguments, {"peft": "prefix_tuning",
                                                         "peft_config": {"num_virtual_tokens": 3}}),
    "gradientless": (GradientlessTrainer, GradientlessTrainingArguments, {"search_peft": "lora"}),
    "sparse-export": (SparseTrainer, SparseTrainingArguments, {"sparse_support": "structured", "sparse_train_rest": "head"}),
}  # fmt: skip
BASES = ["fresh", "size", "names"]
ROUTES = ["auto", "auto_peft", "pipeline", "printed"]


def base_folder(folder, kind: str, tokenizer) -> str:
    """A base model: without a head, with one of three classes, or with one of the same size and other names."""
    if kind == "fresh":
        model = tiny_masked_lm(seed=3)
    elif kind == "size":
        model = tiny_model(seed=3, id2label={0: "yes", 1: "maybe", 2: "no"}, label2id={"yes": 0, "maybe": 1, "no": 2})
    else:
        model = tiny_model(seed=3, id2label={0: "bad", 1: "good"}, label2id={"bad": 0, "good": 1})
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def train(method: str, base: str, folder, names=NAMES, problem="single_label_classification", steps=2, **settings):
    trainer_class, arguments, own = METHODS[method]
    data = SimpleNamespace(label_names=names, problem_type=problem)
    tokenizer, model = load_tokenizer_and_model(ModelArguments(model_name_or_path=base), data, seed=1)
    rows = tiny_dataset(16, regression=names is None)
    settings = {"max_steps": steps, "save_strategy": "steps", "save_steps": steps, **own, **settings}
    args = arguments(
        str(folder), disable_tqdm=True, use_cpu=True, learning_rate=1e-2, report_to="none", do_train=True,
        dataloader_pin_memory=False, **settings,
    )  # fmt: skip
    trainer = trainer_class(model, args, train_dataset=rows, eval_dataset=rows, processing_class=tokenizer)
    trainer.train()
    trainer.save_model()
    return trainer


@pytest.fixture(scope="module")
def saved(tmp_path_factory, tokenizer):
    """(trainer, folder) by method and base, each trained once."""
    done = {}

    def get(method, kind):
        if (method, kind) not in done:
            place = tmp_path_factory.mktemp(f"{method}-{kind}")
            trainer = train(method, base_folder(place / "base", kind, tokenizer), place / "out")
            if method == "sparse-export":
                shutil.rmtree(place / "out")
                export_lora(trainer.model, place / "out")
                trainer.processing_class.save_pretrained(place / "out")
            done[method, kind] = trainer, place / "out"
        return done[method, kind]

    return get


def batch() -> dict:
    ids = torch.arange(len(SPECIAL), len(SPECIAL) + 20).view(2, 10)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(**{key: v.to(model.device) for key, v in batch().items()}).logits.float()


def load(route: str, folder: str, line: str):
    if route == "auto":
        return AutoModelForSequenceClassification.from_pretrained(folder)
    if route == "auto_peft":
        return AutoPeftModelForSequenceClassification.from_pretrained(folder)
    if route == "pipeline":
        return pipeline("text-classification", model=folder, device="cpu").model
    names = {"AutoConfig": AutoConfig, "PeftModel": PeftModel,
             "AutoModelForSequenceClassification": AutoModelForSequenceClassification}  # fmt: skip
    return eval(line, names)


def printed(trainer, folder) -> str:
    """The line that the launcher prints, for `folder` in the place of the run folder."""
    if isinstance(trainer.model, PeftModel):
        return loading_line(trainer).replace(repr(trainer.args.output_dir), repr(str(folder)))
    base = json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]
    return (
        f"PeftModel.from_pretrained(AutoModelForSequenceClassification.from_pretrained({base!r}, "
        f"config=AutoConfig.from_pretrained({str(folder)!r}), ignore_mismatched_sizes=True), {str(folder)!r})"
    )


def check(model, trainer, names=NAMES):
    torch.testing.assert_close(logits(model), logits(trainer.model), rtol=0, atol=1e-5)
    assert model.config.id2label == dict(enumerate(names))
    assert model.config.label2id == {name: i for i, name in enumerate(names)}
    assert model.config.problem_type == "single_label_classification"


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("kind", BASES)
@pytest.mark.parametrize("method", METHODS)
def test_a_saved_adapter_gives_the_trained_labels_and_logits(saved, method, kind, route):
    trainer, folder = saved(method, kind)
    check(load(route, str(folder), printed(trainer, folder)), trainer)
