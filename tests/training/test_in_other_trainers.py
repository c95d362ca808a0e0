"""Our trainers, adapters and optimizers inside trl's trainers: what docs/in-other-trainers.md says."""

import pytest
import torch
from datasets import Dataset
from decoders import decoder, save_decoder, subword_tokenizer
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, LlamaConfig

from hf_ft_ext import (
    BottleneckConfig,
    FullTrainer,
    GradientlessTrainer,
    InputError,
    LayerMixtureConfig,
    LayerPrefixConfig,
    SignGD,
    SparseGradConfig,
    SparseTrainer,
    compute_bases,
)

trl = pytest.importorskip("trl")
TEXTS = Dataset.from_dict({"text": ["a film with a great plot", "we hated the dull scene"] * 4})
PAIRS = Dataset.from_dict(
    {"prompt": ["it was"] * 8, "chosen": [" a great plot", " brilliant"] * 4, "rejected": [" dull", " awful"] * 4}
)
ADAPTERS = {
    "bottleneck": BottleneckConfig(bottleneck_size=4),
    "layer_prefix": LayerPrefixConfig(prefix_length=2),
    "mixture": LayerMixtureConfig(
        kinds={"low": LoraConfig(r=2, target_modules=["q_proj"]), "bottleneck": BottleneckConfig(bottleneck_size=4)},
        layers={0: ["low"], 1: ["bottleneck"]},
    ),
    "sparse_grad": SparseGradConfig(density=0.2),
}


def settings(kind, folder, **more):
    quick = {"max_steps": 2, "per_device_train_batch_size": 2, "use_cpu": True, "bf16": False, "report_to": "none"}
    return kind(str(folder), **quick, activation_checkpointing=False, disable_tqdm=True, save_strategy="no", **more)


@pytest.fixture(scope="module")
def tokenizer():
    return subword_tokenizer("llama")


@pytest.fixture(scope="module")
def llama(tmp_path_factory, tokenizer):
    return save_decoder(tmp_path_factory.mktemp("llama"), "llama", tokenizer)


@pytest.mark.parametrize(("kind", "values"), [
    (SparseTrainer, {"sparse_basis_steps": 2, "sparse_density": 0.2, "learning_rate": 1e-2}),
    (GradientlessTrainer, {"search_method": "spsa", "search_target": "all", "learning_rate": 1e-3}),
    (FullTrainer, {"learning_rate": 1e-2}),
])  # fmt: skip
def test_a_model_by_name_as_trl_takes_it(llama, tmp_path, kind, values):
    class Both(kind, trl.SFTTrainer):
        pass

    args = settings(trl.SFTConfig, tmp_path, max_length=16, model_init_kwargs={"attn_implementation": "eager"})
    trainer = Both(llama, kind.arguments_class.complete(args, **values), train_dataset=TEXTS)
    assert trainer.model.config._attn_implementation == "eager"
    before = AutoModelForCausalLM.from_pretrained(llama).state_dict()
    trainer.train()
    trainer.save_model()
    after = AutoModelForCausalLM.from_pretrained(tmp_path)
    if kind is SparseTrainer:  # an adapter, which transformers loads into the model
        assert any("sparse_grad_values" in name and p.any() for name, p in after.named_parameters())
        return
    assert any(not torch.equal(before[name], value) for name, value in after.state_dict().items())


def test_names_of_nothing_to_train(tmp_path, llama):
    with pytest.raises(InputError, match="is a name, and nothing can be loaded from it"):
        FullTrainer(str(tmp_path / "missing"))
    config = LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    AutoModelForCausalLM.from_config(config).model.save_pretrained(tmp_path)
    with pytest.raises(InputError, match="names LlamaModel, which has no head to train; pass a loaded model"):
        FullTrainer(str(tmp_path))


@pytest.mark.parametrize("adapter", ADAPTERS)
@torch.no_grad()
def test_our_adapters_in_sft(llama, tokenizer, tmp_path, adapter):
    args = settings(trl.SFTConfig, tmp_path, max_length=16, learning_rate=1e-1)
    trainer = trl.SFTTrainer(
        AutoModelForCausalLM.from_pretrained(llama), args, train_dataset=TEXTS, processing_class=tokenizer,
        peft_config=ADAPTERS[adapter],
    )  # fmt: skip
    if adapter == "sparse_grad":
        compute_bases(trainer.model, trainer.get_train_dataloader(), gradients=2)
    with torch.enable_grad():
        trainer.train()
    trainer.save_model()
    ids = torch.tensor([tokenizer("a film")["input_ids"]])
    logits = trainer.model.eval()(input_ids=ids).logits
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(llama), tmp_path).eval()
    assert torch.allclose(loaded(input_ids=ids).logits, logits, atol=1e-5)
    base = AutoModelForCausalLM.from_pretrained(llama)
    assert not torch.allclose(base(input_ids=ids).logits, logits, atol=1e-4)


