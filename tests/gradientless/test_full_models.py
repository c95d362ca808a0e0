"""Searches that run the whole model: language models, token objectives, masks, trl's trainer, 16-bit weights."""

import pytest
import torch
from activity_models import image_model
from heads import FAMILIES, OPTIONS, changed, family, make, weights
from peft import PeftModel
from tiny import one_layer_model, tiny_dataset, tiny_model, tiny_tokenizer
from torch import nn
from torch.nn import functional
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    DataCollatorForLanguageModeling,
)

from hf_ft_ext import (
    SPSA,
    FisherTrainer,
    FisherTrainingArguments,
    GradientlessTrainer,
    GradientlessTrainingArguments,
    InputError,
    apply_trajectory,
)
from hf_ft_ext.entries.delta import read_choice
from hf_ft_ext.gradientless.build import build_optimizer
from hf_ft_ext.gradientless.optimizers.perturbation.directions import CHUNK
from hf_ft_ext.gradientless.optimizers.perturbation.update_rules import Rounding
from hf_ft_ext.gradientless.scoring.full_models import labels_of
from hf_ft_ext.gradientless.scoring.objectives import check_labels, make_objective
from hf_ft_ext.training.sharing import FinishedRun

SPSA_ALL = {"search_method": "spsa", "search_target": "all", "learning_rate": 1e-2, "search_eps": 1e-2}


