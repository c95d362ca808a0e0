"""Plain fine-tuning: optimizers, frozen layers, squared loss, peft methods, and what contradicts what."""

import copy

import pytest
import torch
from classifiers import tiny_classifier
from peft import LoraConfig, PeftModel, get_peft_model
from tiny import CONFIGS, tiny_dataset, tiny_model, tiny_tokenizer
from transformers import (
    AlbertConfig,
    AlbertForSequenceClassification,
    AutoConfig,
    AutoModelForAudioClassification,
    AutoModelForImageClassification,
    Trainer,
    TrainingArguments,
)

from hf_ft_ext import FullTrainer, FullTrainingArguments, InputError, SignGD
from hf_ft_ext.full.freeze import fix_layers
from hf_ft_ext.full.trainer import l2_loss
from hf_ft_ext.launch.parsing import parse_arguments

NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def make(folder, model=None, regression=False, trainer_class=FullTrainer, arguments=FullTrainingArguments, **options):
    kwargs = options.pop("trainer", {})
    options = {"max_steps": 3, "learning_rate": 1e-2, "lr_scheduler_type": "constant", "max_grad_norm": 0.0, **options}
    args = arguments(
        str(folder), use_cpu=True, report_to="none", disable_tqdm=True, save_strategy="no",
        dataloader_pin_memory=False, **options,
    )  # fmt: skip
    return trainer_class(
        model or tiny_model(**NO_DROPOUT),
        args,
        train_dataset=tiny_dataset(32, regression=regression),
        eval_dataset=tiny_dataset(16, seed=1),
        processing_class=tiny_tokenizer(),
        **kwargs,
    )


def weights(trainer):
    return {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}


def test_signgd_steps_by_the_learning_rate_along_the_signs():
    p = torch.nn.Parameter(torch.tensor([1.0, -2.0, 3.0]))
    still = torch.nn.Parameter(torch.ones(1))
    optimizer = SignGD([{"params": [p], "weight_decay": 0.5}, {"params": [still]}], lr=0.1)
    p.grad = torch.tensor([1e-9, 0.0, -7.0])
    assert optimizer.step(lambda: 3.0) == 3.0
    torch.testing.assert_close(p.detach(), torch.tensor([1.0, -2.0, 3.0]) * 0.95 + torch.tensor([-0.1, 0.0, 0.1]))
    assert still.item() == 1 and not optimizer.state_dict()["state"]
    for options in ({"lr": -1.0}, {"weight_decay": -1.0}):
        with pytest.raises(InputError, match=r"must be 0 or more, got -1\.0"):
            SignGD([p], **options)


def test_adam_and_sgd_are_transformers_own(tmp_path):
    for optimizer, optim in (("adam", "adamw_torch_fused"), ("sgd", "sgd")):
        ours = make(tmp_path, optimizer=optimizer)
        plain = make(tmp_path, trainer_class=Trainer, arguments=TrainingArguments, optim=optim)
        for trainer in (ours, plain):
            trainer.train()
        assert all(torch.equal(value, weights(plain)[name]) for name, value in weights(ours).items())


def test_signgd_moves_every_entry_by_the_rate(tmp_path):
    trainer = make(tmp_path, optim="sgd", optim_args="sign=true", max_steps=1, learning_rate=1e-3)
    before = weights(trainer)
    trainer.train()
    step = (weights(trainer)["classifier.weight"] - before["classifier.weight"]).abs()
    torch.testing.assert_close(step, torch.full_like(step, 1e-3), rtol=1e-2, atol=0)


def test_defaults_equal_transformers_trainer(tmp_path):
    ours, plain = make(tmp_path), make(tmp_path, trainer_class=Trainer, arguments=TrainingArguments)
    for trainer in (ours, plain):
        trainer.train()
    assert all(torch.equal(value, weights(plain)[name]) for name, value in weights(ours).items())
    assert FullTrainer(tiny_model(), TrainingArguments(str(tmp_path), use_cpu=True)).args.optimizer is None


@pytest.mark.parametrize(
    ("old", "optim", "signs"),
    [("adam", "adamw_torch_fused", False), ("sgd", "sgd", False), ("signgd", "sgd", True)],
)
def test_the_old_name_of_optim_works_and_warns(tmp_path, old, optim, signs):
    with pytest.warns(FutureWarning, match=f"optimizer={old} is now optim={optim}"):
        args = FullTrainingArguments(str(tmp_path), optimizer=old)
    assert (args.optim.value, args.sign_descent) == (optim, signs)


