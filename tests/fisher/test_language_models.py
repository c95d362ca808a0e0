"""Language models: the loss of each example, selection by it, training and saving."""

import pytest
import torch
from peft import PeftModel
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    BertConfig,
    BertForSequenceClassification,
    BertForTokenClassification,
    GPT2Config,
    LlamaConfig,
    OPTConfig,
    T5Config,
)

from hf_ft_ext import FisherTrainer, FisherTrainingArguments, fisher_information, select_adapters
from hf_ft_ext.fisher.candidates import make_candidates
from hf_ft_ext.fisher.losses import ModelLoss, own_loss
from hf_ft_ext.fisher.prepass import prepass_batches

SIZES = {"vocab_size": 60, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
CAUSAL = {
    "llama": lambda: LlamaConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, **SIZES,
    ),
    "opt": lambda: OPTConfig(
        hidden_size=16, word_embed_proj_dim=16, ffn_dim=24, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=40, **SIZES,
    ),
    "gpt2": lambda: GPT2Config(n_embd=16, n_layer=2, n_head=2, n_positions=40, **SIZES),
}  # fmt: skip


def causal(kind: str):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(CAUSAL[kind]())


def texts(n: int = 6) -> list[dict]:
    """Texts of different lengths, one in a batch; in some, labels of the first tokens are ignored."""
    generator = torch.Generator().manual_seed(0)
    examples = []
    for i in range(n):
        ids = torch.randint(5, 60, (1, 6 + 2 * i), generator=generator)
        labels = ids.clone()
        labels[:, : i % 3] = -100
        examples.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels})
    return examples


def padded(examples: list[dict], size: int) -> list[dict]:
    """The same texts in batches; labels of padding are -100."""
    longest = max(example["input_ids"].shape[1] for example in examples)
    values = {"input_ids": 0, "attention_mask": 0, "labels": -100}
    examples = [
        {key: torch.nn.functional.pad(v, (0, longest - v.shape[1]), value=values[key]) for key, v in example.items()}
        for example in examples
    ]
    return [
        {key: torch.cat([example[key] for example in examples[i : i + size]]) for key in values}
        for i in range(0, len(examples), size)
    ]


def one_by_one(model, examples: list[dict]) -> dict[str, torch.Tensor]:
    """Squared gradients of the model's own loss, one backward pass per example."""
    sums = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for example in examples:
        model.eval().zero_grad()
        model(**example).loss.backward()
        for name, p in model.named_parameters():
            if p.grad is not None:
                sums[name] += p.grad**2
    model.zero_grad()
    return sums


def assert_same(found: dict, expected: dict) -> None:
    top = max(value.max().item() for value in expected.values())
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-6, atol=1e-7 * top, msg=name)


@pytest.mark.parametrize("kind", CAUSAL)
def test_causal_model_uses_its_own_loss_per_text(kind):
    model = causal(kind).double()
    expected = one_by_one(model, texts())
    assert not isinstance(own_loss(model, padded(texts(), 3)[0]), ModelLoss)  # examples run together
    assert_same(fisher_information(model, padded(texts(), 3), progress=False), expected)


def test_translation_and_token_classification_use_their_own_loss():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        translator = AutoModelForSeq2SeqLM.from_config(
            T5Config(d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2, decoder_start_token_id=0, **SIZES)
        )
        tagger = BertForTokenClassification(
            BertConfig(hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, **SIZES)
        )
    examples = texts()
    assert_same(
        fisher_information(translator.double(), padded(examples, 3), progress=False), one_by_one(translator, examples)
    )
    for example in examples:
        example["labels"] = torch.where(example["labels"] < 0, -100, example["labels"] % 2)
    assert_same(fisher_information(tagger.double(), padded(examples, 3), progress=False), one_by_one(tagger, examples))


def test_unusual_loss_runs_one_example_at_a_time():
    class Smoothed(type(causal("gpt2"))):
        def forward(self, *args, labels=None, **kwargs):
            output = super().forward(*args, labels=labels, **kwargs)
            output.loss = output.loss + 0.1 * output.logits.square().mean()
            return output

    model = Smoothed(CAUSAL["gpt2"]()).double()
    assert isinstance(own_loss(model, padded(texts(), 3)[0]), ModelLoss)
    examples = padded(texts(), 1)
    assert_same(fisher_information(model, padded(texts(), 3), progress=False), one_by_one(model, examples))


def test_a_classifier_with_a_loss_of_its_own_keeps_it():
    class SmoothForSequenceClassification(BertForSequenceClassification):
        def forward(self, input_ids=None, attention_mask=None, labels=None, **kwargs):
            output = super().forward(input_ids, attention_mask, **kwargs)
            if labels is not None:
                output.loss = torch.nn.functional.cross_entropy(output.logits, labels, label_smoothing=0.5)
            return output

    config = BertConfig(hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, **SIZES)
    examples = [{**example, "labels": torch.tensor([i % 2])} for i, example in enumerate(padded(texts(), 1))]
    batches = [{key: torch.cat([e[key] for e in examples[i : i + 3]]) for key in examples[0]} for i in (0, 3)]
    for kind in (SmoothForSequenceClassification, BertForSequenceClassification):
        model = kind(config).double()
        assert (own_loss(model, batches[0]) is None) is (kind is BertForSequenceClassification)
        assert model.config.problem_type is None  # transformers' forward stores what it infers from labels
        assert_same(fisher_information(model, batches, progress=False), one_by_one(model, examples))


class Texts(torch.utils.data.Dataset):
    def __init__(self):
        self.rows = [{key: v[0] for key, v in batch.items()} for batch in padded(texts(8), 1)]

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        return self.rows[i]


SETTINGS = {"prefix": {"projection_size": 6}, "bottleneck": {"bottleneck_size": 5}, "lora": {"r": 3}}


@pytest.mark.parametrize("kind", CAUSAL)
def test_the_trainer_selects_trains_saves_and_loads(kind, tmp_path):
    args = FisherTrainingArguments(
        str(tmp_path), max_steps=3, fisher_examples=6, fisher_batch_size=3, fisher_candidate_settings=SETTINGS,
        report_to="none", use_cpu=True, disable_tqdm=True, save_strategy="no", learning_rate=1e-2,
    )  # fmt: skip
    trainer = FisherTrainer(causal(kind), args, train_dataset=Texts())

    def loss(output, batch):
        logits, labels = output.logits[:, :-1].transpose(1, 2), batch["labels"][:, 1:]
        losses = torch.nn.functional.cross_entropy(logits, labels, reduction="none", ignore_index=-100)
        return losses.sum(1) / (labels >= 0).sum(1)

    expected = select_adapters(
        causal(kind), prepass_batches(trainer, 6, 3), make_candidates(None, SETTINGS), loss=loss, seed=args.seed,
        progress=False,
    )  # fmt: skip
    trainer.train()
    assert trainer.plan.choice == expected.choice
    for layer, scores in expected.scores.items():
        assert trainer.plan.scores[layer] == pytest.approx(scores, rel=1e-4, abs=1e-6)
    trainer.save_model()
    loaded = PeftModel.from_pretrained(causal(kind), tmp_path)
    batch = {key: value for key, value in padded(texts(), 3)[0].items() if key != "labels"}
    with torch.no_grad():
        ours, theirs = trainer.model.eval()(**batch).logits, loaded.eval()(**batch).logits
        assert not torch.allclose(ours, causal(kind).eval()(**batch).logits, atol=1e-4)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
