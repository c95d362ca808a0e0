"""LoRA: what trains, what is saved, and that the saved adapter gives the trained logits."""

import warnings

import pytest
import torch
import transformers
from classifiers import classifier_rows, tiny_classifier
from datasets import Dataset
from other_models import other_batch, other_model
from peft import LoraModel, PeftModel, PeftModelForCausalLM
from tiny import CONFIGS, tiny_dataset, tiny_model
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertModel,
    BertPreTrainedModel,
    DataCollatorWithPadding,
    TrainingArguments,
)
from transformers.modeling_outputs import SequenceClassifierOutput

from hf_ft_ext import (
    FisherTrainer,
    FisherTrainingArguments,
    FullTrainer,
    FullTrainingArguments,
    SparseTrainer,
    SparseTrainingArguments,
)
from hf_ft_ext.errors import InputError
from hf_ft_ext.lora.arguments import LoraTrainingArguments
from hf_ft_ext.lora.trainer import LoraTrainer, add_lora


def arguments(tmp_path, **kwargs) -> LoraTrainingArguments:
    defaults = {"max_steps": 4, "save_strategy": "no", "disable_tqdm": True, "use_cpu": True, "learning_rate": 1e-2}
    return LoraTrainingArguments(output_dir=str(tmp_path / "out"), **{**defaults, **kwargs})


def trainer(tmp_path, tokenizer, model=None, model_init=None, data=None, **kwargs) -> LoraTrainer:
    data = tiny_dataset() if data is None else data
    return LoraTrainer(
        model=model,
        model_init=model_init,
        args=arguments(tmp_path, **kwargs),
        train_dataset=data,
        eval_dataset=data,
        data_collator=DataCollatorWithPadding(tokenizer),
    )


def logits(model) -> torch.Tensor:
    ids = torch.arange(5, 25).reshape(2, 10)
    model.eval()
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits


@pytest.mark.parametrize("kind", ["bert", "roberta", "distilbert"])
@pytest.mark.parametrize("targets", [None, ["all-linear"]])
def test_saved_adapter_gives_the_trained_logits(tmp_path, tokenizer, kind, targets):
    tiny_model(kind).save_pretrained(tmp_path / "base")
    base = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", module="peft")
        run = trainer(tmp_path, tokenizer, base, lora_target_modules=targets)
    untrained = logits(run.model)
    run.train()
    run.save_model()
    # the head of the fresh base differs: it must come from the adapter's folder
    fresh = tiny_model(kind, seed=0)
    head = next(m for n, m in fresh.named_modules() if n.endswith("classifier"))
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter)
    loaded = PeftModel.from_pretrained(fresh, tmp_path / "out")
    assert torch.equal(logits(loaded), logits(run.model))
    assert not torch.allclose(logits(loaded), untrained)


def test_adapters_and_head_train(tmp_path):
    model = add_lora(tiny_model(), arguments(tmp_path, lora_r=4))
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert all("lora_" in name or "classifier.modules_to_save" in name for name in trainable)
    assert sum("lora_A" in name for name in trainable) == 4  # query and value of two layers
    assert model.peft_config["default"].r == 4
    every = add_lora(tiny_model(), arguments(tmp_path, lora_target_modules=["all-linear"]))
    # six linear layers in each of two blocks, and the pooler; not the head, which trains in full
    assert sum("lora_A" in name for name, _ in every.named_parameters()) == 13


def test_parts_without_pretrained_weights_train_and_are_saved(tmp_path):
    model = tiny_model()
    model.fresh_parameters = frozenset({"bert.pooler.dense.weight", "bert.pooler.dense.bias", "classifier.weight"})
    wrapped = add_lora(model, arguments(tmp_path, lora_target_modules=["dense"]))
    trainable = {name for name, p in wrapped.named_parameters() if p.requires_grad}
    assert any("pooler.dense.modules_to_save" in name for name in trainable)
    assert not any("pooler" in name and "lora_" in name for name in trainable)


def test_adapters_depend_on_the_seed_alone(tmp_path):
    def first(seed):
        model = add_lora(tiny_model(), arguments(tmp_path, seed=seed))
        return next(p.clone() for n, p in model.named_parameters() if "lora_A" in n)

    torch.manual_seed(3)
    a = first(1)
    before = torch.get_rng_state()
    b = first(1)
    assert torch.equal(a, b) and torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(a, first(2))


