"""Every trainer with every class of arguments, with other Trainers, and with what it is passed and cannot use."""

import copy
import pickle
from dataclasses import dataclass, field, fields

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from tiny import tiny_dataset, tiny_model, tiny_tokenizer
from transformers import (
    DataCollatorWithPadding,
    EarlyStoppingCallback,
    LlamaConfig,
    LlamaForCausalLM,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    Trainer,
    TrainingArguments,
)

from hf_ft_ext import InputError
from hf_ft_ext.arguments import MethodTrainingArguments
from hf_ft_ext.methods import METHODS

# What makes a method quick on a tiny model.
QUICK = {
    "sparse": {"sparse_basis_steps": 2, "sparse_density": 0.2},
    "gradientless": {"feature_cache_gb": 0.0},
    "linearhead": {"feature_cache_gb": 0.0},
    "fisher": {"fisher_examples": 4, "fisher_candidates": ["lora", "bottleneck"]},
    "kernel": {"kernel_regularization": "1e-2"},
}
AT_ONCE = ("linearhead", "kernel")
IN_STEPS = tuple(name for name in METHODS if name not in AT_ONCE)
PLAIN = {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "seed": 7}
LOOP = {"max_steps": 2, "save_strategy": "no", "per_device_train_batch_size": 4}


@dataclass
class OwnArguments(TrainingArguments):
    """A user's class: a field, a default of its own, and work that must not be done twice."""

    own_field: str = field(default="own")
    learning_rate: float = field(default=3e-3)
    weight_decay: float = field(default=0.0)

    def __post_init__(self):
        super().__post_init__()
        self.output_dir += "/inside"


class WithoutDataclass(TrainingArguments):
    """A subclass with a constructor of its own."""

    def __init__(self, *positional, extra=5, **kwargs):
        super().__init__(*positional, **kwargs)
        self.extra = extra


def sft_config(*positional, **kwargs):
    trl = pytest.importorskip("trl")
    return trl.SFTConfig(*positional, activation_checkpointing=False, bf16=False, **kwargs)


CLASSES = {
    "plain": TrainingArguments,
    "seq2seq": Seq2SeqTrainingArguments,
    "own": OwnArguments,
    "own without dataclass": WithoutDataclass,
    "trl": sft_config,
}


def values_of(args) -> dict:
    return {name: value for name, value in vars(args).items() if not name.startswith("_")}


def classes(name):
    method = METHODS[name]
    return method.arguments_class(), method.trainer_class()


def make(name, args=None, model=None, folder=None, trainer_class=None, **kwargs):
    own, kind = classes(name)
    if args is None:
        args = own(str(folder), **PLAIN, **({} if name in AT_ONCE else LOOP), **QUICK.get(name, {}))
    kwargs = {"train_dataset": tiny_dataset(16), "eval_dataset": tiny_dataset(8, seed=1), **kwargs}
    if "model_init" not in kwargs:
        kwargs["model"] = model or tiny_model()
    return (trainer_class or kind)(args=args, processing_class=tiny_tokenizer(), **kwargs)


# --- arguments of any class -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize("name", METHODS)
def test_arguments_of_any_class_are_completed(tmp_path, name, kind):
    own, _ = classes(name)
    args = CLASSES[kind](str(tmp_path), **PLAIN, **({} if name in AT_ONCE else LOOP))
    args.mine = "set after construction"
    for key, value in QUICK.get(name, {}).items():  # settings of the method are such attributes too
        setattr(args, key, value)
    before = values_of(args)
    trainer = make(name, args)
    assert isinstance(trainer.args, own) and isinstance(trainer.args, type(args))
    assert values_of(args) == before, "the user's own object was changed"

    theirs, known = values_of(trainer.args), {f.name: f.default for f in fields(TrainingArguments)}
    changed = {key for key, value in before.items() if theirs[key] != value}
    own_defaults = {f.name for f in fields(own) if f.name in known and f.default != known[f.name]} | {"max_steps"}
    assert changed <= own_defaults, "a value of the user's was lost"
    if kind == "own":
        assert theirs["learning_rate"] == 3e-3 and theirs["output_dir"] == f"{tmp_path}/inside"
    elif "learning_rate" in own_defaults:
        assert theirs["learning_rate"] == (5e-3 if name == "gradientless" else 5e-4)
    elif kind != "trl":
        assert theirs["learning_rate"] == known["learning_rate"]
    for key, value in QUICK.get(name, {}).items():
        assert theirs[key] == value

    loss = trainer.train().training_loss
    assert loss > 0
    trainer.save_model(str(tmp_path / "saved"))
    saved = torch.load(tmp_path / "saved" / "training_args.bin", weights_only=False)
    copies = (saved, copy.copy(trainer.args), copy.deepcopy(trainer.args), pickle.loads(pickle.dumps(trainer.args)))
    for one in copies:
        assert type(one) is type(trainer.args) and one.to_dict() == trainer.args.to_dict()
        assert one.mine == "set after construction" and one.device == args.device
    assert {f.name for f in fields(own) if f.init} <= trainer.args.to_dict().keys()


