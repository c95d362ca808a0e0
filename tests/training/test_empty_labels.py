"""Micro-batches without a label token (all labels -100) count as nothing, in training, pre-passes and searches."""

import math

import pytest
import torch
import transformers
from decoders import decoder
from peft import get_peft_model
from torch.nn import functional
from transformers import Seq2SeqTrainer, Trainer

from hf_ft_ext import SparseGradConfig, compute_bases, fisher_information
from hf_ft_ext.adapters.sparse_grad.model import layers_by_columns
from hf_ft_ext.errors import InputError
from hf_ft_ext.label_tokens import label_tokens, predicts_next_tokens, zero_without_tokens
from hf_ft_ext.methods import METHODS
from hf_ft_ext.sparse.convert import sparse_layers
from hf_ft_ext.sparse.prepass import for_each_gradient

FAMILIES = ["llama", "gpt2", "t5"]
# method, its arguments; steps of SGD, or of AdamW with a large epsilon, which rounding noise does not steer
WAYS = {
    "full": ("full", {"optim": "sgd", "learning_rate": 1.0, "max_grad_norm": 0.0}),
    "smoothed": ("full", {"optim": "sgd", "learning_rate": 1.0, "max_grad_norm": 0.0, "label_smoothing_factor": 0.2}),
    "lora": ("lora", {"optim": "sgd", "learning_rate": 1.0, "max_grad_norm": 0.0}),
    "sparse": ("sparse", {"sparse_density": 0.1, "sparse_basis_steps": 2, "adam_epsilon": 1e-2}),
    "converted": (
        "sparse",
        {"sparse_density": 1.0, "sparse_basis_steps": 2, "adam_epsilon": 1e-2, "sparse_support": "dynamic"},
    ),
    "fisher": ("fisher", {"fisher_examples": 8, "fisher_candidates": ["lora", "bottleneck"], "optim": "sgd"}),
    "spsa": ("gradientless", {"search_method": "spsa", "search_target": "all", "search_eps": 0.1}),
}


