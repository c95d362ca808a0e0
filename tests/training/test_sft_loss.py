"""Our trainers with trl's `SFTTrainer` in user code: the loss is that of the model's own logits, row by row."""

import copy
import re

import pytest
import torch
from datasets import Dataset
from decoders import DECODERS, OTHER_DECODERS, TOKENIZER_OF, subword_tokenizer
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.modeling_outputs import CausalLMOutput

from hf_ft_ext import FullTrainer, FullTrainingArguments, GradientlessTrainer, InputError, LoraTrainer, SparseTrainer
from hf_ft_ext.training.sft import _from_logits, _fused_head_fits

trl = pytest.importorskip("trl")
TEXTS = ["a film with a great plot", "we hated the dull scene, but not the ending!", "it was", "in paris we liked it"]
_LLAMA = DECODERS["llama"]
_EXPERTS = {**_LLAMA, "num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2}
FAMILIES = {
    "llama": _LLAMA,
    "gpt2": DECODERS["gpt2"],
    "modernbert-decoder": OTHER_DECODERS["modernbert-decoder"],  # a layer between network and head
    "recurrent_gemma": OTHER_DECODERS["recurrent_gemma"],  # a soft cap
    "granitemoe": {**_EXPERTS, "router_aux_loss_coef": 0.0},  # another name for the number of experts
    "doge": {**_LLAMA, "head_dim": 8},  # dense, with the settings of a mixture of experts
    # the network below the head has another name than in its class
    "llama4_text": OTHER_DECODERS["llama4_text"],
}  # fmt: skip


def built(family, **more):
    tokenizer = subword_tokenizer(TOKENIZER_OF.get(family, "byte-level"))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = AutoConfig.for_model(family, vocab_size=len(tokenizer), **{**FAMILIES[family], **more})
        model = AutoModelForCausalLM.from_config(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.2 * torch.randn(parameter.shape))
    return tokenizer, model


def sft(kind, model, tokenizer, folder, values, **more):
    if kind is not GradientlessTrainer:
        more["optim"] = "sgd"
    args = trl.SFTConfig(
        str(folder), max_steps=1, per_device_train_batch_size=4, per_device_eval_batch_size=4, learning_rate=0.5,
        lr_scheduler_type="constant", max_grad_norm=0.0, use_cpu=True, bf16=False, report_to="none", logging_steps=1,
        activation_checkpointing=False, disable_tqdm=True, save_strategy="no", max_length=64, **more,
    )  # fmt: skip
    rows = Dataset.from_dict({"text": TEXTS})
    return type("Both", (kind, trl.SFTTrainer), {})(
        model, kind.arguments_class.complete(args, **values), train_dataset=rows, eval_dataset=rows,
        processing_class=tokenizer,
    )  # fmt: skip


def mean_loss(model, tokenizer) -> torch.Tensor:
    """Of all tokens that a row predicts, one row at a time without padding, by the model's own logits."""
    losses = []
    for text in TEXTS:
        ids = tokenizer(text + tokenizer.eos_token, return_tensors="pt")["input_ids"]
        logits = model(input_ids=ids, use_cache=False).logits[0, :-1]
        losses.append(functional.cross_entropy(logits.double(), ids[0, 1:], reduction="none"))
    return torch.cat(losses).mean()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_and_an_evaluation_are_those_of_the_model_s_own_logits(tmp_path, family):
    tokenizer, model = built(family)
    plain = copy.deepcopy(model)
    trainer = sft(FullTrainer, model, tokenizer, tmp_path, {})
    wanted = mean_loss(plain, tokenizer)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(float(wanted.detach()), abs=1e-4)
    trainer.train()
    wanted.backward()
    moved = dict(model.named_parameters())
    for name, parameter in plain.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(moved[name], parameter - 0.5 * parameter.grad, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize(("kind", "values"), [
    (LoraTrainer, {"lora_r": 2}), (SparseTrainer, {"sparse_basis": "random", "sparse_density": 0.2}),
    (GradientlessTrainer, {"search_method": "spsa", "search_target": "all"}),
])  # fmt: skip
@pytest.mark.parametrize("family", ["modernbert-decoder", "llama4_text"])
def test_every_kind_of_trainer_logs_the_loss_of_the_model_s_own_logits(tmp_path, family, kind, values):
    tokenizer, model = built(family)
    wanted = float(mean_loss(copy.deepcopy(model), tokenizer).detach())
    trainer = sft(kind, model, tokenizer, tmp_path, values)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(wanted, abs=1e-4)
    trainer.train()
    logged = next(entry["loss"] for entry in trainer.state.log_history if "loss" in entry)
    assert logged == pytest.approx(wanted, abs=1e-3 if kind is GradientlessTrainer else 1e-4)


def test_weights_spread_over_processes_take_the_model_s_own_logits(tmp_path, caplog):
    caplog.set_level("WARNING")
    tokenizer, model = built("modernbert-decoder")
    wanted = float(mean_loss(model, tokenizer).detach())
    model.decoder.weight.ds_shape = model.decoder.weight.shape  # as DeepSpeed's ZeRO-3 marks its weights
    trainer = sft(FullTrainer, model, tokenizer, tmp_path, {})
    assert "are spread over processes, so trl's fused head cannot be compared" in caplog.text
    del model.decoder.weight.ds_shape
    assert trainer.evaluate()["eval_loss"] == pytest.approx(wanted, abs=1e-4)


def test_the_balance_of_experts_is_refused_where_the_model_has_none(tmp_path):
    tokenizer, model = built("doge")
    with pytest.raises(InputError, match=r"router_aux_loss_coef=0.1 weighs the balance of experts, which Doge"):
        sft(FullTrainer, model, tokenizer, tmp_path, {}, router_aux_loss_coef=0.1)


def test_the_balance_of_experts_counts_and_the_model_still_generates(tmp_path):
    tokenizer, model = built("granitemoe", router_aux_loss_coef=0.5)
    ids = tokenizer([text + tokenizer.eos_token for text in TEXTS], padding=True, return_tensors="pt")
    with torch.no_grad():
        wanted = mean_loss(model, tokenizer) + 0.5 * model(**ids, output_router_logits=True).aux_loss
    trainer = sft(FullTrainer, model, tokenizer, tmp_path, {})
    assert trainer.evaluate()["eval_loss"] == pytest.approx(float(wanted), abs=1e-4)
    assert not trainer.model.config.output_router_logits
    trainer.model.generate(ids["input_ids"][:1], max_new_tokens=2)


@pytest.mark.parametrize("family", ["opt", "llama"])
def test_packed_rows_that_read_each_other_are_refused(tmp_path, family):
    tokenizer = subword_tokenizer(TOKENIZER_OF[family])
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(family, vocab_size=len(tokenizer), **DECODERS[family])
    )
    if family == "llama":
        trainer = sft(FullTrainer, model, tokenizer, tmp_path, {}, packing=True, eval_packing=False)
        assert isinstance(trainer.args, FullTrainingArguments) and len(trainer.train_dataset) == 1
        return
    with pytest.raises(InputError, match=re.escape("packing: rows in one sequence of OPTForCausalLM read each other")):
        sft(FullTrainer, model, tokenizer, tmp_path, {}, packing=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_fused_head_that_is_a_hundredth_off_is_not_used(dtype):
    class Head(torch.nn.Module):
        def __init__(self, error):
            super().__init__()
            self.table, self.error = torch.nn.Embedding(20, 20, dtype=dtype), error
            self.dtype = dtype

        def get_input_embeddings(self):
            return self.table

        def forward(self, input_ids, labels=None, fused_lm_head=False, use_cache=None):
            logits = self.table(input_ids)
            if labels is None:
                return CausalLMOutput(logits=logits)
            return _from_logits(CausalLMOutput(logits=(1 + self.error) * logits), labels[:, 1:])

    assert _fused_head_fits(Head(0.0), routers=False)
    assert not _fused_head_fits(Head(0.01), routers=False)


def test_tokens_that_the_model_excludes_add_nothing_to_the_entropy():
    logits = torch.tensor([0.0, 1.0, -torch.inf, 2.0]).expand(1, 3, 4)
    found = _from_logits(CausalLMOutput(logits=logits), torch.tensor([[3, -100]]))
    wanted = torch.distributions.Categorical(logits=logits[0, 0, [0, 1, 3]]).entropy()
    torch.testing.assert_close(found.entropy, torch.stack([wanted, torch.zeros(())])[None])