def test_values_can_be_given_with_the_completion(tmp_path):
    own, _ = classes("lora")
    args = own.complete(Seq2SeqTrainingArguments(str(tmp_path), use_cpu=True), lora_r=3, learning_rate=0.1)
    assert (args.lora_r, args.learning_rate, args.predict_with_generate) == (3, 0.1, False)
    again = own.complete(args, lora_alpha=4)
    assert (again.lora_r, again.lora_alpha, args.lora_alpha) == (3, 4, 16)
    assert own.complete(args) is args
    with pytest.raises(InputError, match=r"LoraTrainingArguments has no argument 'lora_rank'; did you mean"):
        own.complete(args, lora_rank=3)
    with pytest.raises(InputError, match="lora_r=0 is no rank"):
        own.complete(Seq2SeqTrainingArguments(str(tmp_path), use_cpu=True), lora_r=0)
    mapped = classes("full")[0].complete(
        TrainingArguments(str(tmp_path), use_cpu=True), peft="lora", peft_config='{"r": 1}'
    )
    assert mapped.peft_config == {"r": 1}


@dataclass
class ChecksInPostInit(MethodTrainingArguments):
    """Arguments of a method of another package, made before there was `validate`."""

    their_steps: int = field(default=3)

    def __post_init__(self):
        super().__post_init__()
        if self.their_steps < 1:
            raise InputError("their_steps")
        self.doubled = 2 * self.their_steps


def test_classes_that_check_after_they_are_made_are_completed_too(tmp_path):
    plain = Seq2SeqTrainingArguments(str(tmp_path), use_cpu=True, seed=9, sortish_sampler=True)
    plain.mine = 1
    args = ChecksInPostInit.complete(plain)
    assert isinstance(args, ChecksInPostInit) and isinstance(args, Seq2SeqTrainingArguments)
    assert (args.doubled, args.seed, args.sortish_sampler, args.mine) == (6, 9, True, 1)
    with pytest.raises(InputError, match="their_steps"):
        ChecksInPostInit.complete(plain, their_steps=0)


def test_arguments_that_are_none_are_refused(tmp_path):
    for name in METHODS:
        other = classes("lora" if name != "lora" else "full")[0](str(tmp_path), use_cpu=True)
        with pytest.raises(InputError, match=f"got {type(other).__name__}, which belongs to another method"):
            make(name, other)
        with pytest.raises(InputError, match=r"args is a dict; pass .* or other TrainingArguments"):
            make(name, {"output_dir": str(tmp_path)})
        with pytest.raises(InputError, match="takes a loaded model, and model='bert' is a name"):
            make(name, folder=tmp_path, model="bert")


# --- together with other Trainers -------------------------------------------------------------------------


class Counting(Trainer):
    """Another subclass of Trainer with a hook of its own."""

    steps = 0

    def __init__(self, *positional, word="none", **kwargs):
        super().__init__(*positional, **kwargs)
        self.word = word

    def _maybe_log_save_evaluate(self, *positional, **kwargs):
        self.steps += 1
        return super()._maybe_log_save_evaluate(*positional, **kwargs)


@pytest.mark.parametrize("name", IN_STEPS)
def test_trainers_compose(tmp_path, name):
    kind = type("Both", (classes(name)[1], Counting), {})
    trainer = make(name, folder=tmp_path, trainer_class=kind, word="mine")
    trainer.train()
    assert (trainer.word, trainer.steps) == ("mine", 3)  # two steps and the epoch's end