def rows(family: str, empty: tuple[int, ...] = ()) -> list[dict[str, torch.Tensor]]:
    """Eight rows of unequal lengths; those with a number in `empty` have no label."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for i in range(8):
        ids = torch.randint(5, 60, (5 + i % 3,), generator=generator)
        labels = torch.full_like(ids, -100) if i in empty else ids.clone()
        if family != "t5" and i in empty and i % 2:
            labels[0] = 7  # nothing predicts the first token of a causal model
        found.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels})
    return found


def collate(batch: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    longest = max(len(row["input_ids"]) for row in batch)
    pad = {"input_ids": 0, "attention_mask": 0, "labels": -100}
    return {
        key: torch.stack([functional.pad(row[key], (0, longest - len(row[key])), value=value) for row in batch])
        for key, value in pad.items()
    }


def trainer_of(way: str, family: str, data: list, folder, batch: int, accumulation: int, **more) -> Trainer:
    method, options = WAYS[way]
    args = METHODS[method].arguments_class()(
        str(folder), max_steps=1, per_device_train_batch_size=batch, gradient_accumulation_steps=accumulation,
        lr_scheduler_type="constant", train_sampling_strategy="sequential", use_cpu=True, report_to="none",
        activation_checkpointing=False, disable_tqdm=True, save_strategy="no", dataloader_pin_memory=False,
        per_device_eval_batch_size=1, **{**options, **more},
    )  # fmt: skip
    kind = METHODS[method].trainer_class()
    if family == "t5":
        kind = type("Both", (kind, Seq2SeqTrainer), {})
    model = decoder(family, 64).double()
    return kind(model, args, train_dataset=data, eval_dataset=data, data_collator=collate)


def ended(way: str, family: str, data: list, folder, batch: int, accumulation: int) -> dict[str, torch.Tensor]:
    trainer = trainer_of(way, family, data, folder, batch, accumulation)
    trainer.train()
    assert math.isfinite(trainer.state.log_history[-1]["train_loss"])
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("way", WAYS)
def test_micro_batches_without_labels_equal_one_batch_of_all_rows(tmp_path, way, family):
    data = rows(family, empty=(0, 3, 5))
    one, eight = ended(way, family, data, tmp_path, 8, 1), ended(way, family, data, tmp_path, 1, 8)
    start = dict(decoder(family, 64).double().named_parameters())
    assert any(name not in start or not torch.equal(start[name], p) for name, p in one.items())
    for name, parameter in one.items():
        assert torch.allclose(parameter, eight[name], rtol=0, atol=1e-6), name


# smoothing takes the labels off, and this collator gives T5 no decoder_input_ids
@pytest.mark.parametrize(
    ("way", "family"),
    [
        (w, f)
        for w in WAYS
        for f in FAMILIES
        if w not in ("sparse", "converted", "fisher") and (w, f) != ("smoothed", "t5")
    ],
)
def test_a_step_without_any_label_changes_nothing(tmp_path, way, family):
    trainer = trainer_of(way, family, rows(family, empty=tuple(range(8))), tmp_path, 2, 4, weight_decay=0.0)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    assert trainer.train().training_loss == 0
    assert all(torch.equal(before[name], p) for name, p in trainer.model.named_parameters())


def test_an_encoder_decoder_s_own_mean_loss_skips_empty_micro_batches(tmp_path):
    """T5 takes the mean over each micro-batch, so four of eight micro-batches give half the mean of their means."""
    data = rows("t5", empty=(0, 2, 4, 6))
    trainer = trainer_of("full", "t5", data, tmp_path, 1, 8)
    trainer.model_accepts_loss_kwargs = False  # T5 ignores the count of tokens, although transformers passes it
    trainer.train()
    found = dict(trainer.model.named_parameters())
    model = decoder("t5", 64).double()
    total = sum(model(**collate([row])).loss for row in data[1::2])
    total.backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(found[name], p - p.grad / 8, rtol=0, atol=1e-6)


def plain_gradients(family: str, data: list, names: list[str]) -> dict[str, torch.Tensor]:
    """The gradient of the mean over all label tokens, one row at a time."""
    model = decoder(family, 64).double().eval()
    total, tokens = 0.0, 0
    for row in data:
        batch = collate([row])
        labels = batch.pop("labels")
        logits = model(**batch).logits[:, :-1]
        total = total + functional.cross_entropy(logits[0], labels[0, 1:], reduction="sum")
        tokens += int((labels[:, 1:] != -100).sum())
    (total / tokens).backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    return {name: gradients[f"{name}.weight"] for name in names}


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_pre_pass_of_converted_layers_takes_the_mean_over_tokens(tmp_path, family):
    data = rows(family, empty=(1, 2, 6))
    trainer = trainer_of("converted", family, data, tmp_path, 1, 8)
    layers, found = sparse_layers(trainer.model), {}
    for_each_gradient(trainer, layers, 1, lambda name, gradient: found.update({name: gradient.clone()}), "test")
    plain = plain_gradients(family, data, list(layers))
    for name, gradient in found.items():
        expected = plain[name].T if family == "gpt2" else plain[name]  # a Conv1D holds its transpose
        torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-8)  # transformers' loss is float32


@pytest.mark.parametrize(
    ("way", "message"),
    [
        ("converted", "no batch of the pre-pass has a label to predict"),
        ("sparse", "no gradient reaches the layers"),
        ("fisher", "every gradient is exactly zero, so no adapter can be chosen"),
    ],
)
def test_a_pre_pass_without_any_label_is_refused(tmp_path, way, message):
    trainer = trainer_of(way, "llama", rows("llama", empty=tuple(range(8))), tmp_path, 2, 4)
    with pytest.raises(InputError, match=message):
        trainer.train()


def test_bases_of_an_adapter_ignore_a_batch_without_labels():
    data = rows("llama", empty=(0,))
    columns = []
    for batches in ([collate(data[i : i + 1]) for i in range(4)], [collate(data[i : i + 1]) for i in range(1, 4)]):
        model = get_peft_model(decoder("llama", 64), SparseGradConfig(task_type="CAUSAL_LM", density=0.2))
        compute_bases(model, batches)
        columns.append([c.out_columns @ c.out_columns.T for c, _ in layers_by_columns(model, "default")])
    for one, other in zip(*columns, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("empty", [(0, 3), (0, 1, 2, 3)])
def test_fisher_information_of_a_row_without_labels_is_zero(family, empty):
    data = rows(family, empty)
    batches = [collate(data[i : i + 4]) for i in (0, 4)]
    found = fisher_information(decoder(family, 64).double(), batches, progress=False)
    model = decoder(family, 64).double()
    sums = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for i in set(range(8)) - set(empty):
        model.zero_grad()
        model(**collate([data[i]])).loss.backward()
        for name, p in model.named_parameters():
            sums[name] += p.grad.square() if p.grad is not None else 0
    top = max(value.max().item() for value in sums.values())
    for name, value in sums.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6 * top)


def test_a_user_s_loss_that_is_nan_without_labels_counts_as_nothing(tmp_path):
    class Own(METHODS["fisher"].trainer_class()):
        def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
            labels = inputs["labels"][:, 1:]
            logits = model(input_ids=inputs["input_ids"]).logits[:, :-1]
            return functional.cross_entropy(logits.flatten(0, 1), labels.flatten())

    args = METHODS["fisher"].arguments_class()(
        str(tmp_path), max_steps=1, fisher_examples=8, fisher_candidates=["lora"], use_cpu=True, report_to="none",
        disable_tqdm=True, save_strategy="no",
    )  # fmt: skip
    data = rows("llama", empty=(0, 3))
    trainer = Own(decoder("llama", 64), args, train_dataset=data, data_collator=collate)
    trainer.prepare()
    assert all(math.isfinite(score) for scores in trainer.plan.scores.values() for score in scores.values())


@pytest.mark.parametrize(
    ("labels", "shifted", "count"),
    [
        (torch.tensor([[5, 6, -100], [7, -100, -100]]), True, 1),
        (torch.tensor([[5, 6, -100], [7, -100, -100]]), False, 3),
        (torch.tensor([0, 1]), True, None),
        (torch.rand(2, 3), True, None),
        (None, True, None),
    ],
)
def test_label_tokens(labels, shifted, count):
    assert label_tokens({"labels": labels}, shifted) == count


def test_zero_without_tokens_runs_the_model_and_keeps_labels():
    labels, seen = torch.full((2, 3), -100), []

    def loss(batch):
        seen.append(batch["labels"].clone())
        return torch.tensor(2.0)

    assert zero_without_tokens(loss, {"labels": labels}, True) == 0 and len(seen) == 1
    assert (labels == -100).all() and (seen[0][:, -1] == 0).all()
    labels[0, 1] = 4
    assert zero_without_tokens(loss, {"labels": labels}, True) == 2


def test_who_predicts_next_tokens():
    def made(name: str) -> torch.nn.Module:
        return type(name, (torch.nn.Module,), {})()

    assert [predicts_next_tokens(decoder(family, 64)) for family in FAMILIES] == [True, True, False]
    assert predicts_next_tokens(made("Gemma3ForConditionalGeneration"))  # AutoModelForCausalLM loads it
    assert not predicts_next_tokens(made("XLNetLMHeadModel")) and not predicts_next_tokens(made("BertModel"))


@pytest.mark.parametrize(("base", "shifted"), [("GPT2LMHeadModel", True), ("XLNetLMHeadModel", False)])
def test_a_subclass_predicts_as_its_class(base, shifted):
    kind = getattr(transformers, base)
    config = {"n_embd": 8, "n_head": 2, "d_model": 8, "d_inner": 8, "vocab_size": 10, "n_layer": 1}
    config |= {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    names = config.keys() & vars(kind.config_class()).keys()
    model = type("Mine", (kind,), {})(kind.config_class(**{name: config[name] for name in names}))
    assert predicts_next_tokens(model) is shifted
