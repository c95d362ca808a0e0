"""Fisher information by the model's own loss: class weights, question answering, images, sounds, tokens."""

import pytest
import torch
from other_models import other_batch, other_model
from torch.nn import functional
from transformers import (
    BertConfig,
    BertForMultipleChoice,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
)

from hf_ft_ext import fisher_information
from hf_ft_ext.errors import InputError
from hf_ft_ext.fisher.losses import ModelLoss, own_loss

CONFIG = {"vocab_size": 60, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1,
          "num_attention_heads": 2}  # fmt: skip
WEIGHTS = torch.tensor([1.0, 5.0, 9.0]).double()
MULTI = {"problem_type": "multi_label_classification"}


def seeded(model_class, **config):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return model_class(BertConfig(**{**CONFIG, "num_labels": 3, **config})).double().eval()


def rows(n=4, length=7):
    ids = torch.randint(5, 60, (n, length), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def one_by_one(model, batch):
    """Squared gradients of the model's own loss, one backward pass per example."""
    sums = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for i in range(len(next(iter(batch.values())))):
        model.eval().zero_grad()
        model(**{key: value[i : i + 1] for key, value in batch.items()}).loss.backward()
        for name, p in model.named_parameters():
            if p.grad is not None:
                sums[name] += p.grad**2
    model.zero_grad()
    return sums


def assert_same(found, expected, tolerance=1e-7):
    top = max(float(value.max()) for value in expected.values())
    assert top > 0
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name].to(value.dtype), rtol=1e-6, atol=tolerance * top, msg=name)


def weighted(logits, labels):
    """Each class has a weight, and the sum of losses is divided by the number of rows."""
    return (functional.cross_entropy(logits, labels, reduction="none") * WEIGHTS[labels]).mean()


def positive(logits, labels):
    return functional.binary_cross_entropy_with_logits(logits, labels, pos_weight=WEIGHTS)


def smoothed(logits, labels):
    return functional.cross_entropy(logits, labels, label_smoothing=0.3)


def squared(logits, labels):
    return (functional.one_hot(labels, 3) - logits.softmax(-1)).square().sum(1).mean()


LOSSES = {
    "weighted": (weighted, {}),
    "positive": (positive, MULTI),
    "smoothed": (smoothed, {}),
    "squared": (squared, {}),
    "usual": (functional.cross_entropy, {}),
    "usual of several": (functional.binary_cross_entropy_with_logits, MULTI),
}


@pytest.mark.parametrize("zero_head", [False, True])
@pytest.mark.parametrize("name", LOSSES)
def test_a_classifiers_own_loss(name, zero_head):
    """The first example has class 0, or no label, where most of these losses equal the usual one."""
    loss, config = LOSSES[name]

    class OwnForSequenceClassification(BertForSequenceClassification):
        def forward(self, input_ids=None, attention_mask=None, labels=None, **kwargs):
            output = super().forward(input_ids, attention_mask, **kwargs)
            if labels is not None:
                output.loss = loss(output.logits, labels)
            return output

    model = seeded(OwnForSequenceClassification, **config)
    if zero_head:
        torch.nn.init.zeros_(model.classifier.weight)
    labels = torch.tensor([0, 2, 1, 0])
    if config:
        labels = torch.tensor([[0, 0, 0], [1, 0, 1], [0, 1, 0], [1, 1, 1]]).double()
    batch = {**rows(), "labels": labels}
    assert (own_loss(model, batch) is None) is name.startswith("usual")
    assert_same(fisher_information(model, [batch], progress=False), one_by_one(model, batch))


def test_a_taggers_class_weights():
    class Own(BertForTokenClassification):
        def forward(self, input_ids=None, attention_mask=None, labels=None, **kwargs):
            output = super().forward(input_ids, attention_mask, **kwargs)
            if labels is not None:
                losses = functional.cross_entropy(output.logits.transpose(1, 2), labels, reduction="none")
                output.loss = (losses * WEIGHTS[labels.clamp(min=0)]).sum() / (labels >= 0).sum()
            return output

    model, batch = seeded(Own), rows()
    batch["labels"] = batch["input_ids"] % 3
    batch["labels"][0] = 0  # the first example has tokens of one class only
    batch["labels"][:, 0] = -100
    assert isinstance(own_loss(model, batch), ModelLoss)
    assert_same(fisher_information(model, [batch], progress=False), one_by_one(model, batch))


def test_question_answering_and_multiple_choice():
    model, batch = seeded(BertForQuestionAnswering, num_labels=2), rows()
    with pytest.raises(InputError, match=r"a batch has no labels \(it has input_ids, attention_mask\)"):
        fisher_information(model, [batch], progress=False)
    batch |= {"start_positions": torch.tensor([0, 2, 1, 3]), "end_positions": torch.tensor([3, 4, 1, 6])}
    assert_same(fisher_information(model, [batch], progress=False), one_by_one(model, batch))
    model = seeded(BertForMultipleChoice)
    batch = {key: value.reshape(2, 2, -1) for key, value in rows().items()} | {"labels": torch.tensor([1, 0])}
    assert_same(fisher_information(model, [batch], progress=False), one_by_one(model, batch))


@pytest.mark.parametrize("name", ["vit", "swin", "convnext", "clip", "wav2vec2", "whisper", "bart", "mamba"])
def test_images_sounds_and_other_texts(name):
    model, batch = other_model(name), other_batch(name)
    assert_same(fisher_information(model, [batch], progress=False), one_by_one(model, batch), 1e-6)
