"""Activity perturbation: its estimates against gradients by backward, module by module and row by row."""

import copy
import functools
import logging

import pytest
import torch
from activity_models import IDS, MASK, Passes, problem, searched_layers
from heads import make, weights
from peft import PromptTuningConfig, get_peft_model
from prompt_models import prompt_model
from tiny import one_layer_model, tiny_dataset, tiny_model, tiny_tokenizer
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
)

from hf_ft_ext import ActivityPerturbation, GradientlessTrainer, GradientlessTrainingArguments, InputError
from hf_ft_ext.gradientless.optimizers.output_noise import OutputNoise
from hf_ft_ext.gradientless.scoring.evaluation import StepEvaluation
from hf_ft_ext.gradientless.scoring.full_models import language_row_losses, model_loss
from hf_ft_ext.gradientless.trajectory import save_trajectory


class UnitDirections:
    """Noise that runs through unit vectors: their mean gives the gradient itself, not an estimate of it.

    Direction `i` is entry `i` of all outputs of the model, one row of the batch after the other where rows have slopes
    of their own, times the root of their number.
    """

    def __init__(self, monkeypatch):
        self.places = {}
        monkeypatch.setattr(OutputNoise, "_draws", lambda noise, *given: self.draws(noise, *given))

    def draws(self, noise, seed, position, run, y):
        rows = noise._rows_of(y) if position in noise.row_modules else 1
        size = y.numel() // rows
        taken = sum(n for _, n in self.places.values())
        first, _ = self.places.setdefault((position, run), (taken, size))
        z = torch.zeros(y.shape, dtype=y.dtype)
        flat = z.view(rows, -1)
        if first <= seed < first + size:
            flat[:, seed - first] = self.total**0.5
        return z

    total = 1.0


def exact_estimates(monkeypatch, kind, centred):
    """The estimates of all gradients over a full set of directions, and the gradients by backward."""
    model, losses = problem(kind)
    searched = [
        (n, p) for n, p in model.named_parameters() if kind != "bart" or "encoder_attn" in n or "decoder.embed" in n
    ]
    names, parameters = zip(*searched, strict=True)
    gradients = torch.autograd.grad(losses().mean(), parameters, allow_unused=True)
    gradients = [g.to_dense() if g is not None and g.is_sparse else g for g in gradients]
    optimizer = ActivityPerturbation(parameters, model, lr=1.0, eps=1e-6, update="sgd", centred=centred)
    with torch.no_grad():
        optimizer._examine([losses])
        unit = UnitDirections(monkeypatch)
        with optimizer.noise.added(0, 0.0):
            losses()
        unit.total = sum(size for _, size in unit.places.values())
        start = [p.detach().clone() for p in parameters]
        optimizer.num_directions = int(unit.total)
        numbers = iter(range(int(unit.total)))
        monkeypatch.setattr(optimizer, "_draw_seed", lambda: next(numbers))
        optimizer.step(losses)
    found = {}
    for name, before, p in zip(names, start, parameters, strict=True):
        found[name] = before - p.detach()
        p.detach().copy_(before)
    return model, optimizer, found, dict(zip(names, gradients, strict=True))


@pytest.mark.parametrize(
    "kind",
    ["bert", "albert", "gpt2", "vit", "mixing", "mpnet", "altered", "bart", "convnext", "resnet", "contexts"],
)
def test_estimates_over_all_directions_are_the_gradients(monkeypatch, kind):
    _, optimizer, found, gradients = exact_estimates(monkeypatch, kind, centred=False)
    assert optimizer.noise.by_rows
    direct = {"vit": ("vit.embeddings.cls_token", "vit.embeddings.position_embeddings")}.get(kind, ())
    for name, gradient in gradients.items():
        expected = torch.zeros_like(found[name]) if gradient is None else gradient
        assert name in direct or gradient is None or float(expected.abs().max()) > 0, name
        torch.testing.assert_close(
            found[name], expected, rtol=1e-4, atol=1e-7, msg=lambda text, n=name: f"{n}: {text}"
        )


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_centred_estimates_are_those_of_inputs_minus_their_mean(monkeypatch, kind):
    inputs = {}
    model, _, found, gradients = exact_estimates(monkeypatch, kind, centred=True)
    for name, module in model.named_modules():
        if hasattr(module, "weight"):
            module.register_forward_hook(lambda m, args, y, name=name: inputs.update({name: args[0]}))
    with torch.no_grad():
        model(input_ids=IDS, attention_mask=MASK)
    for name in found:
        module, gradient = model.get_submodule(name.rpartition(".")[0]), gradients[name]
        x = inputs.get(name.rpartition(".")[0])
        linear = type(module).__name__ in ("Linear", "Conv1D") and name.endswith(".weight") and module.bias is not None
        if linear and x.ndim == 3:
            mean, bias = x[MASK.bool()].mean(0), gradients[name.replace("weight", "bias")]
            outer = torch.outer(bias, mean)
            gradient = gradient - (outer.T if type(module).__name__ == "Conv1D" else outer)
        expected = torch.zeros_like(found[name]) if gradient is None else gradient
        torch.testing.assert_close(found[name], expected, rtol=1e-4, atol=1e-7)


