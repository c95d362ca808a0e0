"""SparseGrad in trainers of models that transformers does not make, as sentence-transformers' are."""

import pytest
import torch
from datasets import Dataset
from decoders import subword_tokenizer
from torch import nn
from transformers import BertConfig, BertModel, Trainer, TrainingArguments

from hf_ft_ext import InputError, LoraTrainer, SparseGradConfig, SparseTrainer, compute_bases

ROWS = Dataset.from_dict(
    {"anchor": ["a film with a great plot", "the dull scene"], "positive": ["great film", "we hated it"]}
)
LINEARS = r"(intermediate|output)\.dense$"
LAST = "encoder.layer.1.output.dense"


def bert(vocab_size):
    torch.manual_seed(0)
    return BertModel(
        BertConfig(
            vocab_size=vocab_size, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2
        )
    )


class Sentences(nn.Module):
    """Takes one dictionary and gives no loss: a plain module around a transformers model."""

    def __init__(self, encoder):
        super().__init__()
        self.encoder_model = encoder

    def forward(self, input):
        return self.encoder_model(**input).last_hidden_state.mean(1)


class SentenceTrainer(Trainer):
    """Text columns until the collator, a data loader of its own, and a loss outside of the model."""

    def __init__(self, *args, tokenizer, **kwargs):
        def collate(rows):
            return {
                name: tokenizer([row[name] for row in rows], return_tensors="pt", padding="max_length", max_length=16)
                for name in ("anchor", "positive")
            }

        super().__init__(*args, data_collator=collate, **kwargs)

    def get_train_dataloader(self):
        return torch.utils.data.DataLoader(self.train_dataset, 2, collate_fn=self.data_collator)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return ranking_loss(*(model(dict(batch)) for batch in inputs.values()))


def ranking_loss(anchors, positives):
    return nn.functional.cross_entropy(anchors @ positives.T, torch.arange(len(anchors)))


def arguments(kind, folder, **values):
    args = TrainingArguments(
        str(folder), max_steps=2, use_cpu=True, report_to="none", disable_tqdm=True, save_strategy="no"
    )
    return kind.arguments_class.complete(args, **values)


def test_the_pre_pass_takes_the_trainers_own_loader_and_loss(tmp_path):
    class Both(SparseTrainer, SentenceTrainer):
        pass

    tokenizer = subword_tokenizer("byte-level")
    encoder = bert(len(tokenizer))
    args = arguments(
        SparseTrainer,
        tmp_path,
        sparse_support="dynamic",
        sparse_target_modules=LINEARS,
        sparse_basis_steps=1,
        sparse_basis_scope="layer",
    )
    plain = bert(len(tokenizer)).eval()
    trainer = Both(Sentences(encoder), args, train_dataset=ROWS, tokenizer=tokenizer)
    trainer.create_optimizer()
    batch = trainer.data_collator(list(ROWS))
    outputs = [plain(**batch[name]).last_hidden_state.mean(1) for name in ("anchor", "positive")]
    gradient = torch.autograd.grad(ranking_loss(*outputs), plain.get_submodule(LAST).weight)[0].double()
    basis = encoder.get_submodule(LAST).basis
    # The factor diagonalizes G G^T.
    rotated = basis.out_factor.double().T @ gradient @ gradient.T @ basis.out_factor.double()
    assert torch.allclose(rotated, rotated.diagonal().diag(), atol=1e-5 * rotated.max().item())
    trainer.train()
    assert not torch.equal(encoder.get_submodule(LAST).weight, plain.get_submodule(LAST).weight)


@pytest.mark.parametrize(("kind", "values"), [
    (SparseTrainer, {}), (SparseTrainer, {"sparse_target_modules": LINEARS}), (LoraTrainer, {}),
])  # fmt: skip
def test_adapters_refuse_what_transformers_did_not_make(tmp_path, kind, values):
    class Both(kind, SentenceTrainer):
        pass

    tokenizer = subword_tokenizer("byte-level")
    with pytest.raises(InputError, match=r"Sentences is not a transformers model.*compute_bases\(model"):
        Both(
            Sentences(bert(len(tokenizer))), arguments(kind, tmp_path, **values), train_dataset=ROWS,
            tokenizer=tokenizer,
        )  # fmt: skip


@pytest.mark.parametrize("support", ["adapter", "dynamic", "static"])
def test_sparse_grad_in_sentence_transformers(tmp_path, support):
    sentence_transformers = pytest.importorskip("sentence_transformers")
    from sentence_transformers.sentence_transformer import losses, modules

    tokenizer = subword_tokenizer("byte-level")
    bert(len(tokenizer)).save_pretrained(tmp_path / "bert")
    tokenizer.save_pretrained(tmp_path / "bert")
    encoder = modules.Transformer(str(tmp_path / "bert"))
    model = sentence_transformers.SentenceTransformer(modules=[encoder, modules.Pooling(16)], device="cpu")
    before = model.encode(["a film"], convert_to_tensor=True)
    trainer_class = sentence_transformers.SentenceTransformerTrainer
    args = sentence_transformers.SentenceTransformerTrainingArguments(
        str(tmp_path / "run"), max_steps=2, per_device_train_batch_size=2, use_cpu=True, report_to="none",
        save_strategy="no", learning_rate=1e-2, disable_tqdm=True,
    )  # fmt: skip
    if support == "adapter":
        model.add_adapter(SparseGradConfig(density=0.2, task_type="FEATURE_EXTRACTION"))
    else:
        trainer_class = type("Both", (SparseTrainer, trainer_class), {})
        args = SparseTrainer.arguments_class.complete(
            args, sparse_support=support, sparse_target_modules=LINEARS, sparse_basis_steps=1
        )
    loss = losses.MultipleNegativesRankingLoss(model)
    trainer = trainer_class(model, args, train_dataset=ROWS, loss=loss)
    if support == "adapter":
        compute_bases(trainer.model, trainer.get_train_dataloader(), trainer.compute_loss, gradients=2)
    trainer.train()
    trainer.save_model()
    loaded = sentence_transformers.SentenceTransformer(args.output_dir, device="cpu")
    after = model.encode(["a film"], convert_to_tensor=True)
    assert torch.allclose(loaded.encode(["a film"], convert_to_tensor=True), after, atol=1e-6)
    assert not torch.allclose(before, after, atol=1e-4)
