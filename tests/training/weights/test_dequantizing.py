"""A decoder in few bits without a library for it: linear layers of integers that dequantize in the forward pass."""

from types import SimpleNamespace

import pytest
import torch
from decoders import decoder, subword_tokenizer
from peft import PeftModel
from tiny import text_dataset
from torch import nn

from hf_ft_ext import PromptEncoder, PromptForSequenceClassification
from hf_ft_ext.errors import InputError
from hf_ft_ext.methods import METHODS

TEMPLATE = "*cls**sent_0*_it_was*mask*"
SIZES = {
    "llama": {"hidden_size": 32, "intermediate_size": 48},
    "opt": {"hidden_size": 32, "ffn_dim": 48, "word_embed_proj_dim": 32},
    "t5": {"d_model": 32, "d_ff": 48, "d_kv": 16},
}
TOKENIZERS = {"llama": "llama", "opt": "byte-level", "t5": "unigram"}
SEARCH = {"search_method": "spsa", "search_peft": "lora", "learning_rate": 1e-2}
# name -> method, arguments; all of them on llama, and of each way to find layers one on the other families
TRAINED = {
    "lora": ("lora", {}),
    "sparse": ("sparse", {"sparse_basis_steps": 2, "sparse_density": 0.2}),
    "fisher": ("fisher", {"fisher_examples": 4}),
    "bottleneck": ("fisher", {"fisher_examples": 4, "fisher_candidates": ["bottleneck"]}),
    "prefix": ("fisher", {"fisher_examples": 4, "fisher_candidates": ["prefix"]}),
    "ia3": ("full", {"peft": "ia3"}),
    "spsa": ("gradientless", SEARCH),
    "low-rank": ("gradientless", {**SEARCH, "search_direction": "lozo"}),
}

ON_FAMILIES = [
    *(("llama", name) for name in TRAINED),
    *((family, name) for family in ("opt", "t5") for name in ("lora", "sparse", "bottleneck")),
    ("opt", "prefix"),
    ("opt", "ia3"),
]


class Int8Linear(nn.Linear):
    """`y = x (s q)^T + b` with the weight in integers `q` and a scale `s` for each output."""

    def __init__(self, plain: nn.Linear):
        super().__init__(plain.in_features, plain.out_features, plain.bias is not None, device="meta")
        scale = plain.weight.detach().abs().amax(1, keepdim=True) / 127
        self.weight = nn.Parameter((plain.weight.detach() / scale).round().to(torch.int8), requires_grad=False)
        self.bias = plain.bias if plain.bias is None else nn.Parameter(plain.bias.detach(), requires_grad=False)
        self.register_buffer("scale", scale, persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.weight.to(x.dtype) * self.scale.to(x.dtype), self.bias)


def in_eight_bits(network: nn.Module) -> nn.Module:
    """`network` with `Int8Linear` layers below its head, and what transformers notes on a quantized model."""
    for name, module in list(network.named_modules()):
        if type(module) is nn.Linear and module is not network.get_output_embeddings():
            network.set_submodule(name, Int8Linear(module))
    network.is_quantized, network.hf_quantizer = True, SimpleNamespace(is_trainable=True)
    return network


def quantized_prompt_model(family: str) -> tuple[PromptForSequenceClassification, object]:
    tokenizer = subword_tokenizer(TOKENIZERS[family])
    network = in_eight_bits(decoder(family, len(tokenizer), **SIZES[family]))
    words = (["bad", "great"], ["no", "yes"])
    return PromptForSequenceClassification.from_language_model(network, tokenizer, TEMPLATE, *words), tokenizer


def trainer_on(family: str, method: str, options: dict, folder):
    model, tokenizer = quantized_prompt_model(family)
    encoder = PromptEncoder(tokenizer, TEMPLATE, 1, 48, reading=model.config.reading)
    rows = text_dataset(16).map(
        lambda batch: dict(encoder([batch["sentence"]])), batched=True, remove_columns=["sentence", "idx"]
    )
    args = METHODS[method].arguments_class()(
        str(folder), max_steps=3, use_cpu=True, report_to=[], disable_tqdm=True, save_strategy="no", **options
    )
    return METHODS[method].trainer_class()(model, args, train_dataset=rows, processing_class=tokenizer)


@pytest.mark.parametrize(("family", "name"), ON_FAMILIES)
def test_adapters_train_beside_integers_and_load(tmp_path, name, family):
    trainer = trainer_on(family, *TRAINED[name], tmp_path)
    integers = {n: p.clone() for n, p in trainer.model.named_parameters() if p.dtype == torch.int8}
    trainer.train()
    trainer.save_model()
    batch = next(iter(trainer.get_eval_dataloader(trainer.train_dataset)))
    batch.pop("labels")
    after = dict(trainer.model.named_parameters())
    kept = {n.replace(".base_layer.", "."): p for n, p in after.items() if p.dtype == torch.int8}
    assert len(kept) == len(integers) > 10
    with torch.no_grad():
        logits = trainer.model.eval()(**batch).logits
        fresh, _ = quantized_prompt_model(family)
        assert not torch.allclose(fresh(**batch).logits, logits, atol=1e-6)
        loaded = PeftModel.from_pretrained(fresh, tmp_path).eval()
        assert torch.allclose(loaded(**batch).logits, logits, atol=1e-5)
    original = {n: m.weight for n, m in quantized_prompt_model(family)[0].named_modules() if isinstance(m, Int8Linear)}
    found = {n.rpartition("masked_lm.")[1] + n.rpartition("masked_lm.")[2]: p for n, p in kept.items()}
    assert all(torch.equal(found[f"{n}.weight"], weight) for n, weight in original.items())


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("full", {}, "plain fine-tuning changes the model's weights, and they are quantized"),
        ("sparse", {"sparse_support": "dynamic"}, "sparse training with sparse_support=dynamic changes"),
        ("fisher", {"fisher_mode": "mask"}, "a mask trains entries of"),
        ("kernel", {"max_steps": -1}, "a kernel is computed in float32 or float64 from"),
        ("gradientless", {"search_target": "all"}, "which is quantized and cannot be searched"),
    ],
)
def test_a_quantized_language_model_in_a_prompt_is_quantized(tmp_path, method, options, message):
    settings = {"max_steps": 3, **options}
    if settings["max_steps"] < 0:
        settings.pop("max_steps")
    model, tokenizer = quantized_prompt_model("llama")
    args = METHODS[method].arguments_class()(str(tmp_path), use_cpu=True, report_to=[], **settings)
    with pytest.raises(InputError, match=message):
        METHODS[method].trainer_class()(model, args, train_dataset=text_dataset(4), processing_class=tokenizer)