def test_sparse_grad_columns_in_sft_are_the_leading_directions(llama, tokenizer, tmp_path):
    pairs = PAIRS.rename_column("chosen", "completion").remove_columns("rejected")
    config = SparseGradConfig(n_params=6, target_modules=["model.layers.1.mlp.up_proj"])
    args = settings(trl.SFTConfig, tmp_path, max_length=16, completion_only_loss=True)
    trainer = trl.SFTTrainer(
        AutoModelForCausalLM.from_pretrained(llama), args, train_dataset=pairs, processing_class=tokenizer,
        peft_config=config,
    )  # fmt: skip
    with pytest.raises(InputError, match=r"no columns yet, so nothing would train; call compute_bases"):
        trainer.train()
    batches = list(trainer.get_train_dataloader())[:2]
    compute_bases(trainer.model, batches, gradients=2)
    # Leading eigenvectors of sum G G^T and sum G^T G, G the gradients of the plain model's completion-only loss.
    plain = AutoModelForCausalLM.from_pretrained(llama).eval()
    weight = plain.model.layers[1].mlp.up_proj.weight
    gradients = []
    for batch in batches:
        logits = plain(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten())
        gradients.append(torch.autograd.grad(loss, weight)[0].double())
        assert (batch["labels"] == -100).any()
    layer = next(module for module in trainer.model.modules() if hasattr(module, "sparse_grad_columns"))
    columns = layer.sparse_grad_columns["default"]
    for own, total in (
        (columns.out_columns, sum(g @ g.T for g in gradients)),
        (columns.in_columns, sum(g.T @ g for g in gradients)),
    ):
        leading = torch.linalg.eigh(total).eigenvectors[:, -own.shape[1] :]
        assert torch.allclose(own.double() @ own.double().T, leading @ leading.T, atol=1e-4)


@pytest.mark.parametrize("adapter", ["bottleneck", "mixture", "sparse_grad"])
def test_our_adapters_in_dpo(llama, tokenizer, tmp_path, adapter):
    args = settings(trl.DPOConfig, tmp_path, max_length=32, learning_rate=1e-1)
    trainer = trl.DPOTrainer(
        AutoModelForCausalLM.from_pretrained(llama), args=args, train_dataset=PAIRS, processing_class=tokenizer,
        peft_config=ADAPTERS[adapter],
    )  # fmt: skip
    if adapter == "sparse_grad":  # the loss is the trainer's: the model itself has none for pairs
        compute_bases(trainer.model, trainer.get_train_dataloader(), trainer.compute_loss, gradients=2)
    trainer.train()
    trainer.save_model()
    assert AutoPeftModelForCausalLM.from_pretrained(tmp_path).peft_config["default"].peft_type is not None
    assert trainer.state.log_history[-1]["train_loss"] > 0


def test_our_adapters_in_reward_training(llama, tokenizer, tmp_path):
    args = settings(trl.RewardConfig, tmp_path, max_length=32, learning_rate=1e-1)
    model = AutoModelForSequenceClassification.from_pretrained(llama, num_labels=1)
    trainer = trl.RewardTrainer(
        model, args=args, train_dataset=PAIRS.remove_columns("prompt"), processing_class=tokenizer,
        peft_config=BottleneckConfig(bottleneck_size=4, task_type="SEQ_CLS"),
    )  # fmt: skip
    trainer.train()
    trainer.save_model()
    ids = torch.tensor([tokenizer("a film")["input_ids"]])
    fresh = AutoModelForSequenceClassification.from_pretrained(llama, num_labels=1)
    loaded = PeftModel.from_pretrained(fresh, tmp_path).eval()
    with torch.no_grad():
        assert torch.allclose(loaded(input_ids=ids).logits, trainer.model.eval()(input_ids=ids).logits, atol=1e-5)


def test_our_optimizer_in_sft(tokenizer, tmp_path):
    model = decoder("llama", len(tokenizer))
    before = model.model.layers[0].mlp.up_proj.weight.detach().clone()
    args = settings(trl.SFTConfig, tmp_path, max_length=16, lr_scheduler_type="constant", max_grad_norm=0.0)
    trainer = trl.SFTTrainer(
        model, args, train_dataset=TEXTS, processing_class=tokenizer,
        optimizer_cls_and_kwargs=(SignGD, {"lr": 0.5}),
    )  # fmt: skip
    trainer.train()
    moved = (model.model.layers[0].mlp.up_proj.weight.detach() - before).abs()
    steps = moved / 0.5  # each of two steps adds or takes off the rate
    assert torch.allclose(steps, steps.round(), atol=1e-4) and steps.max().round() == 2