@pytest.mark.parametrize("model_type", CONFIGS)
def test_low_layers_and_embeddings_freeze(tmp_path, model_type):
    trainer = make(tmp_path, tiny_model(model_type), fix_layers=1, optim="sgd", learning_rate=1.0)
    before = weights(trainer)
    trainer.train()
    moved = {name for name, value in weights(trainer).items() if not torch.equal(value, before[name])}
    assert moved and not any("embeddings" in name or "layer.0." in name for name in moved)
    assert any("layer.1." in name for name in moved) and any("classifier" in name for name in moved)


def frozen_of(model, count) -> set[str]:
    fix_layers(model, count)
    return {name for name, parameter in model.named_parameters() if not parameter.requires_grad}


@pytest.mark.parametrize(
    ("kind", "count", "frozen", "trained"),
    [
        ("swin", 2, ("embeddings.", "layers.0.blocks."), ("layers.0.downsample.", "layers.1.")),  # two stages
        ("wav2vec2", 1, ("feature_extractor.", "feature_projection.", "encoder.layers.0."), ("encoder.layers.1.",)),
        ("bart", 1, ("shared.", "encoder.layers.0."), ("encoder.layers.1.", "decoder.")),  # with a longer decoder
        ("xlm", 1, ("attentions.0.", "layer_norm1.0.", "ffns.0."), ("attentions.1.", "layer_norm1.1.", "ffns.1.")),
        ("funnel", 2, ("blocks.0.0.", "blocks.1.0."), ("blocks.1.1.",)),  # two blocks, of one and of two layers
    ],
)
def test_the_lowest_layers_are_those_that_run_first(kind, count, frozen, trained):
    if kind == "wav2vec2":  # with more convolutions than layers, as DistilHuBERT
        model = small_sound_model()
    elif kind == "swin":
        model = AutoModelForImageClassification.from_config(
            AutoConfig.for_model(
                "swin", embed_dim=8, depths=[2, 3], num_heads=[1, 2], image_size=16, patch_size=2, window_size=2
            )
        )
    else:
        model = tiny_classifier(
            kind, **{"bart": {"decoder_layers": 3}, "funnel": {"block_sizes": [1, 2]}}.get(kind, {})
        )
    found = frozen_of(model, count)
    names = {name for name, _ in model.named_parameters()}
    for parts, expected in ((frozen, True), (trained, False)):
        for part in parts:
            own = {name for name in names if f".{part}" in f".{name}"}
            assert own and all((name in found) == expected for name in own), part
    assert not any("classif" in name or "sequence_summary" in name for name in found)


def small_sound_model():
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    convolutions = {
        "conv_dim": [8] * 3,
        "conv_stride": [4, 2, 2],
        "conv_kernel": [8, 4, 4],
        "num_feat_extract_layers": 3,
    }
    more = {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, "classifier_proj_size": 8}
    config = AutoConfig.for_model("wav2vec2", **sizes, **convolutions, **more)
    return AutoModelForAudioClassification.from_config(config)


def test_a_model_that_runs_on_no_trial_row_freezes_its_longest_list():
    model = tiny_model()
    model.forward = None
    assert any("layer.0." in name for name in frozen_of(model, 1)) and not any(
        "layer.1." in name for name in frozen_of(model, 1)
    )


def test_a_model_in_which_nothing_trains_is_refused(tmp_path):
    adapted = get_peft_model(tiny_model(), LoraConfig(task_type="SEQ_CLS", inference_mode=True))
    for model in (adapted.requires_grad_(False), tiny_model().requires_grad_(False)):
        with pytest.raises(InputError, match=r"no parameter of the model trains; load an adapter with .*is_trainable"):
            make(tmp_path, model).train()


class NoTransformer(torch.nn.Module):
    """A model without a configuration."""

    def __init__(self):
        super().__init__()
        self.embedding, self.head = torch.nn.Embedding(60, 8), torch.nn.Linear(8, 2)

    def forward(self, input_ids=None, attention_mask=None, labels=None):
        logits = self.head(self.embedding(input_ids).mean(1))
        return {"loss": torch.nn.functional.cross_entropy(logits, labels), "logits": logits}


def test_adapters_of_a_model_without_a_configuration_are_saved(tmp_path):
    torch.manual_seed(0)
    base = NoTransformer()
    trainer = make(tmp_path, get_peft_model(copy.deepcopy(base), LoraConfig(target_modules=["head"])))
    trainer.train()
    trainer.save_model()
    rows = {"input_ids": torch.arange(5, 25).view(2, 10), "labels": torch.tensor([0, 1])}
    loaded, trained = PeftModel.from_pretrained(base, tmp_path).eval(), trainer.model.eval()
    assert torch.equal(loaded(**rows)["logits"], trained(**rows)["logits"])


