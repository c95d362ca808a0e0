"""FisherTrainer: trained parameters, saving and loading, rates, masks, resuming, two processes."""

import json

import pytest
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from tiny import tiny_dataset, tiny_masked_lm, tiny_model, tiny_tokenizer
from transformers import AutoModelForSequenceClassification, TrainingArguments

from hf_ft_ext import AdapterPlan, FisherTrainer, FisherTrainingArguments, load_entries
from hf_ft_ext.adapters.bottleneck.layer import BottleneckLayer
from hf_ft_ext.adapters.layer_prefix.layer import PrefixLayer
from hf_ft_ext.entries.layer import entries_of
from hf_ft_ext.errors import InputError
from hf_ft_ext.fisher.arguments import MASKS
from hf_ft_ext.fisher.mask import choose_entries, kept_entries
from hf_ft_ext.training.runs.plan import training_plan

SMALL = {"prefix": {"projection_size": 6}, "bottleneck": {"bottleneck_size": 5}, "lora": {"r": 3}}
CHOICE = {0: "prefix", 1: "bottleneck", 2: None, 3: "lora"}
INPUTS = {"input_ids": torch.arange(5, 25).view(2, 10)}


def arguments(folder, **settings) -> FisherTrainingArguments:
    defaults = {
        "max_steps": 4, "save_strategy": "no", "disable_tqdm": True, "use_cpu": True, "learning_rate": 1e-2,
        "report_to": "none", "dataloader_pin_memory": False,
    }  # fmt: skip
    if settings.get("fisher_mode") != "mask" and "adapter_plan" not in settings:
        defaults["fisher_candidate_settings"] = SMALL
    if settings.get("fisher_mode", "select") == "select" and "adapter_plan" not in settings:
        defaults["fisher_examples"] = 8
    return FisherTrainingArguments(str(folder), **{**defaults, **settings})


def make(folder, model=None, data=None, model_init=None, **settings) -> FisherTrainer:
    data = tiny_dataset() if data is None else data
    model = tiny_model(num_hidden_layers=4) if model is None and model_init is None else model
    return FisherTrainer(
        model, arguments(folder, **settings), model_init=model_init, train_dataset=data, eval_dataset=data,
        processing_class=tiny_tokenizer(),
    )  # fmt: skip


def mixed(folder) -> str:
    """A plan with all three kinds and an empty layer."""
    trainer = make(folder)
    trainer.prepare()
    trainer.plan.choice = CHOICE
    (folder / "mine.json").parent.mkdir(parents=True, exist_ok=True)
    trainer.plan.save(folder / "mine.json")
    return str(folder / "mine.json")


def logits(model):
    with torch.no_grad():
        return model.eval()(**INPUTS).logits


@pytest.mark.usefixtures("drawn_pictures")
def test_selects_trains_and_saves_one_adapter(tmp_path):
    tiny_model(num_hidden_layers=4).save_pretrained(tmp_path / "base")
    base = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base")
    trainer = make(tmp_path / "out", base)
    assert trainer.plan is None and trainer.model is base
    trainer.train()
    plan = trainer.plan
    assert plan.data["examples"] == 8 and len(plan.choice) == 4 and plan.criterion == "agreement"
    assert AdapterPlan.load(tmp_path / "out") == plan
    assert (tmp_path / "out" / "adapter_plan.png").read_bytes()[:4] == b"\x89PNG"
    trainer.save_model()
    fresh = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base")
    torch.nn.init.normal_(fresh.classifier.weight)
    loaded = PeftModel.from_pretrained(fresh, tmp_path / "out")
    assert torch.equal(logits(loaded), logits(trainer.model))
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert {int(k): v[0] for k, v in config["layers"].items()} == plan.choice


def test_only_the_chosen_modules_are_in_the_model(tmp_path):
    trainer = make(tmp_path / "out", adapter_plan=mixed(tmp_path))
    trainer.train()
    found = {
        kind: {
            int(n.split("layer.")[1].split(".")[0]) for n, m in trainer.model.named_modules() if isinstance(m, kind)
        }
        for kind in (PrefixLayer, BottleneckLayer, LoraLayer)
    }
    assert found == {PrefixLayer: {0}, BottleneckLayer: {1}, LoraLayer: {3}}
    plain = tiny_model(num_hidden_layers=4)
    own = dict(plain.named_parameters())
    for name, p in trainer.model.named_parameters():
        name = name.removeprefix("base_model.model.").replace("base_layer.", "")
        if name in own:  # the frozen model, weight decay or not
            assert torch.equal(p, own[name]) and not p.requires_grad
    trainer.save_model()
    loaded = PeftModel.from_pretrained(tiny_model(num_hidden_layers=4), tmp_path / "out")
    assert torch.equal(logits(loaded), logits(trainer.model))
    with trainer.model.disable_adapter():
        assert torch.equal(logits(trainer.model), logits(plain))


