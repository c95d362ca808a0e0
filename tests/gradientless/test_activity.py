"""Activity perturbation: its estimates against gradients by backward, module by module and row by row."""

import logging

import pytest
import torch
from heads import make, weights
from tiny import tiny_dataset, tiny_model, tiny_tokenizer
from torch.nn import functional
from transformers import (
    AlbertConfig,
    AutoModelForSequenceClassification,
    BertConfig,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    ViTConfig,
    ViTForImageClassification,
)

from hf_ft_ext import ActivityPerturbation, GradientlessTrainer, GradientlessTrainingArguments, InputError
from hf_ft_ext.gradientless.optimizers.output_noise import OutputNoise
from hf_ft_ext.gradientless.scoring.full_models import language_row_losses

TEXT = {"vocab_size": 11, "hidden_size": 4, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 6,
        "max_position_embeddings": 8}  # fmt: skip
IDS = torch.tensor([[1, 2, 3, 4], [5, 6, 0, 0], [7, 8, 9, 0]])
MASK = (IDS != 0).long()


def text_model(kind):
    if kind == "bert":
        return AutoModelForSequenceClassification.from_config(BertConfig(**TEXT, num_labels=3))
    if kind == "albert":  # one layer that runs twice
        config = AlbertConfig(**{**TEXT, "num_hidden_layers": 2}, embedding_size=4, num_labels=3)
        return AutoModelForSequenceClassification.from_config(config)
    config = GPT2Config(vocab_size=11, n_embd=4, n_layer=1, n_head=2, n_positions=8, num_labels=3, pad_token_id=0)
    return GPT2ForSequenceClassification(config)  # Conv1D


def image_model():
    sizes = {"hidden_size": 4, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 6}
    return ViTForImageClassification(ViTConfig(**sizes, image_size=4, patch_size=2, num_channels=1, num_labels=3))


class Mixing(torch.nn.Module):
    """A classifier in which each row reads the mean of all rows."""

    def __init__(self):
        super().__init__()
        self.first, self.second = torch.nn.Linear(3, 4), torch.nn.Linear(4, 3)

    def forward(self, x):
        y = self.first(x).tanh()
        return self.second(y - y.mean(0))


def problem(kind):
    """Model in float64 and the losses of its rows."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        labels, images = torch.tensor([0, 2, 1]), torch.randn(3, 1, 4, 4, dtype=torch.double)
        if kind == "mixing":
            model, inputs = Mixing(), {"x": torch.randn(3, 3, dtype=torch.double)}
        elif kind == "vit":
            model, inputs = image_model(), {"pixel_values": images}
        else:
            model, inputs = text_model(kind), {"input_ids": IDS, "attention_mask": MASK}
    model = model.double().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.arange(p.numel(), dtype=p.dtype).view(p.shape).sin())

    def losses():
        output = model(**inputs)
        return functional.cross_entropy(getattr(output, "logits", output), labels, reduction="none")

    return model, losses


class UnitDirections:
    """Noise that runs through unit vectors: their mean gives the gradient itself, not an estimate of it.

    Direction `i` is entry `i` of all outputs of the model, one row of the batch after the other where rows have slopes
    of their own, times the root of their number.
    """

    def __init__(self, monkeypatch):
        self.places = {}
        monkeypatch.setattr(OutputNoise, "_draws", lambda noise, *given: self.draws(noise, *given))

    def draws(self, noise, seed, position, run, y):
        separate = noise.by_rows is not False and position in noise.row_modules
        size = y[0].numel() if separate else y.numel()
        taken = sum(n for _, n in self.places.values())
        first, _ = self.places.setdefault((position, run), (taken, size))
        z = torch.zeros_like(y)
        flat = z.view(len(y), -1) if separate else z.view(1, -1)
        if first <= seed < first + size:
            flat[:, seed - first] = self.total**0.5
        return z

    total = 1.0


def exact_estimates(monkeypatch, kind, centred):
    """The estimates of all gradients over a full set of directions, and the gradients by backward."""
    model, losses = problem(kind)
    names, parameters = zip(*model.named_parameters(), strict=True)
    gradients = torch.autograd.grad(losses().mean(), parameters, allow_unused=True)
    optimizer = ActivityPerturbation(parameters, model, lr=1.0, eps=1e-6, update="sgd", centred=centred)
    unit = UnitDirections(monkeypatch)
    with torch.no_grad():
        optimizer._find_rows(losses)
        unit.places = {}
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


@pytest.mark.parametrize("kind", ["bert", "albert", "gpt2", "vit", "mixing"])
def test_estimates_over_all_directions_are_the_gradients(monkeypatch, kind):
    _, optimizer, found, gradients = exact_estimates(monkeypatch, kind, centred=False)
    assert optimizer.noise.by_rows == (kind != "mixing")
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
    optimizer = ActivityPerturbation(model.parameters(), model)
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


def test_row_losses_of_a_language_model_are_its_own():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = GPT2Config(vocab_size=11, n_embd=4, n_layer=1, n_head=2, n_positions=8)
        model = GPT2LMHeadModel(config).double().eval()
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
    trainer = Own(tiny_model(), arguments, train_dataset=tiny_dataset(), processing_class=tiny_tokenizer())
    with pytest.raises(InputError, match="search_method=activity needs the loss of each row, and this loss is known"):
        trainer.train()