def test_layers_that_are_not_there_cannot_freeze():
    with pytest.raises(
        InputError, match="fix_layers=3, but BertForSequenceClassification has 2 layers with separate weights"
    ):
        fix_layers(tiny_model(), 3)
    config = AlbertConfig(vocab_size=60, embedding_size=8, hidden_size=16, num_attention_heads=2, intermediate_size=16)
    with pytest.raises(InputError, match="has 1 layer with separate weights; pass at most 1"):
        fix_layers(AlbertForSequenceClassification(config), 2)
    assert not fix_layers(tiny_model(), 1)[0].startswith("encoder")


def test_squared_loss(tmp_path):
    logits, labels = torch.randn(4, 3), torch.tensor([0, 2, 1, 1])
    expected = torch.nn.functional.mse_loss(logits, torch.eye(3)[labels])
    torch.testing.assert_close(l2_loss({"logits": logits}, labels), expected)
    halves = [l2_loss({"logits": logits[i : i + 2]}, labels[i : i + 2], 4) for i in (0, 2)]
    torch.testing.assert_close(sum(halves), expected)

    losses = []
    for size, accumulation in ((8, 1), (2, 4)):
        trainer = make(
            tmp_path, l2_loss=True, per_device_train_batch_size=size, gradient_accumulation_steps=accumulation,
            logging_steps=1, optim="sgd", learning_rate=0.1,
        )  # fmt: skip
        trainer.train()
        losses.append([log["loss"] for log in trainer.state.log_history if "loss" in log])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4) and losses[0][0] < 0.6
    trainer.evaluate()


def test_a_peft_method_trains_instead(tmp_path):
    trainer = make(tmp_path, peft="ia3", peft_config='{"target_modules": ["key"], "feedforward_modules": []}')
    before = weights(trainer)
    trainer.train()
    moved = {name for name, value in weights(trainer).items() if not torch.equal(value, before[name])}
    assert moved and all("ia3" in name or "classifier.modules_to_save" in name or "pooler" in name for name in moved)
    with pytest.raises(InputError, match="peft='loora' is not a peft method; choose from: "):
        make(tmp_path, peft="loora")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"optimizer": "adam", "optim": "adafactor"}, "optimizer=adam and optim=adafactor both choose the optimizer"),
        ({"optim_args": "sign=true"}, r"optim_args=sign=true needs optim=sgd, but optim is adamw"),
        ({"optim": "sgd", "optim_args": "sign=true,momentum=0.5"}, "steps by the gradient's signs have no momentum; "),
        ({"optimizer": "lion"}, "optimizer='lion' is unknown; choose from: adam, sgd, signgd"),
        ({"fix_layers": -1}, "fix_layers must be 0 or more, got -1"),
        ({"peft_config": {"r": 1}}, "peft_config needs peft"),
        ({"peft": "lora", "peft_config": "{r: 1}"}, "peft_config='{r: 1}' is not valid JSON"),
        (
            {"peft": "lora", "peft_config": LoraConfig(r=1)},
            "peft_config must be a mapping of settings, got a LoraConf",
        ),
        ({"optim": "sgd", "optim_args": "sign=1"}, "optim_args=sign=1: sign must be true or false; pass sign=true"),
        ({"optim": "sgd", "optim_args": "sign"}, "optim_args=sign: sign must be true or false; pass sign=true"),
        ({"peft": "lora", "fix_layers": 1}, "peft=lora freezes the whole model, so fix_layers=1 has no effect"),
        ({"l2_loss": True, "label_smoothing_factor": 0.1}, "l2_loss and label_smoothing_factor=0.1 are two losses"),
    ],
)
def test_bad_arguments(tmp_path, options, message):
    with pytest.raises(InputError, match=message):
        make(tmp_path, **options)


def test_arguments_that_contradict_each_other_are_refused(tmp_path):
    optimizers = (torch.optim.SGD(tiny_model().parameters()), None)
    with pytest.raises(InputError, match="optimizer=sgd and an optimizer were both passed"):
        make(tmp_path, optimizer="sgd", trainer={"optimizers": optimizers})
    with pytest.raises(InputError, match="l2_loss and compute_loss_func are two losses"):
        make(tmp_path, l2_loss=True, trainer={"compute_loss_func": l2_loss})
    with pytest.raises(InputError, match="l2_loss is for classification, and this task is regression"):
        make(tmp_path, tiny_model(num_labels=1, problem_type="regression"), l2_loss=True, regression=True)
    with pytest.raises(InputError, match="l2_loss is for classification, and this task is regression"):
        make(tmp_path, tiny_model(num_labels=1), l2_loss=True, regression=True)
    with pytest.raises(InputError, match="optimizer=adam and optim=adamw_torch both choose the optimizer; pass one"):
        parse_arguments(["--method", "full", "--optimizer", "adam", "--optim", "adamw_torch"])
