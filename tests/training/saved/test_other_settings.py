"""Resuming with other settings than the checkpoint's: refused with the reason, never a run with mixed settings."""

import functools
import re
import shutil

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import tiny_dataset, tiny_model, tiny_tokenizer

import hf_ft_ext
import hf_ft_ext.arguments
from hf_ft_ext import InputError, ResourceMonitor
from hf_ft_ext.training.saved.checkpoints import WriteChecksums, check_fits
from hf_ft_ext.training.saved.resumed_arguments import (
    ARGUMENTS_FILE,
    compared_arguments,
    read_arguments,
    write_arguments,
)

PLAIN = {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "dataloader_pin_memory": False}
SPARSE = {"sparse_density": 0.2}
TRAINED = {
    "structured": ("Sparse", {**SPARSE, "sparse_basis": "random"}),
    "dynamic": ("Sparse", {**SPARSE, "sparse_support": "dynamic", "sparse_basis_steps": 1}),
    "static": ("Sparse", {**SPARSE, "sparse_support": "static", "sparse_basis_steps": 1}),
    "select": ("Fisher", {"fisher_mode": "random", "fisher_candidates": ["bottleneck"]}),
    "mask": ("Fisher", {"fisher_mode": "mask", "fisher_mask": "random"}),
    "lora": ("Lora", {}),
    "full": ("Full", {}),
    "signgd": ("Full", {"optim": "sgd", "optim_args": "sign=true"}),
}
# checkpoint, changed arguments (`None` = leave out), model, the reason in the message
CASES = [
    ("structured", {"sparse_density": 0.4}, {}, r"sparse_grad_values\.weight has shape|sparse_grad_values has shape"),
    ("structured", {"sparse_basis_scope": "kind"}, {}, r"this one has no .*sparse_grad_columns"),
    ("structured", {"sparse_support": "static", "sparse_basis": "none"}, {}, "it holds an adapter, and the model"),
    ("structured", {"sparse_target_modules": "query"}, {}, r"it has no .*attention\.self\.query"),
    ("dynamic", {"sparse_moments": "dense"}, {}, "the optimizer state has other moments"),
    ("dynamic", {"sparse_basis_scope": "layer"}, {}, "no basis for"),
    ("dynamic", {"sparse_basis": "none", "sparse_basis_steps": None}, {}, "has a basis for .* to use no basis"),
    ("dynamic", {"sparse_support": "structured"}, {}, "it holds a whole model, and an adapter trains here"),
    ("static", {"sparse_density": 0.4}, {}, "a support of 307 entries for a layer that trains 614"),
    ("static", {"sparse_basis": "none"}, {}, "has a basis for .* to use no basis"),
    ("static", {}, {"model_type": "roberta"}, r"it has no roberta\.|was trained for the labels"),
    ("mask", {}, {"num_labels": 3}, r"its classifier\.weight has shape \(2, 32\), here \(3, 32\)"),
    ("lora", {"lora_r": 4}, {}, r"lora_A\.weight has shape \(8, 32\), here \(4, 32\)"),
    ("lora", {"lora_target_modules": ["key"]}, {}, r"it has no .*\.key\.lora_A"),
    ("full", {}, {"model_type": "distilbert"}, r"it has no distilbert\."),
    ("full", {"optim": "sgd", "optim_args": "sign=true"}, {}, "it belongs to another optimizer"),
    ("signgd", {"optim": None, "optim_args": None}, {}, "it belongs to another optimizer"),
]


def make(way, folder, changed=None, model=None, **more):
    kind, own = TRAINED[way]
    values = {**own, **more, **(changed or {})}
    args = getattr(hf_ft_ext, f"{kind}TrainingArguments")(
        str(folder), max_steps=2, per_device_train_batch_size=4,
        **{**PLAIN, "save_steps": 1, **{name: value for name, value in values.items() if value is not None}},
    )  # fmt: skip
    return getattr(hf_ft_ext, f"{kind}Trainer")(
        tiny_model(**(model or {})), args, train_dataset=tiny_dataset(8), processing_class=tiny_tokenizer()
    )


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """The checkpoint of a way to train, made once."""

    @functools.cache
    def made(way):
        folder = tmp_path_factory.mktemp(way)
        trainer = make(way, folder)
        trainer.add_callback(WriteChecksums("a method"))
        trainer.train()
        return str(folder / "checkpoint-1")

    return made


