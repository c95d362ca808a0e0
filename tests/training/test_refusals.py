"""What a trainer is passed and cannot use: refused with one line before training, in every trainer that ignores it."""

import pytest
import torch
from any_trainer import PLAIN, QUICK, classes, make
from quick import SOLVER_METHODS
from tiny import tiny_dataset, tiny_model, tiny_tokenizer
from transformers import (
    AutoConfig,
    AutoModelForImageClassification,
    DataCollatorWithPadding,
    EarlyStoppingCallback,
    TrainingArguments,
)

from hf_ft_ext import InputError
from hf_ft_ext.features.rows import SAMPLE
from hf_ft_ext.methods import METHODS


def optimizer_of(model):
    return torch.optim.SGD(model.parameters(), lr=0.1)


@pytest.mark.parametrize("by_position", [False, True])
@pytest.mark.parametrize("name", [name for name in METHODS if name != "full"])
def test_an_optimizer_that_would_train_nothing_is_refused(tmp_path, name, by_position):
    own, kind = classes(name)
    args = own(str(tmp_path), **PLAIN, **QUICK.get(name, {}))
    model = tiny_model()
    optimizer = optimizer_of(model)
    schedule = torch.optim.lr_scheduler.ConstantLR(optimizer)
    for pair in ((optimizer, None), (optimizer, schedule), (None, schedule)):
        with pytest.raises(InputError, match="leave `optimizers` out"):
            if by_position:
                kind(model, args, None, None, None, None, None, None, None, None, pair)
            else:
                kind(model, args, optimizers=pair)


@pytest.mark.parametrize("name", METHODS)
def test_a_wrapper_of_torch_compile_is_refused(tmp_path, name):
    with pytest.raises(InputError, match=r"the model is wrapped by torch\.compile.* torch_compile=True"):
        make(name, folder=tmp_path, model=torch.compile(tiny_model(), backend="eager"))
    with pytest.raises(InputError, match=r"the model is wrapped by torch\.compile"):
        make(name, folder=tmp_path, model_init=lambda: torch.compile(tiny_model(), backend="eager"))


def test_full_trainer_takes_an_optimizer_that_trains_the_model(tmp_path):
    model = tiny_model()
    before = model.classifier.weight.detach().clone()
    make("full", folder=tmp_path, model=model, optimizers=(optimizer_of(model), None)).train()
    assert not torch.equal(model.classifier.weight, before)
    arguments, _ = classes("full")
    with pytest.raises(InputError, match="the optimizer contains none of the trainable parameters"):
        make("full", folder=tmp_path, optimizers=(optimizer_of(tiny_model()), None))
    other = torch.optim.lr_scheduler.ConstantLR(optimizer_of(model))
    with pytest.raises(InputError, match="the scheduler steers another optimizer than the one that trains"):
        make("full", folder=tmp_path, optimizers=(None, other))
    with pytest.raises(InputError, match="model_init makes a new model for each training, whose parameters an opt"):
        make("full", folder=tmp_path, model_init=tiny_model, optimizers=(optimizer_of(model), None))
    adapters = arguments(str(tmp_path), peft="lora", **PLAIN)
    with pytest.raises(
        InputError, match="peft=lora freezes the model and adds parameters, which an optimizer created"
    ):
        make("full", adapters, model, optimizers=(optimizer_of(model), None))


def test_fisher_and_lora_take_an_optimizer_class(tmp_path):
    for name in ("fisher", "lora"):
        factory = (torch.optim.SGD, {"lr": 0.1})
        trainer = make(name, folder=tmp_path, optimizer_cls_and_kwargs=factory)
        trainer.train()
        assert type(trainer.optimizer.optimizer) is torch.optim.SGD


LOOP_ONLY = {
    "eval_strategy": "epoch", "save_strategy": "epoch", "learning_rate": 1e-3, "max_steps": 9, "save_steps": 7,
    "num_train_epochs": 1, "lr_scheduler_type": "cosine", "weight_decay": 0.1, "gradient_accumulation_steps": 2,
    "optim": "sgd", "warmup_steps": 3, "metric_for_best_model": "accuracy",
    "activation_checkpointing": True, "resume_from_checkpoint": "checkpoint-3",
}  # fmt: skip


@pytest.mark.parametrize("argument", LOOP_ONLY)
@pytest.mark.parametrize("name", SOLVER_METHODS)
def test_at_once_trainers_refuse_what_steers_a_loop(tmp_path, name, argument):
    value = LOOP_ONLY[argument]
    message = f"{argument}={value} steers a training loop, and method {name} has none"
    for kind in (TrainingArguments, classes(name)[0]):
        with pytest.raises(InputError, match=message):
            make(name, kind(str(tmp_path), **PLAIN, **{argument: value}))
    late = TrainingArguments(str(tmp_path), **PLAIN)
    setattr(late, argument, value)
    with pytest.raises(InputError, match=message):
        make(name, late)


@pytest.mark.parametrize("name", SOLVER_METHODS)
def test_at_once_trainers_take_at_most_the_smaller_batch_size_of_rows(tmp_path, name):
    sizes = []

    def shape(module, args, kwargs):
        sizes.append(len(kwargs["input_ids"]))

    for given, most in (({}, 8), ({"per_device_train_batch_size": 3}, 3), ({"per_device_train_batch_size": 50}, 8)):
        trainer = make(name, classes(name)[0](str(tmp_path / f"{len(given)} {most}"), **PLAIN, **QUICK[name], **given))
        with trainer.model.register_forward_pre_hook(shape, with_kwargs=True):
            trainer.train()
        assert most // 2 < max(size for size in sizes if size != SAMPLE) <= most
        sizes.clear()