@pytest.mark.parametrize("kind", ["roberta", "distilbert"])
def test_other_families_train_and_save(tmp_path, kind):
    trainer = make(tmp_path, tiny_model(kind))
    trainer.train()
    trainer.save_model()
    loaded = PeftModel.from_pretrained(tiny_model(kind), tmp_path)
    assert torch.equal(logits(loaded), logits(trainer.model))
    assert not torch.equal(logits(loaded), logits(tiny_model(kind)))


def unbroken_and_resumed(tmp_path, **options):
    """Two trainers, one trained without a break and one from the checkpoint of step 2, with equal weights."""
    unbroken = make(tmp_path / "a", **options)
    unbroken.train()
    resumed = make(tmp_path / "b", **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    ours, theirs = unbroken.model.state_dict(), resumed.model.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[n], theirs[n]) for n in ours)
    return unbroken, resumed


@pytest.mark.parametrize("mode", ["select", "random"])
def test_resumed_run_equals_the_unbroken_one(tmp_path, mode):
    options = {"save_strategy": "steps", "save_steps": 2}
    if mode == "select":
        options["adapter_plan"] = mixed(tmp_path)
    else:
        options |= {"fisher_mode": "random", "fisher_budget": 1200}
    unbroken, resumed = unbroken_and_resumed(tmp_path, **options)
    assert resumed.plan == unbroken.plan


def test_best_model_is_loaded_at_the_end_prefixes_included(tmp_path):
    trainer = make(
        tmp_path / "out", adapter_plan=mixed(tmp_path), max_steps=6, learning_rate=0.3, eval_strategy="steps",
        eval_steps=2, save_strategy="steps", save_steps=2, load_best_model_at_end=True, lr_scheduler_type="constant",
    )  # fmt: skip
    trainer.train()
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert len(set(losses)) == 3 and trainer.evaluate()["eval_loss"] == pytest.approx(min(losses), rel=1e-6)


def test_one_candidate_everywhere_and_random_ones(tmp_path):
    trainer = make(tmp_path, fisher_mode="single", fisher_candidates=["lora"])
    trainer.train()
    assert set(trainer.plan.choice.values()) == {"lora"} and trainer.plan.added == 4 * 2 * 3 * 64
    choices = []
    for seed in range(3):
        random = make(tmp_path, fisher_mode="random", seed=seed, fisher_budget=1000)
        random.prepare()
        assert random.plan.added <= 1000
        choices.append(random.plan.choice)
    assert choices[0] != choices[1] or choices[1] != choices[2]


def test_each_candidate_has_its_learning_rate(tmp_path):
    rates = {"prefix": 2e-4, "bottleneck": 1e-4, "head": 3e-3}
    trainer = make(tmp_path / "out", adapter_plan=mixed(tmp_path), fisher_learning_rates=rates, weight_decay=0.1,
                   lr_scheduler_type="constant")  # fmt: skip
    trainer.train()
    of = {id(p): group for group in trainer.optimizer.param_groups for p in group["params"]}
    seen = set()
    for name, p in trainer.model.named_parameters():
        if not p.requires_grad:
            continue
        kind = next((k for k in ("layer_prefix", "bottleneck", "lora", "classifier") if k in name), None)
        expected = {"layer_prefix": 2e-4, "bottleneck": 1e-4, "lora": 1e-2, "classifier": 3e-3}[kind]
        assert of[id(p)]["lr"] == expected, name
        assert of[id(p)]["weight_decay"] == (0.0 if name.endswith("bias") else 0.1)
        seen.add(kind)
    assert len(seen) == 4
    with pytest.raises(InputError, match="fisher_learning_rates names 'perfix'; the candidates are: bottleneck, head"):
        make(tmp_path, fisher_learning_rates={"perfix": 1e-3})