def language_model(kind="llama", seed=0):
    shared = {"vocab_size": len(tiny_tokenizer()), "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = AutoConfig.for_model(kind, max_position_embeddings=64, **shared, **FAMILIES[kind])
        return AutoModelForCausalLM.from_config(config).double()


def trainer_of(folder, model, dataset, collator, kind=GradientlessTrainer, **options):
    args = GradientlessTrainingArguments(str(folder), **{**OPTIONS, **SPSA_ALL, "max_steps": 3, **options})
    return kind(model, args, train_dataset=dataset, data_collator=collator, processing_class=tiny_tokenizer())


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("candidates", [1, 2])
def test_accumulation_over_rows_of_unequal_length_equals_one_batch(tmp_path, kind, candidates):
    dataset = tiny_dataset(8, length=12).remove_columns("labels")
    ends = []
    for size, accumulation in ((8, 1), (2, 4), (1, 8)):
        trainer = trainer_of(
            tmp_path, language_model(kind), dataset, DataCollatorForLanguageModeling(tiny_tokenizer(), mlm=False),
            per_device_train_batch_size=size, gradient_accumulation_steps=accumulation, logging_steps=1,
            search_candidates_per_forward=candidates,
        )  # fmt: skip
        before = weights(trainer)
        trainer.train()
        assert changed(trainer, before) and trainer.optimizer.optimizer.batches == (candidates > 1)
        ends.append((weights(trainer), [log["loss"] for log in trainer.state.log_history if "loss" in log]))
    for other, losses in ends[1:]:
        assert losses == pytest.approx(ends[0][1], rel=1e-6)
        for name, value in ends[0][0].items():
            # losses are float32 numbers, so slopes differ by some 1e-5; weighting by rows made a difference of 0.03
            torch.testing.assert_close(other[name], value, rtol=1e-5, atol=1e-5)


def test_label_smoothing_is_the_same_for_several_candidates_per_forward_pass(tmp_path):
    dataset, logged = tiny_dataset(8, length=12).remove_columns("labels"), []
    for candidates, smoothing in ((1, 0.3), (2, 0.3), (2, 0.0)):
        trainer = trainer_of(
            tmp_path, language_model(), dataset, DataCollatorForLanguageModeling(tiny_tokenizer(), mlm=False),
            logging_steps=1, search_candidates_per_forward=candidates, label_smoothing_factor=smoothing,
        )  # fmt: skip
        trainer.train()
        logged.append([log["loss"] for log in trainer.state.log_history if "loss" in log])
    assert logged[1] == pytest.approx(logged[0], rel=1e-6) and logged[2] != pytest.approx(logged[0], rel=1e-3)


def test_a_users_objective_of_tokens_takes_micro_batches_of_unequal_length(tmp_path):
    seen = []

    def loss(logits, labels):
        seen.append((tuple(logits.shape), tuple(labels.shape), int(labels.ne(-100).sum())))
        return functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100)

    config = family("bert").config
    config.num_labels = 3
    ends = []
    for size, accumulation in ((4, 1), (1, 4)):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = AutoModelForTokenClassification.from_config(config).double()
        rows = [{"input_ids": list(range(5, 5 + k)), "labels": [i % 3 for i in range(k)]} for k in (4, 7, 5, 9)]

        def collate(batch):
            longest = max(len(row["input_ids"]) for row in batch)
            pad = {"input_ids": 0, "labels": -100}
            result = {k: torch.tensor([r[k] + [pad[k]] * (longest - len(r[k])) for r in batch]) for k in pad}
            return {**result, "attention_mask": (result["input_ids"] > 0).long()}

        batches = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulation, "max_steps": 2}
        args = GradientlessTrainingArguments(str(tmp_path), **{**OPTIONS, **SPSA_ALL, **batches})
        trainer = GradientlessTrainer(model, args, train_dataset=rows, data_collator=collate, objective=loss)
        trainer.train()
        ends.append(weights(trainer))
    assert {shape for shape, *_ in seen} == {(4, 9, 3)} and {count for *_, count in seen} == {25}
    for name, value in ends[0].items():
        torch.testing.assert_close(ends[1][name], value, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("weight_decay", [0.0, 0.5])
def test_only_entries_of_the_masks_change(tmp_path, weight_decay):
    name = "bert.encoder.layer.0.output.dense.weight"
    mask = torch.zeros(32, 48, dtype=torch.bool)
    mask[3, ::2] = True
    options = {**SPSA_ALL, "search_target": r"layer\.0\.output\.dense", "feature_cache_gb": 0.0}
    trainer = make(tmp_path, weight_decay=weight_decay, **options)
    masked = GradientlessTrainer(
        one_layer_model(),
        trainer.args,
        train_dataset=tiny_dataset(16),
        processing_class=tiny_tokenizer(),
        masks={name: mask},
    )
    before = weights(masked)
    masked.train()
    moved = weights(masked)[name] != before[name]
    assert torch.equal(moved, mask)
    assert changed(masked, before) == {name, name.replace("weight", "bias")}
    with pytest.raises(InputError, match="masks: nothing is not searched; leave it out, or change search_target"):
        GradientlessTrainer(one_layer_model(), trainer.args, masks={"nothing": mask}).create_optimizer()
    with pytest.raises(InputError, match="masks apply to search_method=spsa, not to gld"):
        GradientlessTrainer(one_layer_model(), make(tmp_path).args, masks={name: mask})


def test_a_frozen_base_learns_an_adapter_in_the_shape_of_lora(tmp_path):
    one_layer_model().save_pretrained(tmp_path / "base")
    base = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base")
    options = {**SPSA_ALL, "search_peft": "lora", "search_target": "lora_B|modules_to_save", "learning_rate": 0.05}
    trainer = make(tmp_path / "out", base, search_candidates_per_forward=2, max_steps=5, **options)
    before = weights(trainer)
    trainer.train()
    moved = changed(trainer, before)
    assert trainer.optimizer.optimizer.batches  # both signs in one forward pass
    assert moved and all("lora_B" in name or "modules_to_save" in name for name in moved)
    trainer.save_model()
    fresh = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base")
    loaded = PeftModel.from_pretrained(fresh, tmp_path / "out").eval()
    batch = {"input_ids": torch.arange(5, 25).view(2, 10)}
    with torch.no_grad():
        assert torch.equal(loaded(**batch).logits, trainer.model.eval()(**batch).logits)


def test_a_resumed_run_leaves_the_trajectory_of_the_whole_run(tmp_path):
    options = {**SPSA_ALL, "search_trajectory": True, "search_direction": "lozo", "search_renew": 3, "max_steps": 6}
    saving = {"save_strategy": "steps", "save_steps": 2, "lr_scheduler_type": "linear"}
    make(tmp_path / "a", **options, **saving).train()
    resumed = make(tmp_path / "b", one_layer_model(seed=3), **options, **saving)
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-4"))
    resumed.save_model()
    again = apply_trajectory(one_layer_model(), tmp_path / "b")
    for name, value in again.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name
    record = {"labels": ["no", "yes"], "arguments": {"seed": 7}}
    code = GradientlessTrainer.delta_code(FinishedRun(tmp_path / "b", record, "me/run", "you/base"))
    assert "set_seed(7)" in code and "apply_trajectory(base, snapshot_download('me/run'" in code
    assert GradientlessTrainer.delta_code(FinishedRun(tmp_path, record, "me/run", "you/base")) is None
    fitted = {**record, "arguments": {"from_linearhead": True}}
    assert GradientlessTrainer.delta_code(FinishedRun(tmp_path / "b", fitted, "me/run", "you/base")) is None


@pytest.mark.parametrize("scores", [[0.1, 0.5, 0.2, 0.3], [0.1, 0.2, 0.3, 0.5]])
def test_the_trajectory_ends_at_the_best_model(tmp_path, scores):
    options = {**SPSA_ALL, "search_trajectory": True, "search_update": "momentum", "max_steps": 4}
    each = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    trainer = make(tmp_path, load_best_model_at_end=True, metric_for_best_model="score", **options, **each)
    values = iter(scores)
    trainer.compute_metrics = lambda _: {"score": next(values)}
    trainer.train()
    assert trainer.state.best_global_step == 1 + scores.index(max(scores))
    trainer.save_model()
    again = apply_trajectory(one_layer_model(), tmp_path)
    for name, value in again.state_dict().items():
        assert torch.equal(value, trainer.model.state_dict()[name]), name


def test_trls_metrics_keep_their_names(tmp_path):
    trl = pytest.importorskip("trl")

    class Search(GradientlessTrainer, trl.SFTTrainer):
        pass

    model = language_model().float()
    model.config.attention_dropout = 0.5
    dropped = []
    model.model.layers[0].mlp.register_forward_hook(lambda module, *_: dropped.append(module.training))
    args = trl.SFTConfig(
        str(tmp_path), max_steps=2, logging_steps=1, use_cpu=True, report_to="none", save_strategy="no", bf16=False,
        disable_tqdm=True, per_device_train_batch_size=2, activation_checkpointing=False,
    )  # fmt: skip
    args = GradientlessTrainingArguments.complete(args, search_method="spsa", search_target="all")
    rows = tiny_dataset(8).remove_columns("labels")
    trainer = Search(model, args, train_dataset=rows, processing_class=tiny_tokenizer())
    trainer.train()
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert len(logs) == 2 and "mean_token_accuracy" in logs[0] and not any(k.startswith("eval_") for k in logs[0])
    assert dropped and not any(dropped)


@pytest.mark.parametrize("packed", ["buffer", "integers", "float8"])
def test_quantized_weights_are_not_left_out_silently(tmp_path, packed):
    model = one_layer_model()
    dense = model.bert.encoder.layer[0].output.dense
    if packed == "buffer":
        del dense.weight
        dense.register_buffer("qweight", torch.zeros(32, 6, dtype=torch.int32))
        model.is_quantized = True
        model._hf_peft_config_loaded = True
    elif packed == "integers":
        dense.weight = nn.Parameter(torch.zeros(32, 48, dtype=torch.int8), requires_grad=False)
    else:
        dense.weight = nn.Parameter(dense.weight.detach().to(torch.float8_e4m3fn), requires_grad=False)
    with pytest.raises(
        InputError, match=r"search_target='all' includes .*layer\.0\.output\.dense\.q?weight, which is"
    ):
        make(tmp_path, model, search_method="spsa", search_target="all")


def test_a_search_changes_only_the_entries_of_a_fisher_run(tmp_path):
    fisher = FisherTrainer(
        one_layer_model(),
        FisherTrainingArguments(
            str(tmp_path / "fisher"), fisher_mode="mask", fisher_mask="random", fisher_keep_ratio=0.05, max_steps=1,
            use_cpu=True, report_to="none", disable_tqdm=True, save_strategy="no",
        ),
        train_dataset=tiny_dataset(16),
        processing_class=tiny_tokenizer(),
    )  # fmt: skip
    fisher.train()
    fisher.save_model()
    options = {**SPSA_ALL, "search_target": None, "search_masks": str(tmp_path / "fisher"), "feature_cache_gb": 0.0}
    trainer = make(tmp_path / "search", **options)
    before = weights(trainer)
    trainer.train()
    chosen, in_full = read_choice(tmp_path / "fisher")
    assert len(chosen) > 5 and in_full == ["classifier.bias", "classifier.weight"]
    for name, value in weights(trainer).items():
        moved = (value != before[name]).flatten()
        expected = torch.zeros_like(moved)
        expected[slice(None) if name in in_full else chosen.get(name, torch.zeros(0)).long()] = True
        assert torch.equal(moved, expected), name
    other = tiny_model("distilbert")
    with pytest.raises(InputError, match=r"search_masks=.* is of another model: Distil.* has no bert\."):
        make(tmp_path / "other", other, **options)
    with pytest.raises(InputError, match=r"holds no entries_delta\.safetensors"):
        make(tmp_path / "other", **{**options, "search_masks": str(tmp_path)})
    with pytest.raises(InputError, match="masks and search_masks both select the entries to change"):
        GradientlessTrainer(one_layer_model(), trainer.args, masks={})


# --- 16-bit weights ----------------------------------------------------------------------------------------------


class Fixed(nn.Module):
    """Its loss has the same slope along every direction, whatever the weights are: a walk of known length."""

    def __init__(self, dtype):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.matrix = nn.Parameter((0.02 * torch.randn(64, 64, generator=generator)).to(dtype))
        self.vector = nn.Parameter((1 + 0.02 * torch.randn(64, generator=generator)).to(dtype))
        self.toward = torch.randn(64, 64, generator=generator)

    def forward(self):
        return (self.matrix.float() * self.toward).sum() + (self.vector.float() * self.toward[0]).sum()


@pytest.mark.parametrize("method", ["gld", "spsa"])
def test_models_that_are_no_transformers_models_are_searched(tmp_path, method):
    args = GradientlessTrainingArguments(str(tmp_path), search_method=method, search_target="all", use_cpu=True)
    model = Fixed(torch.float32)
    build_optimizer(args, model, dict(model.named_parameters())).step(model)


@pytest.mark.parametrize("carry", [False, True])
def test_16_bit_updates_at_a_small_rate_equal_float32_on_average(carry):
    ends = {}
    for dtype in (torch.float32, torch.bfloat16):
        model = Fixed(dtype)
        start = {name: p.detach().float().clone() for name, p in model.named_parameters()}
        optimizer = SPSA(model.parameters(), model, lr=1e-7, eps=0.1, carry=carry)
        for _ in range(200):
            optimizer.step(model)
        exact = {name: p.detach().float() - start[name] for name, p in model.named_parameters()}
        for i, (name, p) in enumerate(model.named_parameters()):
            if i in optimizer.weight_updates.rounding.kept:
                exact[name] += optimizer.weight_updates.rounding.kept[i].view(p.shape).float()
        ends[dtype] = exact
    for name, kept in (("matrix", carry), ("vector", True)):
        wanted, got = ends[torch.float32][name], ends[torch.bfloat16][name]
        error = float((got - wanted).norm() / wanted.norm())
        # With what rounding leaves out the walk is float32's; without, noise of rounding is many times as long.
        assert error < 0.2 if kept else error > 2, (name, error)
        # In the mean it is right either way: along the way of float32 they went as far.
        assert float((got * wanted).sum() / wanted.square().sum()) == pytest.approx(1, abs=0.2 if kept else 0.9)


@pytest.mark.parametrize("size", [1e-6, 1e-7, 1e-8])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(64, 64), (4096,)])
def test_a_kept_rounding_error_loses_no_small_updates(dtype, size, shape):
    weight = (0.02 * torch.randn(shape, generator=torch.Generator().manual_seed(0))).to(dtype)
    start, rounding, part = weight.double(), Rounding(carry=True), slice(0, 4096)
    for step in range(400):
        exact = rounding.exact(weight, 0, part)
        rounding.store(weight, 0, part, exact - size, step)
    change = weight.double() - start + rounding.kept[0].view(shape).double()
    assert float(change.mean()) / (-400 * size) == pytest.approx(1, abs=0.05)