@pytest.mark.parametrize("name", SOLVER_METHODS)
def test_at_once_trainers_refuse_objects_and_hooks_of_a_loop(tmp_path, name):
    make(name, classes(name)[0](str(tmp_path), **PLAIN, **QUICK[name], save_strategy="no")).train()
    with pytest.raises(InputError, match="found without your compute_loss_func; leave it out"):
        make(name, folder=tmp_path, compute_loss_func=lambda *_, **__: 0)
    with pytest.raises(InputError, match="EarlyStoppingCallback compares evaluations in training"):
        make(name, folder=tmp_path, callbacks=[EarlyStoppingCallback(1)])
    later = make(name, folder=tmp_path)
    later.add_callback(EarlyStoppingCallback(1))
    with pytest.raises(InputError, match="EarlyStoppingCallback compares evaluations in training"):
        later.train()
    for hook in ("compute_loss", "training_step", "get_train_dataloader", "create_optimizer"):
        kind = type("Mine", (classes(name)[1],), {hook: lambda self, *_, **__: None})
        with pytest.raises(InputError, match=f"Mine overrides {hook}, which belongs to a training loop"):
            make(name, folder=tmp_path, trainer_class=kind)
    with pytest.raises(InputError, match=r"label_names=\['target'\]: this method reads the labels as `labels`"):
        make(name, classes(name)[0](str(tmp_path), **PLAIN, **QUICK[name], label_names=["target"]))


@pytest.mark.parametrize("name", SOLVER_METHODS)
def test_at_once_trainers_refuse_collators_whose_batches_are_not_the_rows(tmp_path, name):
    pad = DataCollatorWithPadding(tiny_tokenizer())

    def flipping(rows):
        batch = pad(rows)
        return {**batch, "labels": 1 - batch["labels"]}

    def noisy(rows):
        batch = pad(rows)
        return {**batch, "input_ids": batch["input_ids"] + torch.randint(0, 2, batch["input_ids"].shape)}

    own, _ = classes(name)
    for collator, message in (
        (flipping, "data_collator flipping changes the labels of the data set"),
        (noisy, "data_collator noisy gives different input_ids for the same rows each time"),
    ):
        with pytest.raises(InputError, match=message):
            make(name, own(str(tmp_path), **PLAIN, **QUICK[name]), data_collator=collator).train()
    make(name, own(str(tmp_path), **PLAIN, **QUICK[name]), data_collator=lambda rows: pad(rows)).train()

    class Noisy(list):
        def __getitem__(self, i):
            row = super().__getitem__(i)
            return {**row, "input_ids": [int(torch.randint(5, 40, ())) for _ in row["input_ids"]]}

    with pytest.raises(InputError, match="train_dataset gives different input_ids for the same rows each time"):
        make(name, own(str(tmp_path), **PLAIN, **QUICK[name]), train_dataset=Noisy(tiny_dataset(16))).train()


def test_kernel_refuses_what_its_predictions_ignore(tmp_path):
    own, _ = classes("kernel")
    for options, message in (
        ({"eval_do_concat_batches": False}, "eval_do_concat_batches=false: a kernel predicts all rows at once"),
        ({"bf16": True}, "bf16=True steers"),
        ({"kernel_gamma": 2.0}, "kernel_gamma applies only to kernel_solver=asym, not lstsq"),
        ({"kernel_svm_c": 2.0}, "kernel_svm_c applies only to kernel_solver=svr or svc, not lstsq"),
    ):
        with pytest.raises(InputError, match=message):
            own(str(tmp_path), **PLAIN, **options)
    with pytest.raises(InputError, match="leave preprocess_logits_for_metrics out"):
        make("kernel", folder=tmp_path, preprocess_logits_for_metrics=lambda *_: None)


@pytest.mark.parametrize("name", METHODS)
def test_unusable_report_to_is_refused_before_training(tmp_path, name):
    own, _ = classes(name)
    options = {**PLAIN, **QUICK.get(name, {})}
    with pytest.raises(InputError, match="report_to=neptune: its library is not installed; run pip install neptune"):
        make(name, own(str(tmp_path), **{**options, "report_to": "neptune"}))
    late = own(str(tmp_path), **options)
    late.report_to = "neptune"
    with pytest.raises(InputError, match="report_to=neptune: its library is not installed"):
        make(name, late)
    with pytest.raises(InputError, match="report_to=wanbd is unknown; did you mean 'wandb'"):
        make(name, own(str(tmp_path), **{**options, "report_to": ["wanbd"]}))
    with pytest.raises(InputError, match="dataloader_persistent_workers=True is about worker processes, and"):
        make(name, own(str(tmp_path), **options, dataloader_persistent_workers=True))
    if name in SOLVER_METHODS:
        return
    with pytest.raises(InputError, match="save_strategy=best saves after the best evaluation, and there is none"):
        make(name, own(str(tmp_path), **options, save_strategy="best", metric_for_best_model="loss"))
    smooth = own(str(tmp_path), **options, label_smoothing_factor=0.1)
    for config, kind in (
        ({"num_labels": 1}, "this task is a regression"),
        ({"num_labels": 3, "problem_type": "regression"}, "this task is a regression"),
        ({"num_labels": 3, "problem_type": "multi_label_classification"}, "the rows of this task have several labels"),
    ):
        with pytest.raises(InputError, match=f"label_smoothing_factor=0.1 moves probability between .* {kind}"):
            make(name, smooth, tiny_model(**config))
    with pytest.raises(InputError, match=r"label_smoothing_factor=0\.1 moves .* a regression"):
        make(name, smooth, one_output_for_images())
    make(name, smooth)


def one_output_for_images():
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    config = AutoConfig.for_model("vit", **sizes, image_size=8, patch_size=4, num_labels=1)
    return AutoModelForImageClassification.from_config(config)