def test_model_init_prepares_each_new_model(tmp_path):
    trainer = make(tmp_path, model_init=lambda: tiny_model(num_hidden_layers=4))
    trainer.train()
    first = logits(trainer.model)
    assert isinstance(trainer.model, PeftModel)
    trainer.train()
    assert torch.equal(logits(trainer.model), first)
    direct = make(tmp_path)
    direct.train()
    assert torch.equal(logits(direct.model), first)


def test_model_init_makes_a_new_plan_where_a_setting_changed(tmp_path):
    def make_one(folder, **settings):
        return make(
            folder,
            model_init=lambda: tiny_model(num_hidden_layers=2),
            max_steps=1,
            fisher_criterion="mean",
            **settings,
        )

    trainer = make_one(tmp_path)
    trainer.train()
    first = trainer.plan
    trainer.call_model_init()
    assert trainer.plan is first  # nothing changed
    trainer.args.fisher_budget = 700
    trainer.train()
    assert trainer.plan.settings["budget"] == 700 and trainer.plan.added <= 700 < first.added
    fresh = make_one(tmp_path / "fresh", fisher_budget=700)
    fresh.prepare()
    assert fresh.plan.choice == trainer.plan.choice and fresh.plan.scores == trainer.plan.scores
    for name, value in {"fisher_candidates": ["lora", "bottleneck"], "fisher_examples": 4, "seed": 7}.items():
        before = trainer.plan
        setattr(trainer.args, name, value)
        trainer.call_model_init()
        assert trainer.plan is not before, name
    assert set(trainer.plan.candidates) == {"lora", "bottleneck"} and trainer.plan.data["examples"] == 4


def test_plain_arguments_are_completed_and_the_plan_of_a_run_is_shown(tmp_path):
    plain = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none", max_steps=1)
    trainer = FisherTrainer(tiny_model(), plain, train_dataset=tiny_dataset(), processing_class=tiny_tokenizer())
    assert (trainer.args.learning_rate, trainer.args.examples) == (5e-4, 64)
    plan = training_plan(make(tmp_path, fisher_mode="single", fisher_candidates=["lora"]))
    assert plan.trainable == 4 * 2 * 2 * 3 * 32 + 66 and plan.steps == 4


@pytest.mark.parametrize("mask", MASKS)
def test_masks_train_chosen_entries_and_save_a_plain_model(tmp_path, mask):
    settings = {} if mask == "bias" else {"fisher_keep_ratio": 0.02}
    trainer = make(tmp_path, fisher_mode="mask", fisher_mask=mask, **settings)
    before = {n: v.clone() for n, v in trainer.model.state_dict().items()}
    trainer.train()
    entries = entries_of(trainer.model)
    count = sum(len(e.indices) for e in entries.values())
    plain = tiny_model(num_hidden_layers=4)
    biases = sum(p.numel() for n, p in plain.named_parameters() if n.endswith("bias") and "classifier" not in n)
    assert count == (biases if mask == "bias" else kept_entries(plain, 0.02))
    moved = {n: int((v != before[n]).sum()) for n, v in trainer.model.state_dict().items() if n in before}
    assert sum(v for n, v in moved.items() if "classifier" not in n) <= count and moved["classifier.weight"] == 64
    assert sum(v for n, v in moved.items() if "classifier" not in n) > count / 2
    trainer.save_model()
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert torch.equal(logits(loaded), logits(trainer.model))
    applied = load_entries(tiny_model(num_hidden_layers=4), tmp_path)
    assert torch.equal(logits(applied), logits(trainer.model))
    delta = (tmp_path / "entries_delta.safetensors").stat().st_size
    assert delta < 0.25 * (tmp_path / "model.safetensors").stat().st_size
    assert sum(w.trained for w in trainer.trained_weights()) == count + 66


def test_mask_keeps_the_entries_with_the_largest_information(tmp_path):
    from hf_ft_ext import fisher_information
    from hf_ft_ext.fisher.mask import body_parameters
    from hf_ft_ext.fisher.prepass import prepass_batches

    trainer = make(tmp_path, fisher_mode="mask", fisher_examples=12, fisher_keep_ratio=0.02)
    plain = tiny_model(num_hidden_layers=4)
    scores = fisher_information(plain, prepass_batches(trainer, 12, 5), body_parameters(plain), progress=False)
    trainer.prepare()
    kept = torch.cat([scores[n].flatten()[e.indices] for n, e in entries_of(trainer.model).items()])
    every = torch.cat([v.flatten() for v in scores.values()])
    assert kept.min() >= every.topk(len(kept)).values.min() * (1 - 1e-4)