def test_the_update_of_a_large_16_bit_tensor_needs_one_chunk(monkeypatch):
    from hf_ft_ext.gradientless.optimizers.perturbation import update_rules

    model = nn.Embedding(3000, 1024).to(torch.bfloat16)
    largest = []
    original = update_rules.rounded_stochastically
    monkeypatch.setattr(
        update_rules, "rounded_stochastically", lambda x, *a: largest.append(x.numel()) or original(x, *a)
    )
    optimizer = SPSA(model.parameters(), model, lr=1.0, eps=0.1)
    optimizer.step(lambda: model(torch.arange(8)).float().sum())
    assert len(largest) == 12 and max(largest) <= CHUNK


def test_labels_of_another_shape_are_not_spread_over_the_classes():
    """`[rows]` as if each row's label held for every class, where there are as many rows as classes."""
    logits = torch.randn(3, 2, 2, generator=torch.Generator().manual_seed(0))
    with pytest.raises(InputError, match=r"labels have shape \(2,\) and type torch.float32; pass class ids"):
        make_objective("loss", None, 2)(logits, torch.tensor([0.0, 1.0]))


def test_metrics_of_tokens_and_batches_without_labels_are_refused():
    config = one_layer_model().config
    check_labels(config, torch.tensor([[1], [0]]))
    with pytest.raises(InputError, match=r"labels have shape \(2, 3\) .*; for labels of tokens use search_obj"):
        check_labels(config, torch.zeros(2, 3, dtype=torch.long))
    batches = [{"labels": torch.zeros(2)}, {"input_ids": torch.zeros(2, 3), "start_positions": torch.zeros(2)}]
    with pytest.raises(InputError, match="the batch has only: input_ids, start_positions; use search_objective=loss"):
        labels_of(batches)