def test_model_init_and_model_give_the_same(tmp_path, tokenizer):
    results = []
    for source in ({"model": tiny_model()}, {"model_init": lambda: tiny_model()}):
        run = trainer(tmp_path, tokenizer, **source)
        run.train()
        results.append(logits(run.model))
    assert torch.equal(*results)


def test_plain_arguments_are_completed(tmp_path, caplog):
    caplog.set_level("INFO", logger="hf_ft_ext")
    plain = TrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    run = LoraTrainer(tiny_model(), plain)
    assert isinstance(run.args, LoraTrainingArguments)
    assert (run.args.lora_r, run.args.learning_rate) == (8, 5e-4)
    assert [r.message for r in caplog.records if "learning_rate=0.0005" in r.message]
    chosen = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, learning_rate=1e-3, seed=9)
    completed = LoraTrainingArguments.complete(chosen)
    assert (completed.learning_rate, completed.seed) == (1e-3, 9)


@pytest.mark.parametrize("model_init", [False, True])
def test_resume_equals_unbroken(tmp_path, tokenizer, model_init):
    def source():
        return {"model_init": lambda: tiny_model()} if model_init else {"model": tiny_model()}

    options = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3, "lora_dropout": 0.1}
    unbroken = trainer(tmp_path / "a", tokenizer, **source(), **options)
    unbroken.train()
    resumed = trainer(tmp_path / "b", tokenizer, **source(), **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "a/out/checkpoint-3"))
    ours, theirs = unbroken.model.state_dict(), resumed.model.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_best_model_is_loaded_at_the_end(tmp_path, tokenizer):
    run = trainer(
        tmp_path, tokenizer, tiny_model(), max_steps=6, learning_rate=0.5, eval_strategy="steps", eval_steps=2,
        save_strategy="steps", save_steps=2, load_best_model_at_end=True, lr_scheduler_type="constant",
    )  # fmt: skip
    run.train()
    losses = [entry["eval_loss"] for entry in run.state.log_history if "eval_loss" in entry]
    assert run.evaluate()["eval_loss"] == pytest.approx(min(losses), rel=1e-6)
    assert len(set(losses)) == 3


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"lora_r": 0}, "lora_r must be 1 or more, got 0"),
        ({"lora_alpha": 0}, "lora_alpha must be above 0, got 0"),
        ({"lora_dropout": 1.0}, r"lora_dropout must be in \[0, 1\), got 1.0"),
        ({"lora_target_modules": ["all-linear", "query"]}, "already includes all; pass it alone"),
    ],
)
def test_values_out_of_range(tmp_path, values, message):
    with pytest.raises(InputError, match=message):
        arguments(tmp_path, **values)


def test_targets_may_be_a_text_as_in_peft(tmp_path):
    for text in ("all-linear", "query", r".*layer\.0\..*(key|value)"):
        one, several = (add_lora(tiny_model(), arguments(tmp_path, lora_target_modules=t)) for t in (text, [text]))
        assert [name for name, _ in one.named_parameters()] == [name for name, _ in several.named_parameters()]


def test_targets_that_match_nothing(tmp_path, tokenizer):
    with pytest.raises(InputError, match=r"\['qkv'\] cannot be used .*bert.encoder.layer.\*.attention.self.query"):
        trainer(tmp_path, tokenizer, tiny_model(), lora_target_modules=["qkv"])


@pytest.mark.parametrize(
    ("kind", "targets"),
    [
        ("bert", {"query", "value"}),  # peft's table
        ("mpnet", {"q", "v"}),
        ("modernbert", {"Wqkv"}),
        ("phi3", {"qkv_proj"}),
        ("squeezebert", {"query", "value"}),  # convolutions of width 1
        ("xlm", {"q_lin", "v_lin"}),
        ("jetmoe", {"kv_proj"}),
        ("fnet", {"intermediate.dense", "output.dense"}),  # no attention
        ("xlnet", {"layer_1", "layer_2"}),  # attention weights outside of modules
    ],
)
def test_default_targets_by_table_and_by_structure(tmp_path, kind, targets):
    model = add_lora(tiny_classifier(kind), arguments(tmp_path))
    assert set(model.peft_config["default"].target_modules) == targets
    model(**classifier_rows()).loss.backward()
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert any("lora_A" in name for name in trained)
    assert all(p.grad is not None for name, p in model.named_parameters() if name in trained)