@pytest.mark.parametrize("mask", ["label-square", "random", "bias"])
def test_a_mask_leaves_out_what_was_frozen_unless_all_is(tmp_path, mask):
    for frozen in (["embeddings", "encoder"], ["embeddings", "encoder.layer.0"]):
        model = tiny_model(num_hidden_layers=4)
        for part in frozen:
            model.bert.get_submodule(part).requires_grad_(False)
        model.bert.pooler.requires_grad_(len(frozen[1]) > len("encoder"))
        whole = not model.bert.pooler.dense.weight.requires_grad
        settings = {} if mask == "bias" else {"fisher_keep_ratio": 0.1}
        settings |= {"fisher_examples": 4} if mask == "label-square" else {}
        trainer = make(tmp_path, model, fisher_mode="mask", fisher_mask=mask, **settings)
        trainer.prepare()
        inside = [name for name in entries_of(trainer.model) if "embeddings" in name or ".layer.0." in name]
        assert bool(inside) is whole and len(entries_of(trainer.model)) > len(inside)


@pytest.mark.parametrize("ratio", [0.02, 0.2])  # the second: also weights and biases of one module
def test_a_masked_run_resumes(tmp_path, ratio):
    options = {"fisher_mode": "mask", "fisher_keep_ratio": ratio, "fisher_examples": 8, "save_strategy": "steps",
               "save_steps": 2}  # fmt: skip
    unbroken_and_resumed(tmp_path, **options)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"fisher_mode": "chose"}, "fisher_mode='chose' is unknown; choose from: select"),
        ({"fisher_criterion": "best"}, "fisher_criterion='best' is unknown"),
        ({"fisher_mask": "label"}, "fisher_mask='label' is unknown"),
        ({"fisher_examples": 0}, "fisher_examples must be 1 or more, got 0"),
        ({"fisher_budget": -1}, "fisher_budget must be 1 or more, got -1"),
        ({"fisher_mode": "mask", "fisher_keep_ratio": 1.5}, r"fisher_keep_ratio must be in \(0, 1\), got 1.5"),
        (
            {"fisher_mode": "mask", "fisher_budget": 10},
            "fisher_budget=10 applies only to fisher_mode=select or random, not",
        ),
        ({"fisher_mask": "bias"}, "fisher_mask=bias applies only to fisher_mode=mask, not select"),
        ({"fisher_mode": "single"}, "fisher_mode=single trains one candidate in all layers, but .* is None"),
        ({"fisher_mode": "single", "fisher_candidates": ["lora", "ia3"]}, "fisher_mode=single trains one candidate"),
        ({"adapter_plan": "p.json", "fisher_budget": 9}, "adapter_plan already determines what fisher_budget=9 sets"),
        ({"fisher_power": 1}, "fisher_power=1 does not work with fisher_criterion=agreement"),
        (
            {"fisher_labels": "expected"},
            "fisher_labels=expected does not work with fisher_criterion=agreement, which uses mean",
        ),
        (
            {"fisher_labels": "expected", "fisher_criterion": "decrease"},
            "fisher_labels=expected does not work with fisher_criterion=decrease.*fisher_criterion=mean or thesis",
        ),
        (
            {"fisher_mode": "mask", "fisher_mask": "bias", "fisher_examples": 9},
            "does not use gradients; leave fisher_ex",
        ),
        (
            {"fisher_mode": "mask", "fisher_mask": "bias", "fisher_keep_ratio": 0.1},
            "bias trains all biases; leave fisher_keep_ratio out",
        ),
        ({"fisher_learning_rates": {"lora": "high"}}, "the rate of 'lora' must be 0 or more, got 'high'"),
        ({"fisher_learning_rates": "lora=3"}, "fisher_learning_rates='lora=3' is not valid JSON"),
        ({"fisher_candidate_settings": "[1]"}, "must be a mapping from names"),
    ],
)
def test_invalid_arguments_are_refused(tmp_path, settings, message):
    with pytest.raises(InputError, match=message):
        FisherTrainingArguments(str(tmp_path), **settings)


def test_one_candidate_may_be_a_text(tmp_path):
    args = FisherTrainingArguments(str(tmp_path), fisher_mode="single", fisher_candidates="lora")
    assert args.fisher_candidates == ["lora"]


