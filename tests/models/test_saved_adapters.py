"""Saved adapters load with the trained labels and logits: by transformers, by peft, in a pipeline, as printed."""

import json
import os
import shutil
from types import SimpleNamespace

import pytest
import torch
from peft import AutoPeftModelForSequenceClassification, LoraConfig, PeftModel, get_peft_model
from tiny import SPECIAL, tiny_dataset, tiny_masked_lm, tiny_model
from transformers import (
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    AutoConfig,
    AutoModelForSequenceClassification,
    pipeline,
)

from hf_ft_ext import (
    FisherTrainer,
    FisherTrainingArguments,
    FullTrainer,
    FullTrainingArguments,
    GradientlessTrainer,
    GradientlessTrainingArguments,
    InputError,
    KernelTrainer,
    KernelTrainingArguments,
    LoraTrainer,
    LoraTrainingArguments,
    SparseTrainer,
    SparseTrainingArguments,
    load_kernel,
)
from hf_ft_ext.arguments import ModelArguments
from hf_ft_ext.hub.push import shared_files
from hf_ft_ext.launch.results import loading_line
from hf_ft_ext.models import load_tokenizer_and_model
from hf_ft_ext.sparse.saved.export import export_lora

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
    "sparse": (SparseTrainer, SparseTrainingArguments, {"sparse_basis_steps": 2, "sparse_density": 0.2}),
    "sparse-export": (SparseTrainer, SparseTrainingArguments,
                      {"sparse_support": "structured", "sparse_train_rest": "head"}),
}  # fmt: skip
BASES = ["fresh", "size", "names"]
RESIZED = {"ignore_mismatched_sizes": True}
ROUTES = ["auto", "auto_peft", "pipeline", "printed"]


def test_an_adapter_of_another_name_loads_from_the_folder_of_its_name(tmp_path):
    """In the folder around it, the configuration alone would load the base model."""
    tiny_model().save_pretrained(tmp_path / "base")
    base = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=3, **RESIZED)
    model = get_peft_model(base, LoraConfig(task_type="SEQ_CLS", init_lora_weights=False), adapter_name="mine")
    trainer = FullTrainer(model, FullTrainingArguments(str(tmp_path / "out")))
    trainer.save_model()
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out" / "mine").eval()
    ids = torch.arange(5, 15)[None]
    assert torch.equal(loaded(input_ids=ids).logits, model.eval()(input_ids=ids).logits)
    with pytest.raises(ValueError, match="Unrecognized model"):
        AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")