_SIZE = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
_IMAGES = {"vision_config": {**_SIZE, "image_size": 16, "patch_size": 8}, "text_config": {**_SIZE, "vocab_size": 60}}
_STACK = {"layers": 2, "attention_heads": 2, "ffn_dim": 24}
_SOUNDS = {f"{part}_{name}": value for part in ("encoder", "decoder") for name, value in _STACK.items()}
_LATENTS = {"d_latents": 16, "num_latents": 4, "num_self_attends_per_block": 2, "max_position_embeddings": 32,
            "num_self_attention_heads": 2, "num_cross_attention_heads": 2}  # fmt: skip


# base_model_prefix is no submodule of these, or the head is inside of the base model
@pytest.mark.parametrize(
    ("kind", "head", "values"),
    [
        ("CLIPForImageClassification", {"classifier"}, _IMAGES),
        ("SiglipForImageClassification", {"classifier"}, _IMAGES),
        ("WhisperForAudioClassification", {"projector", "classifier"}, _SOUNDS),
        ("PerceiverForSequenceClassification", {"perceiver.decoder"}, _LATENTS),
    ],
)
def test_heads_outside_and_inside_of_what_the_prefix_names(tmp_path, kind, head, values):
    model_class = getattr(transformers, kind)
    sizes = {} if values is _IMAGES else {"d_model": 16, "vocab_size": 60, "pad_token_id": 0}
    wrapped = add_lora(model_class(model_class.config_class(**values, **sizes)), arguments(tmp_path))
    assert set(wrapped.peft_config["default"].modules_to_save) - {"classifier", "score"} <= head  # peft's own two
    trained = {name for name, p in wrapped.named_parameters() if p.requires_grad and "lora_" not in name}
    parts = {name.partition(".modules_to_save.")[0].removeprefix("base_model.model.") for name in trained}
    assert parts == head


def with_head(first, last):
    """A user's classifier on BERT, with a head of a norm and a linear layer of these names."""

    class Own(BertPreTrainedModel):
        def __init__(self, config):
            super().__init__(config)
            self.bert = BertModel(config, add_pooling_layer=False)
            self.add_module(first, nn.LayerNorm(config.hidden_size))
            self.add_module(last, nn.Linear(config.hidden_size, 2))
            self.post_init()

        def forward(self, input_ids=None, attention_mask=None, labels=None):
            hidden = self.bert(input_ids, attention_mask=attention_mask).last_hidden_state[:, 0]
            logits = self.get_submodule(last)(self.get_submodule(first)(hidden))
            loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
            return SequenceClassifierOutput(loss=loss, logits=logits)

    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Own(AutoConfig.for_model("bert", **CONFIGS["bert"]))


@pytest.mark.parametrize("method", ["lora", "sparse", "fisher"])
def test_heads_that_are_named_like_parts_of_layers(tmp_path, tokenizer, method):
    """peft finds modules by the ends of their names; the layers' own are not to train."""
    kind, arguments_class = {
        "lora": (LoraTrainer, LoraTrainingArguments),
        "sparse": (SparseTrainer, SparseTrainingArguments),
        "fisher": (FisherTrainer, FisherTrainingArguments),
    }[method]
    more = {"fisher": {"fisher_mode": "single", "fisher_candidates": ["lora"]}, "sparse": {"sparse_basis_steps": 1}}
    settings = {"max_steps": 2, "save_strategy": "no", "disable_tqdm": True, "use_cpu": True, "report_to": "none"}
    args = arguments_class(str(tmp_path), **settings, **more.get(method, {}))

    def made(*names):
        collate = DataCollatorWithPadding(tokenizer)
        return kind(with_head(*names), args, train_dataset=tiny_dataset(), data_collator=collate)

    with pytest.raises(InputError, match=r"the head 'output' of Own .* bert\.encoder\..*output has the same; rename"):
        made("norm", "output").train()
    run = made("LayerNorm", "head")
    run.train()
    run.save_model()
    saved = {n for n, p in run.model.named_parameters() if p.requires_grad and ".modules_to_save." in n}
    parts = (f"{name}.modules_to_save.default.{p}" for name in ("LayerNorm", "head") for p in ("weight", "bias"))
    assert saved == {f"base_model.model.{part}" for part in parts}
    assert torch.equal(logits(PeftModel.from_pretrained(with_head("LayerNorm", "head"), tmp_path)), logits(run.model))


def test_a_table_that_names_no_module_counts_for_nothing(tmp_path, monkeypatch):
    monkeypatch.setitem(LoraModel.target_module_mapping, "bert", ["c_attn"])
    assert set(add_lora(tiny_model(), arguments(tmp_path)).peft_config["default"].target_modules) == {"query", "value"}