@pytest.mark.parametrize("name", METHODS)
def test_seq2seq_trainer_composes(tmp_path, name):
    kind = type("Both", (classes(name)[1], Seq2SeqTrainer), {})
    if name == "kernel":
        with pytest.raises(InputError, match="overrides prediction_step, and a kernel predicts all rows at once"):
            make(name, folder=tmp_path, trainer_class=kind)
        return
    trainer = make(name, folder=tmp_path, trainer_class=kind)
    assert isinstance(trainer.args, Seq2SeqTrainingArguments)
    trainer.train()
    assert trainer.evaluate()["eval_loss"] > 0


def causal_lm():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LlamaForCausalLM(
            LlamaConfig(
                vocab_size=len(tiny_tokenizer()), hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                num_attention_heads=2, max_position_embeddings=64, pad_token_id=0, bos_token_id=2, eos_token_id=3,
            )
        )  # fmt: skip


@pytest.mark.parametrize("own_arguments", [False, True])
@pytest.mark.parametrize("name", ["full", "sparse", "gradientless"])
def test_trl_s_sft_trainer_composes(tmp_path, name, own_arguments):
    trl = pytest.importorskip("trl")
    own, trainer_class = classes(name)
    settings = {"sparse": QUICK["sparse"], "gradientless": {"search_target": r"layers\.1\.mlp\.down"}}.get(name, {})
    if own_arguments:
        args = own(str(tmp_path), **PLAIN, **LOOP, **settings)
    else:
        args = own.complete(sft_config(str(tmp_path), max_length=16, **PLAIN, **LOOP), **settings)
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token, tokenizer.bos_token = "[SEP]", "[CLS]"
    model = causal_lm()
    before = model.model.layers[1].mlp.down_proj.weight.detach().clone()
    trainer = type("Both", (trainer_class, trl.SFTTrainer), {})(
        model, args, train_dataset=Dataset.from_dict({"text": ["the film was great", "a dull plot never"] * 6}),
        processing_class=tokenizer,
    )  # fmt: skip
    assert isinstance(trainer.args, trl.SFTConfig) and isinstance(trainer.args, own)
    assert trainer.args.max_length == (1024 if own_arguments else 16)
    trainer.train()
    logs = trainer.state.log_history
    assert any("mean_token_accuracy" in log or "eval_mean_token_accuracy" in log for log in logs), logs
    if name != "gradientless":  # two steps of a search may find nothing better
        assert not torch.equal(trainer.model.model.layers[1].mlp.down_proj.weight, before)


@pytest.mark.parametrize("name", METHODS)
def test_a_peft_config_for_the_other_trainer_is_refused(tmp_path, name):
    class TakesPeft(Trainer):
        def __init__(self, *positional, peft_config=None, **kwargs):
            super().__init__(*positional, **kwargs)

    kind = type("Both", (classes(name)[1], TakesPeft), {})
    own = classes(name)[0](
        str(tmp_path), **PLAIN, **QUICK.get(name, {}), **({"fix_layers": 1} if name == "full" else {})
    )
    with pytest.raises(InputError, match="peft_config wraps the model once more, after Both has made it ready"):
        make(name, own, trainer_class=kind, peft_config=LoraConfig(r=1))


def test_arguments_are_completed_for_the_other_trainer_too(tmp_path):
    kind = type("Both", (classes("sparse")[1], Seq2SeqTrainer), {})
    args = OwnArguments(str(tmp_path), own_field="x", **PLAIN, **LOOP)
    args.sparse_density, args.mine = 0.2, 5
    done = make("sparse", args, trainer_class=kind).args
    for one in (done, copy.deepcopy(done), pickle.loads(pickle.dumps(done))):
        assert isinstance(one, classes("sparse")[0])
        assert isinstance(one, OwnArguments) and isinstance(one, Seq2SeqTrainingArguments)
        assert (one.own_field, one.sparse_density, one.mine, one.predict_with_generate) == ("x", 0.2, 5, False)
        assert (one.learning_rate, one.output_dir) == (3e-3, f"{tmp_path}/inside")
    assert type(pickle.loads(pickle.dumps(done))) is type(done)
    kind = type("Both", (classes("lora")[1], Seq2SeqTrainer), {})
    slow = classes("lora")[0](str(tmp_path), **PLAIN, **LOOP, learning_rate=5e-5, lora_r=2)  # transformers' default
    done = make("lora", slow, trainer_class=kind).args
    assert (done.learning_rate, done.lora_r) == (5e-5, 2)