@pytest.mark.parametrize(("way", "changed", "model", "reason"), CASES)
def test_a_checkpoint_of_other_settings_is_refused(tmp_path, checkpoint, way, changed, model, reason):
    trainer = make(way, tmp_path, changed, model)
    with pytest.raises(InputError, match=reason) as caught:
        trainer.train(resume_from_checkpoint=checkpoint(way))
    assert "pass the arguments that the run started with" in str(caught.value) or "trained for" in str(caught.value)


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused", "sgd"])
def test_moments_of_other_shapes_are_refused(tmp_path, optim):
    """A fused step would write past their ends: weights of equal names whose optimizer has another order."""
    values = {"optim": optim, "optim_args": "momentum=0.9"} if optim == "sgd" else {"optim": optim}
    first = make("full", tmp_path, values)
    first.train()
    other = make("full", tmp_path / "other", values)
    other.create_optimizer()
    for group in other.optimizer.param_groups:
        group["params"].reverse()
    with pytest.raises(InputError, match=r"(exp_avg|momentum_buffer) has shape \(.*\), and its parameter here \("):
        other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_an_adapter_of_the_user_resumes(tmp_path):
    """The check takes what `save_pretrained` writes, also with a head that peft saves."""
    finals = []
    for resume in (None, "checkpoint-1"):
        model = get_peft_model(tiny_model(), LoraConfig(task_type="SEQ_CLS", target_modules=["query"]))
        args = hf_ft_ext.FullTrainingArguments(str(tmp_path), max_steps=2, save_steps=1, **PLAIN)
        trainer = hf_ft_ext.FullTrainer(model, args, train_dataset=tiny_dataset(8), processing_class=tiny_tokenizer())
        trainer.train(resume_from_checkpoint=resume and str(tmp_path / resume))
        finals.append(trainer.model.state_dict())
    assert finals[0].keys() == finals[1].keys()
    assert all(torch.equal(value, finals[1][name]) for name, value in finals[0].items())


SEARCH = {"search_method": "spsa", "learning_rate": 1e-3, "seed": 3}
TRAINED |= {
    "selected": ("Fisher", {"fisher_examples": 4, "fisher_candidates": ["bottleneck", "lora"]}),
    "entries": ("Fisher", {"fisher_mode": "mask", "fisher_examples": 4}),
    "projected prefix": (
        "Fisher",
        {
            "fisher_mode": "single",
            "fisher_candidates": ["prefix"],
            "fisher_candidate_settings": {"prefix": {"projection_size": 4}},
        },
    ),
    "momentum": ("Full", {"optim": "sgd", "optim_args": "momentum=0.9"}),
    "spsa": ("Gradientless", {**SEARCH, "search_target": "all"}),
    "gld": ("Gradientless", {"search_candidates": 2}),
    "search lora": ("Gradientless", {**SEARCH, "search_peft": "lora"}),
    "search ia3": ("Gradientless", {**SEARCH, "search_peft": "ia3"}),
    "search vera": ("Gradientless", {**SEARCH, "search_peft": "vera", "search_peft_config": {"r": 4}}),
    "search ln_tuning": ("Gradientless", {**SEARCH, "search_peft": "ln_tuning"}),
    "search bias": ("Gradientless", {**SEARCH, "search_peft": "lora", "search_peft_config": {"bias": "all"}}),
    "search prefix": (
        "Gradientless",
        {**SEARCH, "search_peft": "prefix_tuning", "search_peft_config": {"num_virtual_tokens": 2}},
    ),
    "search prompt": (
        "Gradientless",
        {**SEARCH, "search_peft": "p_tuning", "search_peft_config": {"num_virtual_tokens": 2}},
    ),
    "search head of lora": ("Gradientless", {**SEARCH, "search_peft": "lora", "search_target": "head"}),
    "gld lora": ("Gradientless", {"search_candidates": 2, "search_peft": "lora"}),
    "adam lora": ("Gradientless", {"search_method": "adam", "search_peft": "lora"}),
}
ADAPTERS = ("structured", "select", "lora", *(way for way in TRAINED if " " in way))