@pytest.mark.parametrize(("kind", "method"), [
    ("vit", "gld"), ("vit", "spsa"), ("vit", "activity"), ("vit", "node"), ("convnext", "activity"),
])  # fmt: skip
def test_image_classifiers_are_searched_like_those_of_texts(tmp_path, monkeypatch, method, kind):
    draw = torch.Generator().manual_seed(0)
    images = torch.randn(8, 1, 4, 4, generator=draw).double()
    rows = [{"pixel_values": image, "labels": i % 3} for i, image in enumerate(images)]
    settings = {
        "max_steps": 2, "learning_rate": 0.05, "report_to": [], "save_strategy": "no", "disable_tqdm": True,
        "use_cpu": True, "feature_cache_dir": str(tmp_path / "features"), "remove_unused_columns": False,
        "search_method": method, "search_options": "none" if method == "gld" else "1x1",
    }  # fmt: skip
    ends = []
    for size in (8, 2):  # second: micro-batches, and the whole model instead of the head
        if size == 2 and method != "node":
            monkeypatch.setattr("hf_ft_ext.gradientless.trainer.HeadReader.find", lambda *_: None)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = image_model(kind).double()
        arguments = GradientlessTrainingArguments(
            str(tmp_path), per_device_train_batch_size=size, gradient_accumulation_steps=8 // size, **settings
        )
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        GradientlessTrainer(model, arguments, train_dataset=rows).train()
        assert changed_between(before, model) == {name for name in before if name.startswith("classifier")}
        ends.append(dict(model.named_parameters()))
    assert (tmp_path / "features").exists() == (method != "activity")
    for name, value in ends[0].items():
        torch.testing.assert_close(value, ends[1][name], rtol=1e-7, atol=1e-9)


def changed_between(before, model):
    return {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
