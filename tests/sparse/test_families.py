"""SparseGrad on other model families: found by the table, converted, trained, saved as the plain model."""

import pytest
import torch
from peft import PeftModel
from sparse_trainer import INPUTS, make, weights
from tiny import tiny_dataset, tiny_model, tiny_tokenizer
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, DataCollatorWithPadding
from transformers.pytorch_utils import Conv1D

from hf_ft_ext import SparseTrainer, SparseTrainingArguments, convert_to_sparse, merge_sparse, sparse_layers

VOCABULARY = len(tiny_tokenizer())
_ENCODER = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
_DECODER = {**_ENCODER, "num_key_value_heads": 2, "head_dim": 16}
_T5 = {
    "d_model": 32,
    "d_ff": 48,
    "d_kv": 16,
    "num_layers": 2,
    "num_decoder_layers": 2,
    "num_heads": 2,
    "decoder_start_token_id": 0,
}
# model type -> configuration, converted layers
MODELS = {
    "electra": ({**_ENCODER, "embedding_size": 32}, 4),
    "deberta-v2": ({**_ENCODER, "relative_attention": True, "pos_att_type": ["p2c", "c2p"]}, 4),
    "deberta": (_ENCODER, 4),
    "albert": ({**_ENCODER, "embedding_size": 32}, 2),
    "modernbert": ({**_ENCODER, "global_attn_every_n_layers": 2, "local_attention": 16}, 4),
    "xlm-roberta": (_ENCODER, 4),
    "gpt2": ({"n_embd": 32, "n_inner": 48, "n_layer": 2, "n_head": 2, "n_positions": 64}, 4),
    "llama": (_DECODER, 6),
    "mistral": (_DECODER, 6),
    "qwen2": (_DECODER, 6),
    "qwen3": (_DECODER, 6),
    "gemma": (_DECODER, 6),
    "t5": (_T5, 8),
    "mt5": (_T5 | {"feed_forward_proj": "gated-gelu"}, 12),
}
SHARED = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3, "sep_token_id": 3}


def build(model_type: str, auto=AutoModelForSequenceClassification):
    options, count = MODELS[model_type]
    extra = {"cls_token_id": 2} if model_type == "modernbert" else {}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = AutoConfig.for_model(model_type, **{**SHARED, "max_position_embeddings": 64, **extra, **options})
        return auto.from_config(config), count


def inputs(model_type: str) -> dict[str, torch.Tensor]:
    ids = INPUTS["input_ids"].clone()
    ids[:, -1] = SHARED["eos_token_id"]  # T5 reads its class off the end token
    return {"input_ids": ids}


@pytest.mark.parametrize("model_type", MODELS)
def test_converts_without_changing_the_output_and_merges_back(model_type):
    model, count = build(model_type)
    model.eval()
    linear = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)}
    plain = {name: (type(module), tuple(module.weight.shape)) for name, module in linear.items()}
    state = {name: value.clone() for name, value in model.state_dict().items()}
    before = model(**inputs(model_type)).logits
    assert len(convert_to_sparse(model)) == count
    torch.testing.assert_close(model(**inputs(model_type)).logits, before, rtol=1e-6, atol=1e-6)
    assert {name: tuple(v.shape) for name, v in model.state_dict().items()} == {
        name: tuple(v.shape) for name, v in state.items()
    }
    model.load_state_dict(state)
    merge_sparse(model)
    for name, (kind, shape) in plain.items():
        assert (type(model.get_submodule(name)), tuple(model.get_submodule(name).weight.shape)) == (kind, shape)
    assert torch.equal(model(**inputs(model_type)).logits, before)


# Which layers of a family are trained does not depend on the support.
@pytest.mark.parametrize(
    ("model_type", "support"),
    [*((model_type, "structured") for model_type in MODELS), ("xlm-roberta", "dynamic"), ("gpt2", "dynamic")],
)
def test_trains_and_saves_the_plain_model(tmp_path, model_type, support):
    rows = tiny_dataset(16)
    rows = rows.map(lambda row: {"input_ids": [*row["input_ids"][:-1], SHARED["eos_token_id"]]})
    model, _ = build(model_type)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trainer = make(tmp_path, model, rows, max_steps=2, sparse_basis_steps=2, sparse_support=support)
    trainer.train()
    trainer.save_model()
    logits = trainer.model.eval()(**inputs(model_type)).logits
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(loaded(**inputs(model_type)).logits, logits, rtol=1e-6, atol=1e-6)
    after = loaded.state_dict()
    for name in sparse_layers(trainer.model):
        assert not torch.equal(after[f"{name}.weight"], before[f"{name}.weight"]), name


def test_causal_language_model_in_user_code(tmp_path):
    model, _ = build("llama", AutoModelForCausalLM)
    rows = tiny_dataset(16)
    rows = rows.map(lambda row: {"labels": row["input_ids"]})
    tokenizer = tiny_tokenizer()
    pad = DataCollatorWithPadding(tokenizer)

    def collate(batch):
        labels = [row.pop("labels") for row in batch]
        padded = pad(batch)
        width = padded["input_ids"].shape[1]
        padded["labels"] = torch.tensor([label + [-100] * (width - len(label)) for label in labels])
        return padded

    args = SparseTrainingArguments(
        str(tmp_path),
        num_train_epochs=20,
        learning_rate=5e-2,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        save_strategy="no",
        sparse_density=0.3,
        sparse_basis_steps=2,
    )
    trainer = SparseTrainer(model, args, train_dataset=rows, eval_dataset=rows, data_collator=collate)
    before, frozen = trainer.evaluate()["eval_loss"], weights(trainer)
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < 0.9 * before
    changed = {name for name, value in weights(trainer).items() if not torch.equal(value, frozen[name])}
    assert changed and all(".sparse_grad_values." in name for name in changed)
    trainer.save_model()
    loaded = PeftModel.from_pretrained(build("llama", AutoModelForCausalLM)[0], tmp_path).eval()
    torch.testing.assert_close(loaded(**inputs("llama")).logits, trainer.model.eval()(**inputs("llama")).logits)


@pytest.mark.parametrize("basis", ["hosvd", "random"])
def test_a_layer_that_is_read_but_never_called_is_named(tmp_path, basis, caplog):
    model = tiny_model("bert")
    first = model.bert.encoder.layer[0].intermediate
    first.forward = lambda x: torch.nn.functional.gelu(
        torch.nn.functional.linear(x, first.dense.weight, first.dense.bias)
    )
    options = {"sparse_basis": basis, "sparse_target_modules": r"layer\.\d\.(intermediate|output)\.dense"}
    make(tmp_path, model, adapter=True, sparse_support="structured", **options).train()
    assert "No gradient reached 1 of 4 adapted layers in training (bert.encoder.layer.0.interm" in caplog.text
    caplog.clear()
    make(tmp_path, adapter=True, sparse_support="structured", **options).train()
    assert "No gradient" not in caplog.text