@pytest.mark.parametrize("way", ADAPTERS)
def test_a_checkpoint_fits_the_base_model_of_its_run_and_no_other(tmp_path, checkpoint, way):
    """What freezes while a run trains, as all does in a search, is no part of the base model."""
    folder = checkpoint(way)
    again = make(way, tmp_path, {"resume_from_checkpoint": folder} if TRAINED[way][0] == "Fisher" else None)
    check_fits(folder, again.model, "a method")
    again.model.get_input_embeddings().weight.data[3] += 1
    with pytest.raises(InputError, match="belongs to another base model: the frozen weights differ"):
        check_fits(folder, again.model, "a method")


# checkpoint, changed arguments, the message
SETTLED = [
    ("structured", {"sparse_basis": "svd"}, "sparse_basis=svd has no effect.*chosen with sparse_basis=random; pass r"),
    ("dynamic", {"sparse_basis_steps": 2}, r"sparse_basis_steps=2 has no effect.*chosen with sparse_basis_steps=1"),
    ("static", {"sparse_basis_orientation": "published"}, "sparse_basis_orientation=published has no effect.*=tucker"),
    ("selected", {"fisher_examples": 2}, r"fisher_examples=2 has no effect.*chosen with fisher_examples=4; pass 4"),
    ("selected", {"fisher_criterion": "mean"}, "fisher_criterion=mean has no effect.*chosen without it; leave it out"),
    ("selected", {"fisher_candidates": ["lora"]}, r"fisher_candidates=\['lora'\] has no effect"),
    ("entries", {"fisher_examples": 2}, "fisher_examples=2 has no effect"),
    ("entries", {"fisher_keep_ratio": 0.1}, "fisher_keep_ratio=0.1 has no effect"),
]  # fmt: skip


@pytest.mark.parametrize(("way", "changed", "message"), SETTLED)
def test_an_argument_of_a_finished_prepass_is_refused(tmp_path, checkpoint, way, changed, message):
    with pytest.raises(InputError, match=message):
        make(way, tmp_path, changed).train(resume_from_checkpoint=checkpoint(way))


HARMLESS = {
    "logging_steps": 1, "num_train_epochs": 7, "per_device_eval_batch_size": 3, "save_total_limit": 2, "run_name": "x",
    "dataloader_num_workers": 0, "report_to": [], "metric_for_best_model": "loss",
}  # fmt: skip
APPLIED = {"seed": 5, "data_seed": 6, "gradient_accumulation_steps": 2}
# checkpoint, further changed arguments that apply, those that the optimizer's state replaces
WARNED = [
    ("structured", {}, {"learning_rate": 0.5, "weight_decay": 0.25}),
    ("dynamic", {"sparse_basis_refresh_steps": 9}, {"learning_rate": 0.5}),
    ("selected", {}, {"learning_rate": 0.5, "adam_beta1": 0.5}),
    ("entries", {}, {"adam_epsilon": 0.5}),
    ("lora", {"lora_dropout": 0.5}, {"learning_rate": 0.5}),
    ("full", {"label_smoothing_factor": 0.5}, {"learning_rate": 0.5, "weight_decay": 0.25}),
    ("signgd", {}, {"learning_rate": 0.5, "weight_decay": 0.25}),
    ("momentum", {}, {"optim_args": "momentum=0.5"}),
    ("spsa", {"search_eps": 0.5}, {"learning_rate": 0.5}),
    ("gld", {}, {"learning_rate": 0.5, "search_candidates": 4, "search_sampling_steps": 3}),
    ("search lora", {"search_eps": 0.5}, {"learning_rate": 0.5}),
]