@pytest.mark.parametrize("kind", ["bert", "mpnet", "deberta-v2", "llama"])
def test_both_baselines_train_the_same_parameters(tmp_path, kind):
    args = FullTrainingArguments(str(tmp_path), peft="lora", peft_config={"r": 8, "lora_alpha": 16}, use_cpu=True)
    models = (
        add_lora(tiny_classifier(kind), arguments(tmp_path, seed=1)),
        FullTrainer(tiny_classifier(kind), args).model,
    )
    trained = [{n: tuple(p.shape) for n, p in model.named_parameters() if p.requires_grad} for model in models]
    assert trained[0] == trained[1]


def test_a_causal_language_model_is_wrapped_as_one(tmp_path):
    small = {"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2}
    base = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", vocab_size=50, **small))
    model = add_lora(base, arguments(tmp_path))
    assert isinstance(model, PeftModelForCausalLM) and model.peft_config["default"].task_type == "CAUSAL_LM"
    assert all("lora_" in name for name, p in model.named_parameters() if p.requires_grad)  # its head is pretrained
    assert model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=2, do_sample=False).shape == (1, 5)


def test_gradients_that_reach_no_adapter(tmp_path):
    rows = Dataset.from_list([{"input_ids": [5] * 64, "attention_mask": [1] * 64, "labels": i % 2} for i in range(4)])
    run = LoraTrainer(tiny_classifier("reformer"), arguments(tmp_path, max_steps=1), train_dataset=rows)
    with pytest.raises(InputError, match="no gradient reaches the adapters in ReformerForSequenceClassification"):
        run.train()


def test_a_batch_that_the_model_refuses_is_bad_input(tmp_path):
    rows = Dataset.from_list([{"input_ids": [5] * 16, "attention_mask": [1] * 16, "labels": i % 2} for i in range(4)])
    run = LoraTrainer(tiny_classifier("reformer"), arguments(tmp_path, max_steps=1), train_dataset=rows)
    message = (
        r"ReformerForSequenceClassification refuses the first training batch: .*axial_pos_shape.*pad_to_max_length"
    )
    with pytest.raises(InputError, match=message):
        run.train()


def test_targets_that_cannot_take_an_adapter(tmp_path):
    with pytest.raises(InputError, match=r"lora_target_modules=\['LayerNorm'\] cannot be used .*not supported"):
        add_lora(tiny_model(), arguments(tmp_path, lora_target_modules=["LayerNorm"]))


def test_adapters_on_adapters(tmp_path, tokenizer):
    wrapped = add_lora(tiny_model(), arguments(tmp_path))
    with pytest.raises(InputError, match="has PEFT adapters already"):
        trainer(tmp_path, tokenizer, wrapped)
    with pytest.raises(InputError, match="has PEFT adapters already"):
        trainer(tmp_path, tokenizer, wrapped.base_model.model)


def test_a_regular_expression_picks_layers(tmp_path):
    pattern = r".*layer\.\d+\.(intermediate|output)\.dense"
    args = LoraTrainingArguments(str(tmp_path), lora_target_modules=[pattern], use_cpu=True, report_to="none")
    model = LoraTrainer(tiny_model(), args).model
    adapted = {name.split(".lora_A")[0] for name, _ in model.named_parameters() if ".lora_A" in name}
    assert len(adapted) == 4 and not any("attention" in name for name in adapted)
    with pytest.raises(InputError, match=r"lora_target_modules='\*' is not a regular expression"):
        LoraTrainingArguments(str(tmp_path), lora_target_modules=["*"])


def test_checkpointed_layers_of_images_get_gradients(tmp_path):
    """Inputs of layers with reentrant checkpointing have to require gradients; in transformers, those of texts do."""
    rows = other_batch("vit")
    rows["pixel_values"] = rows["pixel_values"].float()
    data = [{name: value[i] for name, value in rows.items()} for i in range(3)]
    options = {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": True}}
    args = LoraTrainingArguments(str(tmp_path), max_steps=1, use_cpu=True, save_strategy="no", **options)
    trainer = LoraTrainer(other_model("vit").float(), args, train_dataset=data)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if "lora_B" in name}
    trainer.train()
    own = dict(trainer.model.named_parameters())
    assert before and not any(torch.equal(own[name], value) for name, value in before.items())
