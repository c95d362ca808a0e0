"""Every trainer with every class of arguments, with other Trainers, and with what it is passed and cannot use."""

import copy
import pickle
from dataclasses import dataclass, field, fields

import pytest
import torch
from any_trainer import LOOP, PLAIN, QUICK, classes, make
from datasets import Dataset
from peft import LoraConfig
from quick import ITERATIVE_METHODS, SOLVER_METHODS
from tiny import tiny_model, tiny_tokenizer
from transformers import (
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


# --- arguments of any class -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize("name", METHODS)
def test_arguments_of_any_class_are_completed(tmp_path, name, kind):
    own, _ = classes(name)
    args = CLASSES[kind](str(tmp_path), **PLAIN, **({} if name in SOLVER_METHODS else LOOP))
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
        assert theirs["learning_rate"] == {"gradientless": 5e-3, "sparse": 1e-3}.get(name, 5e-4)
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
    with pytest.raises(InputError, match="lora_r must be 1 or more, got 0"):
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
        with pytest.raises(InputError, match="model='bert' is a name, and nothing can be loaded from it"):
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


@pytest.mark.parametrize("name", ITERATIVE_METHODS)
def test_trainers_compose(tmp_path, name):
    kind = type("Both", (classes(name)[1], Counting), {})
    trainer = make(name, folder=tmp_path, trainer_class=kind, word="mine")
    trainer.train()
    assert (trainer.word, trainer.steps) == ("mine", 3)  # two steps and the epoch's end


@pytest.mark.parametrize("name", METHODS)
def test_seq2seq_trainer_composes(tmp_path, name):
    kind = type("Both", (classes(name)[1], Seq2SeqTrainer), {})
    if name == "kernel":
        with pytest.raises(InputError, match="overrides prediction_step, which a kernel does not call"):
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
    assert any("mean_token_accuracy" in log for log in logs), logs
    if name != "gradientless":  # two steps of a search may find nothing better
        layer = (trainer.model.merge_and_unload() if name == "sparse" else trainer.model).model.layers[1]
        assert not torch.equal(layer.mlp.down_proj.weight, before)


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