def test_arguments_without_effect_are_refused_even_at_their_default(tmp_path):
    args = FisherTrainingArguments(str(tmp_path), fisher_mode="mask")
    with pytest.raises(InputError, match=r"fisher_labels=true applies only to fisher_mode=select"):
        args.check_given({"fisher_mode": "mask", "fisher_labels": "true"})


def test_bad_input_ends_before_training(tmp_path):
    with pytest.raises(InputError, match=r"adapter plan 'none\.json' is not a file"):
        make(tmp_path, adapter_plan="none.json")
    with pytest.raises(InputError, match="the adapter plan is for a model with layers=4, but this one has 2"):
        make(tmp_path, tiny_model(), adapter_plan=mixed(tmp_path))
    trainer = make(tmp_path / "out", adapter_plan=mixed(tmp_path))
    trainer.prepare()
    for own in ({}, {"fisher_mode": "mask"}):
        with pytest.raises(
            InputError, match=r"Linear is not a transformers model.* select_adapters\(model, batches, loss"
        ):
            FisherTrainer(torch.nn.Linear(2, 2), FisherTrainingArguments(str(tmp_path), **own))
    with pytest.raises(InputError, match="carries PEFT adapters already"):
        make(tmp_path, trainer.model)
    with pytest.raises(InputError, match=r"has no adapter_plan\.json, so this method did not write it"):
        make(tmp_path).train(resume_from_checkpoint=str(tmp_path))
    with pytest.raises(
        InputError, match=r"resume_from_checkpoint='nowhere' is not a folder; pass a checkpoint-<step>"
    ):
        make(tmp_path).train(resume_from_checkpoint="nowhere")
    with pytest.raises(InputError, match=r"resume_from_checkpoint=True: '.*empty' holds no checkpoint; leave it out"):
        make(tmp_path / "empty").train(resume_from_checkpoint=True)
    masked = make(tmp_path, fisher_mode="mask", fisher_mask="random", fisher_keep_ratio=0.1)
    masked.prepare()
    for settings in ({}, {"fisher_mode": "mask"}):
        with pytest.raises(
            InputError, match=r"already trains entries of its weights; call merge_entries\(model\) first"
        ):
            make(tmp_path, masked.model, **settings)
    with pytest.raises(InputError, match="a batch has no labels"):
        make(tmp_path, data=tiny_dataset().remove_columns("labels")).train()
    with pytest.raises(InputError, match=r"the pre-pass needs training data; pass train_dataset"):
        FisherTrainer(tiny_model(), arguments(tmp_path)).prepare()
    with pytest.raises(InputError, match=r"fisher_keep_ratio=1e-05 of \d+ parameters is 0, but the head has 66"):
        make(tmp_path, fisher_mode="mask", fisher_keep_ratio=1e-5).prepare()


def test_masks_of_quantized_models_and_models_without_biases_are_refused(tmp_path):
    model = tiny_model()
    weight = torch.zeros(48, 32, dtype=torch.int8)
    model.bert.encoder.layer[0].intermediate.dense.weight = torch.nn.Parameter(weight, requires_grad=False)
    with pytest.raises(InputError, match=r"intermediate\.dense\.weight is quantized .* train adapters on it"):
        make(tmp_path, model, fisher_mode="mask", fisher_mask="random", fisher_keep_ratio=0.1).prepare()
    model = tiny_model()
    for module in model.bert.modules():
        if getattr(module, "bias", None) is not None:
            module.bias = None
    with pytest.raises(InputError, match="BertForSequenceClassification has no biases to train"):
        make(tmp_path, model, fisher_mode="mask", fisher_mask="bias").prepare()


@pytest.mark.parametrize("mask", ["random", "label-square"])
def test_a_mask_larger_than_the_unshared_weights_is_refused(mask):
    """The tied table is most of this model, and its entries cannot train: 0.9 of all parameters are not available."""
    model = tiny_masked_lm(vocab_size=2000)
    with pytest.raises(InputError, match=r"asks for \d+ entries besides the head, but a mask can choose from \d+ "):
        choose_entries(model, mask, 0.9, (), seed=0, progress=False)


def test_settings_of_no_candidate_are_logged(tmp_path, caplog):
    make(
        tmp_path, fisher_candidates=["lora", "prefix"], fisher_candidate_settings={"lora": {"r": 2}, "loar": {"r": 4}}
    )
    lines = [record.getMessage() for record in caplog.records if "are not used" in record.getMessage()]
    assert lines == ["fisher_candidate_settings of loar are not used: the candidates are lora, prefix."]