def test_random_directions_are_right_on_average():
    model, losses = problem("bert")
    weight = model.bert.encoder.layer[0].output.dense.weight
    (gradient,) = torch.autograd.grad(losses().mean(), [weight])
    start, total = weight.detach().clone(), torch.zeros_like(weight)
    optimizer = ActivityPerturbation([weight], model, lr=1.0, eps=1e-4, num_directions=2, update="sgd", centred=False)
    for _ in range(200):
        optimizer.step(losses)
        total += start - weight.detach()
        weight.detach().copy_(start)
    torch.testing.assert_close(total / 200, gradient, rtol=0, atol=0.15 * float(gradient.norm()))


def test_rows_that_depend_on_each_other_share_one_slope(caplog):
    model, losses = problem("mixing")
    optimizer = ActivityPerturbation(model.first.parameters(), model)
    with caplog.at_level(logging.WARNING):
        optimizer.step(losses)
    assert "the loss of a row depends on the other rows" in caplog.text
    assert optimizer.noise.by_rows is False


def test_tensors_that_no_forward_pass_reads_stay(caplog):
    model, losses = problem("mixing")
    model.unread = torch.nn.Linear(3, 3).double()
    before = model.unread.weight.detach().clone()
    with caplog.at_level(logging.WARNING):
        ActivityPerturbation(model.parameters(), model).step(losses)
    assert "2 searched tensors (the first of shape (3, 3)) stay as they are" in caplog.text
    assert torch.equal(model.unread.weight, before)


LANGUAGE = GPT2Config(vocab_size=11, n_embd=4, n_layer=1, n_head=2, n_positions=8)


def language_model():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return GPT2LMHeadModel(LANGUAGE).double().eval()


def test_row_losses_of_a_language_model_are_its_own():
    model = language_model()
    labels = torch.where(MASK.bool(), IDS, -100)
    with torch.no_grad():
        found = language_row_losses(model, {"input_ids": IDS, "attention_mask": MASK}, labels)
        lengths, expected = MASK.sum(1), []
        for row, length in zip(IDS, lengths, strict=True):
            ids = row[:length][None]
            expected.append(model(input_ids=ids, labels=ids).loss * (length - 1) * 3 / int((lengths - 1).sum()))
        whole = model(input_ids=IDS, attention_mask=MASK, labels=labels).loss
    torch.testing.assert_close(found.float(), torch.stack(expected))
    torch.testing.assert_close(found.mean().float(), whole)


@pytest.mark.parametrize(("change", "message"), [
    ({"eps": 0.0}, "eps must be a finite number above 0"),
    ({"num_directions": 0}, "num_directions must be 1 or more"),
    ({"update": "rms"}, "update=rms is not available"),
    ({"lr": -1.0}, "lr must be 0 or more"),
])  # fmt: skip
def test_values_out_of_range_are_refused(change, message):
    model, _ = problem("mixing")
    with pytest.raises(InputError, match=message):
        ActivityPerturbation(model.parameters(), model, **change)