@pytest.mark.parametrize(("way", "applied", "kept"), WARNED)
def test_changed_arguments_are_reported_once_with_both_values(tmp_path, checkpoint, caplog, way, applied, kept):
    applied = {**APPLIED, **applied}
    trainer = make(way, tmp_path, {**HARMLESS, **applied, **kept}, save_strategy="no")
    trainer.train(resume_from_checkpoint=checkpoint(way))
    course, optimizer = warnings_of(caplog)
    assert names_in(course) == set(applied) and "seed=5 (checkpoint: " in course
    assert "Pass the checkpoint's values to get what an uninterrupted run gives." in course
    assert names_in(optimizer) == set(kept) and "Start a new run from the checkpoint's model" in optimizer
    for name in set(kept) & {"learning_rate", "weight_decay"}:  # the report is true
        groups = trainer.optimizer.param_groups
        key = {"learning_rate": "initial_lr"}.get(name, name)
        assert kept[name] not in [group[key] for group in groups]


@pytest.mark.parametrize("way", TRAINED)
def test_the_same_arguments_and_harmless_ones_are_not_reported(tmp_path, checkpoint, caplog, way):
    make(way, tmp_path, HARMLESS, save_strategy="no").train(resume_from_checkpoint=checkpoint(way))
    assert not warnings_of(caplog) and "no record of arguments" not in caplog.text


@pytest.mark.parametrize("record", [None, "", "{}", '{"format": "another", "arguments": {"seed": 1}}', '["seed"]'])
def test_a_checkpoint_without_a_record_resumes(tmp_path, checkpoint, caplog, record):
    folder = shutil.copytree(checkpoint("lora"), tmp_path / "checkpoint-1")
    path = folder / ARGUMENTS_FILE
    path.unlink() if record is None else path.write_text(record)
    with caplog.at_level("INFO"):
        make("lora", tmp_path, {"seed": 5, "learning_rate": 0.5}, save_strategy="no").train(
            resume_from_checkpoint=str(folder)
        )
    (optimizer,) = warnings_of(caplog)  # the optimizer's state is a record of its own
    assert "no record of arguments" in caplog.text and names_in(optimizer) == {"lr"}


def test_dropout_of_the_model_and_options_of_the_launcher_are_compared(tmp_path, checkpoint, caplog):
    trainer = make("full", tmp_path, save_strategy="no")
    trainer.model.config.hidden_dropout_prob = 0.5
    data = hf_ft_ext.arguments.DataArguments(max_seq_length=7, validation_file="other.csv")
    recorded = read_arguments(checkpoint("full"))
    folder = shutil.copytree(checkpoint("full"), tmp_path / "checkpoint-1")
    write_arguments(folder, {**recorded, **compared_arguments(hf_ft_ext.arguments.DataArguments())})
    trainer.launcher_settings = compared_arguments(data)
    trainer.train(resume_from_checkpoint=str(folder))
    (course,) = warnings_of(caplog)
    assert names_in(course) == {"max_seq_length", "model.config.hidden_dropout_prob"}
    assert "max_seq_length=7 (checkpoint: None)" in course


def warnings_of(caplog):
    return [r.getMessage() for r in caplog.records if r.name.endswith("saved.resumed_arguments") and r.levelno > 20]


def names_in(message):
    return set(re.findall(r"([\w.]+)=\S.*?\(checkpoint: ", message))


def test_a_callback_that_the_checkpoint_does_not_know_begins_anew(checkpoint, tmp_path):
    """transformers keeps the states of callbacks, and writes them to places that only the first run made."""
    trainer = make("full", tmp_path)
    trainer.add_callback(ResourceMonitor())
    trainer.train(resume_from_checkpoint=checkpoint("full"))
    assert "ResourceMonitor" in (tmp_path / "checkpoint-2" / "trainer_state.json").read_text()