def test_signgd_steps_in_a_seq2seq_trainer(tmp_path):
    arguments, full = classes("full")
    kind = type("Both", (full, Seq2SeqTrainer), {})
    args = arguments(
        str(tmp_path), optimizer="signgd", learning_rate=1e-3, lr_scheduler_type="constant", **PLAIN,
        **LOOP | {"max_steps": 1},
    )  # fmt: skip
    model = tiny_model()
    before = model.classifier.weight.detach().clone()
    make("full", args, model, trainer_class=kind).train()
    step = (model.classifier.weight - before).abs()
    torch.testing.assert_close(step, torch.full_like(step, 1e-3), rtol=1e-2, atol=0)


# --- what a trainer is passed and cannot use --------------------------------------------------------------


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


def test_full_trainer_takes_an_optimizer_that_trains_the_model(tmp_path):
    model = tiny_model()
    before = model.classifier.weight.detach().clone()
    make("full", folder=tmp_path, model=model, optimizers=(optimizer_of(model), None)).train()
    assert not torch.equal(model.classifier.weight, before)
    arguments, _ = classes("full")
    with pytest.raises(InputError, match="the optimizer holds none of the parameters that train"):
        make("full", folder=tmp_path, optimizers=(optimizer_of(tiny_model()), None))
    other = torch.optim.lr_scheduler.ConstantLR(optimizer_of(model))
    with pytest.raises(InputError, match="the scheduler steers another optimizer than the one that trains"):
        make("full", folder=tmp_path, optimizers=(None, other))
    with pytest.raises(InputError, match="model_init makes a new model for each training, whose parameters an opt"):
        make("full", folder=tmp_path, model_init=tiny_model, optimizers=(optimizer_of(model), None))
    adapters = arguments(str(tmp_path), peft="lora", **PLAIN)
    with pytest.raises(InputError, match="peft=lora freezes the model and adds parameters, which an optimizer made"):
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
    "optim": "sgd", "warmup_steps": 3, "per_device_train_batch_size": 4, "metric_for_best_model": "accuracy",
}  # fmt: skip


@pytest.mark.parametrize("argument", LOOP_ONLY)
@pytest.mark.parametrize("name", AT_ONCE)
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


@pytest.mark.parametrize("name", AT_ONCE)
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


@pytest.mark.parametrize("name", AT_ONCE)
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
        (flipping, "data_collator flipping makes other labels than the data set holds"),
        (noisy, "data_collator noisy gives other input_ids for the same rows each time"),
    ):
        with pytest.raises(InputError, match=message):
            make(name, own(str(tmp_path), **PLAIN, **QUICK[name]), data_collator=collator).train()
    make(name, own(str(tmp_path), **PLAIN, **QUICK[name]), data_collator=lambda rows: pad(rows)).train()


def test_kernel_refuses_what_its_predictions_ignore(tmp_path):
    own, _ = classes("kernel")
    for options, message in (
        ({"eval_do_concat_batches": False}, "eval_do_concat_batches=false: a kernel predicts all rows at once"),
        ({"bf16": True}, "bf16=True steers"),
        ({"kernel_gamma": 2.0}, "kernel_gamma is of kernel_solver=asym, not lstsq"),
        ({"kernel_svm_c": 2.0}, "kernel_svm_c is of kernel_solver=svr or svc, not lstsq"),
    ):
        with pytest.raises(InputError, match=message):
            own(str(tmp_path), **PLAIN, **options)
    with pytest.raises(InputError, match="leave preprocess_logits_for_metrics out"):
        make("kernel", folder=tmp_path, preprocess_logits_for_metrics=lambda *_: None)


@pytest.mark.parametrize("name", METHODS)
def test_what_no_trainer_can_honour_is_refused_before_training(tmp_path, name):
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
    if name in AT_ONCE:
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
    make(name, smooth)