def test_a_loss_of_the_whole_batch_and_foreign_parameters_are_refused():
    model, losses = problem("mixing")
    with pytest.raises(InputError, match=r"needs the loss of each row .*, got \(\)"):
        ActivityPerturbation(model.parameters(), model).step(lambda: losses().mean())
    with pytest.raises(InputError, match=r"a parameter of shape \(2, 2\) is in no part of the module"):
        ActivityPerturbation([torch.nn.Parameter(torch.zeros(2, 2))], model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_layers_of_a_model_learn(tmp_path, dtype):
    options = {"search_method": "activity", "search_target": "all", "learning_rate": 5e-3, "max_steps": 8}
    trainer = make(tmp_path, tiny_model().to(dtype), per_device_train_batch_size=32, search_directions=2, **options)
    before, first = weights(trainer), trainer.evaluate(trainer.train_dataset)["eval_loss"]
    trainer.train()
    assert trainer.evaluate(trainer.train_dataset)["eval_loss"] < first - 0.01
    still = {name for name, value in weights(trainer).items() if torch.equal(value, before[name])}
    assert not [name for name in still if "layer" in name]


def test_a_loss_of_the_users_own_is_refused(tmp_path):
    class Own(GradientlessTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            outputs = model(**inputs)
            return (2 * outputs.loss, outputs) if return_outputs else 2 * outputs.loss

    arguments = GradientlessTrainingArguments(
        str(tmp_path), search_method="activity", search_target="all", max_steps=1, report_to=[]
    )
    trainer = Own(one_layer_model(), arguments, train_dataset=tiny_dataset(), processing_class=tiny_tokenizer())
    with pytest.raises(InputError, match="search_method=activity needs the loss of each row, and this loss is known"):
        trainer.train()


# --- rows, padding, copies -------------------------------------------------------------------------------


def test_modules_and_rows_have_noise_of_their_own():
    model, _ = problem("mixing")
    noise = OutputNoise(model, {id(p): i for i, p in enumerate(model.parameters())}, None, True)
    noise.row_modules = {0, 1}
    drawn = [row for position in (0, 1) for run in (1, 2) for row in noise._draws(5, position, run, torch.zeros(4, 3))]
    noise.row_modules = set()
    drawn += [row for position in (0, 1, 2) for row in noise._draws(5, position, 1, torch.zeros(1, 3))]
    assert len({tuple(row.tolist()) for row in drawn}) == len(drawn)


def test_a_module_with_as_many_rows_by_chance_shares_one_slope(caplog):
    model, losses = problem("mpnet")
    optimizer = ActivityPerturbation(model.parameters(), model)
    with caplog.at_level(logging.WARNING):
        optimizer.step(losses)
    names = dict(map(reversed, model.named_modules()))
    shared = [names[m] for i, (m, _) in enumerate(optimizer.noise.holders) if i not in optimizer.noise.row_modules]
    assert optimizer.noise.by_rows and shared == ["mpnet.encoder.relative_attention_bias"]
    assert "the outputs of 1 of 14 searched modules affect the losses of several rows" in caplog.text


@pytest.mark.parametrize(("kind", "some"), [("bert", True), ("altered", False), ("bart", False)])
def test_hidden_positions_without_effect_have_no_noise(kind, some):
    model, losses = problem(kind)
    optimizer = ActivityPerturbation(model.parameters(), model)
    optimizer.step(losses)
    assert bool(optimizer.noise.masked) == some


@pytest.mark.parametrize("contexts", [0, 3])
@pytest.mark.parametrize("sizes", [1, 4, [5, 1, 2]])
def test_micro_batches_equal_one_batch(sizes, contexts):
    results = []
    for parts in (8, sizes):
        model = prompt_model().double() if contexts else problem("bert")[0]
        layers, passes = searched_layers(model), Passes(model, parts, contexts)
        optimizer = ActivityPerturbation(layers, model, lr=1e-2, num_directions=2)
        losses = [optimizer.step(lambda: None, passes) for _ in range(3)]
        results.append((losses, [p.detach().clone() for p in layers]))
        assert all(module in optimizer.noise.row_modules for module in range(len(optimizer.noise.holders)))
    torch.testing.assert_close(*results, rtol=1e-7, atol=1e-9)


def test_rows_without_label_tokens_keep_their_place():
    ids = torch.arange(1, 9)[:, None] + torch.arange(3)
    labels = torch.where(torch.arange(8)[:, None] % 4 == 1, -100, ids)
    results = []
    for size in (8, 2, 1):
        model = language_model()
        layers = [p for name, p in model.named_parameters() if "wpe" not in name]
        optimizer = ActivityPerturbation(layers, model, lr=1e-2)
        batches = [{"input_ids": ids[i : i + size], "labels": labels[i : i + size]} for i in range(0, 8, size)]
        full = model_loss(None, batches, True, None, functools.partial(language_row_losses, model))
        evaluate = StepEvaluation(None, full, None, False)
        results.append([optimizer.step(lambda: None, evaluate) for _ in range(3)])
    for other in results[1:]:
        assert results[0] == pytest.approx(other, rel=1e-9)


def test_single_rows_are_examined_once(caplog):
    model, _ = problem("bert")
    optimizer = ActivityPerturbation(model.parameters(), model)
    ids = IDS[:1]
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            optimizer.step(lambda: model(input_ids=ids).logits.square().sum(-1))
    assert optimizer.evaluations == 1 + 3 * optimizer.evaluations_per_step() and optimizer.noise.by_rows is None
    assert optimizer.step(lambda: model(input_ids=IDS).logits.square().sum(-1)) and optimizer.noise.by_rows


def test_tensors_in_modules_that_return_tuples_only_are_refused():
    model = torch.nn.LSTM(3, 4, batch_first=True)
    with pytest.raises(InputError, match=r"noise on outputs can search none of 4 tensors .* or use SPSA"):
        ActivityPerturbation(model.parameters(), model).step(lambda: model(torch.ones(2, 3, 3))[0].sum((1, 2)))


def test_adam_counts_the_updates_of_each_tensor():
    model = torch.nn.ModuleList([torch.nn.Linear(3, 1).double(), torch.nn.Linear(3, 1).double()])
    optimizer = ActivityPerturbation(model.parameters(), model, lr=0.1)
    start = model[1].weight.detach().clone()
    for step in range(30):
        used = model if step == 29 else model[:1]
        optimizer.step(lambda used=used: sum(layer(torch.ones(2, 3).double()) for layer in used).sum(1))
    # Adam's first step has the length of the learning rate
    changes = (model[1].weight.detach() - start).abs()
    torch.testing.assert_close(changes, torch.full_like(changes, 0.1), rtol=1e-5, atol=0)


def test_a_copy_knows_its_own_parameters():
    model, _ = problem("mixing")
    first = copy.deepcopy((model, ActivityPerturbation(model.parameters(), model)))[1]
    assert list(first.numbers) == [id(p) for p in first.searched] != [id(p) for p in model.parameters()]


# --- the Trainer -----------------------------------------------------------------------------------------


def test_a_language_model_with_a_loss_of_its_own_is_refused(tmp_path):
    class OwnLMHeadModel(GPT2LMHeadModel):
        def forward(self, input_ids, attention_mask=None, labels=None):
            output = super().forward(input_ids, attention_mask=attention_mask, labels=labels)
            output.loss = None if output.loss is None else output.loss + output.logits.square().mean()
            return output

    rows = [{"input_ids": row, "attention_mask": mask, "labels": row} for row, mask in zip(IDS, MASK, strict=True)]
    arguments = GradientlessTrainingArguments(
        str(tmp_path), search_method="activity", search_target="all", max_steps=1, report_to=[], use_cpu=True
    )
    GradientlessTrainer(GPT2LMHeadModel(LANGUAGE), arguments, train_dataset=rows).train()
    with pytest.raises(InputError, match="search_method=activity needs the loss of each row, and this loss is known"):
        GradientlessTrainer(OwnLMHeadModel(LANGUAGE), arguments, train_dataset=rows).train()


def test_prompt_tuning_of_a_language_model_is_searched(tmp_path):
    """The logits are of more tokens than the labels."""
    rows = [{"input_ids": row, "attention_mask": mask, "labels": row} for row, mask in zip(IDS, MASK, strict=True)]
    arguments = GradientlessTrainingArguments(
        str(tmp_path), search_method="activity", max_steps=1, report_to=[], use_cpu=True
    )
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    model = get_peft_model(GPT2LMHeadModel(LANGUAGE), config)
    before = model.prompt_encoder.default.embedding.weight.clone()
    GradientlessTrainer(model, arguments, train_dataset=rows).train()
    assert not torch.equal(before, model.prompt_encoder.default.embedding.weight)


def test_a_step_of_too_many_evaluations_and_a_trajectory_are_refused(tmp_path):
    options = {"search_method": "activity", "search_directions": 9, "max_steps": 1}
    with pytest.raises(InputError, match="would need 19 evaluations, more than max_evaluations_per_step=18"):
        make(tmp_path, max_evaluations_per_step=18, **options).train()
    trainer = make(tmp_path, max_evaluations_per_step=19, **options)
    trainer.train()
    with pytest.raises(InputError, match="a trajectory stores the slopes of an SPSA search, got ActivityPerturbation"):
        save_trajectory(trainer.optimizer.optimizer, trainer.model, tmp_path)