def test_models_with_their_own_code_load_as_printed(tmp_path, monkeypatch, tokenizer):
    """The adapter's folder has the code too, as its configuration names it."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(tmp_path / "modules")
    # loading registers the class; other tests run every class that is registered
    monkeypatch.setattr(MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING, "_extra_content", {})
    base, out = tmp_path / "base", str(tmp_path / "out")
    tiny_model().save_pretrained(base)
    classes = {"AutoConfig": "own_code.OwnConfig", "AutoModelForSequenceClassification": "own_code.OwnModel"}
    config = json.loads((base / "config.json").read_text()) | {"model_type": "own", "auto_map": classes}
    (base / "config.json").write_text(json.dumps(config))
    (base / "own_code.py").write_text(
        "from transformers import BertConfig, BertForSequenceClassification\n"
        "class OwnConfig(BertConfig):\n    model_type = 'own'\n"
        "class OwnModel(BertForSequenceClassification):\n    config_class = OwnConfig\n"
    )
    names = {kind.__name__: kind for kind in (AutoConfig, AutoModelForSequenceClassification, PeftModel)}
    for kind, args in ((FullTrainer, FullTrainingArguments), (LoraTrainer, LoraTrainingArguments)):
        model = AutoModelForSequenceClassification.from_pretrained(base, trust_remote_code=True)
        arguments = args(out, max_steps=1, use_cpu=True, report_to="none", disable_tqdm=True)
        trainer = kind(model, arguments, train_dataset=tiny_dataset(8), processing_class=tokenizer)
        trainer.train()
        trainer.save_model()
        loaded = eval(loading_line(trainer), dict(names)).eval()
        ids = torch.arange(5, 15)[None]
        assert torch.equal(loaded(input_ids=ids).logits, trainer.model.eval()(input_ids=ids).logits)
        shutil.rmtree(out)
    model = AutoModelForSequenceClassification.from_pretrained(base, trust_remote_code=True)
    arguments = KernelTrainingArguments(out, use_cpu=True, report_to="none", disable_tqdm=True)
    trainer = KernelTrainer(model, arguments, train_dataset=tiny_dataset(8), processing_class=tokenizer)
    trainer.train()
    trainer.save_model()
    kernel = eval(loading_line(trainer), {"load_kernel": load_kernel})
    rows = tokenizer.pad(
        [{k: v for k, v in row.items() if k != "labels"} for row in tiny_dataset(4)], return_tensors="pt"
    )
    expected = torch.from_numpy(trainer.predict(tiny_dataset(4)).predictions).double()
    found = kernel(tokenizer.pad(rows, return_tensors="pt")).logits
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert type(kernel.model).__name__ == "OwnModel" and len(kernel.tokenizer) == len(tokenizer)
    again = KernelTrainer.from_folder(out, trust_remote_code=True)
    assert type(again.model) is type(kernel.model)
    for load in (load_kernel, KernelTrainer.from_folder):
        with pytest.raises(InputError, match="pass trust_remote_code=True if you trust this code"):
            load(out)


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


def train(method: str, base: str, folder, names=NAMES, steps=2, model_revision="main", cache_dir=None, **settings):
    """Two steps of a method on a base model; without names: a regression."""
    trainer_class, arguments, own = METHODS[method]
    problem = "regression" if names is None else "single_label_classification"
    data = SimpleNamespace(label_names=names, problem_type=problem)
    source = ModelArguments(model_name_or_path=base, model_revision=model_revision, cache_dir=cache_dir)
    tokenizer, model = load_tokenizer_and_model(source, data, seed=1)
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


def cells():
    """Method, base and way to load.

    All three for one method of each way to save; of the others the base with another head, which has to be replaced.
    """
    for method in METHODS:
        for kind in BASES if method in ("lora", "sparse-export") else ["size"]:
            for route in ROUTES:
                if method == "full-prefix" and route in ("auto", "pipeline"):  # see the next test
                    continue
                yield method, kind, route


@pytest.mark.parametrize(("method", "kind", "route"), list(cells()))
def test_a_saved_adapter_gives_the_trained_labels_and_logits(saved, method, kind, route):
    trainer, folder = saved(method, kind)
    check(load(route, str(folder), printed(trainer, folder)), trainer)


@pytest.mark.parametrize("route", ["auto", "pipeline"])
def test_transformers_itself_refuses_prompt_learning(saved, route):
    _, folder = saved("full-prefix", "size")
    with pytest.raises(ValueError, match="does not support prompt learning"):
        load(route, str(folder), "")


@pytest.mark.parametrize(("method", "route"), [("lora", "auto"), ("lora", "printed"), ("fisher", "auto_peft")])
def test_a_checkpoint_loads_as_the_result_does(saved, method, route):
    trainer, folder = saved(method, "size")
    checkpoint = folder / "checkpoint-2"
    check(load(route, str(checkpoint), printed(trainer, checkpoint)), trainer)


@pytest.mark.parametrize("route", ROUTES)
def test_a_moved_folder_on_a_base_with_a_relative_path_loads(tmp_path, monkeypatch, tokenizer, route):
    monkeypatch.chdir(tmp_path)
    base_folder(tmp_path / "base", "size", tokenizer)
    trainer = train("lora", "base", "out")
    place = tmp_path / "elsewhere" / "run"
    place.parent.mkdir()
    shutil.move("out", place)
    monkeypatch.chdir(place.parent)
    check(load(route, "run", printed(trainer, "run")), trainer)


def test_a_missing_base_is_named(tmp_path, tokenizer):
    base = base_folder(tmp_path / "base", "fresh", tokenizer)
    train("lora", base, tmp_path / "out", steps=1)
    shutil.rmtree(base)
    for route in ("auto", "auto_peft"):
        with pytest.raises(OSError, match=base):
            load(route, str(tmp_path / "out"), "")


def test_a_base_of_the_hub_keeps_its_revision_and_cache(tmp_path, tokenizer):
    """Two revisions in a cache: the adapter belongs to the older one."""
    cache, repository = tmp_path / "cache", tmp_path / "cache" / "models--me--tiny"
    for commit, ref, kind in (("a" * 40, "v1", "size"), ("b" * 40, "main", "names")):
        base_folder(repository / "snapshots" / commit, kind, tokenizer)
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / ref).write_text(commit)
    trainer = train("lora", "me/tiny", tmp_path / "out", model_revision="v1", cache_dir=str(cache))
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == ("me/tiny", "v1")
    assert "revision='v1'" in loading_line(trainer)
    check(load("auto", str(tmp_path / "out"), ""), trainer)
    model = AutoPeftModelForSequenceClassification.from_pretrained(str(tmp_path / "out"), cache_dir=str(cache))
    check(model, trainer)


def test_the_index_of_base_weights_stays_on_this_machine(saved):
    _, folder = saved("lora", "size")
    assert {"config.json", "model.safetensors.index.json", "model-head.safetensors"} <= set(os.listdir(folder))
    shared = {path.name for path in shared_files(folder)}
    assert {"config.json", "adapter_config.json", "adapter_model.safetensors"} <= shared
    assert not {"model.safetensors.index.json", "model-head.safetensors"} & shared


def test_the_configuration_beside_an_adapter_can_be_overruled(saved):
    _, folder = saved("lora", "size")
    names = {"id2label": {0: "x", 1: "y"}, "label2id": {"x": 0, "y": 1}}
    model = AutoPeftModelForSequenceClassification.from_pretrained(str(folder), **names)
    assert model.config.id2label == names["id2label"]


def test_adapters_without_a_configuration_load_as_before(saved, tmp_path):
    trainer, folder = saved("lora", "names")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(folder / name, tmp_path)
    for route in ("auto", "auto_peft"):
        model = load(route, str(tmp_path), "")
        assert model.config.id2label == {0: "bad", 1: "good"}
        torch.testing.assert_close(logits(model), logits(trainer.model), rtol=0, atol=1e-5)


def test_regression_adapters_stay_regressions(tmp_path, tokenizer):
    base = base_folder(tmp_path / "base", "size", tokenizer)
    trainer = train("lora", base, tmp_path / "out", names=None)
    for route in ROUTES:
        model = load(route, str(tmp_path / "out"), printed(trainer, tmp_path / "out"))
        assert (model.config.num_labels, model.config.problem_type) == (1, "regression")
        torch.testing.assert_close(logits(model), logits(trainer.model), rtol=0, atol=1e-5)


def test_the_best_checkpoint_is_what_is_saved(tmp_path, tokenizer):
    base = base_folder(tmp_path / "base", "size", tokenizer)
    evaluate = {"eval_strategy": "steps", "eval_steps": 1, "save_steps": 1, "load_best_model_at_end": True}
    worst = {"metric_for_best_model": "eval_loss", "greater_is_better": True, "max_steps": 3, "save_total_limit": 1}
    trainer = train("lora", base, tmp_path / "out", **{**evaluate, **worst})
    best = trainer.state.best_model_checkpoint
    check(load("auto", best, ""), trainer)
    check(load("printed", str(tmp_path / "out"), loading_line(trainer)), trainer)


def test_a_bf16_base_keeps_its_type(tmp_path, tokenizer):
    base = base_folder(tmp_path / "base", "size", tokenizer)
    AutoModelForSequenceClassification.from_pretrained(base).bfloat16().save_pretrained(base)
    trainer = train("lora", base, tmp_path / "out")
    for route in ROUTES:
        model = load(route, str(tmp_path / "out"), printed(trainer, tmp_path / "out"))
        assert model.get_input_embeddings().weight.dtype == trainer.model.get_input_embeddings().weight.dtype
        torch.testing.assert_close(logits(model), logits(trainer.model), rtol=0, atol=1e-5)


def test_a_base_in_several_files_and_one_of_pickles(tmp_path, tokenizer):
    base = base_folder(tmp_path / "base", "size", tokenizer)
    whole = AutoModelForSequenceClassification.from_pretrained(base)
    (tmp_path / "base" / "model.safetensors").unlink()
    whole.save_pretrained(base, max_shard_size="20KB")
    assert len(list((tmp_path / "base").glob("model-*.safetensors"))) > 1
    trainer = train("lora", base, tmp_path / "out")
    check(load("auto", str(tmp_path / "out"), ""), trainer)
    for path in (tmp_path / "base").glob("model*"):
        path.unlink()
    torch.save(whole.state_dict(), tmp_path / "base" / "pytorch_model.bin")
    trainer = train("lora", base, tmp_path / "other")
    assert not (tmp_path / "other" / "model.safetensors.index.json").exists()
    for route in ("auto_peft", "printed"):
        check(load(route, str(tmp_path / "other"), printed(trainer, tmp_path / "other")), trainer)
    with pytest.raises(OSError, match=r"no file named model\.safetensors"):
        load("auto", str(tmp_path / "other"), "")
